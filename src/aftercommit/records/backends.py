"""The backends of workers: listed by each worker in its own row, and ended by others when it has gone silent.

A client that vanishes without a word (a power cut, a dead host, a network that swallows everything) leaves its
transactions open and its rows locked, until the server itself asks whether it is still there: after two hours, by
default. Whoever rescues its tasks needs those rows at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import UUID

from aftercommit.pools.backends import Seen
from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection

__all__ = ["Ended", "Look", "Reach", "end_silent", "list_backends", "look", "reach"]

_BEGAN: Final = "CAST(EXTRACT(EPOCH FROM a.backend_start) * 1000000 AS bigint)"
_SILENT: Final = "clock_timestamp() + :silent * interval '1 second'"
# Of our own role alone: what others do is not shown to us in full, and is not ours.
_LOOK = Statement(
    f"SELECT a.pid, {_BEGAN}, EXTRACT(EPOCH FROM clock_timestamp() - a.backend_start), CAST(a.usename AS text), "
    "pg_backend_pid() FROM pg_stat_activity a WHERE a.pid = pg_backend_pid() OR (a.datname = current_database() "
    "AND a.usename = session_user AND a.pid IN "
    "(SELECT CAST(json_array_elements_text(CAST(:pids AS json)) AS bigint)))"
)
_LIST = Statement("UPDATE aftercommit_worker SET backends = CAST(:backends AS json) WHERE id = :id")
_IS_SILENT: Final = f"w.backends IS NOT NULL AND w.seen_at < {_SILENT} AND w.id <> :id"
# What was edited by hand into something else lists nothing.
_LISTED: Final = (
    "LATERAL json_array_elements(CASE WHEN json_typeof({0}.backends) = 'array' THEN {0}.backends END) AS e (b)"
)
_EACH: Final = (
    f"{_LISTED.format('w')}, "
    "LATERAL (SELECT CAST(e.b ->> 0 AS bigint) AS pid, CAST(e.b ->> 1 AS bigint) AS began, e.b ->> 2 AS role, "
    "e.b ->> 3 AS keeps_books) AS l"
)
# As pg_terminate_backend decides it.
_MAY: Final = (
    "(pg_has_role(r.oid, 'USAGE') OR pg_has_role('pg_signal_backend', 'USAGE')) "
    "AND (NOT r.rolsuper OR (SELECT rolsuper FROM pg_roles WHERE rolname = current_user))"
)
# The same number in the same database, of the same role, begun at the same microsecond; of other roles we may not be
# shown when. Whatever a worker lists that lives stays, though a silent one may list it, too: it could not sign off
# before it was started again in the same process.
_THERE: Final = (
    "SELECT w.id, l.keeps_books, a.pid, a.state, a.state_change, a.backend_start IS NOT NULL "
    f"AND {_MAY} AS may "
    f"FROM {{workers}} w, {_EACH} JOIN pg_stat_activity a ON a.pid = l.pid AND a.usename = l.role "
    f"AND a.datname = current_database() AND a.pid <> pg_backend_pid() AND COALESCE({_BEGAN}, l.began) = l.began "
    "JOIN pg_roles r ON r.oid = a.usesysid WHERE NOT EXISTS (SELECT 1 FROM aftercommit_worker v, "
    f"{_LISTED.format('v')} WHERE v.seen_at >= {_SILENT} AND e.b ->> 0 = CAST(l.pid AS text) "
    "AND e.b ->> 1 = CAST(l.began AS text))"
)
# The row is locked before anything is ended, and looked at once more: a worker that wakes up at this very moment
# either makes its heartbeat first, and nothing of it is ended, or waits for us, and finds that its backends are gone.
_END = Statement(
    f"WITH silent AS MATERIALIZED (SELECT w.id, w.backends FROM aftercommit_worker w WHERE {_IS_SILENT} "
    f"ORDER BY w.id FOR UPDATE SKIP LOCKED), there AS MATERIALIZED ({_THERE.format(workers='silent')}) "
    "SELECT s.id, t.pid, CASE WHEN t.may THEN pg_terminate_backend(t.pid) ELSE false END "
    "FROM silent s LEFT JOIN there t ON t.id = s.id"
)
# It may have vanished in the middle of a heartbeat, so that its own backend holds its row: the one that keeps its
# books, idle in a transaction for as long as it has been silent. Without that one the row comes free.
_FREE = Statement(
    f"WITH silent AS MATERIALIZED (SELECT w.id, w.backends FROM aftercommit_worker w WHERE {_IS_SILENT} AND w.id NOT "
    "IN (SELECT CAST(json_array_elements_text(CAST(:ids AS json)) AS uuid))), "
    f"there AS MATERIALIZED ({_THERE.format(workers='silent')}) "
    "SELECT t.id, t.pid, pg_terminate_backend(t.pid) FROM there t WHERE t.may AND t.keeps_books = 'true' "
    f"AND starts_with(t.state, 'idle in transaction') AND t.state_change < {_SILENT}"
)
_NOTHING_LEFT = Statement(
    "UPDATE aftercommit_worker SET backends = NULL WHERE id IN "
    "(SELECT CAST(json_array_elements_text(CAST(:ids AS json)) AS uuid))"
)

# One that was made just now will be listed; the listener's holds no locks.
_UNLISTED = Statement(
    "SELECT COUNT(*), inet_client_addr() IS NOT NULL FROM pg_stat_activity a WHERE a.datname = current_database() "
    "AND a.pid <> pg_backend_pid() AND starts_with(a.application_name, 'aftercommit:') "
    "AND a.application_name <> 'aftercommit:listener' AND a.backend_start < clock_timestamp() - interval '10 seconds' "
    f"AND NOT EXISTS (SELECT 1 FROM aftercommit_worker w, {_LISTED.format('w')} WHERE e.b ->> 0 = CAST(a.pid AS text))"
)
_ROLES = Statement(
    "SELECT r.rolname FROM pg_roles r WHERE r.rolname IN (SELECT e.b ->> 2 FROM aftercommit_worker w, "
    f"{_LISTED.format('w')}) AND NOT ({_MAY}) ORDER BY 1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What a rescuer could not end.

    Attributes:
        unlisted: Sessions of ours that no worker lists: of processes that run no tasks, or behind a pooler.
        roles: Whose listed backends our role may not end.
        is_remote: Whether there is a network between the server and us.
    """

    unlisted: int
    roles: list[str]
    is_remote: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the server has.

    Attributes:
        own: The backend that answered.
        seen: The backends under the numbers that were asked for.
    """

    own: int
    seen: list[Seen]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of the backends of silent workers.

    Attributes:
        ended: How many were told to end, by worker.
        refused: How many are there that our role may not end, by worker.
    """

    ended: dict[UUID, int]
    refused: dict[UUID, int]


def look(connection: Connection, pids: Iterable[int]) -> Look:
    """Ask for the backends of these numbers; PostgreSQL only."""
    rows = _LOOK.execute(connection, {"pids": json.dumps(sorted(set(pids)))}).all()
    seen = [
        Seen(pid=pid, began=began, age=float(age), role=role)
        for pid, began, age, role, _own in rows
        if began is not None
    ]
    return Look(own=rows[0][4], seen=seen)


def list_backends(connection: Connection, worker: UUID, ours: Iterable[Seen], *, own: int) -> None:
    """Write into this worker's row which backends are its own.

    Args:
        connection: In a transaction.
        worker: This worker.
        ours: Its backends.
        own: The one of them that keeps its books.
    """
    listed = [[each.pid, each.began, each.role, each.pid == own] for each in ours]
    _LIST.execute(connection, {"id": worker, "backends": json.dumps(listed) if listed else None})


def end_silent(connection: Connection, worker: UUID, *, silent_after: float) -> Ended:
    """End the backends of workers that have gone silent; PostgreSQL only.

    A row forgets its list as soon as nothing of it is there any more, and is kept until then.

    Args:
        connection: In a transaction.
        worker: This worker, whose own are never ended.
        silent_after: Seconds without a heartbeat after which a worker is silent.
    """
    parameters = {"id": worker, "silent": -silent_after}
    rows = _END.execute(connection, parameters).all()
    locked = {str(row[0]) for row in rows}
    freed = _FREE.execute(connection, {**parameters, "ids": json.dumps(sorted(locked))}).all()
    over = sorted(str(id) for id, pid, _ in rows if pid is None)
    if over:
        _NOTHING_LEFT.execute(connection, {"ids": json.dumps(over)})
    ended: dict[UUID, int] = {}
    refused: dict[UUID, int] = {}
    for id, pid, is_ended in [*rows, *freed]:
        if pid is not None:
            counts = ended if is_ended else refused
            counts[UUID(str(id))] = counts.get(UUID(str(id)), 0) + 1
    return Ended(ended=ended, refused=refused)


def reach(connection: Connection) -> Reach:
    """Find out what would stay if its client vanished; PostgreSQL only."""
    unlisted, is_remote = _UNLISTED.execute(connection, {}).one()
    roles = [str(role) for role in _ROLES.execute(connection, {}).scalars()]
    return Reach(unlisted=unlisted, roles=roles, is_remote=is_remote)
