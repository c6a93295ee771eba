"""Tasks written into the asker's transaction: one statement, however many.

With a key it may be one more. What is queued under the key already stands for this asker, too, so it must not be
claimed before his commit: the run would not see his rows, and none would follow. ``ON CONFLICT`` alone says that it was
there a moment ago. So the row that was met is locked until the asker's transaction ends (claims skip what is locked),
and whoever cannot have it any more writes a record without the key: rather one run more than none.

SQLite needs none of this: from the INSERT on, the asker has the write lock.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy.exc import DBAPIError

from aftercommit.pools.views import LEVEL
from aftercommit.records.statement import Statement, savepoint
from aftercommit.tasks.transient import Fault, fault_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Connection

__all__ = ["SEES_THE_NEWEST", "NewTask", "has_snapshot", "insert", "insert_new"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A task as it is written for the first time.

    Attributes:
        id: UUIDv7.
        task: The task's name.
        pool: The pool it runs in.
        arguments: JSON text.
        worker: The worker that takes it at once (born claimed), or None: it is queued.
        key: A no-op while one of this name and key is queued.
        priority: Higher runs first.
        max_attempts: How often it may be tried.
        delay: Seconds from now, by the database's clock.
        at: The moment it is due, instead.
        parent: The run that asks for it.
        context: Trace headers and log context as JSON text.
        schedule: The schedule that asks for it.
        scheduled_at: The tick of that schedule.
    """

    id: UUID
    task: str
    pool: str
    arguments: str
    worker: UUID | None
    key: str | None
    priority: int
    max_attempts: int
    delay: float
    at: datetime | None
    parent: UUID | None
    context: str | None
    schedule: str | None = None
    scheduled_at: datetime | None = None


_COLUMNS = (
    "INSERT INTO aftercommit_task (id, task, pool, state, arguments, key, queued_key, priority, attempt, claims, "
    "max_attempts, run_at, enqueued_at, started_at, worker, parent, context, schedule, scheduled_at) "
)
# One parameter, whatever the number of rows: the statement stays the same, so it is prepared once, and the limit of
# 65 535 parameters is never met. The arguments are a string inside the JSON, so that the server does not read them
# (a NUL in them would be refused).
_POSTGRESQL = (
    _COLUMNS + "SELECT r.id, r.task, r.pool, CASE WHEN r.worker IS NULL THEN 'queued' ELSE 'running' END, "
    "CAST(r.arguments AS json), r.key, r.queued_key, r.priority, CASE WHEN r.worker IS NULL THEN 0 ELSE 1 END, "
    "CASE WHEN r.worker IS NULL THEN 0 ELSE 1 END, r.max_attempts, "
    "COALESCE(r.at, clock_timestamp() + r.delay * interval '1 second'), clock_timestamp(), "
    "CASE WHEN r.worker IS NULL THEN NULL ELSE clock_timestamp() END, r.worker, r.parent, CAST(r.context AS json), "
    "r.schedule, r.scheduled_at "
    "FROM json_to_recordset(CAST(:rows AS json)) AS r(id uuid, task text, pool text, arguments text, worker uuid, "
    "key text, queued_key text, priority integer, max_attempts integer, delay double precision, at timestamptz, "
    "parent uuid, context text, schedule text, scheduled_at timestamptz)"
)
_NOW = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"


def _of(name: str) -> str:
    return f"json_extract(r.value, '$.{name}')"


_SQLITE = (
    _COLUMNS + f"SELECT {_of('id')}, {_of('task')}, {_of('pool')}, "
    f"CASE WHEN {_of('worker')} IS NULL THEN 'queued' ELSE 'running' END, {_of('arguments')}, {_of('key')}, "
    f"{_of('queued_key')}, {_of('priority')}, CASE WHEN {_of('worker')} IS NULL THEN 0 ELSE 1 END, "
    f"CASE WHEN {_of('worker')} IS NULL THEN 0 ELSE 1 END, {_of('max_attempts')}, "
    f"COALESCE({_of('at')}, strftime('%Y-%m-%d %H:%M:%f', 'now', {_of('delay')} || ' seconds') || '000'), {_NOW}, "
    f"CASE WHEN {_of('worker')} IS NULL THEN NULL ELSE {_NOW} END, {_of('worker')}, {_of('parent')}, {_of('context')}, "
    f"{_of('schedule')}, {_of('scheduled_at')} "
    "FROM json_each(:rows) AS r WHERE true"
)
_INSERT = Statement(_POSTGRESQL, _SQLITE)
_IF_NOT_THERE = " ON CONFLICT (id) DO NOTHING RETURNING id"
_INSERT_NEW = Statement(_POSTGRESQL + _IF_NOT_THERE, _SQLITE + _IF_NOT_THERE)
SEES_THE_NEWEST = "current_setting('transaction_isolation') IN ('read committed', 'read uncommitted')"
"""Elsewhere ``ON CONFLICT`` fails where the row that it meets is newer than the snapshot, and the commit with it."""
_INSERT_KEYED = Statement(
    f"{_POSTGRESQL} WHERE {SEES_THE_NEWEST} ON CONFLICT (task, queued_key) DO NOTHING RETURNING id",
    f"{_SQLITE} ON CONFLICT (task, queued_key) DO NOTHING RETURNING id",
)
# Shared, so that askers do not wait for each other, and in the order of their INSERT. That the newest is seen is said
# by a row of its own.
_LOCK_MET = Statement(
    "SELECT met.task, met.queued_key FROM json_to_recordset(CAST(:rows AS json)) AS r(task text, queued_key text) "
    "CROSS JOIN LATERAL (SELECT t.task, t.queued_key FROM aftercommit_task t WHERE t.task = r.task "
    f"AND t.queued_key = r.queued_key AND {SEES_THE_NEWEST} FOR KEY SHARE) met "
    f"UNION ALL SELECT NULL, NULL WHERE {SEES_THE_NEWEST}"
)
# What cannot be met by a plain read under a snapshot: the newest row, locked; it changes nothing.
_INSERT_OR_LOCK = Statement(
    f"{_POSTGRESQL} ON CONFLICT (task, queued_key) DO UPDATE SET priority = excluded.priority WHERE false RETURNING id"
)


def insert(connection: Connection, tasks: Sequence[NewTask]) -> set[UUID]:
    """Write *tasks* with one statement; return the ids of those that were really written.

    Left out are those whose name and key is queued already: until the transaction ends, that record is not claimed.
    The order is that of *tasks*, but keyed ones are sorted, so that two transactions with the same keys wait for each
    other instead of deadlocking.
    """
    if all(each.key is None for each in tasks):
        _INSERT.execute(connection, {"rows": _rows(connection, tasks)})
        return {each.id for each in tasks}
    tasks = _first_of_each_key(tasks)
    if connection.dialect.name == "sqlite":
        return _ids(_INSERT_KEYED.execute(connection, {"rows": _rows(connection, tasks)}).scalars())
    if has_snapshot(connection):
        return _insert_under_snapshot(connection, tasks)
    written = _ids(_INSERT_KEYED.execute(connection, {"rows": _rows(connection, tasks)}).scalars())
    left = [each for each in tasks if each.id not in written]
    if not left:
        return written
    met = {(row[0], row[1]) for row in _LOCK_MET.execute(connection, {"rows": _rows(connection, left)})}
    if not met:
        # Begun at another level than we knew of: by SQL, or by the server's default.
        return _insert_under_snapshot(connection, tasks)
    # Claimed between the two statements, or never met: without the key nobody is waited for.
    return written | _insert_without_key(connection, [each for each in left if (each.task, each.key) not in met])


def insert_new(connection: Connection, tasks: Sequence[NewTask]) -> set[UUID]:
    """Write those of *tasks* whose ids are not there yet; return these. None of them has a key."""
    return _ids(_INSERT_NEW.execute(connection, {"rows": _rows(connection, tasks)}).scalars())


def has_snapshot(connection: Connection) -> bool:
    """Whether the transaction is known to go on seeing what was there when it began; asks nobody."""
    options = connection.get_execution_options()
    level = options.get("isolation_level") or options.get(LEVEL)
    return level in ("REPEATABLE READ", "SERIALIZABLE")


def _insert_under_snapshot(connection: Connection, tasks: Sequence[NewTask]) -> set[UUID]:
    try:
        with savepoint(connection):
            return _ids(_INSERT_OR_LOCK.execute(connection, {"rows": _rows(connection, tasks)}).scalars())
    except DBAPIError as exc:
        if fault_of(exc) is not Fault.CONFLICT:
            raise
    if len(tasks) == 1:
        # It was queued, or claimed, after this transaction's snapshot was taken.
        return _insert_without_key(connection, tasks)
    return set[UUID]().union(*(_insert_under_snapshot(connection, [each]) for each in tasks))


def _insert_without_key(connection: Connection, tasks: Sequence[NewTask]) -> set[UUID]:
    if tasks:
        _INSERT.execute(connection, {"rows": _rows(connection, tasks, takes_key=False)})
    return {each.id for each in tasks}


def _first_of_each_key(tasks: Sequence[NewTask]) -> list[NewTask]:
    first: dict[object, NewTask] = {}
    for each in tasks:
        first.setdefault(each.id if each.key is None else (each.task, each.key), each)
    return sorted(first.values(), key=lambda each: (each.task, each.key or ""))


def _ids(found: Iterable[object]) -> set[UUID]:
    return {each if isinstance(each, UUID) else UUID(str(each)) for each in found}


def _rows(connection: Connection, tasks: Sequence[NewTask], *, takes_key: bool = True) -> str:
    is_sqlite = connection.dialect.name == "sqlite"
    return json.dumps([_row(each, is_sqlite=is_sqlite, takes_key=takes_key) for each in tasks])


def _row(task: NewTask, *, is_sqlite: bool, takes_key: bool) -> dict[str, object]:
    def identifier(value: UUID | None) -> str | None:
        return None if value is None else value.hex

    return {
        "id": task.id.hex,
        "task": task.task,
        "pool": task.pool,
        "arguments": task.arguments,
        "worker": identifier(task.worker),
        "key": task.key,
        "queued_key": task.key if takes_key else None,
        "priority": task.priority,
        "max_attempts": task.max_attempts,
        "delay": task.delay,
        "at": _moment(task.at, is_sqlite=is_sqlite),
        "parent": identifier(task.parent),
        "context": task.context,
        "schedule": task.schedule,
        "scheduled_at": _moment(task.scheduled_at, is_sqlite=is_sqlite),
    }


def _moment(moment: datetime | None, *, is_sqlite: bool) -> str | None:
    """As text: SQLite compares it with its own clock, in UTC."""
    if moment is None:
        return None
    there = moment.astimezone(UTC)
    return there.strftime("%Y-%m-%d %H:%M:%S.%f") if is_sqlite else there.isoformat()
