"""One claim of one task: what its commits must hold, and what is told of it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from aftercommit import signals
from aftercommit.commits import fence_commits
from aftercommit.errors import (
    CommitWithoutCheckpoint,
    ConfigurationError,
    LostClaim,
    RunInVain,
    TaskCancelled,
    TaskTimeout,
    WorkerLost,
)
from aftercommit.plain import one_line
from aftercommit.pools.taking import make_takeable
from aftercommit.records import elsewhere, moves
from aftercommit.records.moves import Claim, Failure
from aftercommit.sessions import Owner
from aftercommit.tasks.current import CurrentRun, current_run
from aftercommit.tasks.retry import Tries
from aftercommit.tasks.tick import tick_of
from aftercommit.tasks.transient import Fault, cancels_ours, fault_of
from aftercommit.wording import told, told_fully

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from aftercommit.tasks import Task

__all__ = ["Run", "failure_of", "note_fault", "now", "stop_at_statement"]

_SERVER_LAG: Final = 0.25
"""Seconds by which the server's own time limits come after ours, which tell more."""


@dataclass(eq=False, slots=True, kw_only=True)
class Run:
    """A task that this process has taken, from the claim to its end.

    Attributes:
        task: The task.
        id: The record's id.
        claim: The claim on the record; None for a task in memory.
        attempt: 1 for the first.
        max_attempts: How many there may be.
        arguments: JSON text.
        context: What follows the task across the hand-over, JSON text.
        checkpoint: What an earlier run saved, JSON text.
        refunds: How many claims before this one came to nothing, without using an attempt up.
        waited: Seconds between its being due and its being taken.
        asked_ago: Seconds between its hand-over and its being taken, by the database's clock.
        taken: When that was, by the monotonic clock; 0.0 before.
        pool: The pool it was asked for in, and runs in; the task's own by default.
        on_progress: Called when the task tells of its progress.
        on_deadline: Called when a try begins that has a time limit.
        tries: What this claim has been repeated for.
        repeated: How often, attempts included.
        started: When it started here, by the monotonic clock; 0.0 before.
        deadline: When its time is over, by the monotonic clock; None without a limit.
        job: The asyncio task that runs it, of an async task.
        stopping: Whether it was cancelled by an orderly stop.
        abandoned: Why nothing of it may be committed any more, or None.
        is_taken_over: Whether somebody else records its end: it hangs.
        is_committed: Whether its last commit is done.
        was_lost: Whether its end found the record in other hands.
        ends_schedule: Whether its failure has ended the schedule that asked for it.
        was_called: Whether the task's function was called, under this claim.
        got_on: Whether this claim has saved something that the next one goes on from.
    """

    task: Task[Any, Any]
    id: UUID
    claim: Claim | None
    attempt: int
    max_attempts: int
    arguments: str
    context: str | None = None
    checkpoint: str | None = None
    refunds: int = 0
    waited: float = 0.0
    asked_ago: float = 0.0
    taken: float = 0.0
    pool: str = ""
    on_progress: Callable[[Run], None] | None = None
    on_deadline: Callable[[Run], None] | None = None
    tries: Tries = field(default_factory=Tries)
    repeated: int = 0
    started: float = 0.0
    deadline: float | None = None
    job: asyncio.Task[None] | None = None
    stopping: bool = False
    abandoned: Exception | None = None
    is_taken_over: bool = False
    is_committed: bool = False
    was_lost: bool = False
    ends_schedule: bool = False
    was_called: bool = False
    got_on: bool = False
    current: CurrentRun = field(init=False)
    session: Session | None = None
    connection: Connection | None = None
    _has_tried: bool = False
    _finishing: bool = False
    _result: str | None = None
    _changes: int = 0

    def __post_init__(self) -> None:
        """Make what the task's code sees of it; what it restores is read with the first try, where it may fail."""
        self.pool = self.pool or self.task.settings.pool
        self.current = self._make_current(None)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def owner(self) -> Owner:
        """Who its session belongs to."""
        task = self.task
        return Owner(
            task.name, task.line, kind="task", allowed=task.settings.timeout, task_id=self.id, attempt=self.attempt
        )

    @property
    def seconds(self) -> float:
        """Since it started here."""
        return time.monotonic() - self.started if self.started else 0.0

    @property
    def since_hand_over(self) -> float:
        """Seconds: by the database's clock until it was taken here, and by ours since."""
        return self.asked_ago + (time.monotonic() - self.taken if self.taken else 0.0)

    def facts(self) -> dict[str, Any]:
        """What every signal about it says."""
        return {"task": self.name, "id": self.id, "pool": self.pool, "attempt": self.attempt}

    def begin(self) -> None:
        """Note the start of this claim."""
        self.started = time.monotonic()
        waited = self.waited + (self.started - self.taken if self.taken else 0.0)
        self.task.figures.wait.add(waited)
        signals.emit(signals.TaskStarted(**self.facts(), waited=waited))

    def prepare(self, session: Session) -> None:
        """Get ready for one try, on *session*: every commit on it must hold what this module demands."""
        self._finishing = False
        self._result = None
        if self._has_tried or self.checkpoint is not None:
            self.current = self._make_current(self.checkpoint)
        self._has_tried = True
        self.current.behind = self
        self.session = session
        timeout = self.task.settings.timeout
        if timeout is not None:
            self.deadline = time.monotonic() + timeout
            if self.on_deadline is not None:
                self.on_deadline(self)
        fence_commits(session, self)

    def refuse_autocommit(self, connection: Connection) -> None:
        """Raise where nothing on *connection* would be in a transaction.

        Raises:
            ConfigurationError: If its isolation level is AUTOCOMMIT.
        """
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            raise ConfigurationError(
                f"Task {self.name!r} put its session into AUTOCOMMIT: every statement would take effect by itself, and "
                "again when the run is repeated. Leave the session's isolation level alone; use db.session() for work "
                "that needs no transaction."
            )

    def end_try(self) -> None:
        """Let go of what belonged to one try; what is done from here on is not the function's doing."""
        self.session = None
        self.connection = None
        self.deadline = None
        if self.current.stopped_by is not None:
            # A thread that hangs still has the old one, and is to be told.
            self.current = self._make_current(None)

    def renew_current(self) -> None:
        """Forget what was seen during an earlier try, for code that runs beside the task's function."""
        self.current = self._make_current(self.checkpoint)

    def close(self) -> None:
        """Let go of everything that may be large or alive: somebody may keep the run, nobody what it ran with."""
        self.end_try()
        self.job = None
        self.arguments = ""
        self._result = None
        self.current.forget()

    def stop_with(self, error: Exception) -> None:
        """Have its next statement and every commit raise *error*."""
        self.abandoned = error
        self.current.stopped_by = error

    def finish_with(self, result: Any) -> None:
        """Make the next commit the last one."""
        self._result = self.task.results.store(result, task=self.name)
        self._finishing = True

    @property
    def is_finishing(self) -> bool:
        """Whether the function has returned and its last commit is being made."""
        return self._finishing

    @property
    def is_overdue(self) -> bool:
        """Whether its time is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def _make_current(self, checkpoint: str | None) -> CurrentRun:
        return CurrentRun(
            id=self.id,
            name=self.name,
            attempt=self.attempt,
            restored=None if checkpoint is None else json.loads(checkpoint),
            on_progress=self._progressed,
            tick=tick_of(self.context),
            pool=self.pool,
        )

    def _progressed(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self)

    # --- its commits, see commits.fences -------------------------------------------------------------------------

    def begun(self, connection: Connection) -> None:
        """A transaction of its session has begun."""
        self.refuse_autocommit(connection)
        make_takeable(connection)
        self.connection = connection
        if self.abandoned is not None:
            # Whoever ended it found no connection to take.
            raise self.abandoned
        self._changes = moves.changes_so_far(connection)
        if self.deadline is not None:
            moves.limit_time(connection, max(0.0, self.deadline - time.monotonic()) + _SERVER_LAG)

    def begun_elsewhere(self, connection: Connection) -> None:
        """Its session works on a second connection, too."""
        elsewhere.note(connection)

    def rolled_back(self, connection: Connection) -> None:
        """Whatever begins on the connection now has written nothing yet."""
        if not (connection.closed or connection.invalidated):
            self._changes = moves.changes_so_far(connection)

    def committing_anywhere(self, connection: Connection, others: Sequence[Connection]) -> None:
        """A COMMIT comes on one of several connections: of these, only its own may have written."""
        elsewhere.refuse_writes(connection, others, task=self.name)

    def committing(self, connection: Connection) -> None:
        """A COMMIT comes on its connection, whoever sends it."""
        if self.abandoned is not None:
            raise self.abandoned
        if self.is_overdue:
            raise self.overdue()
        if self._finishing:
            if self.claim is not None and not moves.finish(connection, self.claim, self._result):
                raise self.lost()
        else:
            self._commit_in_the_middle(connection)
        if connection.dialect.name == "sqlite" and self.claim is not None:
            # Nobody else could write it now without waiting for us.
            progress = self.current.take_progress()
            if progress is not None:
                moves.set_progress(connection, self.id, *progress)
        # Of a transaction that begins behind this commit past the session, nobody would be told.
        self._changes = moves.changes_so_far(connection)

    def _commit_in_the_middle(self, connection: Connection) -> None:
        value = self.current.take_checkpoint()
        if value is not None:
            if self.claim is None:
                self.checkpoint = value
            elif not moves.save_checkpoint(connection, self.claim, value):
                raise self.lost()
            return
        if not self.task.settings.repeatable and moves.wrote_something(connection, self._changes):
            raise CommitWithoutCheckpoint(
                f"Task {self.name!r} committed before its end, and wrote something: if the run is repeated after a "
                "crash or a conflict, it would be written again. Rolled back. The last commit is made for you: leave "
                "out session.commit() at the end. In the middle, call current_run().checkpoint(value) before it and "
                "go on from current_run().restored; or declare @db.task(repeatable=True) if running again from the "
                "top does no harm (status flags, upserts).",
                task=self.name,
                run_id=self.id,
            )
        if self.claim is not None and not moves.lock(connection, self.claim):
            raise self.lost()

    def lost(self) -> LostClaim:
        """The error of a run that no longer owns its record."""
        return LostClaim(
            f"Task {self.name!r} ({self.id}, attempt {self.attempt}) no longer owns its record: it was rescued by "
            "another worker after this one fell silent, or it was cancelled. Nothing of this run was committed.",
            task=self.name,
            run_id=self.id,
        )

    def cancelled(self, by: str | None) -> TaskCancelled:
        """The error of a run whose record was cancelled by hand."""
        return TaskCancelled(
            f"Task {self.name!r} ({self.id}, attempt {self.attempt}) was cancelled"
            + ("" if by is None else f" by {one_line(by)}")
            + ". Nothing of this run was committed since its last checkpoint. It can be queued again with "
            "db.retry(id).",
            task=self.name,
            run_id=self.id,
            by=by,
        )

    def hidden(self) -> RunInVain:
        """The error of a run whose own transaction changed or hid its record."""
        return RunInVain(
            f"Task {self.name!r} ({self.id}, attempt {self.attempt}) could not commit: in its own transaction its "
            "record was changed, deleted, or not to be found, so that nothing could say that it is done. Rolled back; "
            "it would be the same each time. Leave the row of the task at hand alone (db.cancel and db.retry are for "
            "those of others), and keep aftercommit's tables in sight (search_path, schema_translate_map).",
            task=self.name,
            run_id=self.id,
        )

    def in_vain(self) -> RunInVain:
        """The error of a run that was claimed too often."""
        return RunInVain(
            f"Task {self.name!r} ({self.id}) was claimed {self.refunds} times without coming to an end or using up an "
            "attempt: it met conflicts for as long as that, its worker never ran it to its end, or something resets "
            "its record. Nothing of these runs was committed. Look at the record's error and at the workers' logs; "
            "mended, it can be queued again with db.retry(id).",
            task=self.name,
            run_id=self.id,
        )

    def interrupted(self) -> WorkerLost:
        """The error of a run that may begin only once, and was stopped with its process."""
        return WorkerLost(
            f"Task {self.name!r} ({self.id}) was interrupted because its process stopped, and Retry(attempts=1) means "
            "that it is not begun again. Nothing of it was committed. Give the process more grace, or queue it again "
            "with db.retry(id) once you know that it does no harm.",
            task=self.name,
            run_id=self.id,
        )

    def overdue(self) -> TaskTimeout:
        """The error of a run that took too long."""
        return TaskTimeout(
            f"Task {self.name!r} ({self.id}) took longer than its timeout of {self.task.settings.timeout} s. "
            "Rolled back. Give it more time with @db.task(timeout=…), or commit what is done with a checkpoint.",
            task=self.name,
            run_id=self.id,
        )


def failure_of(error: BaseException, *, expected: bool = False) -> Failure:
    """What the record keeps of *error*: no values, neither bound ones nor those in the messages of databases."""
    if expected:
        return Failure(error=told(error), traceback=None, expected=True)
    return Failure(error=told(error), traceback=told_fully(error))


def now() -> str:
    """This moment, for an entry in a record's list of errors."""
    return datetime.now(UTC).isoformat()


def note_fault(context: Any) -> None:
    """Remember, on the run at hand, what the database answered: the task's code may catch it.

    A listener of the engines' ``handle_error``. The usual get-or-create swallows a unique violation, finds nothing in
    its old snapshot, and then fails with an error of its own.
    """
    run = current_run()
    if run is None:
        return
    fault = fault_of(context.sqlalchemy_exception or context.original_exception)
    run.saw_unique = run.saw_unique or fault is Fault.UNIQUE
    run.saw_conflict = run.saw_conflict or fault is Fault.CONFLICT
    run.saw_cancelled = run.saw_cancelled or cancels_ours(context.sqlalchemy_exception or context.original_exception)


def stop_at_statement(connection: Connection, _statement: str) -> None:
    """Raise what has ended the run at hand, before it sends another statement.

    One of the engines' ``before_statement``. A thread cannot be stopped, but it can be told.
    """
    run = current_run()
    if run is None:
        return
    if run.stopped_by is not None:
        raise run.stopped_by
    behind = run.behind
    if behind is not None and behind.connection is connection:
        # Set behind the session's back, once its transaction had begun.
        behind.refuse_autocommit(connection)
