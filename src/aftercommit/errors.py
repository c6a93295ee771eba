"""Every error the library raises: one tree, each with a code and its facts.

A message says what happened, why it matters, and what to write instead. The ``code`` names a page under
``docs/errors``; a rule has one code, whether a guard, the checker or the docs speak of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import sqlalchemy.exc

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

__all__ = [
    "AfterCommitError",
    "BatchError",
    "BatchStopped",
    "CommitWithoutCheckpoint",
    "ConfigurationError",
    "DatabaseUnavailable",
    "HandOverError",
    "LockDeadlock",
    "LostClaim",
    "PayloadError",
    "PoolBudgetError",
    "PoolExhausted",
    "RowGone",
    "RunInVain",
    "RunnerNotRunning",
    "ScheduleError",
    "ScheduleStateError",
    "SchemaError",
    "SessionEnded",
    "SessionShared",
    "TaskCancelled",
    "TaskDefinitionError",
    "TaskStateError",
    "TaskTimeout",
    "TasksNotCommitted",
    "UnsafeArgument",
    "WorkerLost",
]


class AfterCommitError(Exception):
    """Base of all errors of this library.

    Attributes:
        code: The rule that was broken, such as ``"AC101"``; ``docs/errors/AC101.md`` explains it.
    """

    code: ClassVar[str] = "AC000"

    def __str__(self) -> str:
        """The message, with its code at the end."""
        return f"{super().__str__()} [{self.code}]"


# --- configuration: raised while an application is put together -------------------------------------------------


class ConfigurationError(AfterCommitError):
    """Settings that cannot work together, found before anything ran."""

    code = "AC401"


class TaskDefinitionError(ConfigurationError):
    """A function that cannot be a task, or two tasks under one name."""

    code = "AC111"


class SchemaError(ConfigurationError):
    """The library's own tables are missing, or older than this release needs."""

    code = "AC402"


class PoolBudgetError(ConfigurationError):
    """All processes together may open more connections than the server allows; raised where ``strict=True``.

    Attributes:
        processes: How many processes were counted.
        per_process: How many connections each may open.
        allowed: How many the server allows.
    """

    code = "AC403"

    def __init__(self, message: str, *, processes: int, per_process: int, allowed: int) -> None:
        super().__init__(message)
        self.processes = processes
        self.per_process = per_process
        self.allowed = allowed


# --- hand-over: raised where a task is asked for ----------------------------------------------------------------


class HandOverError(AfterCommitError):
    """A task was asked for in a way that can never start it."""

    code = "AC114"


class RunnerNotRunning(HandOverError):
    """A task in memory was asked for in a process that runs no tasks of its pool."""

    code = "AC115"


class UnsafeArgument(HandOverError, TypeError):
    """An argument cannot cross to the task.

    Attributes:
        task: The task's name.
        parameter: The parameter, with the path inside it: ``"order"``, ``"items[2].owner"``.
        thing: What was found there, in words.
        code: ``AC101`` for sessions, ``AC102`` for mapped instances, ``AC105`` for connections and cursors,
            ``AC109`` for everything else.
    """

    code = "AC109"

    def __init__(self, message: str, *, task: str, parameter: str, thing: str, code: str = "AC109") -> None:
        super().__init__(message)
        self.task = task
        self.parameter = parameter
        self.thing = thing
        self.code = code  # type: ignore[misc]  # one class, four rules: the code says which thing it was


class TasksNotCommitted(AfterCommitError):
    """Tasks were left waiting when their session closed without a commit: they will never run.

    Attributes:
        tasks: The names of the tasks.
        lines: Where each was handed over, as ``"file:line in function"``.
    """

    code = "AC110"

    def __init__(self, message: str, *, tasks: Sequence[str], lines: Sequence[str]) -> None:
        super().__init__(message)
        self.tasks = tuple(tasks)
        self.lines = tuple(lines)


# --- sessions and pools -----------------------------------------------------------------------------------------


class SessionEnded(AfterCommitError):
    """A session was used after its end.

    Attributes:
        owner: Who had the session: a request line, a task with its attempt, or a line of code.
        ended_for: Seconds since it ended.
        operation: The attribute that was asked for, such as ``"execute"``.
    """

    code = "AC201"

    def __init__(self, message: str, *, owner: str, ended_for: float, operation: str) -> None:
        super().__init__(message)
        self.owner = owner
        self.ended_for = ended_for
        self.operation = operation


class SessionShared(AfterCommitError):
    """A session was used while somebody else's call on it was under way. Nothing was done; the other goes on.

    Attributes:
        owner: Who has the session: a request line, a task with its attempt, or a line of code.
        operation: What was refused, such as ``"execute"``.
        doing: What the first user was in, such as ``"flush"``.
        line: Where, as ``"file:line in function"``; None where that cannot be seen.
    """

    code = "AC103"

    def __init__(self, message: str, *, owner: str, operation: str, doing: str, line: str | None) -> None:
        super().__init__(message)
        self.owner = owner
        self.operation = operation
        self.doing = doing
        self.line = line


class PoolExhausted(AfterCommitError, sqlalchemy.exc.TimeoutError):  # pyright: ignore[reportIncompatibleVariableOverride]
    """No connection of a pool came free in time, or none could ever come free.

    Attributes:
        pool: The pool's name.
        waiting_themselves: How many of those who hold its connections wait for another one.
        is_standstill: Whether it was refused at once, because everybody who could have given one back waits himself.
        is_alone: Whether all of them are held by the one who was refused: to try again would be in vain.
    """

    # SQLAlchemy's errors have a code of the instance, ours of the class.
    code = "AC203"  # type: ignore[misc]

    def __init__(
        self,
        message: str,
        *,
        pool: str,
        waiting_themselves: int = 0,
        is_standstill: bool = False,
        is_alone: bool = False,
    ) -> None:
        super().__init__(message)
        self.pool = pool
        self.waiting_themselves = waiting_themselves
        self.is_standstill = is_standstill
        self.is_alone = is_alone

    def __str__(self) -> str:
        """The message, with its code at the end, and without the page that SQLAlchemy would name for it."""
        return f"{self.args[0]} [{self.code}]"


class DatabaseUnavailable(AfterCommitError):
    """The database could not be reached when the application or a worker started."""

    code = "AC204"


class LockDeadlock(AfterCommitError):
    """SQLite's write lock was asked for by work that holds it itself, so that it could never come free.

    Attributes:
        holder: Who has the lock, since when, and on which line it was taken.
        is_alone: Whether the work that asks has it itself; otherwise the holder waits for that work, through others.
    """

    code = "AC205"

    def __init__(self, message: str, *, holder: str, is_alone: bool) -> None:
        super().__init__(message)
        self.holder = holder
        self.is_alone = is_alone


# --- runs of tasks ----------------------------------------------------------------------------------------------


class RunError(AfterCommitError):
    """Something ended a run of a task.

    Attributes:
        task: The task's name.
        run_id: The id of its record, where there is one.
    """

    code = "AC300"

    def __init__(self, message: str, *, task: str, run_id: UUID | None = None) -> None:
        super().__init__(message)
        self.task = task
        self.run_id = run_id


class RowGone(RunError):
    """A row that was handed over by reference is gone, or not visible to the task's session.

    Attributes:
        row: The row, as ``"Order(7,)"``.
    """

    code = "AC301"

    def __init__(self, message: str, *, task: str, row: str, run_id: UUID | None = None) -> None:
        super().__init__(message, task=task, run_id=run_id)
        self.row = row


class LostClaim(RunError):
    """This run no longer owns its record: another took over, or it was cancelled. Nothing was committed."""

    code = "AC302"


class TaskCancelled(LostClaim):
    """This run's task was cancelled by hand. Nothing was committed.

    Attributes:
        by: Who has cancelled it, as given to ``db.cancel(id, by=…)``; None if that was not said.
    """

    code = "AC308"

    def __init__(self, message: str, *, task: str, run_id: UUID | None = None, by: str | None = None) -> None:
        super().__init__(message, task=task, run_id=run_id)
        self.by = by


class TaskTimeout(RunError, TimeoutError):
    """A run took longer than its task's ``timeout``. Nothing of it was committed."""

    code = "AC303"


class WorkerLost(RunError):
    """The worker of a run died, or fell silent, as often as the task may be tried."""

    code = "AC304"


class PayloadError(RunError):
    """Stored arguments do not fit the task any more: they were changed, or its signature was."""

    code = "AC305"


class CommitWithoutCheckpoint(RunError):
    """A commit in the middle of a task wrote something that a repeated run would write again. Rolled back."""

    code = "AC202"


class RunInVain(RunError):
    """A task was claimed again and again and came to nothing, or its own transaction hides its record."""

    code = "AC307"


class TaskStateError(AfterCommitError):
    """An operation does not fit the record's state: a task that runs cannot be retried, and so on."""

    code = "AC306"


# --- batches ----------------------------------------------------------------------------------------------------


class BatchError(AfterCommitError):
    """A batch is used in a way that could lose or repeat records: it stops, and the chunk at hand is rolled back."""

    code = "AC501"


class BatchStopped(AfterCommitError):
    """More records of a batch failed than ``max_failures`` allows. What was done stays done.

    Attributes:
        report: What was done, and the failures.
    """

    code = "AC502"

    def __init__(self, message: str, *, report: Any) -> None:
        super().__init__(message)
        self.report = report


# --- schedules --------------------------------------------------------------------------------------------------


class ScheduleError(ConfigurationError):
    """A schedule that cannot be meant: its expression, its time zone, its options, or its name."""

    code = "AC601"


class ScheduleStateError(AfterCommitError):
    """An operation does not fit a schedule: there is none of that name, or the application's code declares it."""

    code = "AC602"
