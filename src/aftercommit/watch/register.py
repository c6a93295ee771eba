"""Who holds which connection, since when; what to say when none is left, and when one is held too long."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.util.queue import Empty, Full

from aftercommit import signals
from aftercommit.errors import PoolExhausted
from aftercommit.watch.call_sites import session_taking, user_line
from aftercommit.watch.deadlocks import Flow, stop_waiting, this_flow, wait_for, waiting_among
from aftercommit.watch.holders import HOLD, OF_SESSION, Hold, note_statements, shortened
from aftercommit.watch.timing import Meter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine, Pool

__all__ = ["AsyncExplainingPool", "ExplainingPool", "Register"]

_ALWAYS_ENDED: Final = frozenset({"request", "task"})
_SHOWN: Final = 10

LOCK_SECONDS: Final = 1.0
"""For which SQLite's one write lock may be held before that is reported."""


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
        if isinstance(engine.pool, _Explaining):
            engine.pool.register = self
        else:
            event.listen(engine, "checkout", lambda _connection, entry, _proxy: self.taken(entry))
            event.listen(engine, "checkin", lambda _connection, entry: self.returned(entry))
            event.listen(engine, "detach", self._detached)
        note_statements(engine)

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
            + self._listed(pool)
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
            + self._listed(pool)
            + "\nUse the session that is open already, end or commit it before another is opened, open the other "
            "one on another pool (db.session(pool=…)), or give the pool connections for all: concurrency x "
            "(connections that one needs - 1) + 1, with PoolSettings(max_overflow=…, concurrency=…).",
            pool=self.pool,
            waiting_themselves=len(flows),
            is_standstill=True,
            is_alone=alone,
        )

    def note_dry(self, seconds: float, *, held: int, waiting: int) -> None:
        """Count somebody who got no connection, and tell of him.

        Args:
            seconds: For how long he waited.
            held: Connections that were in use.
            waiting: Others that still wait.
        """
        with self._lock:
            self.exhaustions += 1
        signals.emit(signals.PoolRanDry(pool=self.pool, seconds=seconds, held=held, waiting=waiting))

    def _listed(self, pool: _Explaining) -> str:
        now = time.monotonic()
        holds = [hold for hold in self.holds() if hold.pool is pool]  # not those of the other flavour
        listed = [f"  {hold.describe(now)}" for hold in holds[:_SHOWN]]
        if len(holds) > _SHOWN:
            listed.append(f"  and {len(holds) - _SHOWN} more")
        unmade = pool.checkedout() - len(holds)
        if unmade > 0:
            listed.append(f"  {unmade} being connected")
        return "\n".join(listed)

    def report_late(self) -> None:
        """Report, once each, the connections and the locks that are held for too long."""
        now = time.monotonic()
        for hold in self.holds():
            limit = hold.allowed if hold.allowed is not None else self._warn_after
            lock = hold.locked_since()
            locked = lock is not None and now - lock > LOCK_SECONDS
            if (hold.reported or now - hold.since <= limit) and (not locked or hold.told_lock == lock):
                continue
            hold.reported = True
            if locked:
                hold.told_lock = lock
            signals.emit(
                signals.ConnectionHeld(
                    pool=self.pool, owner=hold.holder, seconds=now - hold.since, idle=hold.idle(now), locked=locked,
                    statement=None if hold.statement is None else shortened(hold.statement),
                )
            )  # fmt: skip

    def taken(self, entry: Any, pool: Pool | None = None) -> None:
        """Note that a connection is in use.

        Args:
            entry: What the pool gives out.
            pool: The pool, if it is one of ours.
        """
        session = session_taking()
        own: Hold | None = None if session is None else session.info.get(OF_SESSION)
        if own is not None and (own.entry is None or own.entry is entry):
            hold = own
            hold.statement = hold.done_since = hold.took_lock = hold.told_lock = None
            hold.reported = hold.is_begun = False
        else:
            hold = Hold()
            if own is None:
                hold.line = user_line()
            else:
                # The second of a session that works on two engines.
                hold.owner, hold.kind, hold.allowed, hold.opened_by = own.owner, own.kind, own.allowed, own.opened_by
        # A bare connection may be handed to whoever works on it and gives it back: nobody knows in which flow.
        hold.flow = None if session is None else this_flow()
        hold.since = time.monotonic()
        hold.pool = pool
        hold.entry = entry
        entry.record_info[HOLD] = hold
        self._holds[entry] = hold

    def returned(self, entry: Any) -> None:
        """Note that a connection is its pool's again, or that its place is: it may have been detached."""
        hold = self._holds.pop(entry, None)
        if hold is None:
            return
        hold.entry = None
        if hold.reported:
            seconds = time.monotonic() - hold.since
            signals.emit(signals.ConnectionReturned(pool=self.pool, owner=hold.holder, seconds=seconds))
        # What is left to the garbage collector comes back at any moment, in the middle of a subscriber holding a lock
        # of its own: sessions of requests and tasks are always ended.
        if hold.kind in _ALWAYS_ENDED and signals.wanted(signals.ConnectionUsed):
            seconds = time.monotonic() - hold.since
            signals.emit(signals.ConnectionUsed(pool=self.pool, kind=hold.kind, seconds=seconds))

    def _detached(self, _connection: object, entry: Any) -> None:
        # The event comes behind the return of the place. If that has been taken again meanwhile, with a connection of
        # its own, what stands there is somebody else's.
        if entry.dbapi_connection is None:
            self.returned(entry)

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

    def flows(self) -> list[Flow]:
        """Who has connections of this pool; not everybody who has one is known."""
        register = self.register
        holds = [] if register is None else register.holds()
        # A session that was handed to another thread for a while goes on as soon as the one comes to it that opened it.
        return [
            hold.flow
            for hold in holds
            if hold.pool is self and hold.flow is not None and hold.opened_by in {None, hold.flow.thread}
        ]

    def takers(self) -> list[Flow] | None:
        """Who has all of its connections; None while it may still have one to give."""
        places = self.size() + max(0, self._max_overflow)
        flows = self.flows()
        return flows if self.checkedout() >= places <= len(flows) else None

    def recreate(self) -> QueuePool:
        """Make another like it, known to the same register."""
        pool = super().recreate()
        pool.register = self.register  # type: ignore[attr-defined]  # of the same class as this one
        return pool

    def _do_get(self) -> Any:
        try:
            # There nearly always is one, and who does not wait need not be looked for among those who do.
            entry = self._pool.get(block=False)
        except Empty:
            entry = self._wait()
        if self.register is not None:
            self.register.taken(entry, self)
        return entry

    def _do_return_conn(self, record: Any) -> None:
        if self.register is not None:
            # Forgotten before it can be given to the next.
            self.register.returned(record)
        try:
            self._pool.put(record, block=False)
        except Full:
            super()._do_return_conn(record)

    def _wait(self) -> Any:
        register = self.register
        flow = wait_for(self)
        if flow is None:
            assert register is not None  # noqa: S101  # given before the pool can be empty
            standstill = register.standstill(self)
            register.note_dry(0.0, held=self.checkedout(), waiting=register.waiting)
            raise standstill
        try:
            if register is None or self.checkedout() < self.size() + max(0, self._max_overflow):
                return self._get(register)
            with register.someone_waits():
                return self._get(register)
        finally:
            stop_waiting(flow)

    def _get(self, register: Register | None) -> Any:
        try:
            return super()._do_get()
        except PoolTimeoutError as exc:
            if register is None:
                raise
            error = register.exhausted(self, self.timeout())
            register.note_dry(self.timeout(), held=self.checkedout(), waiting=max(0, register.waiting - 1))
            raise error from exc


class ExplainingPool(_Explaining):
    """For sessions."""


class AsyncExplainingPool(_Explaining, AsyncAdaptedQueuePool):
    """For async sessions."""
