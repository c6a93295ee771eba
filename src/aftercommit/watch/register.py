"""Who holds which connection, since when; what to say when none is left, and when one is held too long."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from aftercommit import signals
from aftercommit.errors import PoolExhausted
from aftercommit.watch.call_sites import find_taker
from aftercommit.watch.deadlocks import (
    ExecutionContext,
    deadlocks,
    start_waiting,
    stop_waiting,
    this_context,
    waiting_among,
)
from aftercommit.watch.holders import HELD, HeldConnection, shortened
from aftercommit.watch.loops import FirstLoop, LoopQueue
from aftercommit.watch.notes import NOTES, link_notes
from aftercommit.watch.timing import Meter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine, PoolProxiedConnection

__all__ = ["AsyncWatchedPool", "Register", "WatchedPool"]

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
        self._holds: dict[Any, HeldConnection] = {}
        self._lock = threading.Lock()
        self.waiting = 0
        self.exhaustions = 0
        self.waits = Meter()

    def attach(self, engine: Engine) -> None:
        """Write down who has an engine's connections."""
        if isinstance(engine.pool, _Watched):
            engine.pool.register = self
        # Before other listeners, which may take their time, or refuse the connection.
        event.listen(engine, "checkout", self._taken, insert=True)
        event.listen(engine, "checkin", self._returned)
        event.listen(engine, "detach", self._detached)

    def holds(self) -> list[HeldConnection]:
        """Everything that is in use now, the longest held first."""
        now = list(self._holds.values())  # in one step: others come and go meanwhile
        return sorted(now, key=lambda hold: hold.since)

    def exhausted(self, pool: _Watched, seconds: float) -> PoolExhausted:
        """The error for whoever waited, and got no connection in time."""
        themselves = waiting_among(pool.contexts())
        stuck = f"\n{themselves} of the holders wait for a second connection themselves." if themselves else ""
        return PoolExhausted(
            f"All {pool.size() + max(0, pool.overflow())} connections of pool {self.pool!r} are in use (size "
            f"{pool.size()}, overflow {max(0, pool.overflow())}), and none came back within {seconds:g} s; "
            f"{self.waiting} others wait. Held by:\n"
            + self._listed(pool)
            + stuck
            + "\nEnd sessions before slow work, or give the pool more with "
            "PoolSettings(pool_size=…, max_overflow=…).",
            pool=self.pool,
            waiting_themselves=themselves,
        )

    def deadlock(self, pool: _Watched) -> PoolExhausted:
        """The error for whoever would have waited for ever."""
        contexts = set(pool.contexts())
        is_alone = contexts == {this_context()}
        who = "the work that asks for another one" if is_alone else "work that asks for a second one, this one included"
        size = f"size {pool.size()}, overflow {max(0, pool.overflow())}"
        return PoolExhausted(
            f"Deadlock in pool {self.pool!r}: every connection is held by work that is itself waiting for one. All "
            f"{pool.checkedout()} ({size}) are held by {who}: none could ever come back, so this request for one was "
            "refused at once. Held by:\n"
            + self._listed(pool)
            + "\nUse the session that is open already, end or commit it before another is opened, open the other "
            "one on another pool (db.session(pool=…)), or give the pool connections for all: concurrency x "
            "(connections that one needs - 1) + 1, with PoolSettings(max_overflow=…, concurrency=…).",
            pool=self.pool,
            waiting_themselves=len(contexts),
            is_standstill=True,
            is_alone=is_alone,
        )

    def note_dry(self, seconds: float, *, held: int, waiting: int) -> None:
        """Count a request for a connection that was refused, and report it.

        Args:
            seconds: For how long it waited.
            held: Connections that were in use.
            waiting: Others that still wait.
        """
        with self._lock:
            self.exhaustions += 1
        signals.emit(signals.PoolRanDry(pool=self.pool, seconds=seconds, held=held, waiting=waiting))

    def _listed(self, pool: _Watched) -> str:
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

    def _taken(self, _connection: object, entry: Any, pooled: PoolProxiedConnection) -> None:
        before = vars(pooled).get(NOTES)
        notes = link_notes(entry, pooled)
        if before is not None and HELD in before:
            # Told again, of a connection that another listener has refused, and that was made anew.
            notes[HELD] = before[HELD]
            return
        context = this_context()
        watch, context.taking = context.taking, None
        held: HeldConnection
        if watch is not None and watch.entry is None and watch.is_called():
            held = watch
            held.statement = held.done_since = held.took_lock = held.told_lock = None
            held.reported = held.is_begun = False
            held.context = context
        else:
            held = HeldConnection()
            line, is_session = find_taker()
            if is_session:
                held.become_own_session(line)
            else:
                # A bare connection may be handed to other work, which gives it back: it is of no context.
                held.line = line
                held.is_doubtful = is_session is None
        held.since = time.monotonic()
        # It waits no longer; and of a pool of ours it is known by that which one it is.
        held.pool = stop_waiting(context)
        held.entry = entry
        notes[HELD] = self._holds[entry] = held

    def _returned(self, _connection: object, entry: Any) -> None:
        # It is the pool's again, or its place is: it may have been detached.
        held = self._holds.pop(entry, None)
        if held is None:
            return
        held.entry = None
        if held.reported:
            seconds = time.monotonic() - held.since
            signals.emit(signals.ConnectionReturned(pool=self.pool, owner=held.holder, seconds=seconds))
        # What is left to the garbage collector comes back at any moment, in the middle of a subscriber holding a lock
        # of its own: sessions of requests and tasks are always ended.
        if held.kind in _ALWAYS_ENDED and signals.wanted(signals.ConnectionUsed):
            seconds = time.monotonic() - held.since
            signals.emit(signals.ConnectionUsed(pool=self.pool, kind=held.kind, seconds=seconds))

    def _detached(self, _connection: object, entry: Any) -> None:
        # The event comes behind the return of the place. If that has been taken again meanwhile, with a connection of
        # its own, what stands there belongs to the next.
        if entry.dbapi_connection is None:
            self._returned(None, entry)

    @contextmanager
    def one_waits(self) -> Iterator[None]:
        """Count one that waits, while it does, and measure for how long."""
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


class _Watched(QueuePool):
    """A pool that says who has its connections when it has none left."""

    register: Register | None = None

    def __init__(self, creator: Any, pool_size: int = 5, max_overflow: int = 10, **options: Any) -> None:
        super().__init__(creator, pool_size=pool_size, max_overflow=max_overflow, **options)
        self._places = pool_size + max(0, max_overflow)

    def connect(self) -> PoolProxiedConnection:
        """Give a connection, as soon as there is one.

        Raises:
            PoolExhausted: If none came back in time, or none ever could.
        """
        register = self.register
        if register is None:
            return super().connect()
        context = start_waiting(self)
        try:
            if self.checkedout() < self._places:
                return super().connect()
            if self.takers() is not None and deadlocks(context):
                error = register.deadlock(self)
                register.note_dry(0.0, held=self.checkedout(), waiting=register.waiting)
                raise error
            with register.one_waits():
                return super().connect()
        except PoolTimeoutError as exc:
            if isinstance(exc, PoolExhausted):
                # As above, or of another pool: a listener wanted a connection of its own.
                raise
            error = register.exhausted(self, self.timeout())
            register.note_dry(self.timeout(), held=self.checkedout(), waiting=register.waiting)
            raise error from exc
        finally:
            stop_waiting(context)

    def contexts(self) -> list[ExecutionContext]:
        """Where connections of this pool are held; of some that is not known."""
        register = self.register
        holds = [] if register is None else register.holds()
        # A session that was lent to another thread goes on as soon as the thread comes to it that opened it.
        return [
            held.context
            for held in holds
            if held.pool is self and held.context is not None and held.opened_by in {None, held.context.thread}
        ]

    def takers(self) -> list[ExecutionContext] | None:
        """Who has all of its connections; None while it may still have one to give."""
        contexts = self.contexts()
        return contexts if self.checkedout() >= self._places <= len(contexts) else None

    def recreate(self) -> QueuePool:
        """Make another like it, known to the same register."""
        pool = super().recreate()
        pool.register = self.register  # type: ignore[attr-defined]  # of the same class as this one
        return pool


class WatchedPool(_Watched):
    """For sessions."""

    # Where people look for the pool's own log, and switch it: not among what this library has to say.
    _sqla_logger_namespace = "sqlalchemy.pool.impl.QueuePool"


class AsyncWatchedPool(_Watched, AsyncAdaptedQueuePool):
    """For async sessions, of any number of event loops."""

    _sqla_logger_namespace = "sqlalchemy.pool.impl.AsyncAdaptedQueuePool"
    _queue_class = LoopQueue  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # by its methods

    def __init__(self, creator: Any, pool_size: int = 5, max_overflow: int = 10, **options: Any) -> None:
        super().__init__(creator, pool_size=pool_size, max_overflow=max_overflow, **options)
        self._first = FirstLoop()

    def connect(self) -> PoolProxiedConnection:
        """Give a connection, as soon as there is one.

        Raises:
            PoolExhausted: If none came back in time, or none ever could.
        """
        if self._first.is_over:
            return super().connect()
        self._first.enter()
        connected = False
        try:
            made = super().connect()
            connected = True
            return made
        finally:
            self._first.leave(connected=connected)

    def dispose(self) -> None:
        """Close what is idle: each connection in its own loop."""
        queue: Any = self._pool
        queue.give_up_strangers()
        super().dispose()
