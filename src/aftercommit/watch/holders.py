"""A connection that is in use: who has it, since when, and what it is doing.

Noted for every session and every statement there is, and looked at by nearly nobody: so what whoever asks can find out
himself is not noted, and the rest is noted with as few calls as can be.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine, Pool, PoolProxiedConnection
    from sqlalchemy.pool import ConnectionPoolEntry

    from aftercommit.watch.call_sites import Line
    from aftercommit.watch.deadlocks import Flow

__all__ = [
    "HOLD",
    "KEPT",
    "OF_SESSION",
    "Hold",
    "at_work",
    "hold_of",
    "note_lock",
    "note_statements",
    "shortened",
]

HOLD: Final = "aftercommit.hold"
"""Where a connection has its hold: the key in the ``record_info`` of what is pooled."""

OF_SESSION: Final = "aftercommit.leash"
"""Where a session of ours has its own: the key in its ``info``."""

KEPT: Final = "_aftercommit_hold"
"""The attribute by which a connection knows its hold, in which is noted what is run on it."""

_OPEN: Final = frozenset({2, 3})
"""Of libpq's PGTransactionStatusType: in a transaction, and in one that has failed."""
_EXECUTE: Final = ("do_execute", "do_executemany", "do_execute_no_params")
_STATEMENT: Final = 200


class Hold:
    """A connection that is in use. Times are of the monotonic clock.

    It has no constructor: what it may know later stands in the class until then.

    Attributes:
        since: When it was taken.
        entry: What was taken, as the pool has it; None before, and once it is back.
        pool: Where it is from, if that is a pool of ours.
        flow: Who took it, if whoever takes it there gives it back there: not if it was taken by hand.
        opened_by: The thread that opened the session, where it is the one that ends it; None where others may.
        owner: Who has it; its text says so, with the line where that is known.
        kind: Of the owner: ``"request"``, ``"task"`` or ``"code"``.
        line: Where it was taken from the engine by hand; None where it was not.
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
    pool: Pool | None = None
    flow: Flow | None = None
    opened_by: int | None = None
    owner: Any = "code that took it from the engine"
    kind: str = "code"
    line: Line | None = None
    allowed: float | None = None
    statement: str | None = None
    done_since: float | None = None
    is_begun: bool = True
    reported: bool = False
    took_lock: float | None = None
    told_lock: float | None = None
    connection: ref[Connection] | None = None

    @property
    def holder(self) -> str:
        """Who has it, and the line that took it."""
        return str(self.owner) if self.line is None else f"{self.owner} ({self.line})"

    def idle(self, now: float) -> float | None:
        """Seconds for which its transaction has been open and nothing was done in it; None if that is not so."""
        done = self.done_since
        # Only whoever asks pays for it: commits and rollbacks are not noted.
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


def hold_of(connection: Connection) -> Hold | None:
    """The hold of a connection that is in use, from now on kept on it; None if it is from no pool of ours."""
    facts = connection.connection.record_info
    hold: Hold | None = None if facts is None else facts.get(HOLD)
    if hold is None or hold.entry is None:
        return None
    connection.__dict__[KEPT] = hold
    hold.connection = ref(connection)
    return hold


def note_lock(pooled: PoolProxiedConnection) -> None:
    """Note that a connection has taken SQLite's write lock."""
    facts = pooled.record_info
    hold: Hold | None = None if facts is None else facts.get(HOLD)
    if hold is not None:
        hold.took_lock = time.monotonic()


@contextmanager
def at_work(connection: Connection) -> Iterator[None]:
    """Note that *connection* works on the statement that it has run last: more of its rows are fetched."""
    hold: Hold | None = connection.__dict__.get(KEPT)
    if hold is None:
        yield
        return
    hold.done_since = None
    try:
        yield
    finally:
        hold.done_since = time.monotonic()


def note_statements(engine: Engine) -> None:
    """Have each connection of *engine*, and of its views, know which statement it has run last, and when."""
    # In the dialect's methods, which every statement passes through: see `steps` for why not by the engine's events.
    # Its own events come before them, and may wait for SQLite's lock: what waits there is not running yet.
    dialect: Any = engine.dialect
    for name in _EXECUTE:
        vars(dialect)[name] = _noted(getattr(dialect, name))


def _noted(execute: Callable[..., None]) -> Callable[..., None]:
    # A statement comes with its cursor, its parameters where it has any, and last its context.
    def run(cursor: Any, statement: str, *rest: Any) -> None:
        connection: Connection = rest[-1].root_connection
        hold: Hold | None = connection.__dict__.get(KEPT)
        if hold is None or hold.entry is None:
            hold = hold_of(connection)
            if hold is None:
                # Detached from its pool, it is nobody's business any more.
                execute(cursor, statement, *rest)
                return
        hold.statement = statement
        hold.done_since = None
        try:
            execute(cursor, statement, *rest)
        finally:
            hold.done_since = time.monotonic()

    return run


def shortened(statement: str) -> str:
    """A statement on one line, cut where it is long."""
    text = " ".join(statement.split())
    return text if len(text) <= _STATEMENT else text[: _STATEMENT - 1] + "…"
