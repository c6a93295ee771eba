"""Who holds which connection, since when; what to say when none is left, and when one is held too long."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.util.queue import Empty

from aftercommit import signals
from aftercommit.errors import PoolExhausted
from aftercommit.pools.lines import opening_line
from aftercommit.pools.standstill import Flow, stop_waiting, this_flow, wait_for, waiting_among
from aftercommit.pools.steps import steps_of
from aftercommit.pools.timing import Meter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine, PoolProxiedConnection
    from sqlalchemy.engine.interfaces import DBAPIConnection

    from aftercommit.pools.lines import Line

__all__ = [
    "AsyncExplainingPool",
    "ExplainingPool",
    "Hold",
    "Register",
    "hold_of",
    "name_holder",
    "note_lock",
    "shortened",
]

_HOLD: Final = "aftercommit.hold"
_ALWAYS_ENDED: Final = frozenset({"request", "task"})
_KEPT: Final = "_aftercommit_hold"
_OPEN: Final = frozenset({2, 3})
"""Of libpq's PGTransactionStatusType: in a transaction, and in one that has failed."""
_SHOWN: Final = 10
_STATEMENT: Final = 200

LOCK_SECONDS: Final = 1.0
"""For which SQLite's one write lock may be held before that is reported."""


class Hold:
    """A connection that is in use. Times are of the monotonic clock.

    One is made whenever a connection is taken, so what it may know later stands in the class until then.

    Attributes:
        since: When it was taken.
        owner: Who has it; its text says so, with the line where that is known.
        line: Where it was taken from the engine by hand; None where it was not.
        allowed: Seconds that its owner may take, where that is known (a task's ``timeout``).
        statement: The statement that was run last.
        done_since: When that one was done; None during a statement.
        locked_since: When it last took SQLite's write lock.
        reported: Whether it was reported as held too long.
        is_returned: Whether the connection went back to its pool.
    """

    owner: object = "code that took it from the engine"
    allowed: float | None = None
    statement: str | None = None
    done_since: float | None = None
    locked_since: float | None = None
    reported: bool = False
    is_returned: bool = False

    def __init__(self, since: float, line: Line | None, driver: Any) -> None:
        self.since = since
        self.line = line
        self._driver = driver

    @property
    def holder(self) -> str:
        """Who has it, and the line that took it."""
        return str(self.owner) if self.line is None else f"{self.owner} ({self.line})"

    def idle(self, now: float) -> float | None:
        """Seconds for which its transaction has been open and nothing was done in it; None if that is not so."""
        done = self.done_since
        # Only whoever asks pays for it: commits and rollbacks are not noted. In SQLite a read begins nothing, but
        # SQLAlchemy's transaction is open by then, and holds the connection.
        is_open = is_in_transaction(self._driver, unknown=self.locked_since is None)
        return max(0.0, now - done) if done is not None and is_open else None

    def locked(self, now: float) -> float | None:
        """Seconds for which it has had SQLite's write lock; None if it has not."""
        since = self.locked_since
        return max(0.0, now - since) if since is not None and is_in_transaction(self._driver) else None

    def describe(self, now: float) -> str:
        """Say who, for how long, and what it is doing."""
        text = f"{self.holder}, for {now - self.since:.1f} s"
        idle = self.idle(now)
        if idle is not None and idle >= 0.1:  # noqa: PLR2004  # less is the pause between two statements
            text += f", idle in its transaction for {idle:.1f} s"
        if self.statement is not None:
            text += f", {'in' if self.done_since is None else 'after'} {shortened(self.statement)!r}"
        return text


class Register:
    """The holders of one pool's connections, in both flavours.

    Args:
        pool: Its name.
        warn_after: Seconds for which a connection may be held before that is reported.
    """

    def __init__(self, pool: str, warn_after: float) -> None:
        self.pool = pool
        self._warn_after = warn_after
        self._holds: dict[Any, Hold] = {}
        self._lock = threading.Lock()
        self.waiting = 0
        self.exhaustions = 0
        self.waits = Meter()

    def attach(self, engine: Engine) -> None:
        """Write down what an engine's connections do."""
        event.listen(engine, "checkout", partial(self._taken, engine))
        event.listen(engine, "checkin", self._returned)
        event.listen(engine, "detach", self._detached)
        steps = steps_of(engine)
        steps.before_statement.append(_begin_statement)
        steps.after_statement.append(_end_statement)
        if isinstance(engine.pool, (ExplainingPool, AsyncExplainingPool)):
            engine.pool.register = self

    def holds(self) -> list[Hold]:
        """Everything that is in use now, the longest held first."""
        now = list(self._holds.values())  # in one step: others come and go meanwhile
        return sorted(now, key=lambda hold: hold.since)

    def exhausted(self, pool: _Explaining, seconds: float) -> PoolExhausted:
        """The error of somebody who waited in vain."""
        themselves = waiting_among(pool.flows())
        stuck = f"\n{themselves} of the holders wait for a second connection themselves." if themselves else ""
        return PoolExhausted(
            f"All {pool.size() + max(0, pool.overflow())} connections of pool {self.pool!r} are in use (size "
            f"{pool.size()}, overflow {max(0, pool.overflow())}), and none came back within {seconds:g} s; "
            f"{self.waiting} waiting. Held by:\n"
            + self._listed()
            + stuck
            + "\nEnd sessions before slow work, or give the pool more with "
            "PoolSettings(pool_size=…, max_overflow=…).",
            pool=self.pool,
            waiting_themselves=themselves,
        )

    def standstill(self, pool: _Explaining) -> PoolExhausted:
        """The error of somebody who would have waited for ever."""
        flows = set(pool.flows())
        alone = flows == {this_flow()}
        who = "this very piece of work" if alone else "work that waits for another connection itself, this one included"
        size = f"size {pool.size()}, overflow {max(0, pool.overflow())}"
        return PoolExhausted(
            f"Pool {self.pool!r} has no connection left, and to wait for one would be in vain: all {len(pool.flows())} "
            f"({size}) are held by {who}. Refused at once, so that what is held comes back. Held by:\n"
            + self._listed()
            + "\nUse the session that is open already, end or commit it before another is opened, open the other "
            "one on another pool (db.session(pool=…)), or give the pool connections for all: concurrency x "
            "(connections that one needs - 1) + 1, with PoolSettings(max_overflow=…, concurrency=…).",
            pool=self.pool,
            waiting_themselves=len(flows),
            is_standstill=True,
            is_alone=alone,
        )

    def note_dry(self, seconds: float, *, waiting: int) -> None:
        """Count somebody who got no connection, and tell of him.

        Args:
            seconds: For how long he waited.
            waiting: Others that still wait.
        """
        with self._lock:
            self.exhaustions += 1
        held = len(self._holds)
        signals.emit(signals.PoolRanDry(pool=self.pool, seconds=seconds, held=held, waiting=waiting))

    def _listed(self) -> str:
        now = time.monotonic()
        holds = self.holds()
        listed = [f"  {hold.describe(now)}" for hold in holds[:_SHOWN]]
        if len(holds) > _SHOWN:
            listed.append(f"  and {len(holds) - _SHOWN} more")
        return "\n".join(listed)

    def report_late(self) -> None:
        """Report, once each, the connections that are held for too long."""
        now = time.monotonic()
        for hold in self.holds():
            limit = hold.allowed if hold.allowed is not None else self._warn_after
            locked = (hold.locked(now) or 0.0) > LOCK_SECONDS
            if hold.reported or (now - hold.since <= limit and not locked):
                continue
            hold.reported = True
            signals.emit(
                signals.ConnectionHeld(
                    pool=self.pool, owner=hold.holder, seconds=now - hold.since, idle=hold.idle(now), locked=locked,
                    statement=None if hold.statement is None else shortened(hold.statement),
                )
            )  # fmt: skip

    def _taken(self, engine: Engine, connection: DBAPIConnection, record: Any, _proxy: Any) -> None:
        hold = Hold(time.monotonic(), opening_line(), connection)
        if hold.line is not None and isinstance(engine.pool, _Explaining):
            engine.pool.forget_taker(record)
        record.record_info[_HOLD] = hold
        self._holds[record] = hold

    def _returned(self, _connection: DBAPIConnection | None, record: Any) -> None:
        record.record_info.pop(_HOLD, None)
        hold = self._holds.pop(record, None)
        if hold is None:
            return
        hold.is_returned = True
        if hold.reported:
            seconds = time.monotonic() - hold.since
            signals.emit(signals.ConnectionReturned(pool=self.pool, owner=hold.holder, seconds=seconds))
        if signals.wanted(signals.ConnectionUsed):
            # What is left to the garbage collector comes back at any moment, in the middle of a subscriber holding a
            # lock of its own: sessions of requests and tasks are always ended.
            kind = getattr(hold.owner, "kind", None)
            if kind in _ALWAYS_ENDED:
                seconds = time.monotonic() - hold.since
                signals.emit(signals.ConnectionUsed(pool=self.pool, kind=kind, seconds=seconds))

    def _detached(self, _connection: DBAPIConnection, record: Any) -> None:
        # Whoever has it keeps it, but it is the pool's no longer. If the place has been taken again meanwhile, with a
        # connection of its own, what stands there is somebody else's.
        if record.dbapi_connection is None:
            record.record_info.pop(_HOLD, None)
            self._holds.pop(record, None)

    @contextmanager
    def someone_waits(self) -> Iterator[None]:
        """Count somebody who waits, while he does, and measure for how long."""
        since = time.monotonic()
        with self._lock:
            self.waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self.waiting -= 1
            seconds = time.monotonic() - since
            self.waits.add(seconds)
            if signals.wanted(signals.ConnectionAwaited):
                signals.emit(signals.ConnectionAwaited(pool=self.pool, seconds=seconds))


class _Explaining(QueuePool):
    """A pool that says who has its connections when it has none left."""

    register: Register | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Noted before a connection is given out, and forgotten before it can be given to the next: whoever is here
        # has one, though not everybody who has one is here.
        self._takers: dict[Any, Flow] = {}

    def flows(self) -> list[Flow]:
        """Who has connections of this pool."""
        return list(self._takers.values())  # in one step: others come and go meanwhile

    def takers(self) -> list[Flow] | None:
        """Who has all of its connections; None while it may still have one to give."""
        flows = self.flows()
        return flows if len(flows) >= self.size() + max(0, self._max_overflow) else None

    def forget_taker(self, record: Any) -> None:
        """Nobody knows who has it: a bare connection may be handed to whoever works on it and gives it back."""
        self._takers.pop(record, None)

    def recreate(self) -> QueuePool:
        """Make another like it, known to the same register."""
        pool = super().recreate()
        pool.register = self.register  # type: ignore[attr-defined]  # of the same class as this one
        return pool

    def _do_get(self) -> Any:
        try:
            # There nearly always is one, and who does not wait need not be looked for among those who do.
            record = self._pool.get(block=False)
        except Empty:
            return self._wait()
        self._takers[record] = this_flow()
        return record

    def _wait(self) -> Any:
        register = self.register
        flow = wait_for(self)
        if flow is None:
            assert register is not None  # noqa: S101  # given before the pool can be empty
            standstill = register.standstill(self)
            register.note_dry(0.0, waiting=register.waiting)
            raise standstill
        try:
            if register is None or self.checkedout() < self.size() + max(0, self._max_overflow):
                record = self._get(register)
            else:
                with register.someone_waits():
                    record = self._get(register)
            self._takers[record] = flow
        finally:
            stop_waiting(flow)
        return record

    def _do_return_conn(self, record: Any) -> None:
        self._takers.pop(record, None)
        super()._do_return_conn(record)

    def _get(self, register: Register | None) -> Any:
        try:
            return super()._do_get()
        except PoolTimeoutError as exc:
            if register is None:
                raise
            error = register.exhausted(self, self.timeout())
            register.note_dry(self.timeout(), waiting=max(0, register.waiting - 1))
            raise error from exc


class ExplainingPool(_Explaining):
    """For sessions."""


class AsyncExplainingPool(_Explaining, AsyncAdaptedQueuePool):
    """For async sessions."""


def hold_of(connection: Connection) -> Hold | None:
    """What is known of a connection that is in use; None if it is not one of ours, or lost."""
    # Asked for around each statement, and five properties away from the connection: kept on it.
    hold: Hold | None = getattr(connection, _KEPT, None)
    if hold is not None and not hold.is_returned:
        return hold
    if connection.closed or connection.invalidated:
        return None
    hold = _hold_on(connection.connection)
    setattr(connection, _KEPT, hold)
    return hold


def note_lock(pooled: PoolProxiedConnection) -> None:
    """Note that a connection has taken SQLite's write lock."""
    hold = _hold_on(pooled)
    if hold is not None:
        hold.locked_since = time.monotonic()


def is_in_transaction(pooled: Any, *, unknown: bool = False) -> bool:
    """Whether a pooled connection's driver knows of an open transaction; asked from any thread, at any moment.

    Args:
        pooled: The connection as a pool has it.
        unknown: What to say where SQLite knows of none.
    """
    driver = getattr(pooled, "driver_connection", pooled)
    try:
        if hasattr(driver, "pgconn"):
            return driver.pgconn.transaction_status in _OPEN
        if hasattr(driver, "is_in_transaction"):
            return bool(driver.is_in_transaction())
        return bool(driver.in_transaction) or unknown
    except Exception:  # noqa: BLE001  # it was closed by now, and each driver has an error of its own for that
        return False


def name_holder(connection: Connection, owner: object, allowed: float | None) -> None:
    """Say who has a connection.

    Args:
        connection: Any; those of other people's engines are let alone.
        owner: Whoever has it; the text of this is shown.
        allowed: Seconds that he may take, or None for what the pool allows.
    """
    hold = hold_of(connection)
    if hold is not None:
        hold.owner = owner
        hold.line = None
        hold.allowed = allowed


def _begin_statement(connection: Connection, statement: str) -> None:
    # As hold_of() does it, without a call for each statement there is.
    hold: Hold | None = vars(connection).get(_KEPT)
    if hold is None or hold.is_returned:
        hold = hold_of(connection)
        if hold is None:
            return
    hold.statement = statement
    hold.done_since = None


def _end_statement(connection: Connection) -> None:
    hold: Hold | None = vars(connection).get(_KEPT)
    if hold is not None:
        hold.done_since = time.monotonic()


def _hold_on(pooled: PoolProxiedConnection) -> Hold | None:
    facts = pooled.record_info
    return None if facts is None else facts.get(_HOLD)


def shortened(statement: str) -> str:
    """A statement on one line, cut where it is long."""
    text = " ".join(statement.split())
    return text if len(text) <= _STATEMENT else text[: _STATEMENT - 1] + "…"
