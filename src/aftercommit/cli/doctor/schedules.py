"""What is thought of the schedules: which are overdue and why, declared differently, undeclared, skipping, paused."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import select

from aftercommit.cli.doctor.findings import Finding, Level, ago, word
from aftercommit.errors import ConfigurationError, ScheduleError
from aftercommit.records import schedules
from aftercommit.records.tables import ScheduleRecord, WorkerRecord
from aftercommit.schedules.registry import when_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, Row

__all__ = ["Schedules", "check_schedules", "take_schedules"]

_LATE: Final = timedelta(minutes=2)
_LONG: Final = timedelta(days=7)
_LOOKED_AT: Final = 200
_SHOWN: Final = 5
_TICKS: Final = 4
"""So many ticks say something about how many of them are skipped."""

_table: Final = ScheduleRecord.__table__
_c: Final = _table.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedules:
    """All that is known of them, up to 200 of each kind.

    Attributes:
        moment: The database's clock.
        overdue: Those that were due more than two minutes ago.
        paused: Those that have been paused for more than a week.
        skipping: Those that skipped more ticks than they fired.
        of_code: Those that some code declared.
        zones: A schedule for each time zone that is used.
        names: The tasks that live workers know, by worker.
        declares: What live workers declare: hashes by name, by worker.
        declared: What the code at hand declares.
        where: The ``Database``, as ``module:name``.
    """

    moment: datetime
    overdue: Sequence[Row[Any]]
    paused: Sequence[Row[Any]]
    skipping: Sequence[Row[Any]]
    of_code: Sequence[Row[Any]]
    zones: Sequence[Row[Any]]
    names: Sequence[Collection[str]]
    declares: Sequence[Mapping[str, str]]
    declared: Collection[str]
    where: str


def take_schedules(connection: Connection, *, silent_after: float, declared: Collection[str], where: str) -> Schedules:
    """Look at them; reads only."""
    moment = schedules.now(connection)
    alive = (_c.paused_at.is_(None), _c.ended_at.is_(None))

    def found(*where_: Any) -> Sequence[Row[Any]]:
        return connection.execute(select(_table).where(*where_).order_by(_c.next_at, _c.name).limit(_LOOKED_AT)).all()

    heard = select(WorkerRecord.names, WorkerRecord.declares).where(
        WorkerRecord.seen_at >= moment - timedelta(seconds=silent_after)
    )
    # Whatever somebody has written there by hand.
    workers: list[tuple[Any, Any]] = [(row[0], row[1]) for row in connection.execute(heard)]
    used = connection.execute(select(_c.timezone).where(_c.timezone.is_not(None), *alive).distinct().limit(_LOOKED_AT))
    return Schedules(
        moment=moment,
        overdue=found(_c.next_at < moment - _LATE, *alive),
        paused=found(_c.paused_at < moment - _LONG, _c.ended_at.is_(None)),
        skipping=found(_c.skipped > _c.fired, _c.skipped >= _TICKS, *alive),
        of_code=found(_c.origin == "code", _c.ended_at.is_(None)),
        zones=[row for zone in used.scalars() for row in found(_c.timezone == zone, *alive)[:1]],
        names=[names if isinstance(names, list) else [] for names, _ in workers],
        declares=[declares for _, declares in workers if isinstance(declares, dict)],
        declared=declared,
        where=where,
    )


def check_schedules(seen: Schedules) -> Iterator[Finding]:
    """Judge all of it."""
    yield from _overdue(seen)
    yield from _different(seen)
    yield from _undeclared(seen)
    yield from _unknown_zones(seen)
    yield from _skipping(seen)
    yield from _paused(seen)


def _overdue(seen: Schedules) -> Iterator[Finding]:
    by_reason: dict[tuple[str, str], list[Row[Any]]] = defaultdict(list)
    known = {name for each in seen.declares for name in each} | set(seen.declared)
    for row in seen.overdue:
        if seen.names and row.origin == "code" and row.name not in known:
            continue  # nobody's any more, which is told below
        by_reason[_why(seen, row)].append(row)
    for (why, remedy), rows in by_reason.items():
        late = (seen.moment - rows[0].next_at).total_seconds()
        yield Finding(
            check="schedules",
            level=Level.WRONG,
            found=f"{_shown(rows)} overdue, {'the first ' if len(rows) > 1 else ''}by {ago(late)}",
            why=why,
            remedy=(remedy,),
        )


def _why(seen: Schedules, row: Row[Any]) -> tuple[str, str]:
    start = f"aftercommit worker {seen.where}"
    if not seen.names:
        return "No process runs tasks, so nobody fires.", start
    if row.origin == "code" and not any(row.name in each for each in seen.declares):
        return "No live worker's code declares it: it runs other code, or imports other modules.", start
    if row.origin == "data" and not any(row.task in each for each in seen.names):
        return f"No live worker knows its task {row.task!r}: it waits for one that does.", start
    show = f"aftercommit schedules show {word(row.name)} --db {seen.where}"
    if dict(row.options or {}).get("overlap") == "wait":
        return 'overlap="wait": it may wait for its last run, which has not ended.', show
    return "A live worker should have fired it. Its log says why it cannot, or it is frozen.", show


def _different(seen: Schedules) -> Iterator[Finding]:
    hashes: dict[str, set[str]] = defaultdict(set)
    for each in seen.declares:
        for name, digest in each.items():
            hashes[name].add(digest)
    for name in sorted(name for name, found in hashes.items() if len(found) > 1)[:_SHOWN]:
        yield Finding(
            check="schedules",
            level=Level.WARNING,
            found=f"Live workers declare the schedule {name!r} differently",
            why="As during a deploy. All of them fire by its row, which the last one to start has written; if this "
            "stays, some of them run other code.",
            remedy=(f"aftercommit schedules show {word(name)} --db {seen.where}",),
        )


def _undeclared(seen: Schedules) -> Iterator[Finding]:
    if not seen.names:
        return  # nobody is there who could
    known = {name for each in seen.declares for name in each} | set(seen.declared)
    rows = [row for row in seen.of_code if row.name not in known]
    if rows:
        yield Finding(
            check="schedules",
            level=Level.NOTE,
            found=f"{_shown(rows)} declared by no code any more",
            why="Nobody fires it; its row is deleted after keep_finished. If it was renamed: aliases=(…).",
        )


def _unknown_zones(seen: Schedules) -> Iterator[Finding]:
    for row in seen.zones:
        try:
            when_of(row)
        except (ScheduleError, ConfigurationError) as exc:
            yield Finding(
                check="schedules",
                level=Level.WARNING,
                found=f"The schedule {row.name!r} ({row.expression}, {row.timezone}) cannot be read on this machine",
                why=str(exc),
                remedy=("pip install tzdata",)
                if isinstance(exc, ScheduleError)
                else ("pip install 'aftercommit[schedules]'",),
            )


def _skipping(seen: Schedules) -> Iterator[Finding]:
    for row in seen.skipping[:_SHOWN]:
        yield Finding(
            check="schedules",
            level=Level.WARNING,
            found=f"The schedule {row.name!r} has skipped {row.skipped} of {row.skipped + row.fired} ticks",
            why="The task of the tick before had not ended: it takes longer than the distance of two ticks, waits in a "
            "paused or crowded pool, or is tried again and again.",
            remedy=(f"aftercommit tasks list --db {seen.where} --task {word(row.task)}",),
        )


def _paused(seen: Schedules) -> Iterator[Finding]:
    for row in seen.paused[:_SHOWN]:
        by = f" by {row.paused_by}" if row.paused_by else ""
        yield Finding(
            check="schedules",
            level=Level.WARNING,
            found=f"The schedule {row.name!r} has been paused{by} for "
            f"{ago((seen.moment - row.paused_at).total_seconds())}",
            why="Nobody fires it until it is resumed.",
            remedy=(f"aftercommit schedules resume {word(row.name)} --db {seen.where}",),
        )


def _shown(rows: Sequence[Row[Any]]) -> str:
    names = ", ".join(repr(row.name) for row in rows[:_SHOWN])
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"The schedule{'s' if len(rows) > 1 else ''} {names}{more} {'are' if len(rows) > 1 else 'is'}"
