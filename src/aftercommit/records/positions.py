"""How far the batches inside a task are: one row for each lane, written in each chunk's own transaction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from sqlalchemy import Connection

__all__ = ["Position", "advance", "clear", "commits_of", "finish", "prepare", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """One lane's row.

    Attributes:
        lane: Its number.
        done: ``[from, to, key before, last key]`` for every stretch that is done.
        succeeded: Records that it has done.
        failed: Records that failed in it.
        failures: The first of these, ``[key, error]`` each.
        commits: Chunks that it has committed.
        is_finished: Whether nothing is left of the batch.
    """

    lane: int
    done: list[Any]
    succeeded: int
    failed: int
    failures: list[Any]
    commits: int
    is_finished: bool


_MINE: Final = "WHERE task_id = :id AND batch = :batch AND lane = :lane"
_INSERT: Final = (
    "INSERT INTO aftercommit_batch (task_id, batch, lane, position, succeeded, failed, failures, commits, is_finished) "
)
_PREPARE = Statement(
    f"{_INSERT} SELECT CAST(:id AS uuid), CAST(:batch AS text), each, '[]', 0, 0, '[]', 0, 0 "
    "FROM generate_series(0, CAST(:lanes AS integer) - 1) AS each ON CONFLICT DO NOTHING",
    f"{_INSERT} SELECT :id, :batch, value, '[]', 0, 0, '[]', 0, 0 FROM json_each(:numbers) WHERE true "
    "ON CONFLICT DO NOTHING",
)
_READ = Statement(
    "SELECT lane, CAST(position AS text), succeeded, failed, CAST(failures AS text), commits, is_finished "
    "FROM aftercommit_batch WHERE task_id = :id AND batch = :batch ORDER BY lane"
)
_ADVANCE = Statement(
    "UPDATE aftercommit_batch SET position = CAST(:done AS json), succeeded = :succeeded, failed = :failed, "
    f"failures = COALESCE(CAST(:failures AS json), failures), commits = :commits {_MINE} AND commits = :before",
    "UPDATE aftercommit_batch SET position = :done, succeeded = :succeeded, failed = :failed, "
    f"failures = COALESCE(:failures, failures), commits = :commits {_MINE} AND commits = :before",
)
_COMMITS = Statement(
    f"SELECT commits FROM aftercommit_batch {_MINE} FOR UPDATE",
    f"SELECT commits FROM aftercommit_batch {_MINE}",
)
_FINISH = Statement("UPDATE aftercommit_batch SET is_finished = 1 WHERE task_id = :id AND batch = :batch AND lane = 0")
_CLEAR = Statement(
    "DELETE FROM aftercommit_batch WHERE task_id IN (SELECT CAST(json_array_elements_text(CAST(:ids AS json)) AS "
    "uuid))",
    "DELETE FROM aftercommit_batch WHERE task_id IN (SELECT value FROM json_each(:ids))",
)


def prepare(connection: Connection, task: UUID, batch: str, *, lanes: int) -> None:
    """Make the rows of lanes that have none yet."""
    numbers = json.dumps(list(range(lanes)))
    _PREPARE.execute(connection, {"id": task, "batch": batch, "lanes": lanes, "numbers": numbers})


def read(connection: Connection, task: UUID, batch: str) -> list[Position]:
    """Every lane's row."""
    return [
        Position(
            lane=row[0],
            done=json.loads(row[1]),
            succeeded=row[2],
            failed=row[3],
            failures=json.loads(row[4]),
            commits=row[5],
            is_finished=bool(row[6]),
        )
        for row in _READ.execute(connection, {"id": task, "batch": batch})
    ]


def advance(
    connection: Connection,
    task: UUID,
    batch: str,
    *,
    lane: int,
    done: Sequence[Any],
    succeeded: int,
    failed: int,
    failures: Sequence[Any] | None,
    commits: int,
) -> bool:
    """Save where a lane is, in a chunk's own transaction; False if somebody else has moved its row.

    Args:
        connection: The chunk's.
        task: The task.
        batch: Which of its batches.
        lane: Which lane.
        done: Every stretch that is done with this commit.
        succeeded: Of this lane, in all.
        failed: Of this lane, in all.
        failures: The first of these; None where there are no new ones.
        commits: How many there are with this one.
    """
    parameters = {
        "id": task,
        "batch": batch,
        "lane": lane,
        "done": json.dumps(done),
        "succeeded": succeeded,
        "failed": failed,
        "failures": None if failures is None else json.dumps(failures),
        "commits": commits,
        "before": commits - 1,
    }
    return _ADVANCE.execute(connection, parameters).rowcount == 1


def commits_of(connection: Connection, task: UUID, batch: str, *, lane: int) -> int:
    """How many chunks a lane has committed; waits for a commit in doubt, which holds the row."""
    return int(_COMMITS.execute(connection, {"id": task, "batch": batch, "lane": lane}).scalar() or 0)


def finish(connection: Connection, task: UUID, batch: str) -> None:
    """Say that nothing is left of the batch."""
    _FINISH.execute(connection, {"id": task, "batch": batch})


def clear(connection: Connection, tasks: Collection[UUID]) -> None:
    """Forget the batches of records that are pruned."""
    _CLEAR.execute(connection, {"ids": json.dumps([each.hex for each in tasks])})
