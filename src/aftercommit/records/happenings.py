"""Events that were published with a key: the rows that make a second publishing a no-op."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import UUID

from sqlalchemy.exc import DBAPIError

from aftercommit.records.statement import Statement, savepoint
from aftercommit.records.writing import SEES_THE_NEWEST, has_snapshot
from aftercommit.tasks.transient import Fault, fault_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Connection

__all__ = ["NewEvent", "insert", "prune"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event that is being published with a key.

    Attributes:
        id: UUIDv7.
        event: The name of its class.
        key: The key.
    """

    id: UUID
    event: str
    key: str


_COLUMNS: Final = "INSERT INTO aftercommit_event (id, event, key, published_at) "
_ONCE: Final = " ON CONFLICT (event, key) DO NOTHING RETURNING id"
_SELECT: Final = (
    f"{_COLUMNS} SELECT r.id, r.event, r.key, clock_timestamp() "
    "FROM json_to_recordset(CAST(:rows AS json)) AS r(id uuid, event text, key text)"
)
# Under a snapshot it fails, and the publisher's commit with it, where the event was published after that was taken.
_INSERT = Statement(
    f"{_SELECT} WHERE {SEES_THE_NEWEST}{_ONCE}",
    f"{_COLUMNS} SELECT json_extract(r.value, '$.id'), json_extract(r.value, '$.event'), "
    "json_extract(r.value, '$.key'), (strftime('%Y-%m-%d %H:%M:%f', 'now') || '000') "
    f"FROM json_each(:rows) AS r WHERE true{_ONCE}",
)
_INSERT_UNDER_SNAPSHOT = Statement(f"{_SELECT}{_ONCE}")
_IS_SEEN = Statement(f"SELECT {SEES_THE_NEWEST}")
_PRUNE = Statement(
    "DELETE FROM aftercommit_event WHERE id IN (SELECT id FROM aftercommit_event WHERE published_at < "
    "now() - :keep * interval '1 second' ORDER BY published_at LIMIT :count FOR UPDATE SKIP LOCKED)",
    "DELETE FROM aftercommit_event WHERE id IN (SELECT id FROM aftercommit_event WHERE published_at < "
    "(strftime('%Y-%m-%d %H:%M:%f', 'now', -:keep || ' seconds') || '000') ORDER BY published_at LIMIT :count)",
)


def insert(connection: Connection, events: Iterable[NewEvent]) -> set[UUID]:
    """Write *events* with one statement; return the ids of those whose type and key were new.

    Sorted, so that two transactions with the same keys wait for each other instead of deadlocking.
    """
    ordered = sorted(events, key=lambda each: (each.event, each.key, each.id))
    if has_snapshot(connection):
        return _insert_under_snapshot(connection, ordered)
    found = _write(connection, _INSERT, ordered)
    if not found and connection.dialect.name != "sqlite" and not _IS_SEEN.execute(connection, {}).scalar():
        return _insert_under_snapshot(connection, ordered)
    return found


def _insert_under_snapshot(connection: Connection, events: Sequence[NewEvent]) -> set[UUID]:
    try:
        with savepoint(connection):
            return _write(connection, _INSERT_UNDER_SNAPSHOT, events)
    except DBAPIError as exc:
        if fault_of(exc) is not Fault.CONFLICT:
            raise
    # One that is newer than the snapshot: published by somebody else, and so not new.
    return set[UUID]().union(*(_insert_under_snapshot(connection, [each]) for each in events if len(events) > 1))


def _write(connection: Connection, statement: Statement, events: Sequence[NewEvent]) -> set[UUID]:
    rows = json.dumps([{"id": each.id.hex, "event": each.event, "key": each.key} for each in events])
    found = statement.execute(connection, {"rows": rows}).scalars()
    return {each if isinstance(each, UUID) else UUID(str(each)) for each in found}


def prune(connection: Connection, *, keep: float, count: int) -> None:
    """Delete up to *count* events that were published more than *keep* seconds ago."""
    _PRUNE.execute(connection, {"keep": keep, "count": count})
