"""Schedules in the database: written, changed, fired. The row decides; a compare-and-swap on it fires each tick once.

SQLAlchemy's expressions, unlike its neighbours: none of this runs once for each task, but ``fire``, which is one
transaction for each tick.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import and_, delete, func, literal, or_, select, tuple_, update

from aftercommit.records import writing
from aftercommit.records.statement import Statement
from aftercommit.records.tables import ScheduleRecord, TaskRecord, WorkerRecord

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from sqlalchemy import Connection, Row, Select
    from sqlalchemy.sql.elements import ColumnElement

__all__ = [
    "Definition",
    "NewTick",
    "Unfinished",
    "ahead",
    "change",
    "count",
    "create",
    "declare",
    "definition_hash",
    "definition_of",
    "due",
    "end",
    "end_data",
    "fire",
    "forget",
    "found",
    "next_due",
    "now",
    "overdue",
    "pause",
    "publish",
    "remove",
    "rename",
    "resume",
    "set_next",
    "tick_id",
    "trigger",
]

_PAGE: Final = 1000
_table: Final = ScheduleRecord.__table__
_columns: Final = _table.c
_NOW = Statement(
    "SELECT clock_timestamp()",
    "SELECT strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'",
)
_OPEN: Final = ("queued", "running")


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What a schedule is: what its row says as long as nobody changes it.

    Attributes:
        name: Its name.
        task: The task's name.
        arguments: JSON text.
        kind: ``cron`` or ``every``.
        expression: Of ``cron``.
        seconds: Of ``every``.
        timezone: Of ``cron``.
        options: Everything else, as JSON takes it.
    """

    name: str
    task: str
    arguments: str
    kind: str
    expression: str | None
    seconds: float | None
    timezone: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """For the row, but for its name."""
        return {
            "task": self.task,
            "arguments": json.loads(self.arguments),
            "kind": self.kind,
            "expression": self.expression,
            "seconds": self.seconds,
            "timezone": self.timezone,
            "options": dict(self.options),
        }

    def grid(self) -> tuple[Any, ...]:
        """What says which moments are ticks; the rest says what becomes of them."""
        return (self.kind, self.expression, self.seconds, self.timezone, self.options.get("start"))


def definition_of(row: Row[Any]) -> Definition:
    """The definition that a row holds."""
    return Definition(
        name=row.name,
        task=row.task,
        arguments=json.dumps(row.arguments),
        kind=row.kind,
        expression=row.expression,
        seconds=row.seconds,
        timezone=row.timezone,
        options=row.options,
    )


def definition_hash(definition: Definition) -> str:
    """A short name for all that a definition says: live workers publish it, so that differences can be seen."""
    text = json.dumps([definition.name, definition.values()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTick:
    """One tick that is written as a task.

    Attributes:
        at: The tick.
        previous: The last one that fired before it, or the schedule's creation.
        missed: How many ticks in between it stands for.
        triggered: Whether somebody asked for it by hand.
    """

    at: datetime
    previous: datetime
    missed: int = 0
    triggered: bool = False


class Unfinished(Exception):  # an answer, not a failure
    """The record of the last firing has not ended, and the schedule waits for it."""


def now(connection: Connection) -> datetime:
    """The database's clock, in UTC."""
    found = _NOW.execute(connection, {}).scalar()
    if isinstance(found, str):
        return datetime.strptime(found, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)
    assert isinstance(found, datetime)  # noqa: S101  # as the drivers give it
    return found.astimezone(UTC)


def tick_id(name: str, at: datetime, *, triggered: bool = False) -> UUID:
    """The id of the record of one tick: the same whoever fires it, so that a kept tick cannot be written twice.

    A UUIDv7: 48 bits of the tick's milliseconds, then a hash of name and tick.
    """
    milliseconds = max(0, int((at - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1)))
    seed = f"{name}\0{at.astimezone(UTC).isoformat()}\0{triggered}"
    digest = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:10], "big")
    high, low = digest >> 68, digest & (1 << 62) - 1
    return UUID(int=(milliseconds & (1 << 48) - 1) << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low)


# --- which there are --------------------------------------------------------------------------------------------


def _known(declared: Collection[str], tasks: Collection[str]) -> ColumnElement[bool]:
    """Those that a process may fire: of the code only what it declares itself, others if it knows their task."""
    return or_(
        and_(_columns.origin == "code", _columns.name.in_(sorted(declared))),
        and_(_columns.origin == "data", _columns.task.in_(sorted(tasks))),
    )


def _alive() -> ColumnElement[bool]:
    return and_(_columns.paused_at.is_(None), _columns.ended_at.is_(None))


def due(
    connection: Connection, *, declared: Collection[str], tasks: Collection[str], moment: datetime, count: int = 100
) -> Sequence[Row[Any]]:
    """Up to *count* schedules that are due at *moment*, and may be fired by a process that knows these names."""
    return connection.execute(
        select(_table)
        .where(_columns.next_at <= moment, _alive(), _known(declared, tasks))
        .order_by(_columns.next_at, _columns.name)
        .limit(count)
    ).all()


def next_due(declared: Collection[str], tasks: Collection[str], *, after: datetime) -> Select[Any]:
    """The statement that says when the next one is due, later than *after*."""
    return (
        select(_columns.next_at)
        .where(_columns.next_at > after, _alive(), _known(declared, tasks))
        .order_by(_columns.next_at)
        .limit(1)
    )


def ahead(
    connection: Connection,
    *,
    declared: Collection[str],
    tasks: Collection[str],
    before: tuple[datetime, str] | None = None,
) -> Sequence[Row[Any]]:
    """The schedules whose next tick may have to be put right: those that are not due, up to 1000, the furthest first.

    Args:
        connection: In a transaction.
        declared: Schedules that this process may fire.
        tasks: As *declared*.
        before: The last that was looked at, as its next tick and its name.
    """
    place = tuple_(_columns.next_at, _columns.name)
    looked_at = [] if before is None else [place < tuple_(literal(before[0], _columns.next_at.type), before[1])]
    return connection.execute(
        select(_table)
        .where(_columns.next_at > now(connection), _alive(), _known(declared, tasks), *looked_at)
        .order_by(_columns.next_at.desc(), _columns.name.desc())
        .limit(_PAGE)
    ).all()


def overdue(connection: Connection, *, moment: datetime) -> Sequence[Row[Any]]:
    """All that were due before *moment* and have not fired, whoever may fire them."""
    return connection.execute(
        select(_table).where(_columns.next_at <= moment, _alive()).order_by(_columns.next_at).limit(1000)
    ).all()


def found(connection: Connection, name: str) -> Row[Any] | None:
    """The row of that name."""
    return connection.execute(select(_table).where(_columns.name == name)).first()


# --- making and changing ----------------------------------------------------------------------------------------


def create(
    connection: Connection,
    definition: Definition,
    *,
    origin: str,
    moment: datetime,
    next_at: datetime | None,
    parent: UUID | None = None,
) -> bool:
    """Write a new one; False if there is one of that name, and the transaction stays usable."""
    values = {
        "name": definition.name,
        **definition.values(),
        "origin": origin,
        "version": 1,
        "anchor": moment,
        "next_at": next_at,
        "created_at": moment,
        "declared_at": moment if origin == "code" else None,
        "parent": parent,
        "fired": 0,
        "skipped": 0,
        "missed": 0,
    }
    taken = select(literal(1)).where(select(_columns.name).where(_columns.name == definition.name).exists())
    if connection.execute(taken).first() is not None:
        return False
    # Of two that are written at once, the second waits for the first, and is then none.
    from sqlalchemy.dialects import postgresql, sqlite

    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(ScheduleRecord).values(values).on_conflict_do_nothing(index_elements=["name"])
    return connection.execute(statement.returning(_columns.name)).first() is not None


def change(
    connection: Connection, definition: Definition, *, version: int, next_at: datetime | None, origin: str | None = None
) -> bool:
    """Have a schedule be another, from *next_at* on; False if somebody else has changed it meanwhile."""
    values: dict[str, Any] = {**definition.values(), "version": version + 1, "next_at": next_at}
    if origin is not None:
        values["origin"] = origin
    statement = (
        update(ScheduleRecord)
        .where(_columns.name == definition.name, _columns.version == version)
        .values(**values, ended_at=None, ended_because=None)
    )
    return connection.execute(statement).rowcount == 1


def declare(connection: Connection, names: Collection[str], *, moment: datetime) -> None:
    """Note that running code declares these."""
    connection.execute(
        update(ScheduleRecord)
        .where(_columns.name.in_(sorted(names)), _columns.origin == "code")
        .values(declared_at=moment)
    )


def publish(connection: Connection, worker: UUID, hashes: Mapping[str, str]) -> None:
    """Say in a worker's row what its code declares: others can see then if they differ."""
    connection.execute(
        update(WorkerRecord).where(WorkerRecord.id == worker).values(declares=dict(hashes) if hashes else None)
    )


def rename(connection: Connection, old: str, new: str) -> bool:
    """Give the row another name, with all that it remembers; not where there is one of that name."""
    taken = select(_columns.name).where(_columns.name == new).exists()
    if connection.execute(select(literal(1)).where(taken)).first() is not None:
        return False
    statement = (
        update(ScheduleRecord)
        .where(_columns.name == old, _columns.origin == "code")
        .values(name=new, version=_columns.version + 1)
    )
    return connection.execute(statement).rowcount == 1


def remove(connection: Connection, name: str) -> bool:
    """Delete it; what it asked for stays."""
    return connection.execute(delete(ScheduleRecord).where(_columns.name == name)).rowcount == 1


def forget(connection: Connection, *, declared: Collection[str], before: datetime) -> list[str]:
    """Delete those of the code that no code has declared since *before*; return their names."""
    stale = (
        _columns.origin == "code",
        _columns.declared_at < before,
        _columns.name.not_in(sorted(declared)),
    )
    names = list(connection.execute(select(_columns.name).where(*stale)).scalars())
    if names:
        connection.execute(delete(ScheduleRecord).where(_columns.name.in_(names), *stale))
    return names


def end(connection: Connection, name: str, *, moment: datetime, because: str) -> bool:
    """Have no tick come any more, and say why."""
    statement = (
        update(ScheduleRecord)
        .where(_columns.name == name, _columns.ended_at.is_(None))
        .values(ended_at=moment, ended_because=because, next_at=None, version=_columns.version + 1)
    )
    return connection.execute(statement).rowcount == 1


def end_data(connection: Connection, name: str, *, because: str) -> bool:
    """End it if it was made as data; one of the code goes on, because the code says so."""
    row = found(connection, name)
    return row is not None and row.origin == "data" and end(connection, name, moment=now(connection), because=because)


def set_next(
    connection: Connection,
    name: str,
    *,
    version: int,
    seen: datetime | None,
    next_at: datetime | None,
    last_at: datetime | None,
) -> bool:
    """Put *next_at* and *last_at* right, if the row is as it was seen."""
    same = _columns.next_at.is_(None) if seen is None else _columns.next_at == seen
    statement = (
        update(ScheduleRecord)
        .where(_columns.name == name, _columns.version == version, same)
        .values(next_at=next_at, last_at=last_at, version=version + 1)
    )
    return connection.execute(statement).rowcount == 1


def pause(connection: Connection, name: str, *, moment: datetime, by: str | None) -> bool:
    """Fire nothing from the next look on; False if it is paused already, or there is none."""
    statement = (
        update(ScheduleRecord)
        .where(_columns.name == name, _columns.paused_at.is_(None))
        .values(paused_at=moment, paused_by=by, version=_columns.version + 1)
    )
    return connection.execute(statement).rowcount == 1


def resume(connection: Connection, name: str, *, next_at: datetime | None) -> bool:
    """Fire again, from *next_at* on; False if it is not paused, or there is none."""
    statement = (
        update(ScheduleRecord)
        .where(_columns.name == name, _columns.paused_at.is_not(None))
        .values(paused_at=None, paused_by=None, next_at=next_at, version=_columns.version + 1)
    )
    return connection.execute(statement).rowcount == 1


# --- firing -----------------------------------------------------------------------------------------------------


def fire(
    connection: Connection,
    row: Row[Any],
    ticks: Sequence[NewTick],
    tasks: Sequence[writing.NewTask],
    *,
    next_at: datetime | None,
    missed: int,
    overlap: str,
    moment: datetime,
) -> tuple[set[UUID], int] | None:
    """Fire *ticks* of a schedule that is due, in this transaction: swap the row, write the tasks.

    Args:
        connection: In a transaction.
        row: As ``due`` found it.
        ticks: The oldest first; none where all that was due is dropped.
        tasks: The record of each.
        next_at: The tick that comes then; None ends it.
        missed: How many ticks are not fired by themselves.
        overlap: What becomes of the ticks while the record of the last firing is unfinished.
        moment: The database's clock.

    Returns:
        The ids that were written, and how many ticks were skipped; None if another process fired first.

    Raises:
        Unfinished: If the schedule waits for its last record; nothing has been written.
    """
    seen = (_columns.name == row.name, _columns.next_at == row.next_at, _columns.version == row.version)
    values: dict[str, Any] = {"next_at": next_at, "missed": _columns.missed + missed}
    if next_at is None:
        values.update(ended_at=moment, ended_because="its end has come")
    # The row first: whoever else is at it waits here, and finds it changed. Then nobody but us decides.
    if connection.execute(update(ScheduleRecord).where(*seen).values(**values)).rowcount != 1:
        return None
    skipped = 0
    if ticks and overlap != "allow" and row.last_task is not None and _is_open(connection, row.last_task):
        if overlap == "wait":
            raise Unfinished
        skipped, ticks = len(ticks), ()
    written: set[UUID] = set()
    if ticks:
        written = writing.insert_new(connection, tasks)
    fired: dict[str, Any] = {"skipped": _columns.skipped + skipped, "fired": _columns.fired + len(written)}
    if ticks:
        fired.update(last_at=ticks[-1].at, last_task=tasks[-1].id)
    connection.execute(update(ScheduleRecord).where(_columns.name == row.name).values(**fired))
    return written, skipped


def trigger(connection: Connection, row: Row[Any], task: writing.NewTask) -> bool:
    """Run it now, beside its ticks: nothing of the schedule is moved; False if there is a record of its id."""
    if not writing.insert_new(connection, (task,)):
        return False
    connection.execute(update(ScheduleRecord).where(_columns.name == row.name).values(fired=_columns.fired + 1))
    return True


def _is_open(connection: Connection, id: UUID) -> bool:
    state = connection.execute(select(TaskRecord.state).where(TaskRecord.id == id)).scalar()
    return state in _OPEN


def count(connection: Connection) -> int:
    """How many schedules there are."""
    return int(connection.execute(select(func.count()).select_from(ScheduleRecord)).scalar() or 0)
