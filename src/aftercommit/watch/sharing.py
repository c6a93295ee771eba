"""One session, one user at a time: whoever comes while another's call is under way is refused, every time.

A session has one connection and one transaction. SQLAlchemy notices two users only while the session fetches its
first connection; after that their statements interleave without a word. So a session of ours has a guard, and its
class is one whose methods take the guard for as long as they last.

An ``AsyncSession`` does all its work through the ``Session`` behind it, in greenlets of whoever awaits it. So the
guard is on that one, for both flavours. What differs is who is asked for: a thread, or an asyncio task.

Taking turns is fine: nobody is remembered between two calls.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from contextlib import nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from sqlalchemy import event
from sqlalchemy.engine import ChunkedIteratorResult, CursorResult
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from aftercommit.errors import SessionShared
from aftercommit.watch import leaks
from aftercommit.watch.call_sites import CallSite, is_machinery, is_users, line_at, user_line
from aftercommit.watch.deadlocks import this_context
from aftercommit.watch.holders import at_work
from aftercommit.watch.owners import Owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    Listen = Callable[[Session | type[Session]], None]

__all__ = ["Guard", "guard_session"]

T = TypeVar("T")

_GUARD: Final = "_aftercommit_guard"

_METHODS: Final = (
    # What talks to the database. `execute`, `scalar`, `scalars`, queries and lazy loads meet in `_execute_internal`,
    # also where a subclass (SQLModel's `exec`) calls them on `super()`.
    *("_execute_internal", "flush", "get", "get_one", "refresh", "merge", "connection"),
    *("begin", "commit", "rollback", "prepare", "close", "reset", "invalidate"),
    *("bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"),
    # What changes the session in memory: in the middle of somebody else's flush it would be lost, or half written.
    *("add", "add_all", "delete", "expunge", "expunge_all", "expire", "expire_all"),
)
# What may write without a flush.
_PAST_FLUSH: Final = frozenset({"connection", "bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"})
_FETCHES: Final = frozenset({"fetchone", "fetchmany", "fetchall"})
_TRANSACTION_METHODS: Final = ("commit", "rollback", "prepare", "close")


class Guard:
    """Knows who is using a session at this moment.

    Args:
        owner: Who has the session.
        is_async: Whether it is the one behind an ``AsyncSession``.

    Attributes:
        may_have_written: Whether anything but a SELECT went through the session.
    """

    __slots__ = ("_is_async", "_lock", "_operation", "_owner", "_user", "_waiting", "_whoever", "may_have_written")

    def __init__(self, owner: Owner, *, is_async: bool) -> None:
        self._owner = owner
        self._is_async = is_async
        self._lock = threading.Lock()
        # Written by whoever has the lock. Read without it: it equals oneself only if one has written it.
        self._user: Any = None
        self._operation = ""
        self._waiting: list[Callable[[], None]] = []
        self._whoever: Callable[[], Any] = _this_task if is_async else threading.get_ident
        self.may_have_written = False

    def enter(self, operation: str) -> bool:
        """Take the session for one call; False if the caller is inside another of its own calls.

        Raises:
            SessionShared: If somebody else's call is under way.
        """
        me = self._whoever()
        if self._user == me:
            return False
        if not self._lock.acquire(blocking=False):
            self._refuse(operation)
        self._user = me
        self._operation = operation
        return True

    @property
    def is_entered(self) -> bool:
        """Whether a call is under way."""
        return self._user is not None

    def leave(self) -> None:
        """The call is over."""
        self._user = None
        self._lock.release()
        if self._waiting:
            self._wake()

    def take(self) -> bool:
        """Take the session for its end: waits for a call that is under way. False as for ``enter``."""
        me = self._whoever()
        if self._user == me:
            return False
        self._lock.acquire()
        self._user = me
        self._operation = "end"
        return True

    async def async_take(self) -> bool:
        """Take the session for its end: waits for a call that is under way. False as for ``enter``."""
        me = self._whoever()
        if self._user == me:
            return False
        loop = asyncio.get_running_loop()
        while not self._lock.acquire(blocking=False):
            freed = asyncio.Event()

            def wake(freed: asyncio.Event = freed) -> None:
                loop.call_soon_threadsafe(freed.set)

            self._waiting.append(wake)
            # Once more: it may have been freed before it could see that somebody waits.
            if self._lock.acquire(blocking=False):
                break
            await freed.wait()
        self._user = me
        self._operation = "end"
        return True

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()

    def _refuse(self, operation: str) -> NoReturn:
        first, doing = self._user, self._operation
        kind, how, part = (
            ("AsyncSession", "async with db.async_session() as session:", "coroutine")
            if self._is_async
            else ("Session", "with db.session() as session:", "thread")
        )
        line = _line_of(first)
        where = "" if line is None else f", at {line}"
        raise SessionShared(
            f"{operation}() on a session that is in use at this moment: it belongs to {self._owner}, and "
            f"{_name(first)} is in its {doing}(){where}. A session has one connection and one transaction: the "
            "statements of two users would mix, and one would commit half of the other's work. Nothing was done here, "
            "and the other goes on. One after the other is fine; for work side by side give each "
            f"{part} a session of its own, `{how}` inside it, and ids for what they share; or hand over tasks, which "
            f"have one each (session: {kind}).",
            owner=str(self._owner),
            operation=operation,
            doing=doing,
            line=None if line is None else str(line),
        )


def guard_session(session: Session | AsyncSession, owner: Owner, listen: Listen | None = None) -> Guard:
    """Give a new session its guard: from now on a second user of it is refused.

    Args:
        session: A new one.
        owner: Who has it.
        listen: Adds whatever else listens to sessions of ours: to their class, as that is made, or to one that has
            listeners of its own already.
    """
    if isinstance(session, AsyncSession):
        sync = session.sync_session
        guard = Guard(owner, is_async=True)
        vars(session)[_GUARD] = guard
        kind: Any = type(session)
        session.__class__ = _guarded_async(kind)
    else:
        sync = session
        guard = Guard(owner, is_async=False)
    vars(sync)[_GUARD] = guard
    watch = leaks.watch_of(sync)
    if watch is not None:
        watch.guard = guard
    has_listeners = "dispatch" in vars(sync)
    sync_kind: Any = type(sync)
    sync.__class__ = _guarded(sync_kind, listen)
    if has_listeners:
        # Its own constructor has asked for events, and from then on a session hears those of the class it had then.
        _listen(sync, listen)
    return guard


def _listen(target: Session | type[Session], others: Listen | None) -> None:
    event.listen(target, "after_flush", _after_flush)
    leaks.listen(target)
    if others is not None:
        others(target)


def _after_flush(session: Session, _context: object) -> None:
    guard: Guard = vars(session)[_GUARD]
    guard.may_have_written = True


# --- the classes ------------------------------------------------------------------------------------------------


@cache
def _guarded(kind: type[Session], listen: Listen | None) -> type[Session]:
    methods = {name: _method(kind, name) for name in _METHODS if hasattr(kind, name)}
    # `with session.begin():` ends the transaction past the session, and so may whoever asks for it.
    given = ("begin", "get_transaction", "get_nested_transaction")
    giving = {name: _giving(methods.get(name) or getattr(kind, name)) for name in given}
    made = _subclass(kind, {**methods, **giving, "_execute_internal": _execute(kind), "get_bind": _get_bind(kind)})
    _listen(made, listen)
    return made


def _get_bind(kind: type[Session]) -> Callable[..., Any]:
    def get_bind(self: Any, *args: Any, **kwargs: Any) -> Any:
        bind = kind.get_bind(self, *args, **kwargs)
        watch = leaks.watch_of(self)
        if watch is not None and watch.entry is None and self.__dict__[_GUARD].is_entered:
            # The session is about to take a connection: its pool will want to know whose it is.
            this_context().taking = watch
        return bind

    return get_bind


@cache
def _guarded_async(kind: type[AsyncSession]) -> type[AsyncSession]:
    async def run_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            guard: Guard = vars(self)[_GUARD]
        except KeyError:
            guard = _adopt(self)
        is_first = guard.enter("run_sync")
        try:
            return await kind.run_sync(self, *args, **kwargs)
        finally:
            if is_first:
                guard.leave()

    return _subclass(kind, {"run_sync": run_sync})


_transactions: Final[set[type]] = set()


@cache
def _guarded_transaction(kind: type[SessionTransaction]) -> type[SessionTransaction]:
    def method(name: str) -> Callable[..., Any]:
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                guard: Guard = vars(self.session)[_GUARD]
            except KeyError:
                guard = _adopt(self.session)
            is_first = guard.enter(name)
            try:
                return getattr(kind, name)(self, *args, **kwargs)
            finally:
                if is_first:
                    guard.leave()

        return guarded

    made = _subclass(kind, {name: method(name) for name in _TRANSACTION_METHODS})
    _transactions.add(made)
    return made


def _adopt(session: Any) -> Guard:
    """Guard a session that somebody made of the class of one of ours: ``type(session)(bind=…)``."""
    owner = Owner("a session made of the class of another", user_line())
    guard: Guard = vars(session).setdefault(_GUARD, Guard(owner, is_async=False))
    return guard


def _subclass(kind: type[T], methods: dict[str, Any]) -> type[T]:
    # One base and no slots: the class of an object can only be changed for one of the same layout. It keeps its name,
    # because users read it in their logs.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    metaclass: Any = type(kind)
    made: type[T] = metaclass(kind.__name__, (kind,), {**methods, **names, "__slots__": ()})
    return made


def _method(kind: type[Session], name: str) -> Callable[..., Any]:
    may_write = name in _PAST_FLUSH

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            guard: Guard = self.__dict__[_GUARD]
        except KeyError:
            guard = _adopt(self)
        is_first = guard.enter(name)
        try:
            if may_write:
                guard.may_have_written = True
            # Looked up at each call, for those who replace a method of their class in a test.
            return getattr(kind, name)(self, *args, **kwargs)
        finally:
            if is_first:
                guard.leave()

    return guarded


def _execute(kind: type[Any]) -> Callable[..., Any]:
    def guarded(self: Any, statement: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            guard: Guard = self.__dict__[_GUARD]
        except KeyError:
            guard = _adopt(self)
        is_first = guard.enter("execute")
        try:
            if not getattr(statement, "is_select", False):
                guard.may_have_written = True
            result = kind._execute_internal(self, statement, *args, **kwargs)  # noqa: SLF001  # see _METHODS
        finally:
            if is_first:
                guard.leave()
        if isinstance(result, ChunkedIteratorResult):
            _guard_rows(result, guard)
        elif isinstance(result, CursorResult) and isinstance(result.cursor_strategy, BufferedRowCursorFetchStrategy):
            streaming: Any = _Streaming(result.cursor_strategy, guard)
            result.cursor_strategy = streaming
        return result

    return guarded


def _guard_rows(result: ChunkedIteratorResult[Any], guard: Guard) -> None:
    """Guard what comes after ``execute`` has returned: rows are fetched, and made instances of, as they are asked for.

    A result that is streamed is guarded for each of its pages, not in between: there its reader may use the session.
    """
    chunks = result.chunks
    is_streamed = result._yield_per is not None  # noqa: SLF001  # see below
    connection = getattr(result.raw, "connection", None) if is_streamed else None

    def guarded(size: int | None) -> Iterator[Any]:
        pages = iter(chunks(size))
        while True:
            is_first = guard.enter("fetch")
            try:
                # Only what is streamed is still to come: the server works on it.
                with nullcontext() if connection is None else at_work(connection):
                    page = next(pages, None)
            finally:
                if is_first:
                    guard.leave()
            if page is None:
                return
            yield page

    result.chunks = guarded
    # As its constructor and `yield_per` made it, which nobody has begun to read.
    result.iterator = itertools.chain.from_iterable(guarded(result._yield_per))  # noqa: SLF001


class _Streaming:
    """How the rows of no class are fetched that are streamed: guarded, as those of instances are, for each fetch."""

    def __init__(self, strategy: BufferedRowCursorFetchStrategy, guard: Guard) -> None:
        self._strategy = strategy
        self._guard = guard

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._strategy, name)
        return partial(self._fetch, found) if name in _FETCHES else found

    def _fetch(self, fetch: Callable[..., Any], result: CursorResult[Any], *args: Any, **kwargs: Any) -> Any:
        is_first = self._guard.enter("fetch")
        try:
            with at_work(result.connection):
                return fetch(result, *args, **kwargs)
        finally:
            if is_first:
                self._guard.leave()


def _giving(give: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        transaction = give(self, *args, **kwargs)
        kind: Any = type(transaction)
        if transaction is not None and kind not in _transactions:
            transaction.__class__ = _guarded_transaction(kind)
        return transaction

    return guarded


# --- who --------------------------------------------------------------------------------------------------------


def _this_task() -> Any:
    try:
        return asyncio.current_task() or threading.get_ident()
    except RuntimeError:
        # No loop runs in this thread: `session.add` needs none.
        return threading.get_ident()


def _name(user: Any) -> str:
    if isinstance(user, asyncio.Task):
        return f"asyncio task {user.get_name()!r}"
    return next((f"thread {each.name!r}" for each in threading.enumerate() if each.ident == user), "another thread")


def _line_of(user: Any) -> CallSite | None:
    """The line from which somebody uses the session, looked for only now that it is asked for."""
    frames = _awaited(user) if isinstance(user, asyncio.Task) else _stack(sys._current_frames().get(user))  # noqa: SLF001
    is_inside = True
    for frame in frames:
        # Innermost are the driver's, which we cannot know, or those of a listener; then SQLAlchemy's and ours.
        is_inside = is_inside and not is_machinery(frame.f_code.co_filename)
        if not is_inside and is_users(frame.f_code.co_filename):
            return line_at(frame)
    return None


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _awaited(task: asyncio.Task[Any]) -> list[FrameType]:
    """The frames of a suspended task, innermost first."""
    frames: list[FrameType] = []
    step: Any = task.get_coro()
    while step is not None:
        frame = getattr(step, "cr_frame", None) or getattr(step, "ag_frame", None) or getattr(step, "gi_frame", None)
        if frame is not None:
            frames.insert(0, frame)
        step = getattr(step, "cr_await", None) or getattr(step, "ag_await", None) or getattr(step, "gi_yieldfrom", None)
    return frames
