"""Ways of keeping keys that are almost right."""

from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from aftercommit.records import keys, moves, workers, writing
from aftercommit.records.statement import Statement
from tests.model.checking import Change, replacing

_INSERT_OR_NOTHING = Statement(
    f"{writing._POSTGRESQL} ON CONFLICT (task, queued_key) DO NOTHING RETURNING id",
    f"{writing._SQLITE} ON CONFLICT (task, queued_key) DO NOTHING RETURNING id",
)


def _insert_without_lock(connection: Connection, tasks: Any) -> set[UUID]:
    tasks = writing._first_of_each_key(tasks)
    return writing._ids(_INSERT_OR_NOTHING.execute(connection, {"rows": writing._rows(connection, tasks)}).scalars())


def _taking_up_anyway(condition: str) -> Change:
    assert condition in keys._PICKED
    picked = keys._PICKED.replace(condition, "")
    ids = ("SELECT CAST(json_array_elements_text(CAST(:ids AS json)) AS uuid)", "SELECT value FROM json_each(:ids)")
    words = [f"UPDATE aftercommit_task SET queued_key = key WHERE id IN ({picked.format(ids=each)})" for each in ids]
    return replacing(keys, "_TAKE_UP", Statement(*words))


class _Waiting:
    """The module ``keys``, without its patience."""

    @staticmethod
    def take_up(connection: Connection, records: Any) -> None:
        keys._TAKE_UP.execute(connection, {"ids": keys._listed(sorted(records))})


BROKEN: dict[str, Change] = {
    "what is queued is not locked": replacing(writing, "insert", _insert_without_lock),
    "what was claimed meanwhile is believed queued": replacing(
        writing, "_insert_without_key", lambda _connection, _tasks: set()
    ),
    "a key is taken up behind a checkpoint": _taking_up_anyway("AND t.checkpoint IS NULL "),
    "a key is taken up behind a position": _taking_up_anyway(
        "AND NOT EXISTS (SELECT 1 FROM aftercommit_batch b WHERE b.task_id = t.id) "
    ),
    "a key is taken up by what will not begin": _taking_up_anyway("AND t.attempt < t.max_attempts "),
    "what is given back waits for its key": replacing(moves, "keys", _Waiting),
    "what is rescued waits for its key": replacing(workers, "keys", _Waiting),
}
ON_SQLITE = [each for each in BROKEN if "taken up" in each]
"""There, an asker has the write lock."""
