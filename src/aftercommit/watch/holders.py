"""A connection that is in use: who has it, since when, and what it is doing.

Noted for every session and every statement there is, and hardly ever read: so what the reader can find out is not
noted, and the rest is noted with as few calls as can be.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from aftercommit.watch.call_sites import session_begins
from aftercommit.watch.deadlocks import this_context
from aftercommit.watch.notes import notes_of
from aftercommit.watch.owners import Owner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, PoolProxiedConnection
    from sqlalchemy.pool import ConnectionPoolEntry

    from aftercommit.watch.call_sites import CallSite
    from aftercommit.watch.deadlocks import ExecutionContext, Takers

__all__ = ["HELD", "HeldConnection", "at_work", "held_by", "hold_of", "note_begin", "note_lock", "shortened"]

HELD: Final = "_aftercommit_held"
"""Where it stands who holds a connection: SQLAlchemy's has it as an attribute, the pool's in its notes."""

_OPEN: Final = frozenset({2, 3})
"""Of libpq's PGTransactionStatusType: in a transaction, and in one that has failed."""
_STATEMENT: Final = 200


class HeldConnection:
    """A connection that is in use. Times are of the monotonic clock.

    It has no constructor: what it may know later stands in the class until then.

    Attributes:
        since: When it was taken.
        entry: What was taken, as the pool has it; None before, and once it is back.
        pool: Where it is from, if that is a pool of ours.
        context: Where it was taken, if it is given back there, too: not if it was taken by hand.
        opened_by: The thread that opened the session, where it is the one that ends it; None where others may.
        owner: Who has it; its text says so, with the line where that is known.
        kind: Of the owner: ``"request"``, ``"task"`` or ``"code"``.
        line: Where it was taken from the engine by hand; None where it was not.
        is_doubtful: Whether its BEGIN is to say that a session took it.
        allowed: Seconds that its owner may take, where that is known (a task's ``timeout``).
        statement: The statement that was run last.
        done_since: When that one was done; None during a statement.
        is_begun: Whether the session that takes it has begun a transaction on it.
        reported: Whether it was reported as held too long.
        took_lock: When it last took SQLite's write lock, which it may have lost since.
        told_lock: Since when it had SQLite's write lock that was reported as held too long.
        connection: SQLAlchemy's, where it is taken by hand and has run something.
    """

    since: float
    entry: ConnectionPoolEntry | None = None
    pool: Takers | None = None
    context: ExecutionContext | None = None
    opened_by: int | None = None
    owner: Any = "code that took it from the engine"
    kind: str = "code"
    line: CallSite | None = None
    is_doubtful: bool = False
    allowed: float | None = None
    statement: str | None = None
    done_since: float | None = None
    is_begun: bool = True
    reported: bool = False
    took_lock: float | None = None
    told_lock: float | None = None
    connection: ref[Connection] | None = None

    def become_own_session(self, line: CallSite | None) -> None:
        """A session of the application's own has it, made by hand on an engine of ours."""
        self.owner, self.line = Owner("a session of the application's own", line), None
        self.context = this_context()

    @property
    def holder(self) -> str:
        """Who has it, and the line that took it."""
        return str(self.owner) if self.line is None else f"{self.owner} ({self.line})"

    def idle(self, now: float) -> float | None:
        """Seconds for which its transaction has been open and nothing was done in it; None if that is not so."""
        done = self.done_since
        # Paid for by who asks: commits and rollbacks are not noted.
        return max(0.0, now - done) if done is not None and self._is_in_transaction() else None

    def locked_since(self) -> float | None:
        """When it took SQLite's write lock; None if it has not got it."""
        since = self.took_lock
        return since if since is not None and self._is_in_transaction(of_driver=True) else None

    def locked(self, now: float) -> float | None:
        """Seconds for which it has had SQLite's write lock; None if it has not."""
        since = self.locked_since()
        return None if since is None else max(0.0, now - since)

    def describe(self, now: float) -> str:
        """Say who, for how long, and what it is doing."""
        text = f"{self.holder}, for {now - self.since:.1f} s"
        if not self.is_begun:
            text += ", beginning a transaction"
        idle = self.idle(now)
        if idle is not None and idle >= 0.1:  # noqa: PLR2004  # less is the pause between two statements
            text += f", idle in its transaction for {idle:.1f} s"
        if self.statement is not None:
            text += f", {'in' if self.done_since is None else 'after'} {shortened(self.statement)!r}"
        return text

    def has_begun(self) -> bool:
        """Whether SQLAlchemy has a transaction open on it."""
        connection = None if self.connection is None else self.connection()
        return connection is not None and connection.in_transaction()

    def _is_in_transaction(self, *, of_driver: bool = False) -> bool:
        """Whether there is an open transaction; asked from any thread, at any moment.

        Args:
            of_driver: Whether it must be one that SQLite knows of, too: it begins nothing for reads.
        """
        try:
            driver: Any = self.entry.driver_connection  # type: ignore[union-attr]  # see below
            if hasattr(driver, "pgconn"):
                return driver.pgconn.transaction_status in _OPEN
            if hasattr(driver, "is_in_transaction"):
                return bool(driver.is_in_transaction())
            return bool(driver.in_transaction) or (not of_driver and self.has_begun())
        except Exception:  # noqa: BLE001  # it was closed by now, and each driver has an error of its own for that
            return False


def held_by(pooled: PoolProxiedConnection) -> HeldConnection | None:
    """What is noted of a connection, as the pool gave it out; None if it is from no pool of ours."""
    held: HeldConnection | None = notes_of(pooled).get(HELD)
    return held if held is not None and held.entry is not None else None


def hold_of(connection: Connection) -> HeldConnection | None:
    """What is noted of a connection that is in use, from now on kept on it; None if it is from no pool of ours."""
    held = held_by(connection.connection)
    if held is not None:
        connection.__dict__[HELD] = held
        held.connection = ref(connection)
    return held


def note_lock(pooled: PoolProxiedConnection) -> None:
    """Note that a connection has taken SQLite's write lock."""
    held = held_by(pooled)
    if held is not None:
        held.took_lock = time.monotonic()


def note_begin(pooled: PoolProxiedConnection) -> None:
    """Note that a transaction is begun on a connection: a session that does so, and was not known, is its holder."""
    held = held_by(pooled)
    if held is not None and held.is_doubtful:
        held.is_doubtful = False
        line = session_begins()
        if line is not None:
            held.become_own_session(line)


@contextmanager
def at_work(connection: Connection) -> Iterator[None]:
    """Note that *connection* works on the statement that it has run last: more of its rows are fetched."""
    hold: HeldConnection | None = connection.__dict__.get(HELD)
    if hold is None:
        yield
        return
    hold.done_since = None
    try:
        yield
    finally:
        hold.done_since = time.monotonic()


def shortened(statement: str) -> str:
    """A statement on one line, cut where it is long."""
    text = " ".join(statement.split())
    return text if len(text) <= _STATEMENT else text[: _STATEMENT - 1] + "…"
