"""Worker processes: one row each, a heartbeat, and what is done about those that have gone silent."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from aftercommit.records import happenings, keys, positions
from aftercommit.records.moves import clear_progress
from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy import Connection

__all__ = [
    "Pulse",
    "beat",
    "forget_silent",
    "prune",
    "register",
    "release_orphans",
    "renew",
    "rescue",
    "sign_off",
    "who_runs",
]

_PG_NOW: Final = "clock_timestamp()"
_LITE_NOW: Final = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
_LITE_SILENT: Final = "(strftime('%Y-%m-%d %H:%M:%f', 'now', :silent || ' seconds') || '000')"
_PG_SILENT: Final = f"{_PG_NOW} + :silent * interval '1 second'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What a look after a heartbeat brings back.

    Attributes:
        running: The records that say this worker runs them.
        has_silent: Whether some other worker has gone silent with tasks in hand, or with backends on the server.
    """

    running: frozenset[UUID]
    has_silent: bool


_REGISTER = Statement(
    "INSERT INTO aftercommit_worker (id, host, pid, started_at, seen_at, pools, names) "
    f"VALUES (:id, :host, :pid, {_PG_NOW}, {_PG_NOW}, CAST(:pools AS json), CAST(:names AS json)) "
    f"ON CONFLICT (id) DO UPDATE SET seen_at = {_PG_NOW}",
    "INSERT INTO aftercommit_worker (id, host, pid, started_at, seen_at, pools, names) "
    f"VALUES (:id, :host, :pid, {_LITE_NOW}, {_LITE_NOW}, :pools, :names) "
    f"ON CONFLICT (id) DO UPDATE SET seen_at = {_LITE_NOW}",
)
_LOST_PG: Final = (
    "SELECT t.id FROM aftercommit_task t LEFT JOIN aftercommit_worker w ON w.id = t.worker "
    f"WHERE t.state = 'running' AND (w.id IS NULL OR w.seen_at < {_PG_SILENT})"
)
_LOST_LITE: Final = (
    "SELECT t.id FROM aftercommit_task t LEFT JOIN aftercommit_worker w ON w.id = t.worker "
    f"WHERE t.state = 'running' AND (w.id IS NULL OR w.seen_at < {_LITE_SILENT})"
)
# By itself, so that it needs nothing but this worker's own row, whoever has locked what else.
_RENEW = Statement(
    f"UPDATE aftercommit_worker SET seen_at = {_PG_NOW} WHERE id = :id",
    f"UPDATE aftercommit_worker SET seen_at = {_LITE_NOW} WHERE id = :id",
)
_PULSE = Statement(
    "SELECT (SELECT CAST(json_agg(t.id) AS text) FROM aftercommit_task t "
    "WHERE t.worker = :id AND t.state = 'running'), "
    f"EXISTS ({_LOST_PG}) OR EXISTS (SELECT 1 FROM aftercommit_worker s WHERE s.backends IS NOT NULL "
    f"AND s.seen_at < {_PG_SILENT} AND s.id <> :id)",
    "SELECT (SELECT json_group_array(CAST(t.id AS TEXT)) FROM aftercommit_task t "
    "WHERE t.worker = :id AND t.state = 'running'), "
    f"EXISTS ({_LOST_LITE})",
)
# Without the key at first: see ``keys``.
_AGAIN: Final = "state = 'queued', worker = NULL, queued_key = NULL"
_REFUNDED: Final = "CASE WHEN attempt > 0 THEN attempt - :refund ELSE 0 END"
_RESCUE = Statement(
    f"WITH lost AS ({_LOST_PG} ORDER BY t.id LIMIT :count FOR UPDATE OF t SKIP LOCKED) "
    f"UPDATE aftercommit_task SET {_AGAIN}, run_at = {_PG_NOW}, error = :error "
    "WHERE id IN (SELECT id FROM lost) AND state = 'running' RETURNING id, key",
    # Without the plus, SQLite would walk all records in the order of their ids.
    f"WITH lost AS ({_LOST_LITE} ORDER BY +t.id LIMIT :count) "
    f"UPDATE aftercommit_task SET {_AGAIN}, run_at = {_LITE_NOW}, error = :error "
    "WHERE id IN (SELECT id FROM lost) AND state = 'running' RETURNING id, key",
)
# Locked ones are left for the next time: a COMMIT in doubt may hold the row for as long as a network is down.
_ORPHANS = Statement(
    "WITH lost AS (SELECT id FROM aftercommit_task WHERE worker = :id AND state = 'running' "
    "AND id IN (SELECT CAST(json_array_elements_text(CAST(:ids AS json)) AS uuid)) FOR UPDATE SKIP LOCKED) "
    f"UPDATE aftercommit_task SET {_AGAIN}, attempt = {_REFUNDED} "
    "WHERE id IN (SELECT id FROM lost) AND state = 'running' RETURNING id, key",
    "WITH lost AS (SELECT id FROM aftercommit_task WHERE worker = :id AND state = 'running' "
    "AND id IN (SELECT value FROM json_each(:ids))) "
    f"UPDATE aftercommit_task SET {_AGAIN}, attempt = {_REFUNDED} "
    "WHERE id IN (SELECT id FROM lost) AND state = 'running' RETURNING id, key",
)
_FORGET_SILENT = Statement(
    f"DELETE FROM aftercommit_worker WHERE seen_at < {_PG_SILENT} AND backends IS NULL AND NOT EXISTS "
    "(SELECT 1 FROM aftercommit_task t WHERE t.worker = aftercommit_worker.id AND t.state = 'running')",
    f"DELETE FROM aftercommit_worker WHERE seen_at < {_LITE_SILENT} AND NOT EXISTS "
    "(SELECT 1 FROM aftercommit_task t WHERE t.worker = aftercommit_worker.id AND t.state = 'running')",
)
_WHO = Statement("SELECT CAST(pools AS text), CAST(names AS text) FROM aftercommit_worker")
_SIGN_OFF = Statement("DELETE FROM aftercommit_worker WHERE id = :id")
_PRUNE = Statement(
    # Not clock_timestamp(): it may change from row to row, and so cannot be looked up in an index.
    "DELETE FROM aftercommit_task WHERE id IN (SELECT id FROM aftercommit_task WHERE finished_at < "
    "now() - :keep * interval '1 second' ORDER BY finished_at LIMIT :count FOR UPDATE SKIP LOCKED) RETURNING id",
    "DELETE FROM aftercommit_task WHERE id IN (SELECT id FROM aftercommit_task WHERE finished_at < "
    "(strftime('%Y-%m-%d %H:%M:%f', 'now', -:keep || ' seconds') || '000') ORDER BY finished_at LIMIT :count) "
    "RETURNING id",
)


def register(
    connection: Connection, worker: UUID, *, host: str, pid: int, pools: Sequence[str], names: Sequence[str]
) -> None:
    """Enter this process among the workers."""
    parameters = {"id": worker, "host": host, "pid": pid, "pools": json.dumps(pools), "names": json.dumps(names)}
    _REGISTER.execute(connection, parameters)


def renew(connection: Connection, worker: UUID) -> bool:
    """Renew this worker's row; False if somebody took it away, because we had been silent for too long."""
    return _RENEW.execute(connection, {"id": worker}).rowcount == 1


def look(connection: Connection, worker: UUID, *, silent_after: float) -> Pulse:
    """Say what this worker is said to run, and whether others have gone silent."""
    row = _PULSE.execute(connection, {"id": worker, "silent": -silent_after}).one()
    # A record whose id is none (SQLite holds anything) is nothing that could be run, or given back.
    running = (_readable(each) for each in json.loads(row[0] or "[]"))
    return Pulse(running=frozenset(id for id in running if id is not None), has_silent=bool(row[1]))


def beat(connection: Connection, worker: UUID, *, silent_after: float) -> Pulse | None:
    """Renew this worker's row, and look; None if somebody took it away."""
    return look(connection, worker, silent_after=silent_after) if renew(connection, worker) else None


def who_runs(connection: Connection, pool: str) -> frozenset[str]:
    """Return the names that the workers know which run *pool*, of this application or of another.

    Those that have fallen silent are among them, until their rows are taken out.
    """
    known: set[str] = set()
    for pools, names in _WHO.execute(connection, {}):
        # A row that somebody has edited is one that cannot be read.
        with suppress(ValueError, TypeError):
            if pool in json.loads(pools):
                known.update(json.loads(names))
    return frozenset(known)


def rescue(connection: Connection, *, silent_after: float, count: int = 500) -> list[UUID]:
    """Queue the tasks of silent workers again; return their ids. The claim that follows counts the next attempt."""
    parameters = {"silent": -silent_after, "count": count, "error": "its worker died or fell silent"}
    return _queued_again(connection, _RESCUE.execute(connection, parameters).all())


def forget_silent(connection: Connection, *, silent_after: float) -> None:
    """Take out workers that have been silent for long and hold nothing any more."""
    _FORGET_SILENT.execute(connection, {"silent": -10 * silent_after})


def release_orphans(
    connection: Connection, worker: UUID, records: Collection[UUID], *, refund: bool = True
) -> list[UUID]:
    """Queue records again that say this worker runs them, though it does not; return their ids.

    Args:
        connection: In a transaction.
        worker: This worker.
        records: What it does not run.
        refund: Whether the attempt never began, and so does not count.
    """
    parameters = {"id": worker, "ids": json.dumps([each.hex for each in records]), "refund": int(refund)}
    return _queued_again(connection, _ORPHANS.execute(connection, parameters).all())


def _queued_again(connection: Connection, rows: Sequence[Any]) -> list[UUID]:
    found = {id: row[1] for row in rows if (id := _readable(row[0])) is not None}
    keyed = [id for id, key in found.items() if key is not None]
    if keyed:
        keys.take_up(connection, keyed)
    return list(found)


def sign_off(connection: Connection, worker: UUID) -> None:
    """Take this process out of the workers."""
    _SIGN_OFF.execute(connection, {"id": worker})


def prune(connection: Connection, *, keep: float, count: int = 1000) -> int:
    """Delete up to *count* records that finished more than *keep* seconds ago; return how many."""
    rows = _PRUNE.execute(connection, {"keep": keep, "count": count}).scalars().all()
    gone = [id for each in rows if (id := _readable(each)) is not None]
    if gone:
        clear_progress(connection, gone)
        positions.clear(connection, gone)
    happenings.prune(connection, keep=keep, count=count)
    return len(rows)


def _readable(value: Any) -> UUID | None:
    """None for what is no id: SQLite holds anything that somebody writes."""
    try:
        return value if isinstance(value, UUID) else UUID(str(value))
    except ValueError:
        return None
