"""Who is there, and what waits, runs, failed and is kept: questions of an operator, asked seldom.

Each is one statement, reads only, and takes no lock that anybody waits for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = [
    "Failures",
    "Kept",
    "Queue",
    "Tuples",
    "Worker",
    "denied",
    "failures",
    "held_by_nobody",
    "kept",
    "live",
    "paused",
    "queues",
    "tuples",
    "version",
    "workers",
]

# Seconds from a column to now, in both databases' words; NULL for what is no moment, such as infinity.
_PG_SINCE: Final = "EXTRACT(EPOCH FROM clock_timestamp() - CASE WHEN isfinite({0}) THEN {0} END)"
_LITE_SINCE: Final = "(julianday('now') - julianday({})) * 86400.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A process that runs tasks.

    Attributes:
        host: Its machine.
        pid: Its number there.
        seen: Seconds since its last heartbeat.
        pools: The pools it runs.
        names: The tasks it knows.
        running: How many tasks are in its hands.
    """

    host: str
    pid: int
    seen: float
    pools: frozenset[str]
    names: frozenset[str]
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """The queued tasks of one name in one pool.

    Attributes:
        pool: The pool.
        task: The name.
        queued: How many.
        due: How many of them are due.
        oldest: Seconds since the oldest of them has been due; 0.0 if none is.
    """

    pool: str
    task: str
    queued: int
    due: int
    oldest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """The tasks of one name that failed for good of late.

    Attributes:
        task: The name.
        failed: How many.
        error: What the last of them says, in one line.
    """

    task: str
    failed: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Records of tasks that have ended.

    Attributes:
        number: How many there are.
        oldest: Seconds since the oldest of them ended; 0.0 if there is none.
    """

    number: int
    oldest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuples:
    """What PostgreSQL counts in the table of tasks.

    Attributes:
        live: Rows.
        dead: Versions of rows that nobody needs any more, and that have not been cleared away.
    """

    live: int
    dead: int


_VERSION = Statement("SELECT MAX(version) FROM aftercommit_schema")
_UPDATED: Final = "'aftercommit_task', 'aftercommit_worker', 'aftercommit_batch', 'aftercommit_schedule'"
_WRITTEN: Final = f"{_UPDATED}, 'aftercommit_event', 'aftercommit_pool', 'aftercommit_progress'"
# Asked for several privileges at once, has_table_privilege says whether there is any of them.
_DENIED = Statement(
    "SELECT relname FROM pg_class WHERE pg_table_is_visible(oid) AND ("
    + " OR ".join(
        f"(relname IN ({tables}) AND NOT has_table_privilege(oid, '{privilege}'))"
        for privilege, tables in (
            ("SELECT", f"{_WRITTEN}, 'aftercommit_schema'"),
            ("INSERT", _WRITTEN),
            ("DELETE", _WRITTEN),
            ("UPDATE", _UPDATED),
        )
    )
    + ") ORDER BY relname"
)
_LIVE = Statement(
    "SELECT host, pid FROM aftercommit_worker WHERE seen_at >= clock_timestamp() - :silent * interval '1 second'"
)
_WORKERS_OF: Final = (
    "SELECT w.host, w.pid, {seen}, CAST(w.pools AS text), CAST(w.names AS text), (SELECT COUNT(*) "
    "FROM aftercommit_task t WHERE t.worker = w.id AND t.state = 'running') FROM aftercommit_worker w ORDER BY w.id"
)
_WORKERS = Statement(
    _WORKERS_OF.format(seen=_PG_SINCE.format("w.seen_at")), _WORKERS_OF.format(seen=_LITE_SINCE.format("w.seen_at"))
)
_QUEUES_OF: Final = (
    "SELECT pool, task, COUNT(*), SUM(CASE WHEN {since} >= 0 THEN 1 ELSE 0 END), MAX({since}) FROM aftercommit_task "
    "WHERE state = 'queued' GROUP BY pool, task ORDER BY pool, task"
)
_QUEUES = Statement(
    _QUEUES_OF.format(since=_PG_SINCE.format("run_at")), _QUEUES_OF.format(since=_LITE_SINCE.format("run_at"))
)
_PAUSED = Statement("SELECT name FROM aftercommit_pool ORDER BY name")
_HELD_BY_NOBODY = Statement(
    "SELECT COUNT(*) FROM aftercommit_task t WHERE t.state = 'running' "
    "AND NOT EXISTS (SELECT 1 FROM aftercommit_worker w WHERE w.id = t.worker)"
)
# Beside MAX, SQLite gives the other columns of the row in which it was found.
_FAILURES = Statement(
    "SELECT task, COUNT(*), (array_agg(error ORDER BY finished_at DESC))[1] FROM aftercommit_task "
    "WHERE state = 'failed' AND NOT expected AND finished_at >= now() - :within * interval '1 second' "
    "GROUP BY task ORDER BY task",
    "SELECT task, COUNT(*), error, MAX(finished_at) FROM aftercommit_task WHERE state = 'failed' "
    "AND NOT expected AND finished_at >= (strftime('%Y-%m-%d %H:%M:%f', 'now', -:within || ' seconds') || '000') "
    # Without the plus it would read every record, in the order of the keys' index.
    "GROUP BY +task ORDER BY +task",
)
_KEPT_OF: Final = "SELECT COUNT(*), {since} FROM aftercommit_task WHERE finished_at IS NOT NULL"
_KEPT = Statement(
    _KEPT_OF.format(since=_PG_SINCE.format("MIN(finished_at)")),
    _KEPT_OF.format(since=_LITE_SINCE.format("MIN(finished_at)")),
)
_TUPLES = Statement(
    "SELECT n_live_tup, n_dead_tup FROM pg_stat_user_tables WHERE relid = CAST('aftercommit_task' AS regclass)"
)


def version(connection: Connection) -> int | None:
    """Return which release's tables these are."""
    found = _VERSION.execute(connection, {}).scalar()
    return None if found is None else int(found)


def denied(connection: Connection) -> list[str]:
    """Return the tables of ours on which we lack a privilege that requests or tasks need; PostgreSQL."""
    return [str(name) for name in _DENIED.execute(connection, {}).scalars()]


def live(connection: Connection, *, silent_after: float) -> list[tuple[str, int]]:
    """Return host and process number of every worker that was heard of within *silent_after* seconds; PostgreSQL."""
    return [(row[0], row[1]) for row in _LIVE.execute(connection, {"silent": silent_after})]


def workers(connection: Connection) -> list[Worker]:
    """Return all workers, those among them that have fallen silent."""
    return [
        Worker(
            host=row[0],
            pid=row[1],
            seen=max(0.0, float(row[2] or 0.0)),
            pools=_names(row[3]),
            names=_names(row[4]),
            running=row[5],
        )
        for row in _WORKERS.execute(connection, {})
    ]


def queues(connection: Connection) -> list[Queue]:
    """Return what is queued, by pool and name."""
    return [
        Queue(pool=row[0], task=row[1], queued=row[2], due=int(row[3]), oldest=max(0.0, float(row[4] or 0.0)))
        for row in _QUEUES.execute(connection, {})
    ]


def paused(connection: Connection) -> list[str]:
    """Return the pools in which nobody starts tasks."""
    return [str(name) for name in _PAUSED.execute(connection, {}).scalars()]


def held_by_nobody(connection: Connection) -> int:
    """Return how many tasks are said to be run by a worker that is no more."""
    return _number(_HELD_BY_NOBODY.execute(connection, {}).scalar())


def failures(connection: Connection, *, within: float) -> list[Failures]:
    """Return what failed within the last *within* seconds, by name."""
    rows = _FAILURES.execute(connection, {"within": within})
    return [Failures(task=row[0], failed=row[1], error=row[2] or "") for row in rows]


def kept(connection: Connection) -> Kept:
    """Return how many records of ended tasks there are."""
    row = _KEPT.execute(connection, {}).one()
    return Kept(number=row[0], oldest=max(0.0, float(row[1] or 0.0)))


def tuples(connection: Connection) -> Tuples:
    """Return what PostgreSQL has counted in the table of tasks; it counts a moment late."""
    row = _TUPLES.execute(connection, {}).one()
    return Tuples(live=row[0], dead=row[1])


def _number(value: Any) -> int:
    return int(value or 0)


def _names(text: str) -> frozenset[str]:
    """What a worker's row says; nothing, where somebody has made it unreadable."""
    try:
        return frozenset(map(str, json.loads(text)))
    except (ValueError, TypeError):
        return frozenset()
