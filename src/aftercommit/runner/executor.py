"""The few things that differ between the end of a ``def`` run and that of an ``async def`` run.

The end of a run is written once, as plain functions (``recording``). That of an async run is executed in a greenlet,
as SQLAlchemy executes its own: what awaits is awaited from there, and a cancellation comes in as an exception.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy.util import await_only

from aftercommit.sessions import AsyncOpened, SyncOpened, to_the_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from aftercommit.runner.outcome import RunContext
    from aftercommit.runner.run import Run
    from aftercommit.sessions import Opened

__all__ = ["AsyncExecutor", "Executor", "SyncExecutor"]


class Executor(Protocol):
    """How the end of a run waits, writes, and opens the session of ``on_failure``."""

    def call_books(self, work: Callable[[Connection], Any]) -> Any:
        """Run ``work(connection)`` in a short transaction of the library's own."""
        ...

    def open_session(self, run: Run) -> Opened:
        """Open a session like the run's own: its pool, its isolation."""
        ...

    def wait(self, seconds: float) -> None:
        """Let time pass; less of it when the worker stops."""

    def is_cancelled(self, run: Run, error: BaseException) -> bool:
        """Whether *error* says that the asyncio task was cancelled from outside, and so is not the code's own doing."""
        ...


class SyncExecutor:
    """Threads and plain sessions."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def call_books(self, work: Callable[[Connection], Any]) -> Any:
        """Write, and wait for it."""
        return self._context.books.call(work)

    def open_session(self, run: Run) -> Opened:
        """Open a ``Session``."""
        level = run.task.settings.isolation_level
        return SyncOpened(self._context.sessions.task_scope(run.pool, run.owner, level))

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self._context.stopping.wait(seconds)

    def is_cancelled(self, run: Run, error: BaseException) -> bool:  # noqa: ARG002  # a thread cannot be cancelled
        """Never."""
        return False


class AsyncExecutor:
    """The event loop and async sessions, from inside a greenlet."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def call_books(self, work: Callable[[Connection], Any]) -> Any:
        """Write, and await it."""
        return await_only(self._context.books.async_call(work))

    def open_session(self, run: Run) -> Opened:
        """Open an ``AsyncSession``."""
        level = run.task.settings.isolation_level
        return _Opened(self._context.sessions.async_task_scope(run.pool, run.owner, level))

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        await_only(asyncio.sleep(seconds))

    def is_cancelled(self, run: Run, error: BaseException) -> bool:
        """Whether somebody else cancelled it: a loop that closes cancels this asyncio task and the run's own."""
        mine = asyncio.current_task()
        if mine is None or not isinstance(error, asyncio.CancelledError):
            return False
        return mine.cancelling() > 0 and (run.job is None or run.job.cancelling() > 0)


class _Opened(AsyncOpened):
    """One whose commit and end keep a cancellation to themselves: what was committed has been committed."""

    __slots__ = ()

    def commit(self) -> None:
        await_only(to_the_end(self.scope.commit()))

    def end(self) -> None:
        await_only(to_the_end(self.scope.end()))
