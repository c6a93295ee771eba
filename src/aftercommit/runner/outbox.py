"""From the hand-over to the start: what waits for a commit is written with it, and started by it."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError

from aftercommit import signals
from aftercommit.commits import autocommits, simulates_commits
from aftercommit.errors import ConfigurationError, HandOverError, SchemaError, TasksNotCommitted
from aftercommit.records import happenings, writing
from aftercommit.records.moves import Claim
from aftercommit.runner.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from aftercommit.records.happenings import NewEvent
    from aftercommit.runner.listening import Herald
    from aftercommit.runner.runner import Runner
    from aftercommit.sessions import CallSite
    from aftercommit.tasks import Task
    from aftercommit.tasks.arguments import Handed

__all__ = ["Outbox", "TaskHandle", "Wanted"]

logger = logging.getLogger(__name__)


class TaskHandle:
    """What a hand-over gives back.

    Attributes:
        id: The record's id.
        created: None until the transaction commits; then whether a record was written (not if its key was queued
            already).
    """

    __slots__ = ("created", "id")

    def __init__(self, id: UUID) -> None:
        self.id = id
        self.created: bool | None = None

    if not TYPE_CHECKING:  # a type checker finds the `await` itself

        def __await__(self) -> None:
            """Refuse: there is nothing to wait for, and a task has not even started before the commit.

            Raises:
                HandOverError: Always.
            """
            raise HandOverError(
                "A hand-over is not awaited: after_commit(…) and publish(…) do nothing but note what is to be written "
                "at the commit, and return at once. Leave out the `await`. What became of the task stands in its "
                "record: session.get(TaskRecord, handle.id)."
            )

    def __repr__(self) -> str:
        """Its id, and whether it was written."""
        return f"<TaskHandle {self.id}, created={self.created}>"


@dataclass(eq=False, slots=True, kw_only=True)
class Wanted:
    """A task that waits for the commit of the transaction that asked for it.

    Attributes:
        task: The task, with its options.
        handed: Its arguments; references are resolved at the commit.
        handle: What the caller has.
        parent: The run that asks for it.
        context: What follows it, JSON text.
        event: The event with a key that it handles: it is written only if that is new.
    """

    task: Task[Any, Any]
    handed: Handed
    handle: TaskHandle
    parent: UUID | None
    context: str | None
    event: NewEvent | None = None
    arguments: str = ""
    reserved: Run | None = None
    written: bool = field(default=False)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def id(self) -> UUID:
        """The record's id."""
        return self.handle.id

    def as_run(self, worker_claim: Claim | None) -> Run:
        """The run that starts with the commit."""
        return Run(
            task=self.task,
            id=self.id,
            claim=worker_claim,
            attempt=1,
            max_attempts=self.task.settings.retry.attempts,
            arguments=self.arguments,
            context=self.context,
        )


class Stand(Protocol):
    """Where a test runs tasks by its own hand."""

    def run(self) -> int:
        """Run all that is pending; return how many ran."""
        ...

    async def async_run(self) -> int:
        """The same, on the running event loop."""
        ...


class Outbox:
    """Takes what one ``Database`` was asked for."""

    def __init__(self, started: Callable[[Sequence[Wanted]], None] | None = None) -> None:
        self.runner: Runner | None = None
        self.herald: Herald | None = None
        self.lost_tasks: list[TasksNotCommitted] = []
        self.started = started
        """Takes over what was committed, instead of the runner (tests)."""
        self._unknown: list[Callable[[], bool]] = []
        self.replaced_by: Stand | None = None
        """Runs what was taken over (tests)."""

    def write(self, connection: Connection, entries: Sequence[Wanted], *, owns_commit: bool) -> None:
        """Write the durable ones with one statement, and take places for those that can start at once."""
        for entry in entries:
            entry.arguments = entry.handed.resolve()
        durable = [entry for entry in entries if entry.task.settings.durable]
        runner = self.runner
        if owns_commit and runner is not None:
            for entry in entries:
                self._reserve(runner, entry)
        if durable:
            if autocommits(connection) and not simulates_commits(connection):
                raise ConfigurationError(
                    "This session's connection is in AUTOCOMMIT: there is no transaction whose commit a task could "
                    "wait for. Hand over with a session that has one."
                )
            worker = None if runner is None else runner.id
            try:
                durable = _of_new_events(connection, durable)
                rows = [_row(entry, worker if entry.reserved is not None else None) for entry in durable]
                written = writing.insert(connection, rows) if rows else set()
            except DBAPIError as exc:
                _explain_missing_table(exc)
                raise
            for entry in durable:
                entry.written = entry.id in written

    def committed(self, entries: Sequence[Wanted]) -> None:
        """Start what was reserved; let the runner know of the rest."""
        for entry in entries:
            entry.handle.created = entry.written or not entry.task.settings.durable
        new = [entry for entry in entries if entry.handle.created]
        if new:
            signals.emit(
                signals.TasksHandedOver(
                    tasks=tuple(entry.name for entry in new),
                    ids=tuple(entry.id for entry in new),
                    pools=tuple(entry.task.settings.pool for entry in new),
                )
            )
        if self.started is not None:
            self.started(entries)
            return
        for entry in entries:
            self._start(entry)

    def outcome_unknown(self, entries: Sequence[Wanted], connection: Connection) -> None:
        """Somebody commits past the session: look for the end of that transaction."""
        transaction = connection.get_transaction()
        if transaction is None or (self.runner is None and self.started is None):
            # Nobody here would start them, and a record tells for itself.
            return
        # Weakly: one that is gone has ended, and must not be kept from going.
        ending, of = weakref.ref(transaction), weakref.ref(connection)
        failed: list[object] = []

        def note_failure(context: Any) -> None:
            if context.connection is of():
                failed.append(context.original_exception)

        engine = connection.engine
        event.listen(engine, "handle_error", note_failure)

        def settle() -> bool:
            current = ending()
            if current is not None and current.is_active:
                return False
            event.remove(engine, "handle_error", note_failure)
            if failed:
                self.dropped(entries)
                for entry in entries:
                    # It may have been another statement's error, behind the COMMIT: to look costs nothing.
                    self.tell(entry.task.settings.pool)
            else:
                self.committed(entries)
            return True

        if self.runner is not None:
            self.runner.settle(settle)
        else:
            self.poll_outcome()
            self._unknown.append(settle)

    def poll_outcome(self) -> None:
        """Where no runner looks for the ends of such transactions: look now."""
        self._unknown = [check for check in self._unknown if not check()]

    def dropped(self, entries: Sequence[Wanted]) -> None:
        """Give back the places that were reserved: the transaction was rolled back."""
        for entry in entries:
            if entry.reserved is not None and self.runner is not None:
                self.runner.release(entry.reserved)
                entry.reserved = None

    def lost(self, entries: Sequence[Wanted], lines: Sequence[CallSite | None]) -> None:
        """Tell of work that can no longer start."""
        # Its COMMIT may have failed behind the writing, and its session was dropped before it could say so.
        self.dropped(entries)
        names = tuple(entry.name for entry in entries)
        where = tuple("unknown line" if line is None else str(line) for line in lines)
        listed = "; ".join(f"{name!r} at {line}" for name, line in zip(names, where, strict=True))
        error = TasksNotCommitted(
            f"{len(names)} task(s) will never run, because their session was closed without a commit after the "
            f"hand-over: {listed}. Hand over before you commit: move the call above session.commit(), or commit again "
            "after it.",
            tasks=names,
            lines=where,
        )
        self.lost_tasks.append(error)
        logger.error("%s", error)
        signals.emit(signals.TasksLost(tasks=names, lines=where))

    def _reserve(self, runner: Runner, entry: Wanted) -> None:
        durable = entry.task.settings.durable
        if durable and (not entry.task.options.is_plain or entry.event is not None):
            return
        run = entry.as_run(Claim(entry.id, 1, 1) if durable else None)
        if runner.reserve(run):
            entry.reserved = run

    def _start(self, entry: Wanted) -> None:
        runner, run = self.runner, entry.reserved
        if run is not None and runner is not None:
            entry.reserved = None
            runner.submit(run, reserved=True)
        elif not entry.task.settings.durable:
            if runner is None or not runner.submit(entry.as_run(None), reserved=False):
                self._report_memory_lost(entry)
        elif entry.written:
            self.tell(entry.task.settings.pool)

    def tell(self, pool: str) -> None:
        """Have *pool* looked at soon, here or elsewhere: something of it was queued."""
        if self.runner is not None:
            self.runner.expect(pool)
        elif self.herald is not None:
            self.herald.tell(pool)

    def look(self) -> None:
        """Have everybody look soon, here and elsewhere: a schedule was changed."""
        if self.runner is not None:
            self.runner.look()
        herald = self.herald if self.runner is None else self.runner.herald
        if herald is not None:
            herald.call()

    def _report_memory_lost(self, entry: Wanted) -> None:
        logger.error(
            "Task %r (%s) was kept in memory, and the runner stopped before it could start: it is lost. "
            "Declare it durable to have it kept.", entry.name, entry.id,
        )  # fmt: skip
        signals.emit(signals.TasksLost(tasks=(entry.name,), lines=("the runner stopped",)))


def _of_new_events(connection: Connection, entries: Sequence[Wanted]) -> list[Wanted]:
    """Leave out what handles an event whose key was published before."""
    keyed = {entry.event.id: entry.event for entry in entries if entry.event is not None}
    if not keyed:
        return list(entries)
    new = happenings.insert(connection, keyed.values())
    return [entry for entry in entries if entry.event is None or entry.event.id in new]


def _row(entry: Wanted, worker: UUID | None) -> writing.NewTask:
    settings, options = entry.task.settings, entry.task.options
    return writing.NewTask(
        id=entry.id,
        task=settings.name,
        pool=settings.pool,
        arguments=entry.arguments,
        worker=worker,
        key=options.key,
        priority=options.priority,
        max_attempts=settings.retry.attempts,
        delay=options.delay,
        at=options.at,
        parent=entry.parent,
        context=entry.context,
    )


def _explain_missing_table(error: DBAPIError) -> None:
    text = str(error.orig)
    is_ours = "aftercommit_task" in text or "aftercommit_event" in text
    if is_ours and ("no such table" in text or "does not exist" in text):
        raise SchemaError(
            "A task was handed over, and the table aftercommit_task does not exist in this session's database, so its "
            "transaction was rolled back. On SQLite install(app, db) makes the tables when the application starts: run "
            "it with its lifespan (a TestClient needs `with`). Elsewhere, and in scripts, call db.create_tables() or "
            "run `aftercommit schema --apply`."
        ) from error
