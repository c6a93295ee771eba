"""How the queue stands for all processes together: one look, taken seldom.

It reads what is queued and what runs by their partial indexes, and nothing that has finished: with millions of
finished records it costs as much as without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["ClusterTask", "Sweep", "sweep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTask:
    """How the records of one name stand, for all processes together.

    Attributes:
        queued: How many are queued, those that are due later included.
        running: How many run.
        oldest_due: For how many seconds the oldest queued one has been due; None if none is due.
    """

    queued: int
    running: int
    oldest_due: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What one look found.

    Attributes:
        workers: Processes that run tasks and were heard of lately.
        tasks: By the name that the records carry.
        overdue: Schedules that have been due for more than two minutes.
    """

    workers: int
    tasks: dict[str, ClusterTask]
    overdue: int


_SWEEP = Statement(
    "SELECT 'queued', task, count(*), EXTRACT(EPOCH FROM clock_timestamp() - MIN(run_at) "
    "FILTER (WHERE isfinite(run_at))) FROM aftercommit_task "
    "WHERE state = 'queued' GROUP BY task "
    "UNION ALL SELECT 'running', task, count(*), NULL FROM aftercommit_task WHERE state = 'running' GROUP BY task "
    "UNION ALL SELECT 'workers', NULL, count(*), NULL FROM aftercommit_worker "
    "WHERE seen_at > clock_timestamp() + :silent * interval '1 second' "
    "UNION ALL SELECT 'overdue', NULL, count(*), NULL FROM aftercommit_schedule "
    "WHERE paused_at IS NULL AND ended_at IS NULL AND next_at < clock_timestamp() - interval '120 seconds'",
    # Without the plus SQLite would read the index of keys, and with it every record that there is, for its order.
    "SELECT 'queued', task, count(*), (julianday('now') - julianday(MIN(run_at))) * 86400.0 FROM aftercommit_task "
    "WHERE state = 'queued' GROUP BY +task "
    "UNION ALL SELECT 'running', task, count(*), NULL FROM aftercommit_task WHERE state = 'running' GROUP BY +task "
    "UNION ALL SELECT 'workers', NULL, count(*), NULL FROM aftercommit_worker "
    "WHERE seen_at > (strftime('%Y-%m-%d %H:%M:%f', 'now', :silent || ' seconds') || '000') "
    "UNION ALL SELECT 'overdue', NULL, count(*), NULL FROM aftercommit_schedule WHERE paused_at IS NULL "
    "AND ended_at IS NULL AND next_at < (strftime('%Y-%m-%d %H:%M:%f', 'now', '-120 seconds') || '000')",
)


def sweep(connection: Connection, *, silent_after: float) -> Sweep:
    """Count what is queued and what runs, by name, and the workers that are alive; by the database's clock.

    Args:
        connection: Any; this is a single statement.
        silent_after: Seconds without a heartbeat after which a worker does not count.
    """
    rows = _SWEEP.execute(connection, {"silent": -silent_after}).all()
    queued = {task: (count, -1.0 if age is None else float(age)) for what, task, count, age in rows if what == "queued"}
    running = {task: count for what, task, count, _age in rows if what == "running"}
    tasks = {}
    for task in sorted({*queued, *running}):
        count, age = queued.get(task, (0, -1.0))
        tasks[task] = ClusterTask(queued=count, running=running.get(task, 0), oldest_due=age if age >= 0 else None)
    whole = {what: count for what, task, count, _age in rows if task is None}
    return Sweep(workers=whole["workers"], tasks=tasks, overdue=whole["overdue"])
