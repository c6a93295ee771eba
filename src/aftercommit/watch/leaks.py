"""Sessions that are dropped without being ended: reported with their line, and their connection given back.

A leash is what there is to say of a session that is open. Its end takes it off; if the session is collected first, a
weak reference to it notices, and reports.

The connection of a ``Session`` is rolled back and given back by SQLAlchemy as it is collected. That of an
``AsyncSession`` it cannot roll back there, where nothing can be awaited: it warns, and cuts the connection off. So
its leash keeps hold of that connection, and gives it back on the event loop that it belongs to.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from aftercommit import signals
from aftercommit.watch.holders import KEPT, OF_SESSION, Hold, hold_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection, PoolProxiedConnection

    from aftercommit.watch.owners import Owner

__all__ = ["Leash", "put_on_leash"]

# Whatever is still open when the process ends goes with it, and is no news then.
_open: Final[dict[Leash, _Tether]] = {}
atexit.register(_open.clear)


class Leash(Hold):
    """What there is to say of a session that is open, and of the connection that it has.

    Attributes:
        opened: When it was opened, by the monotonic clock.
        from_pool: Where its connections come from.
        held: The connections of an async session. Of the driver's side: SQLAlchemy's refers, by what waits for its
            commit, to the session.
    """

    owner: Owner
    opened: float
    from_pool: str
    held: list[tuple[PoolProxiedConnection, ref[Connection]]]
    _loop: asyncio.AbstractEventLoop | None = None

    def begun(self, connection: Connection) -> None:
        """The session has begun a transaction on *connection*."""
        if self.entry is not None and not self.is_begun:
            self.is_begun = True
            connection.__dict__[KEPT] = self
        else:
            # Its second: one transaction on two engines. Or one that the pool could not tell to be a session's.
            hold = hold_of(connection)
            if hold is not None and not isinstance(hold, Leash):
                hold.owner, hold.kind, hold.line, hold.allowed = self.owner, self.kind, None, self.allowed
        if connection.dialect.is_async:
            self._loop = asyncio.get_running_loop()
            self.held.append((connection.connection, ref(connection)))

    def has_begun(self) -> bool:
        """Whether SQLAlchemy has a transaction open on the connection: there is none of a session's without one."""
        return self.is_begun

    def take_off(self) -> None:
        """The session has ended."""
        _open.pop(self, None)

    def give_back(self) -> None:
        """Give back what a dropped session held, rolled back."""
        # Somebody may still have the connection itself: then it is his, and not ours to roll back.
        held = [mine for mine, theirs in self.held if theirs() is None and mine.dbapi_connection is not None]
        self.held.clear()
        if not held or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_start, held)
        except RuntimeError:
            # The loop has closed, and with it nobody can speak to the server on this connection any more.
            _cut_off(held)


def put_on_leash(session: Session, owner: Owner, pool: str) -> Leash:
    """Have *session* reported if it is dropped before ``take_off`` is called.

    Args:
        session: A new one.
        owner: Who has it.
        pool: Where its connections come from.
    """
    leash = Leash()
    leash.owner = owner
    leash.kind = owner.kind
    leash.allowed = owner.allowed
    if owner.kind == "code":
        leash.opened_by = threading.get_ident()
    leash.opened = time.monotonic()
    leash.from_pool = pool
    leash.held = []
    session.info[OF_SESSION] = leash
    _open[leash] = tether = _Tether(session, _dropped)
    tether.leash = leash
    return leash


class _Tether(ref[Session]):
    """Notices that a session is dropped; one that is taken off before notices nothing."""

    __slots__ = ("leash",)

    leash: Leash


def _dropped(tether: _Tether) -> None:
    # Called by whatever set the garbage collector off: in any thread, between any two lines.
    leash = tether.leash
    if _open.pop(leash, None) is None:
        return
    leash.give_back()
    signals.emit(
        signals.SessionLeaked(
            pool=leash.from_pool,
            owner=leash.owner.name,
            line=None if leash.owner.line is None else str(leash.owner.line),
            seconds=time.monotonic() - leash.opened,
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
        with suppress(Exception):
            connection.invalidate()
