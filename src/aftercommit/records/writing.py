"""Tasks written into the asker's transaction: one statement, however many."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

__all__ = ["NewTask", "insert"]


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


_COLUMNS = (
    "INSERT INTO aftercommit_task (id, task, pool, state, arguments, key, queued_key, priority, attempt, claims, "
    "max_attempts, run_at, enqueued_at, started_at, worker, parent, context) "
)
# One parameter, whatever the number of rows: the statement stays the same, so it is prepared once, and the limit of
# 65 535 parameters is never met. The arguments are a string inside the JSON, so that the server does not read them
# (a NUL in them would be refused).
_POSTGRESQL = (
    _COLUMNS + "SELECT r.id, r.task, r.pool, CASE WHEN r.worker IS NULL THEN 'queued' ELSE 'running' END, "
    "CAST(r.arguments AS json), r.key, r.key, r.priority, CASE WHEN r.worker IS NULL THEN 0 ELSE 1 END, "
    "CASE WHEN r.worker IS NULL THEN 0 ELSE 1 END, r.max_attempts, "
    "COALESCE(r.at, clock_timestamp() + r.delay * interval '1 second'), clock_timestamp(), "
    "CASE WHEN r.worker IS NULL THEN NULL ELSE clock_timestamp() END, r.worker, r.parent, CAST(r.context AS json) "
    "FROM json_to_recordset(CAST(:rows AS json)) AS r(id uuid, task text, pool text, arguments text, worker uuid, "
    "key text, priority integer, max_attempts integer, delay double precision, at timestamptz, parent uuid, "
    "context text)"
)
_NOW = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"


def _of(name: str) -> str:
    return f"json_extract(r.value, '$.{name}')"


_SQLITE = (
    _COLUMNS + f"SELECT {_of('id')}, {_of('task')}, {_of('pool')}, "
    f"CASE WHEN {_of('worker')} IS NULL THEN 'queued' ELSE 'running' END, {_of('arguments')}, {_of('key')}, "
    f"{_of('key')}, {_of('priority')}, CASE WHEN {_of('worker')} IS NULL THEN 0 ELSE 1 END, "
    f"CASE WHEN {_of('worker')} IS NULL THEN 0 ELSE 1 END, {_of('max_attempts')}, "
    f"COALESCE({_of('at')}, strftime('%Y-%m-%d %H:%M:%f', 'now', {_of('delay')} || ' seconds') || '000'), {_NOW}, "
    f"CASE WHEN {_of('worker')} IS NULL THEN NULL ELSE {_NOW} END, {_of('worker')}, {_of('parent')}, {_of('context')} "
    "FROM json_each(:rows) AS r WHERE true"
)
_INSERT = Statement(_POSTGRESQL, _SQLITE)
_IF_NOT_QUEUED = " ON CONFLICT (task, queued_key) DO NOTHING RETURNING id"
_INSERT_KEYED = Statement(_POSTGRESQL + _IF_NOT_QUEUED, _SQLITE + _IF_NOT_QUEUED)


def insert(connection: Connection, tasks: Sequence[NewTask]) -> set[UUID]:
    """Write *tasks* with one statement; return the ids of those that were really written.

    Left out are those whose name and key is queued already. The order is that of *tasks*, but keyed ones are sorted,
    so that two transactions with the same keys wait for each other instead of deadlocking.
    """
    is_sqlite = connection.dialect.name == "sqlite"
    keyed = any(each.key is not None for each in tasks)
    if keyed:
        tasks = sorted(tasks, key=lambda each: (each.task, each.key or ""))
    rows = json.dumps([_row(each, is_sqlite=is_sqlite) for each in tasks])
    if not keyed:
        _INSERT.execute(connection, {"rows": rows})
        return {each.id for each in tasks}
    written = _INSERT_KEYED.execute(connection, {"rows": rows}).scalars()
    return {each if isinstance(each, UUID) else UUID(str(each)) for each in written}


def _row(task: NewTask, *, is_sqlite: bool) -> dict[str, object]:
    def identifier(value: UUID | None) -> str | None:
        return None if value is None else value.hex

    # Text on SQLite, which compares it with its own clock in UTC.
    at = None if task.at is None else task.at.astimezone(UTC)
    return {
        "id": task.id.hex,
        "task": task.task,
        "pool": task.pool,
        "arguments": task.arguments,
        "worker": identifier(task.worker),
        "key": task.key,
        "priority": task.priority,
        "max_attempts": task.max_attempts,
        "delay": task.delay,
        "at": None if at is None else at.strftime("%Y-%m-%d %H:%M:%S.%f") if is_sqlite else at.isoformat(),
        "parent": identifier(task.parent),
        "context": task.context,
    }
