"""The life of one session: opened for an owner, committed or rolled back, and ended for good.

Two shells, sync and async, in the same order. Whoever opens a scope decides when it commits; the end always comes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import commits
from aftercommit.sessions.ended import end_for_good
from aftercommit.watch.leaks import watch_session
from aftercommit.watch.sharing import Guard, guard_session

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from aftercommit.watch.owners import Owner

__all__ = ["AsyncScope", "Scope", "shielded"]

T = TypeVar("T")


class Scope:
    """A session for ``with``: commit on success, roll back on error, end in any case.

    Args:
        make: Makes the session; nothing is connected before it is used.
        owner: Who has it.
        pool: Where its connections come from.
        keeps_rows: Whether rows that were only read may be read after the end.
    """

    __slots__ = ("_guard", "_keeps_rows", "_watch", "owner", "session")

    def __init__(self, make: Callable[[], Session], owner: Owner, *, pool: str, keeps_rows: bool = False) -> None:
        self.owner = owner
        self.session = make()
        self._watch = watch_session(self.session, owner, pool)
        self._guard = guard_session(self.session, owner, commits.listen)
        self._keeps_rows = keeps_rows

    def __enter__(self) -> Session:
        """The session."""
        return self.session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        """Commit or roll back, then end."""
        try:
            if error is None:
                self.commit()
        finally:
            self.end()

    def commit(self) -> None:
        """Commit what there is; without a transaction there is nothing to do."""
        if self.session.in_transaction():
            if self._keeps_rows:
                _keep_rows(self.session, self._guard)
            self.session.commit()

    def end(self) -> None:
        """Give the connection back, rolling back what was not committed, and refuse every further use.

        A call of somebody else's that is under way is waited for: it must not have its connection taken away.
        """
        is_first = self._guard.take()
        try:
            if self.session.in_transaction():
                _roll_back(self.session)
        finally:
            try:
                self.session.close()
            finally:
                end_for_good(self.session, self.owner)
                self._watch.close()
                if is_first:
                    self._guard.leave()


class AsyncScope:
    """A session for ``async with``: commit on success, roll back on error or cancellation, end in any case.

    Args:
        make: Makes the session; nothing is connected before it is used.
        owner: Who has it.
        pool: Where its connections come from.
        keeps_rows: Whether rows that were only read may be read after the end.
    """

    __slots__ = ("_guard", "_keeps_rows", "_watch", "owner", "session")

    def __init__(self, make: Callable[[], AsyncSession], owner: Owner, *, pool: str, keeps_rows: bool = False) -> None:
        self.owner = owner
        self.session = make()
        self._watch = watch_session(self.session.sync_session, owner, pool)
        self._guard = guard_session(self.session, owner, commits.listen)
        self._keeps_rows = keeps_rows

    async def __aenter__(self) -> AsyncSession:
        """The session."""
        return self.session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        """Commit or roll back, then end; neither a cancellation nor a second one can stop that half-way."""
        await shielded(self._finish(commit=error is None))

    async def commit(self) -> None:
        """Commit what there is; without a transaction there is nothing to do.

        Shielded: both drivers would tell the server to cancel, and nobody could say what became of the commit.
        """
        if self.session.in_transaction():
            await shielded(self.session.commit())

    async def end(self) -> None:
        """Give the connection back, rolling back what was not committed, and refuse every further use.

        A call of somebody else's that is under way is waited for: it must not have its connection taken away.
        """
        await shielded(self._finish(commit=False))

    def end_within(self, session: Session) -> bool:
        """The same as ``end`` for a session that has just committed, by a function that ``run_sync`` runs.

        Each ``run_sync`` costs a greenlet, and each shield an asyncio task: whoever runs in both already needs no more
        of them.

        Args:
            session: The plain session, as ``run_sync`` gives it.

        Returns:
            Whether it has ended. A class with a ``close`` of its own has not: that one is to be awaited.
        """
        if type(self.session).close is not AsyncSession.close or "close" in vars(self.session):
            return False
        try:
            session.close()
        finally:
            end_for_good(self.session, self.owner)
            self._watch.close()
        return True

    async def _finish(self, *, commit: bool) -> None:
        session = self.session
        is_first = False
        try:
            if commit and session.in_transaction():
                if self._keeps_rows:
                    await session.run_sync(_keep_rows, self._guard)
                await session.commit()
        finally:
            try:
                is_first = await self._guard.async_take()
                # A session that failed to commit is still in its transaction; the close below rolls it back,
                # but only the rollback tells that its tasks are gone on purpose.
                if session.in_transaction():
                    await session.run_sync(_roll_back)
            finally:
                try:
                    await session.close()
                finally:
                    end_for_good(session, self.owner)
                    self._watch.close()
                    if is_first:
                        self._guard.leave()


def _keep_rows(session: Session, guard: Guard) -> None:
    """Let what was read stay readable after the last commit, if nothing was written.

    Expiring says that the database may know better after a commit. Where nothing was written, it cannot.
    """
    if not guard.may_have_written:
        # The commit would do so next; what it finds to write is known only then.
        session.flush()
    if not guard.may_have_written:
        session.expire_on_commit = False


def _roll_back(session: Session) -> None:
    """Roll back; a connection that is already lost has done so itself."""
    try:
        session.rollback()
    except SQLAlchemyError:
        # Closing it, which follows, drops the connection; the error that brought us here is the one to tell.
        session.invalidate()


async def shielded(work: Coroutine[Any, Any, T]) -> T:
    """Await *work* to its end, however often the caller is cancelled meanwhile; then let the cancellation through."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as exc:
            if task.cancelled():
                raise
            cancelled = exc
        except BaseException:  # noqa: BLE001  # it is the task's own, and is raised below
            break
    if cancelled is not None:
        if not task.cancelled() and task.exception() is not None:
            raise cancelled from task.exception()
        raise cancelled
    return task.result()
