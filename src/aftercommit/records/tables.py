"""The library's tables, as mapped classes: status pages and scripts read them with plain SQLAlchemy."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    DDL,
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Float,
    Index,
    Integer,
    String,
    Text,
    TypeDecorator,
    Uuid,
    event,
    false,
    select,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column

__all__ = [
    "AUTOVACUUM",
    "Base",
    "BatchPosition",
    "EventRecord",
    "PoolState",
    "ProgressRecord",
    "ScheduleRecord",
    "SchemaRecord",
    "TaskRecord",
    "UtcDateTime",
    "WorkerRecord",
]


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, always in UTC; SQLite, which has no zones, stores it without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive datetimes: nobody could say which moment they mean."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(
                f"{value!r} has no time zone. Write datetime.now(UTC), or give it one with .replace(tzinfo=…)."
            )
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Read it as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of the library's mapped classes, with a metadata of its own."""


class ProgressRecord(Base):
    """How far a run is. A table of its own: while a task runs, nobody may touch its record."""

    __tablename__ = "aftercommit_progress"

    task_id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    done: Mapped[int] = mapped_column(BigInteger)
    total: Mapped[int | None] = mapped_column(BigInteger)


class TaskRecord(Base):
    """One task that somebody asked for, and what became of it.

    Attributes:
        id: UUIDv7; also the idempotency key for effects outside the database.
        task: The task's name.
        pool: The pool it runs in.
        state: ``queued``, ``running``, ``succeeded``, ``failed`` or ``cancelled``.
        arguments: What crossed, as JSON by parameter.
        result: What the task returned, if its return annotation names something that JSON can carry.
        key: As given with ``with_options(key=…)``.
        queued_key: The key while the task is queued: this is what makes a second one a no-op.
        priority: Higher runs first.
        attempt: The attempt at hand, or the last; 0 before the first.
        max_attempts: How many there may be.
        claims: How often a worker took it; with the attempt, the token that fences a zombie off.
        refunds: How often in a row it was claimed without ending in order or getting on; those beyond the attempts used
            came to nothing (conflicts that lasted, records that said ``running`` and that nobody ran), and have a
            ceiling.
        run_at: When it is due.
        enqueued_at: When it was asked for.
        started_at: When the attempt at hand, or the last, was claimed.
        finished_at: When it succeeded, failed or was cancelled.
        worker: The worker that has it, or had it last.
        parent: The run that asked for it.
        context: Trace headers and log context of the asker.
        checkpoint: What the run saved last with ``current_run().checkpoint(value)``.
        error: The last error in one line.
        traceback: Its traceback; none of an end that was expected.
        expected: Whether it failed in a way that ``@db.task(expected=…)`` names.
        cancelled_by: Who has cancelled it, if that was said.
        errors: One entry per failed attempt: ``attempt``, ``at``, ``error``, ``traceback``.
        schedule: The schedule that asked for it, if one did.
        scheduled_at: The tick of that schedule.
        progress_done: How far it is.
        progress_total: Of how many, if that is known.
    """

    __tablename__ = "aftercommit_task"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    task: Mapped[str] = mapped_column(String(255))
    pool: Mapped[str] = mapped_column(String(63))
    state: Mapped[str] = mapped_column(String(9))
    arguments: Mapped[dict[str, Any]] = mapped_column(JSON(none_as_null=True))
    result: Mapped[Any] = mapped_column(JSON(none_as_null=True), nullable=True)
    key: Mapped[str | None] = mapped_column(String(255))
    queued_key: Mapped[str | None] = mapped_column(String(255))
    priority: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    attempt: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    max_attempts: Mapped[int] = mapped_column(Integer, server_default=text("5"))
    claims: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    refunds: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    run_at: Mapped[datetime] = mapped_column(UtcDateTime)
    enqueued_at: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    worker: Mapped[UUID | None] = mapped_column(Uuid)
    parent: Mapped[UUID | None] = mapped_column(Uuid)
    context: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    checkpoint: Mapped[Any] = mapped_column(JSON(none_as_null=True), nullable=True)
    error: Mapped[str | None] = mapped_column(Text)
    traceback: Mapped[str | None] = mapped_column(Text)
    expected: Mapped[bool] = mapped_column(Boolean, server_default=false())
    cancelled_by: Mapped[str | None] = mapped_column(String(255))
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON(none_as_null=True))
    schedule: Mapped[str | None] = mapped_column(String(255))
    scheduled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    progress_done: Mapped[int | None] = column_property(
        select(ProgressRecord.done)
        .where(ProgressRecord.task_id == id)
        .correlate_except(ProgressRecord)
        .scalar_subquery()
    )
    progress_total: Mapped[int | None] = column_property(
        select(ProgressRecord.total)
        .where(ProgressRecord.task_id == id)
        .correlate_except(ProgressRecord)
        .scalar_subquery()
    )

    def __repr__(self) -> str:
        """Name, id, state and attempt."""
        return f"<TaskRecord {self.task} {self.id} {self.state}, attempt {self.attempt}>"


_queued = TaskRecord.state == "queued"
_running = TaskRecord.state == "running"
_finished = TaskRecord.finished_at.is_not(None)
_scheduled = TaskRecord.schedule.is_not(None)

# One per question: what is due next in a pool, what waits there of which kind, who holds what, what a key already
# waits for, what may be pruned.
Index(
    "aftercommit_task_due",
    TaskRecord.pool,
    TaskRecord.priority.desc(),
    TaskRecord.run_at,
    TaskRecord.id,
    postgresql_where=_queued,
    sqlite_where=_queued,
)
Index(
    "aftercommit_task_waiting",
    TaskRecord.pool,
    TaskRecord.task,
    TaskRecord.priority,
    TaskRecord.run_at,
    TaskRecord.id,
    postgresql_where=_queued,
    sqlite_where=_queued,
)
Index("aftercommit_task_held", TaskRecord.worker, postgresql_where=_running, sqlite_where=_running)
Index("aftercommit_task_key", TaskRecord.task, TaskRecord.queued_key, unique=True)
Index("aftercommit_task_finished", TaskRecord.finished_at, postgresql_where=_finished, sqlite_where=_finished)

Index(
    "aftercommit_task_scheduled",
    TaskRecord.schedule,
    TaskRecord.scheduled_at,
    postgresql_where=_scheduled,
    sqlite_where=_scheduled,
)


class WorkerRecord(Base):
    """A process that runs tasks, and when it was last heard of.

    Attributes:
        id: Made anew at each start.
        host: The machine's name.
        pid: The process.
        started_at: When it started.
        seen_at: Its last heartbeat.
        pools: The pools it runs.
        names: The tasks it knows.
        declares: A hash of each schedule that its code declares, by name.
        backends: The server processes of its connections, as far as it can be sure of them; None where there are none.
    """

    __tablename__ = "aftercommit_worker"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime)
    pools: Mapped[list[str]] = mapped_column(JSON)
    names: Mapped[list[str]] = mapped_column(JSON)
    backends: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    declares: Mapped[dict[str, str] | None] = mapped_column(JSON(none_as_null=True))


class PoolState(Base):
    """A pool that was paused: nobody starts tasks in it."""

    __tablename__ = "aftercommit_pool"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    paused_at: Mapped[datetime] = mapped_column(UtcDateTime)


class BatchPosition(Base):
    """How far one lane of a batch inside a task is: written in each chunk's own commit.

    A table of its own, and a row for each lane: two that wrote one row side by side would fail at REPEATABLE READ.

    Attributes:
        task_id: The task.
        batch: Which of its batches.
        lane: Which lane of that batch; 0 is the first.
        position: What is done, by all lanes as far as this one knew: ``[from, to, key before, last key]`` each.
        succeeded: Records that this lane has done.
        failed: Records that failed in it.
        failures: The first of these, ``[key, error]`` each.
        commits: Chunks that it has committed: says after a commit in doubt whether it happened.
        is_finished: Whether nothing is left of the batch (said in the row of lane 0).
    """

    __tablename__ = "aftercommit_batch"

    task_id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    batch: Mapped[str] = mapped_column(String(255), primary_key=True)
    lane: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    position: Mapped[list[Any]] = mapped_column(JSON)
    succeeded: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    failures: Mapped[list[Any]] = mapped_column(JSON)
    commits: Mapped[int] = mapped_column(BigInteger)
    is_finished: Mapped[int] = mapped_column(Integer)


class EventRecord(Base):
    """An event that was published with a key: a second one of the same type and key is none.

    Attributes:
        id: UUIDv7.
        event: The name of its class.
        key: As given to ``publish``.
        published_at: When.
    """

    __tablename__ = "aftercommit_event"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    event: Mapped[str] = mapped_column(String(255))
    key: Mapped[str] = mapped_column(String(255))
    published_at: Mapped[datetime] = mapped_column(UtcDateTime)


Index("aftercommit_event_key", EventRecord.event, EventRecord.key, unique=True)
Index("aftercommit_event_published", EventRecord.published_at)


class ScheduleRecord(Base):
    """A schedule: when a task is due again and again, and what became of that.

    Attributes:
        name: Its name.
        task: The task's name.
        arguments: What crosses to each run, as JSON by parameter.
        origin: ``code`` if the application's code declares it, ``data`` if it was made with ``db.create_schedule``.
        kind: ``cron`` or ``every``.
        expression: The cron expression.
        seconds: The distance of two ticks of ``every``.
        timezone: The zone of the cron expression.
        options: How it catches up, what becomes of overlaps, and so on.
        version: Rises with each change, so that nobody fires by what was true before.
        anchor: Where ``every`` counts from: the moment of its creation.
        next_at: Its next tick; None if there is none to come.
        last_at: The last tick that fired.
        last_task: The record of that one.
        fired: How many ticks fired.
        skipped: How many were left out because the one before was unfinished.
        missed: How many were not fired by themselves because nobody could in time.
        paused_at: Since when it is paused.
        paused_by: Who paused it.
        declared_at: When code that declares it started last.
        ended_at: Since when it has ended.
        ended_because: Why.
        created_at: When it was made.
        parent: The run that made it.
    """

    __tablename__ = "aftercommit_schedule"

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    task: Mapped[str] = mapped_column(String(255))
    arguments: Mapped[dict[str, Any]] = mapped_column(JSON(none_as_null=True))
    origin: Mapped[str] = mapped_column(String(4))
    kind: Mapped[str] = mapped_column(String(5))
    expression: Mapped[str | None] = mapped_column(String(255))
    seconds: Mapped[float | None] = mapped_column(Float(53))
    timezone: Mapped[str | None] = mapped_column(String(255))
    options: Mapped[dict[str, Any]] = mapped_column(JSON(none_as_null=True))
    version: Mapped[int] = mapped_column(Integer, server_default=text("1"))
    anchor: Mapped[datetime] = mapped_column(UtcDateTime)
    next_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_task: Mapped[UUID | None] = mapped_column(Uuid)
    fired: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    skipped: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    missed: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    paused_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    paused_by: Mapped[str | None] = mapped_column(String(255))
    declared_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_because: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    parent: Mapped[UUID | None] = mapped_column(Uuid)

    def __repr__(self) -> str:
        """Name, and when it is due next."""
        return f"<ScheduleRecord {self.name!r} of {self.task!r}, next at {self.next_at}>"


_alive = ScheduleRecord.paused_at.is_(None) & ScheduleRecord.ended_at.is_(None)
Index("aftercommit_schedule_next", ScheduleRecord.next_at, postgresql_where=_alive, sqlite_where=_alive)


class SchemaRecord(Base):
    """Which release's tables these are."""

    __tablename__ = "aftercommit_schema"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    version: Mapped[int] = mapped_column(Integer)


# A queue's rows change several times and then stay: without room on the page each change would touch every index,
# and with the server's default of 20 % dead rows a large table would be vacuumed far too late.
AUTOVACUUM: Final = (
    "ALTER TABLE aftercommit_task SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, "
    "autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0.02)"
)
"""What PostgreSQL is told of the table of tasks."""

event.listen(
    TaskRecord.__table__,
    "after_create",
    DDL(AUTOVACUUM).execute_if(dialect="postgresql"),  # type: ignore[no-untyped-call]  # as SQLAlchemy has it
)
