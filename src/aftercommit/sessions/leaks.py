"""Sessions that are dropped without being ended: reported with their line, and their connection given back.

A leash is a weak reference to the session, with what there is to say of it. The session's end takes it off; if the
session is collected first, it is called, and reports.

The connection of a ``Session`` is rolled back and given back by SQLAlchemy as it is collected. That of an
``AsyncSession`` it cannot roll back there, where nothing can be awaited: it warns, and cuts the connection off. So
its leash keeps hold of that connection, and gives it back on the event loop that it belongs to.
"""

from __future__ import annotations

import asyncio
import atexit
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from aftercommit import signals
from aftercommit.pools.holds import KEPT, Hold
from aftercommit.pools.register import register_of
from aftercommit.pools.standstill import this_flow

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection, PoolProxiedConnection

    from aftercommit.pools.register import Register
    from aftercommit.sessions.owner import Owner

__all__ = ["Leash", "leash_of", "put_on_leash"]

_LEASH: Final = "aftercommit.leash"
_ALWAYS_ENDED: Final = frozenset({"request", "task"})


class Leash(ref[Session], Hold):
    """What there is to say of a session that is open, and of the connection that it has while it is in a transaction.

    Attributes:
        opened: When it was opened, by the monotonic clock.
        register: Of the pool that its connections come from.
        held: The connections of an async session. Of the driver's side: SQLAlchemy's refers, by what waits for its
            commit, to the session.
    """

    owner: Owner
    opened: float
    register: Register
    held: list[tuple[PoolProxiedConnection, ref[Connection]]]
    _loop: asyncio.AbstractEventLoop | None = None
    _connection: ref[Connection] | None = None

    @property
    def is_in_use(self) -> bool:
        """Whether there is a connection, and it is its pool's: not lost, and not detached."""
        source = self.source
        return source is not None and not source.is_detached

    def take(self, connection: Connection) -> None:
        """The session has begun a transaction on *connection*."""
        pooled, weakly = connection.connection, ref(connection)
        if connection.dialect.is_async:
            self._loop = asyncio.get_running_loop()
            self.held.append((pooled, weakly))
        if self.source is not None:
            # One transaction on two databases, or on two engines.
            other = register_of(connection)
            if other is not None:
                other.taken_by(connection, self.owner)
            return
        self.since = time.monotonic()
        self.statement = self.done_since = None
        self.reported = False
        self.flow = this_flow()
        self.pool = connection.engine.pool
        self._connection = weakly
        vars(connection)[KEPT] = self
        self.source = pooled

    def let_go(self) -> None:
        """The transaction is over, and its connections are back."""
        if self.source is None:
            return
        self.source = None
        if self._loop is not None:
            self.held.clear()
        if self.reported:
            self.register.tell_of_return(self)
        # What is left to the garbage collector comes back at any moment, in the middle of a subscriber holding a lock
        # of its own: sessions of requests and tasks are always ended.
        if self.owner.kind in _ALWAYS_ENDED and signals.wanted(signals.ConnectionUsed):
            seconds = time.monotonic() - self.since
            signals.emit(signals.ConnectionUsed(pool=self.register.pool, kind=self.owner.kind, seconds=seconds))

    def take_off(self) -> None:
        """The session has ended."""
        self.register.sessions.pop(id(self), None)

    def give_back(self) -> None:
        """Give back what a dropped session held, rolled back."""
        connection = None if self.source is None or self._connection is None else self._connection()
        if connection is not None and not (connection.closed or connection.invalidated):
            # Somebody still has the connection itself: then it is his, and not ours to roll back.
            self.register.taken_by(connection, self.owner, after=self)
            self.reported = False
        held = [mine for mine, theirs in self.held if theirs() is None and mine.dbapi_connection is not None]
        self.held.clear()
        if held and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(_start, held, self)
            except RuntimeError:
                # The loop has closed, and with it nobody can speak to the server on this connection any more.
                _cut_off(held)
        elif self.reported:
            self.register.tell_of_return(self)


def put_on_leash(session: Session, owner: Owner, register: Register) -> Leash:
    """Have *session* reported if it is dropped before ``take_off`` is called.

    Args:
        session: A new one.
        owner: Who has it.
        register: Of the pool that its connections come from.
    """
    leash = Leash(session, _dropped)
    leash.owner = owner
    leash.allowed = owner.allowed
    leash.opened = time.monotonic()
    leash.register = register
    leash.held = []
    session.info[_LEASH] = leash
    register.sessions[id(leash)] = leash
    return leash


def leash_of(session: Session) -> Leash | None:
    """The leash of a session of ours."""
    return session.info.get(_LEASH)


_is_ending = False


@atexit.register
def _end() -> None:
    # Whatever is still open when the process ends goes with it, and is no news then.
    global _is_ending  # noqa: PLW0603  # there is one process, and it ends once
    _is_ending = True


def _dropped(leash: Leash) -> None:
    # Called by whatever set the garbage collector off: in any thread, between any two lines.
    if leash.register.sessions.pop(id(leash), None) is None or _is_ending:
        return
    leash.give_back()
    signals.emit(
        signals.SessionLeaked(
            pool=leash.register.pool,
            owner=leash.owner.name,
            line=None if leash.owner.line is None else str(leash.owner.line),
            seconds=time.monotonic() - leash.opened,
        )
    )


_returning: Final[set[asyncio.Task[None]]] = set()


def _start(held: list[PoolProxiedConnection], leash: Leash) -> None:
    task = asyncio.get_running_loop().create_task(_give_back(held, leash))
    _returning.add(task)
    task.add_done_callback(_returning.discard)


async def _give_back(held: list[PoolProxiedConnection], leash: Leash) -> None:
    for connection in held:
        # The pool rolls back what comes back to it; what cannot be rolled back, it drops, and says so itself.
        with suppress(Exception):
            await greenlet_spawn(connection.close)
    if leash.reported:
        leash.register.tell_of_return(leash)


def _cut_off(held: Iterable[Any]) -> None:
    for connection in held:
        with suppress(Exception):
            # SQLAlchemy cannot close psycopg's without a loop; libpq can.
            connection.driver_connection.pgconn.finish()
        with suppress(Exception):
            connection.invalidate()
