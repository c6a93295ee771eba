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

from sqlalchemy import Connection
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from aftercommit import signals

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from sqlalchemy import PoolProxiedConnection

    from aftercommit.sessions.owner import Owner

__all__ = ["Leash", "leash_of", "put_on_leash"]

_LEASH: Final = "aftercommit.leash"

# Whatever is still open when the process ends goes with it, and is no news then.
_leashes: Final[dict[int, Leash]] = {}
atexit.register(_leashes.clear)


class Leash(ref[Session]):
    """What there is to say of a session that is open.

    Attributes:
        owner: Who has it.
        pool: Where its connections come from.
        since: When it was opened, by the monotonic clock.
    """

    __slots__ = ("_held", "_loop", "owner", "pool", "since")

    owner: Owner
    pool: str
    since: float
    _held: list[tuple[PoolProxiedConnection, ref[Connection]]]
    _loop: asyncio.AbstractEventLoop | None

    def __new__(cls, session: Session, _owner: Owner, _pool: str) -> Self:
        """Refer to *session*."""
        return super().__new__(cls, session, _dropped)

    def __init__(self, session: Session, owner: Owner, pool: str) -> None:
        super().__init__(session, _dropped)  # type: ignore[call-arg]  # typeshed knows only __new__
        self.owner = owner
        self.pool = pool
        self.since = time.monotonic()
        self._held = []
        self._loop = None

    def hold(self, connection: Connection) -> None:
        """Keep hold of an async connection on which the session has begun.

        Of the driver's side of it: SQLAlchemy's refers, by what waits for its commit, to the session.
        """
        self._loop = asyncio.get_running_loop()
        self._held.append((connection.connection, ref(connection)))

    def let_go(self) -> None:
        """The transaction is over, and its connections are back."""
        self._held.clear()

    def take_off(self) -> None:
        """The session has ended."""
        _leashes.pop(id(self), None)

    def give_back(self) -> None:
        """Give back what a dropped session held, rolled back."""
        # Somebody may still have the connection itself: then it is his, and not ours to roll back.
        held = [mine for mine, theirs in self._held if theirs() is None and mine.dbapi_connection is not None]
        self._held.clear()
        if not held or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_start, held)
        except RuntimeError:
            # The loop has closed, and with it nobody can speak to the server on this connection any more.
            _cut_off(held)


def put_on_leash(session: Session, owner: Owner, pool: str) -> Leash:
    """Have *session* reported if it is dropped before ``take_off`` is called."""
    leash = Leash(session, owner, pool)
    session.info[_LEASH] = leash
    _leashes[id(leash)] = leash
    return leash


def leash_of(session: Session) -> Leash | None:
    """The leash of a session of ours."""
    return session.info.get(_LEASH)


def _dropped(leash: Leash) -> None:
    # Called by whatever set the garbage collector off: in any thread, between any two lines.
    if _leashes.pop(id(leash), None) is None:
        return
    leash.give_back()
    signals.emit(
        signals.SessionLeaked(
            pool=leash.pool,
            owner=leash.owner.name,
            line=None if leash.owner.line is None else str(leash.owner.line),
            seconds=time.monotonic() - leash.since,
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
