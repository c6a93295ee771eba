"""What waits, by pool, task and priority: a look that costs as many steps as there are of these, not of tasks.

The queue of a pool may hold hundreds of thousands: delayed until tomorrow, or of a name that nobody here knows. Both
stand in the way of whoever reads the queue from its front.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy import Connection

__all__ = ["KINDS_LITE", "KINDS_PG", "Waiting", "look", "look_around"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What waits in one pool.

    Attributes:
        seconds: Until the next task of a known name is due, negative if one is; None if there is none, or if the pool
            is paused.
        is_paused: Whether nobody starts tasks in it.
        is_crowded: Whether tasks stand among those that are due which cannot be taken: of other names, or not yet due.
    """

    seconds: float | None
    is_paused: bool
    is_crowded: bool


# Every (pool, task, priority) that is queued, each found by one step into the index behind the one before.
_FIRST: Final = (
    "SELECT pool, task, priority FROM aftercommit_task WHERE state = 'queued' AND pool >= '' "
    "ORDER BY pool, task, priority LIMIT 1"
)
_NEXT: Final = "FROM aftercommit_task t WHERE t.state = 'queued' AND "
_IN_ORDER: Final = "ORDER BY t.pool, t.task, t.priority LIMIT 1"
KINDS_PG: Final = (
    f"RECURSIVE kinds AS (({_FIRST}) UNION ALL SELECT n.pool, n.task, n.priority FROM kinds k CROSS JOIN LATERAL "
    f"(SELECT t.pool, t.task, t.priority {_NEXT} (t.pool, t.task, t.priority) > (k.pool, k.task, k.priority) "
    f"{_IN_ORDER}) n)"
)
# SQLite begins at what is equal to a row of values, and reads all of it to find what is greater.
KINDS_LITE: Final = (
    f"RECURSIVE kinds(pool, task, priority) AS (SELECT * FROM ({_FIRST}) UNION ALL SELECT n.pool, n.task, n.priority "
    "FROM kinds k CROSS JOIN aftercommit_task n ON n.rowid = COALESCE("
    f"(SELECT t.rowid {_NEXT} t.pool = k.pool AND t.task = k.task AND t.priority > k.priority {_IN_ORDER}), "
    f"(SELECT t.rowid {_NEXT} t.pool = k.pool AND t.task > k.task {_IN_ORDER}), "
    f"(SELECT t.rowid {_NEXT} t.pool > k.pool {_IN_ORDER})))"
)
_OF_A_KIND: Final = (
    "(SELECT t.run_at FROM aftercommit_task t WHERE t.state = 'queued' AND t.pool = k.pool AND t.task = k.task "
    "AND t.priority = k.priority ORDER BY t.run_at {order} LIMIT 1)"
)
_ENDS: Final = (
    f"ends AS (SELECT k.pool, k.task, {_OF_A_KIND.format(order='')} AS first, "
    f"{_OF_A_KIND.format(order='DESC')} AS last FROM kinds k "
    "WHERE NOT EXISTS (SELECT 1 FROM aftercommit_pool p WHERE p.name = k.pool))"
)
_LITE_NOW: Final = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
_LOOK = Statement(
    f"WITH {KINDS_PG}, {_ENDS}, known AS (SELECT json_array_elements_text(CAST(:names AS json)) AS task) "
    "SELECT e.pool, MIN(CASE WHEN e.task NOT IN (SELECT task FROM known) THEN NULL WHEN isfinite(e.first) THEN "
    "EXTRACT(EPOCH FROM e.first - now()) WHEN e.first < now() THEN -1 END), "
    "false, bool_or(e.last > now() OR e.task NOT IN (SELECT task FROM known)) FROM ends e GROUP BY e.pool "
    "UNION ALL SELECT name, NULL, true, false FROM aftercommit_pool "
    # Of the code only what this process declares, others if it knows their task.
    "UNION ALL SELECT NULL, EXTRACT(EPOCH FROM (SELECT s.next_at FROM aftercommit_schedule s WHERE s.paused_at IS NULL "
    "AND s.ended_at IS NULL AND s.next_at IS NOT NULL AND ((s.origin = 'data' AND s.task IN (SELECT task FROM known)) "
    "OR (s.origin = 'code' AND s.name IN (SELECT json_array_elements_text(CAST(:declared AS json))))) "
    "ORDER BY s.next_at LIMIT 1) - now()), false, false",
    f"WITH {KINDS_LITE}, {_ENDS}, known AS (SELECT value AS task FROM json_each(:names)) "
    # As the claim compares them. An impossible date has no Julian day, and is before or behind us all the same.
    "SELECT e.pool, MIN(CASE WHEN e.task IN (SELECT task FROM known) THEN COALESCE((julianday(e.first) "
    f"- julianday('now')) * 86400.0, CASE WHEN e.first <= {_LITE_NOW} THEN -1.0 END) END), "
    f"0, MAX(e.last > {_LITE_NOW} OR e.task NOT IN (SELECT task FROM known)) FROM ends e "
    "GROUP BY e.pool UNION ALL SELECT name, NULL, 1, 0 FROM aftercommit_pool "
    "UNION ALL SELECT NULL, (julianday((SELECT s.next_at FROM aftercommit_schedule s WHERE s.paused_at IS NULL "
    "AND s.ended_at IS NULL AND s.next_at IS NOT NULL AND ((s.origin = 'data' AND s.task IN (SELECT task FROM known)) "
    "OR (s.origin = 'code' AND s.name IN (SELECT value FROM json_each(:declared)))) "
    "ORDER BY s.next_at LIMIT 1)) - julianday('now')) * 86400.0, 0, 0",
)


def look(connection: Connection, *, names: Sequence[str]) -> dict[str, Waiting]:
    """Say what waits in each pool that has a queued task, and which pools are paused.

    Args:
        connection: In a transaction, or in autocommit.
        names: The tasks that the worker knows.
    """
    return look_around(connection, names=names, declared=())[0]


def look_around(
    connection: Connection, *, names: Sequence[str], declared: Collection[str]
) -> tuple[dict[str, Waiting], float | None]:
    """Say what ``look`` does, and in how many seconds a schedule is due that this process may fire; None if none is.

    One statement: an idle process costs the server no more with schedules than without.

    Args:
        connection: In a transaction, or in autocommit.
        names: The tasks that the worker knows.
        declared: The schedules that its code declares.
    """
    parameters = {"names": json.dumps(list(names)), "declared": json.dumps(sorted(declared))}
    found: dict[str, Waiting] = {}
    schedule: float | None = None
    for pool, seconds, paused, crowded in _LOOK.execute(connection, parameters):
        due = None if seconds is None else float(seconds)
        if pool is None:
            schedule = due
        else:
            found[pool] = Waiting(seconds=due, is_paused=bool(paused), is_crowded=bool(crowded))
    return found, schedule
