"""How some tasks stand: one statement, whatever the number of those who ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from aftercommit.records.tables import TaskRecord

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime

    from sqlalchemy import Connection

__all__ = ["ENDED", "TaskState", "record_of", "states_of"]

ENDED: Final = frozenset({"succeeded", "failed", "cancelled"})
_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskState:
    """How one task stands, without what it was given and what it gave back.

    Attributes:
        id: The record's id.
        task: The task's name.
        pool: The pool it runs in.
        state: ``queued``, ``running``, ``succeeded``, ``failed`` or ``cancelled``.
        attempt: The attempt at hand, or the last.
        max_attempts: How many there may be.
        enqueued_at: When it was asked for.
        run_at: When it is due.
        started_at: When the attempt at hand was claimed.
        finished_at: When it ended.
        error: The last error, in one line.
        progress_done: How far it is.
        progress_total: Of how many.
    """

    id: UUID
    task: str
    pool: str
    state: str
    attempt: int
    max_attempts: int
    enqueued_at: datetime
    run_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None
    progress_done: int | None
    progress_total: int | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more becomes of it by itself."""
        return self.state in ENDED


_NAMES: Final = tuple(TaskState.__dataclass_fields__)


def states_of(connection: Connection, ids: Collection[UUID]) -> dict[UUID, TaskState]:
    """Return how those of *ids* stand that there are."""
    wanted = list(ids)
    found: dict[UUID, TaskState] = {}
    columns = [getattr(TaskRecord, name) for name in _NAMES]
    for start in range(0, len(wanted), _AT_ONCE):
        chosen = select(*columns).where(TaskRecord.id.in_(wanted[start : start + _AT_ONCE]))
        for row in connection.execute(chosen):
            found[row[0]] = TaskState(**dict(zip(_NAMES, row, strict=True)))
    return found


def record_of(connection: Connection, id: UUID) -> TaskRecord | None:
    """Return the record, on its own."""
    with Session(connection, expire_on_commit=False, join_transaction_mode="rollback_only") as session:
        record = session.get(TaskRecord, id)
        if record is not None:
            session.expunge(record)
        return record
