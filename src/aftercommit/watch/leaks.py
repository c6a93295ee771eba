"""Sessions that are dropped without being ended: reported with their line, and their connection given back.

A watch is what there is to say of a session that is open. Its end closes it; if the session is collected first, a weak
reference to it notices, and reports.

The connection of a ``Session`` is rolled back and given back by SQLAlchemy as it is collected. That of an
``AsyncSession`` it cannot roll back there, where nothing can be awaited: it warns, and cuts the connection off. So
its watch keeps hold of that connection, and gives it back on the event loop that it belongs to.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from aftercommit import signals
from aftercommit.watch.deadlocks import this_context
from aftercommit.watch.holders import HELD, HeldConnection, held_by, hold_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sqlalchemy import PoolProxiedConnection
    from sqlalchemy.orm import SessionTransaction

    from aftercommit.watch.owners import Owner
    from aftercommit.watch.sharing import Guard

__all__ = ["SessionWatch", "listen", "watch_of", "watch_session"]

_WATCH: Final = "_aftercommit_watch"
"""The attribute of a session; its `info` is the application's."""

# Whatever is still open when the process ends goes with it, and is no news then.
_open: Final[dict[SessionWatch, _Tether]] = {}
atexit.register(_open.clear)


class SessionWatch(HeldConnection):
    """What there is to say of a session that is open, and of the connection that it has.

    Attributes:
        opened: When it was opened, by the monotonic clock.
        from_pool: Where its connections come from.
        guard: Knows whether it is being used.
        held: The connections of an async session. Of the driver's side: SQLAlchemy's refers, by what waits for its
            commit, to the session.
    """

    owner: Owner
    opened: float
    from_pool: str
    guard: Guard | None = None
    held: list[tuple[PoolProxiedConnection, ref[Connection]]]
    _loop: asyncio.AbstractEventLoop | None = None

    def is_called(self) -> bool:
        """Whether a call of the session's is under way."""
        guard = self.guard
        return guard is not None and guard.is_entered

    def begun(self, connection: Connection) -> None:
        """The session has begun a transaction on *connection*."""
        pooled = connection.connection
        held = held_by(pooled)
        if held is self:
            self.is_begun = True
            connection.__dict__[HELD] = self
        elif held is not None and not isinstance(held, SessionWatch):
            # Its second, of one transaction on two engines; or one that the pool could not tell to be a session's.
            hold_of(connection)
            held.owner, held.kind, held.line, held.allowed = self.owner, self.kind, None, self.allowed
            held.opened_by, held.context = self.opened_by, this_context()
        if connection.dialect.is_async:
            self._loop = asyncio.get_running_loop()
            # Without those of transactions that have ended.
            self.held = [each for each in self.held if each[0].dbapi_connection is not None]
            self.held.append((pooled, ref(connection)))

    def has_begun(self) -> bool:
        """Whether SQLAlchemy has a transaction open on the connection: there is none of a session's without one."""
        return self.is_begun

    def close(self) -> None:
        """The session has ended."""
        _open.pop(self, None)

    def give_back(self) -> None:
        """Give back what a dropped session held, rolled back."""
        # Code that took the connection itself may still have it: then it is not ours to roll back.
        held = [mine for mine, theirs in self.held if theirs() is None and mine.dbapi_connection is not None]
        self.held.clear()
        if not held or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_start, held)
        except RuntimeError:
            # The loop has closed, and with it the way to speak to the server on this connection.
            _cut_off(held)


def watch_session(session: Session, owner: Owner, pool: str) -> SessionWatch:
    """Have *session* reported if it is dropped before the watch is closed.

    Args:
        session: A new one.
        owner: Who has it.
        pool: Where its connections come from.
    """
    watch = SessionWatch()
    watch.owner = owner
    watch.kind = owner.kind
    watch.allowed = owner.allowed
    if owner.kind == "code":
        watch.opened_by = threading.get_ident()
    watch.opened = time.monotonic()
    watch.from_pool = pool
    watch.held = []
    vars(session)[_WATCH] = watch
    _open[watch] = tether = _Tether(session, _dropped)
    tether.watch = watch
    return watch


def watch_of(session: Session) -> SessionWatch | None:
    """The watch of *session*; None if it is not one of ours."""
    return vars(session).get(_WATCH)


def listen(target: Session | type[Session]) -> None:
    """Have the watches of sessions hear of their transactions: of a class of sessions of ours, or of one session."""
    # Before listeners of the application's, which may take connections of their own.
    event.listen(target, "after_begin", _after_begin, insert=True)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    # A connection that the session was given stays whose it was.
    if transaction.parent is None and not isinstance(session.bind, Connection):
        watch = watch_of(session)
        if watch is not None:
            watch.begun(connection)


class _Tether(ref[Session]):
    """Notices that a session is dropped; one whose watch was closed before notices nothing."""

    __slots__ = ("watch",)

    watch: SessionWatch


def _dropped(tether: _Tether) -> None:
    # Called by whatever set the garbage collector off: in any thread, between any two lines.
    watch = tether.watch
    if _open.pop(watch, None) is None:
        return
    watch.give_back()
    signals.emit(
        signals.SessionLeaked(
            pool=watch.from_pool,
            owner=watch.owner.name,
            line=None if watch.owner.line is None else str(watch.owner.line),
            seconds=time.monotonic() - watch.opened,
        )
    )


_returning: Final[set[asyncio.Task[None]]] = set()


def _start(held: list[PoolProxiedConnection]) -> None:
    task = asyncio.get_running_loop().create_task(_give_back(held))
    _returning.add(task)
    task.add_done_callback(_returning.discard)


async def _give_back(held: list[PoolProxiedConnection]) -> None:
    for connection in held:
        # The pool rolls back what comes back to it; what cannot be rolled back, it drops, and says so itself.
        with suppress(Exception):
            await greenlet_spawn(connection.close)


def _cut_off(held: Iterable[Any]) -> None:
    for connection in held:
        with suppress(Exception):
            # SQLAlchemy cannot close psycopg's without a loop; libpq can.
            connection.driver_connection.pgconn.finish()
        with suppress(Exception), _quiet(connection):
            connection.invalidate()


@contextmanager
def _quiet(connection: Any) -> Iterator[None]:
    """Keep the pool from logging, in this thread, that it cannot close what cannot be closed without its loop."""
    this = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != this

    # The pool is not to be had publicly; were it renamed, the pool's lines would be seen, and a test would say so.
    logger: Any = getattr(connection, "_pool").logger  # noqa: B009  # as said
    logger = getattr(logger, "logger", logger)
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
