"""What users and operators do to schedules: made and changed in the user's transaction, paused and triggered in ours.

Written once, against a plain ``Session`` or ``Connection``; async code runs the same functions with ``run_sync``.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from aftercommit.errors import ScheduleError, ScheduleStateError
from aftercommit.records import schedules
from aftercommit.records.tables import ScheduleRecord
from aftercommit.schedules.registry import check_task, definition_of, redefined, when_of
from aftercommit.schedules.scheduler import changed_next, new_task, write_declared
from aftercommit.schedules.ticks import first_tick, next_tick

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection, Engine, Row
    from sqlalchemy.orm import Session

    from aftercommit.records.writing import NewTask
    from aftercommit.schedules.registry import Declared
    from aftercommit.schedules.when import When
    from aftercommit.tasks import Task

__all__ = ["Changed", "Listening", "create", "delete", "pause", "resume", "tick_by_hand", "trigger", "update"]


# --- in the user's transaction ----------------------------------------------------------------------------------


def create(
    session: Session,
    bind: Engine | Connection,
    declared: Declared,
    *,
    max_bytes: int,
    parent: UUID | None,
) -> ScheduleRecord:
    """Make a schedule, if and only if *session*'s transaction commits.

    Raises:
        ScheduleError: If there is one of its name, or it cannot be.
        UnsafeArgument: If an argument cannot cross.
    """
    when, task = declared.when, declared.task
    check_task(task, when)
    handed = task.arguments.hand_over(session, declared.args, dict(declared.kwargs), max_bytes=max_bytes)
    # The identities of rows are known after it.
    session.flush()
    definition = definition_of(when, task, handed.resolve())
    connection = session.connection(bind_arguments={"bind": bind})
    moment = schedules.now(connection)
    next_at = first_tick(when, moment)
    if not schedules.create(connection, definition, origin="data", moment=moment, next_at=next_at, parent=parent):
        raise ScheduleError(
            f"There is a schedule {definition.name!r} already, and its row is found by this name. Give this one a name "
            "of its own, such as name=f'invoice {customer.id}', or change the other with db.update_schedule."
        )
    return session.get_one(ScheduleRecord, definition.name, bind_arguments={"bind": bind}, populate_existing=True)


def update(session: Session, bind: Engine | Connection, name: str, when: When) -> ScheduleRecord:
    """Have a schedule that was made as data be due at other times, if and only if the transaction commits.

    Raises:
        ScheduleStateError: If there is none of that name, or the code declares it.
        ScheduleError: If *when* has another name.
    """
    if when.name is not None and when.name != name:
        raise ScheduleError(
            f"update_schedule({name!r}, {when!r}): a schedule keeps its name. Leave out name=, or delete this one and "
            "make another."
        )
    session.flush()
    connection = session.connection(bind_arguments={"bind": bind})
    row = _row(connection, name)
    _refuse_code(row, "changed")
    moment = schedules.now(connection)
    before = schedules.definition_of(row)
    definition = redefined(before, when)
    next_at = changed_next(row, before, when, definition, moment)
    if not schedules.change(connection, definition, version=row.version, next_at=next_at):
        raise ScheduleStateError(f"The schedule {name!r} was changed by somebody else at this very moment. Try again.")
    return session.get_one(ScheduleRecord, name, bind_arguments={"bind": bind}, populate_existing=True)


def delete(session: Session, bind: Engine | Connection, name: str) -> None:
    """Delete a schedule that was made as data, if and only if the transaction commits; what it asked for stays.

    Raises:
        ScheduleStateError: If there is none of that name, or the code declares it.
    """
    session.flush()
    connection = session.connection(bind_arguments={"bind": bind})
    _refuse_code(_row(connection, name), "deleted")
    schedules.remove(connection, name)
    known = session.identity_map.get(session.identity_key(ScheduleRecord, name))
    if known is not None:
        session.expunge(known)


# --- in transactions of their own -------------------------------------------------------------------------------


def pause(connection: Connection, name: str, by: str | None) -> None:
    """Fire nothing of it, in any process, until ``resume``.

    Raises:
        ScheduleStateError: If there is none of that name, or it is paused already.
    """
    _row(connection, name)
    if not schedules.pause(connection, name, moment=schedules.now(connection), by=by):
        raise ScheduleStateError(f"The schedule {name!r} is paused already.")


def resume(connection: Connection, name: str, *, catch_up: bool) -> None:
    """Fire it again, from its next tick on.

    Args:
        connection: In a transaction.
        name: Its name.
        catch_up: Whether the ticks of the pause count as missed.

    Raises:
        ScheduleStateError: If there is none of that name, or it is not paused.
    """
    row = _row(connection, name)
    next_at: datetime | None = row.next_at
    if not catch_up:
        moment = schedules.now(connection)
        if next_at is not None and next_at <= moment:
            next_at = next_tick(when_of(row), row.anchor, max(moment, row.last_at or row.anchor))
    if not schedules.resume(connection, name, next_at=next_at):
        raise ScheduleStateError(f"The schedule {name!r} is not paused.")


def trigger(connection: Connection, name: str, tasks: Mapping[str, Task[Any, Any]]) -> tuple[UUID, str]:
    """Write a task as a tick of this moment would; return its id and its pool. No tick is moved.

    Raises:
        ScheduleStateError: If there is no schedule of that name, or no task of its name in this process.
    """
    row = _row(connection, name)
    task = tasks.get(row.task)
    if task is None:
        raise ScheduleStateError(
            f"The schedule {name!r} is of task {row.task!r}, which this process does not know. Import the module that "
            "declares it first (the command: --import)."
        )
    moment = schedules.now(connection)
    while True:
        tick = schedules.NewTick(at=moment, previous=row.last_at or row.created_at, triggered=True)
        made = new_task(row, task, when_of(row), tick)
        if schedules.trigger(connection, row, made):
            return made.id, made.pool
        # Twice within a microsecond, or on a clock that stands still.
        moment += timedelta(microseconds=1)


def tick_by_hand(connection: Connection, *, name: str, at: datetime | None, db: Any) -> NewTask:
    """Write the record of one tick for a test, and move the row on as a firing would.

    Raises:
        ScheduleStateError: If there is no schedule of that name.
    """
    if schedules.found(connection, name) is None:
        write_declared(connection, db.schedules.declared, max_bytes=db.max_argument_bytes)
    row = _row(connection, name)
    when = when_of(row)
    tick = at or row.next_at or schedules.now(connection)
    made = new_task(row, db.tasks[row.task], when, schedules.NewTick(at=tick, previous=row.last_at or row.created_at))
    following = next_tick(when, row.anchor, tick)
    schedules.fire(
        connection, row, (schedules.NewTick(at=tick, previous=row.last_at or row.created_at),), (made,),
        next_at=following, missed=0, overlap="allow", moment=tick,
    )  # fmt: skip
    return made


def _row(connection: Connection, name: str) -> Row[Any]:
    row = schedules.found(connection, name)
    if row is None:
        raise ScheduleStateError(
            f"There is no schedule {name!r}. `aftercommit schedules list` shows those that there are; one of the code "
            "is there once a process that declares it has started."
        )
    return row


def _refuse_code(row: Row[Any], what: str) -> None:
    if row.origin == "code":
        raise ScheduleStateError(
            f"The schedule {row.name!r} is declared in the code, which would write it again at the next start. It is "
            f"{what} there; db.pause_schedule({row.name!r}) stops it meanwhile."
        )


class Changed:
    """That schedules were changed in a transaction: told to those who fire, once it has committed."""

    __slots__ = ("by", "schedule", "what")

    def __init__(self, schedule: str, what: str, by: str | None = None) -> None:
        self.schedule = schedule
        self.what = what
        self.by = by

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return f"schedule {self.schedule}"


class Listening:
    """Tells of changes once they are committed; dropped with their transaction, they never were."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self._tell = tell

    def write(self, connection: Connection, entries: Sequence[Changed], *, owns_commit: bool) -> None:
        """They are written already."""

    def committed(self, entries: Sequence[Changed]) -> None:
        """Tell."""
        for entry in entries:
            self._tell(entry.schedule, entry.what)

    def outcome_unknown(self, entries: Sequence[Changed], connection: Connection) -> None:
        """Committed by somebody else's hand: found with the next look."""

    def dropped(self, entries: Sequence[Changed]) -> None:
        """Rolled back."""

    def lost(self, entries: Sequence[Changed], lines: Sequence[Any]) -> None:
        """The session was closed without a commit, which is a rollback of what it wrote."""
