"""The key of a record that is queued again: taken up where that promises nothing false, and never waited for.

Whoever is queued under a key stands for every later hand-over of it, and so must be a run that is still to start, and
that will read what is there then. While it runs it has none.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

from aftercommit.records.statement import Statement, savepoint
from aftercommit.tasks.transient import Fault, fault_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Connection

__all__ = ["take_up"]

_LOCK_MILLISECONDS: Final = "50"
_SECONDS: Final = 0.5
# What goes on from a checkpoint or behind a batch's position has read already; what was begun too often fails without
# being begun. Of two under one key, the older waits under it, unless another does already.
_PICKED: Final = (
    "SELECT id FROM (SELECT t.id, row_number() OVER (PARTITION BY t.task, t.key ORDER BY t.id) AS place "
    "FROM aftercommit_task t WHERE t.id IN ({ids}) AND t.state = 'queued' AND t.key IS NOT NULL "
    "AND t.checkpoint IS NULL AND t.attempt < t.max_attempts "
    "AND NOT EXISTS (SELECT 1 FROM aftercommit_batch b WHERE b.task_id = t.id) "
    "AND NOT EXISTS (SELECT 1 FROM aftercommit_task o WHERE o.task = t.task AND o.queued_key = t.key)) AS picked "
    "WHERE place = 1"
)
_TAKE_UP = Statement(
    "UPDATE aftercommit_task SET queued_key = key WHERE id IN ("
    + _PICKED.format(ids="SELECT CAST(json_array_elements_text(CAST(:ids AS json)) AS uuid)")
    + ")",
    "UPDATE aftercommit_task SET queued_key = key WHERE id IN ("
    + _PICKED.format(ids="SELECT value FROM json_each(:ids)")
    + ")",
)
_PATIENCE = Statement("SELECT current_setting('lock_timeout'), set_config('lock_timeout', :new, true)")


def take_up(connection: Connection, records: Sequence[UUID]) -> None:
    """Have *records*, which this transaction has queued again, wait under their keys.

    An asker who stands between the INSERT of a key and his COMMIT holds its place in the index, for as long as he
    likes. Whoever finds him there does without: then his record and this one both run.
    """
    ids = sorted(records)
    if connection.dialect.name == "sqlite":
        _TAKE_UP.execute(connection, {"ids": _listed(ids)})
    else:
        _take_up(connection, ids, time.monotonic() + _SECONDS)


def _take_up(connection: Connection, ids: Sequence[UUID], deadline: float) -> None:
    if not ids or time.monotonic() >= deadline:
        return
    try:
        with savepoint(connection):
            before = _PATIENCE.execute(connection, {"new": _LOCK_MILLISECONDS}).scalar()
            _TAKE_UP.execute(connection, {"ids": _listed(ids)})
            _PATIENCE.execute(connection, {"new": before})
    except DBAPIError as exc:
        # Somebody is there, or has just come: 23505.
        if fault_of(exc) not in (Fault.CONFLICT, Fault.UNIQUE):
            raise
        if len(ids) > 1:
            middle = len(ids) // 2
            _take_up(connection, ids[:middle], deadline)
            _take_up(connection, ids[middle:], deadline)


def _listed(ids: Sequence[UUID]) -> str:
    return json.dumps([each.hex for each in ids])
