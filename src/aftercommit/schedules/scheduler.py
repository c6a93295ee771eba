"""Fires what is due: a duty of every process that runs tasks, on its housekeeping thread. There is no leader.

The row decides. Two processes that find the same schedule due swap the same row; the second finds it changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from aftercommit import signals
from aftercommit.errors import ConfigurationError, ScheduleError
from aftercommit.records.writing import NewTask
from aftercommit.schedules.plan import Firing, plan
from aftercommit.schedules.registry import when_of
from aftercommit.schedules.ticks import first_tick, next_tick
from aftercommit.wording import told

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from uuid import UUID

    from sqlalchemy import Connection, Row

    from aftercommit.records.schedules import NewTick
    from aftercommit.schedules.registry import Declared, Registry
    from aftercommit.schedules.when import When
    from aftercommit.tasks import Task

__all__ = ["Scheduler", "tick_context", "write_declared"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CORRECTED_EVERY: Final = 3600.0
_WAITS: Final = 1.0
"""Seconds until a schedule that waits for its last record is looked at again."""
_IN_A_ROW: Final = 3
_JUMP: Final = timedelta(days=1)
"""A tick that fired later than this from now was fired by a clock that has been put right since."""


class Executor(Protocol):
    """Short transactions of the library's own."""

    def execute(self, work: Callable[[Connection], T]) -> T:
        """Run ``work(connection)`` in a transaction, on the housekeeping thread."""
        ...


@dataclass(frozen=True, slots=True)
class _Fired:
    """What one transaction did."""

    row: Row[Any]
    ticks: tuple[NewTick, ...]
    tasks: tuple[NewTask, ...]
    written: frozenset[Any]
    skipped: int


class Scheduler:
    """Fires the schedules that one process may fire.

    Args:
        executor: Where it writes.
        registry: What the code declares.
        tasks: All that this process knows, by name and alias.
        expect: Called with a pool when something of it was queued.
        max_bytes: How large arguments may be.
        keep: Seconds for which the row of a schedule is kept that no code declares any more; None for ever.
        worker: This process among the workers.
    """

    def __init__(
        self,
        executor: Executor,
        registry: Registry,
        tasks: Mapping[str, Task[Any, Any]],
        *,
        expect: Callable[[str], None],
        max_bytes: int,
        keep: float | None,
        worker: UUID,
    ) -> None:
        self._worker = worker
        self._executor = executor
        self._registry = registry
        self._tasks = tasks
        self._expect = expect
        self._max_bytes = max_bytes
        self._keep = keep
        self._next_look = 0.0
        self._next_correction = 0.0
        self._in_a_row: dict[str, int] = {}
        self._unreadable: dict[str, int] = {}

    # --- when ---------------------------------------------------------------------------------------------------

    @property
    def due(self) -> float:
        """When it wants to be called, by the monotonic clock; infinity where nothing is to come."""
        return self._next_look

    def look(self) -> None:
        """Have it look soon: a schedule was made, changed or resumed somewhere."""
        self._next_look = 0.0

    def expect_in(self, seconds: float) -> None:
        """Have it look by then: somebody else's may be due earlier than what it knows of."""
        self._next_look = min(self._next_look, time.monotonic() + max(0.0, seconds))

    def make(self) -> None:
        """Fire what is due, and find out when something is again."""
        if time.monotonic() >= self._next_correction:
            self._next_correction = time.monotonic() + _CORRECTED_EVERY
            self._correct()
        moment, rows, following = self._executor.execute(self._find)
        waiting = [row for row in rows if not self._fire(row, moment)]
        seen = {(row.name, row.next_at) for row in rows}
        if rows:
            # A hundred at a time, and what was fired may be due again.
            moment, rows, following = self._executor.execute(self._find)
        if any((row.name, row.next_at) not in seen for row in rows):
            self._next_look = time.monotonic()
        elif waiting or rows:
            self._next_look = time.monotonic() + _WAITS
        elif following is None:
            self._next_look = math.inf
        else:
            self._next_look = time.monotonic() + max(0.0, (following - moment).total_seconds())

    def _find(self, connection: Connection) -> tuple[datetime, list[Row[Any]], datetime | None]:
        from aftercommit.records import schedules  # mapping the tables takes time that an import must not

        moment = schedules.now(connection)
        declared, tasks = self._registry.declared.keys(), self._tasks.keys()
        found = schedules.due(connection, declared=declared, tasks=tasks, moment=moment)
        rows = [row for row in found if self._unreadable.get(row.name) != row.version]
        following = None
        if not rows:
            following = connection.execute(schedules.next_due(declared, tasks, after=moment)).scalar()
        return moment, rows, following

    # --- what the code declares ---------------------------------------------------------------------------------

    def start(self, connection: Connection) -> None:
        """Write what the code declares, at the start of a process.

        Raises:
            ScheduleError: If a schedule that was made as data has the name of one in the code.
        """
        from aftercommit.records import schedules

        hashes = write_declared(connection, self._registry.declared, max_bytes=self._max_bytes)
        schedules.publish(connection, self._worker, hashes)

    def _correct(self) -> None:
        """Put right what the zones' rules, or a clock, have changed; forget what nobody declares any more."""
        from aftercommit.records import schedules

        declared, keep = self._registry.declared.keys(), self._keep

        def work(connection: Connection) -> list[str]:
            moment = schedules.now(connection)
            schedules.declare(connection, declared, moment=moment)
            if keep is None:
                return []
            return schedules.forget(connection, declared=declared, before=moment - timedelta(seconds=keep))

        for name in self._executor.execute(work):
            signals.emit(signals.ScheduleChanged(schedule=name, what="forgotten: no code declares it", by=None))
        self._correct_all()

    def _correct_all(self) -> None:
        """Look at all that are not due, in short transactions."""
        from aftercommit.records import schedules

        declared, tasks = self._registry.declared.keys(), self._tasks.keys()
        before: tuple[datetime, str] | None = None

        def work(connection: Connection) -> tuple[datetime, str] | None:
            moment = schedules.now(connection)
            rows = schedules.ahead(connection, declared=declared, tasks=tasks, before=before)
            for row in rows:
                _correct_one(connection, row, moment)
            return (rows[-1].next_at, rows[-1].name) if rows else None

        while (before := self._executor.execute(work)) is not None:
            pass

    # --- firing -------------------------------------------------------------------------------------------------

    def _fire(self, row: Row[Any], moment: datetime) -> bool:
        """Fire one schedule; False if it waits for its last record."""
        from aftercommit.records import schedules

        task = self._tasks.get(row.task)
        try:
            when = when_of(row)
        except (ScheduleError, ConfigurationError) as exc:
            self._unreadable[row.name] = row.version
            logger.error("Schedule %r cannot be fired here: %s", row.name, told(exc))  # noqa: TRY400  # it says all there is
            return True
        if task is None:
            return True
        firing = plan(when, anchor=row.anchor, next_at=row.next_at, now=moment)
        ticks = _ticks(row, firing)
        tasks = tuple(new_task(row, task, when, tick) for tick in ticks)
        missed = sum(each.missed for each in firing.ticks) + (firing.dropped.count if firing.dropped else 0)
        # What is caught up with was asked for, each of it: it waits its turn in the queue.
        catches_up = when.catch_up == "all" and bool(ticks) and (moment - ticks[0].at) > timedelta(seconds=60)
        try:
            done = self._executor.execute(
                lambda connection: schedules.fire(
                    connection, row, ticks, tasks, next_at=firing.next_at, missed=missed,
                    overlap="allow" if catches_up else when.overlap, moment=moment,
                )
            )  # fmt: skip
        except schedules.Unfinished:
            return False
        if done is not None:
            written, skipped = done
            self._tell(_Fired(row, ticks, tasks, frozenset(written), skipped), firing, moment)
        return True

    def _tell(self, fired: _Fired, firing: Firing, moment: datetime) -> None:
        row, gone = fired.row, firing.dropped
        if gone is not None:
            logger.warning(
                "Schedule %r: %d tick(s) from %s to %s were dropped: %s",
                row.name, gone.count, gone.first.isoformat(), gone.last.isoformat(), gone.reason,
            )  # fmt: skip
            signals.emit(
                signals.ScheduleMissed(
                    schedule=row.name,
                    task=row.task,
                    origin=row.origin,
                    count=gone.count,
                    first=gone.first,
                    last=gone.last,
                    reason=gone.reason,
                )
            )
        if fired.skipped:
            self._tell_skipped(fired)
        else:
            self._in_a_row.pop(row.name, None)
        for tick, task in zip(fired.ticks, fired.tasks, strict=True):
            if task.id in fired.written:
                lag = (moment - tick.at).total_seconds()
                signals.emit(
                    signals.ScheduleFired(
                        schedule=row.name,
                        task=row.task,
                        origin=row.origin,
                        id=task.id,
                        at=tick.at,
                        missed=tick.missed,
                        lag=lag,
                    )
                )
                self._expect(task.pool)
        if firing.next_at is None:
            logger.warning("Schedule %r has ended: its end has come", row.name)
            signals.emit(signals.ScheduleEnded(schedule=row.name, reason="its end has come"))

    def _tell_skipped(self, fired: _Fired) -> None:
        row = fired.row
        times = self._in_a_row[row.name] = self._in_a_row.get(row.name, 0) + 1
        logger.log(
            logging.WARNING if times == _IN_A_ROW else logging.INFO,
            "Schedule %r: the tick of %s was skipped (%d in a row), because the task of the one before (%s) has not "
            'ended; overlap="wait" or "allow" would not skip it',
            row.name, fired.ticks[-1].at.isoformat(), times, row.last_task,
        )  # fmt: skip
        for tick in fired.ticks:
            signals.emit(
                signals.ScheduleSkipped(
                    schedule=row.name, task=row.task, origin=row.origin, at=tick.at, running=row.last_task
                )
            )


# --- rows and records -------------------------------------------------------------------------------------------


def write_declared(connection: Connection, declared: Mapping[str, Declared], *, max_bytes: int) -> dict[str, str]:
    """Have the rows say what the code declares; return a hash of each, by name.

    Old and new processes of a rolling deploy fire by the row, so they do the same; the last to start wins.
    """
    from aftercommit.records import schedules

    hashes: dict[str, str] = {}
    if not declared:
        return hashes
    moment = schedules.now(connection)
    for name, each in sorted(declared.items()):
        definition = each.definition(max_bytes)
        hashes[name] = schedules.definition_hash(definition)
        row = schedules.found(connection, name)
        for alias in each.when.aliases:
            if row is None and schedules.rename(connection, alias, name):
                row = schedules.found(connection, name)
        if row is None:
            next_at = first_tick(each.when, moment)
            if not schedules.create(connection, definition, origin="code", moment=moment, next_at=next_at):
                row = schedules.found(connection, name)
        if row is not None:
            _change(connection, row, each.when, definition, moment)
    schedules.declare(connection, declared.keys(), moment=moment)
    return hashes


def _change(connection: Connection, row: Row[Any], when: When, definition: Any, moment: datetime) -> None:
    from aftercommit.records import schedules

    if row.origin == "data":
        raise ScheduleError(
            f"The schedule {row.name!r} was made with db.create_schedule, and the code declares one of that name. Give "
            "the one in the code another name, or delete the other: aftercommit schedules delete."
        )
    before = schedules.definition_of(row)
    if definition.values() == before.values():
        return
    next_at = changed_next(row, before, when, definition, moment)
    if schedules.change(connection, definition, version=row.version, next_at=next_at):
        signals.emit(signals.ScheduleChanged(schedule=row.name, what="its definition in the code", by=None))


def changed_next(row: Row[Any], before: Any, when: When, definition: Any, moment: datetime) -> datetime | None:
    """The next tick of a schedule that is being changed: never in the past because of the change.

    What was due already under the old definition stays due: nothing is lost by a deploy.
    """
    if row.next_at is not None and (row.next_at <= moment or definition.grid() == before.grid()):
        return row.next_at if when.end is None or row.next_at <= when.end else None
    return next_tick(when, row.anchor, max(moment, row.last_at or row.anchor))


def _correct_one(connection: Connection, row: Row[Any], moment: datetime) -> None:
    from aftercommit.records import schedules

    try:
        when = when_of(row)
    except (ScheduleError, ConfigurationError):
        # Told of when it is due.
        return
    is_astray = row.last_at is not None and row.last_at > moment + _JUMP
    since = moment if is_astray else max(moment, row.last_at or row.anchor)
    expected = next_tick(when, row.anchor, since)
    if expected == row.next_at or (row.last_at is None and row.next_at == first_tick(when, row.anchor)):
        return
    if schedules.set_next(
        connection, row.name, version=row.version, seen=row.next_at, next_at=expected,
        last_at=moment if is_astray else row.last_at,
    ):  # fmt: skip
        logger.warning(
            "Schedule %r: its next tick was said to be at %s, and is at %s: the rules of its time zone have changed, "
            "or a clock was put right", row.name, row.next_at, expected,
        )  # fmt: skip


def _ticks(row: Row[Any], firing: Firing) -> tuple[NewTick, ...]:
    from aftercommit.records.schedules import NewTick

    previous = row.last_at or row.created_at
    found = []
    for each in firing.ticks:
        found.append(NewTick(at=each.at, previous=previous, missed=each.missed))
        previous = each.at
    return tuple(found)


def new_task(row: Row[Any], task: Task[Any, Any], when: When, tick: NewTick) -> NewTask:
    """The record of one tick."""
    from aftercommit.records.schedules import tick_id

    return NewTask(
        id=tick_id(row.name, tick.at, triggered=tick.triggered),
        task=task.name,
        pool=task.settings.pool,
        arguments=json.dumps(row.arguments),
        worker=None,
        key=None,
        priority=int(row.options.get("priority") or 0),
        max_attempts=task.settings.retry.attempts,
        delay=0.0,
        at=tick.at if tick.triggered else tick.at + timedelta(seconds=jitter_of(row.name, tick.at, when.jitter)),
        parent=None,
        context=tick_context(row.name, tick, when),
        schedule=row.name,
        scheduled_at=tick.at,
    )


def tick_context(name: str, tick: NewTick, when: When) -> str:
    """What the run is told of its tick, as JSON text."""
    zone = getattr(when, "timezone", "UTC")
    return json.dumps(
        {
            "tick": {
                "schedule": name,
                "at": tick.at.isoformat(),
                "previous": tick.previous.isoformat(),
                "missed": tick.missed,
                "triggered": tick.triggered,
                "timezone": zone,
            }
        }
    )


def jitter_of(name: str, at: datetime, limit: float) -> float:
    """Seconds by which the start of a tick is delayed: below *limit*, and the same for every process."""
    if not limit:
        return 0.0
    digest = hashlib.sha256(f"jitter\0{name}\0{at.isoformat()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 * limit
