"""The run at hand: what a task's code may ask and tell about itself."""

from __future__ import annotations

import json
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from aftercommit.errors import HandOverError

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from aftercommit.tasks.tick import Tick

__all__ = ["CurrentRun", "as_current", "current_run"]


class CurrentRun:
    """One run of a task, from inside.

    Attributes:
        id: The record's id; the idempotency key for everything outside this database.
        name: The task's name.
        attempt: 1 for the first.
        pool: The pool it runs in.
        restored: The value that an earlier run of this task saved with ``checkpoint``; None if there is none.
        tick: The tick of the schedule that asked for this run; None if the task was handed over by hand.
    """

    __slots__ = (
        "_checkpoint",
        "_lock",
        "_on_progress",
        "_progress",
        "attempt",
        "batches",
        "behind",
        "id",
        "name",
        "pool",
        "restored",
        "saw_cancelled",
        "saw_conflict",
        "saw_unique",
        "stopped_by",
        "tick",
    )

    def __init__(
        self,
        *,
        id: UUID,
        name: str,
        attempt: int,
        restored: Any,
        on_progress: Callable[[], None] | None,
        tick: Tick | None = None,
        pool: str = "",
    ) -> None:
        self.pool = pool
        self.tick = tick
        self.id = id
        self.name = name
        self.attempt = attempt
        self.restored = restored
        self.saw_unique = False
        self.saw_conflict = False
        self.saw_cancelled = False
        self.stopped_by: Exception | None = None
        self.behind: Any = None
        """The runner's side of this run, for batches: its claim, its session, its deadline."""
        self.batches: dict[str, int] = {}
        """How many batches this try has begun, by the name of their handler."""
        self._checkpoint: str | None = None
        self._progress: tuple[int, int | None] | None = None
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        """Name, id and attempt."""
        return f"<run of {self.name} {self.id}, attempt {self.attempt}>"

    def progress(self, done: int, total: int | None = None) -> None:
        """Say how far the run is, for whoever looks at ``TaskRecord.progress_done`` and ``progress_total``.

        Cheap enough for every record: only the last value is written, now and then, outside the task's transaction
        (on SQLite, where that would wait for the task itself, with the task's next commit).

        Args:
            done: What is done.
            total: Of how many, if that is known.

        Raises:
            ValueError: If *done* is negative or beyond *total*.
        """
        if done < 0 or (total is not None and done > total):
            raise ValueError(f"progress({done}, {total}): 0 <= done <= total does not hold")
        with self._lock:
            self._progress = (done, total)
        if self._on_progress is not None:
            self._on_progress()

    @property
    def is_cancelled(self) -> bool:
        """Whether this run was told to end: cancelled by hand, its time is over, or its record is another worker's.

        For code that computes or waits in a thread between two statements, where nothing can end it from outside.
        """
        return self.stopped_by is not None

    def check(self) -> None:
        """Raise what has ended this run, if it was told to end; its next statement and its commit do so by themselves.

        Raises:
            TaskCancelled: If it was cancelled by hand.
            TaskTimeout: If its time is over.
            LostClaim: If its record is another worker's by now.
        """
        if self.stopped_by is not None:
            raise self.stopped_by

    def checkpoint(self, value: Any) -> None:
        """Save *value* with the next commit of the task's session: a later run finds it in ``restored``.

        Saved in the same transaction as what the task wrote, so the two never disagree.

        Args:
            value: Anything that JSON gives back unchanged: where to go on.

        Raises:
            HandOverError: If JSON would change it.
        """
        try:
            text = json.dumps(value, allow_nan=False)
            back = json.loads(text)
        except (TypeError, ValueError) as exc:
            raise HandOverError(f"checkpoint({type(value).__name__}): JSON cannot carry this value: {exc}.") from exc
        if back != value:
            raise HandOverError(
                f"checkpoint({type(value).__name__}): the value would come back changed from JSON. "
                "Save plain numbers, strings, lists and dictionaries, such as the last id that is done."
            )
        self._checkpoint = text

    def forget(self) -> None:
        """Let go of the runner: a connection's context may keep this object for as long as the connection lives."""
        self._on_progress = None
        self.behind = None

    def take_checkpoint(self) -> str | None:
        """Hand out the value to be saved with this commit, once, as JSON text."""
        value, self._checkpoint = self._checkpoint, None
        return value

    def take_progress(self) -> tuple[int, int | None] | None:
        """Hand out the last progress that nobody has written yet."""
        with self._lock:
            value, self._progress = self._progress, None
        return value


_current: ContextVar[CurrentRun | None] = ContextVar("aftercommit_run", default=None)


def current_run() -> CurrentRun | None:
    """Return the run that the calling code belongs to, or None outside of tasks."""
    return _current.get()


class as_current:  # noqa: N801  # reads as a verb where it is used: `with as_current(run):`
    """Make *run* the current one for the length of a ``with``."""

    __slots__ = ("_run", "_token")

    def __init__(self, run: CurrentRun) -> None:
        self._run = run

    def __enter__(self) -> CurrentRun:
        """Set it."""
        self._token = _current.set(self._run)
        return self._run

    def __exit__(self, *_: object) -> None:
        """Set back what was there."""
        _current.reset(self._token)
