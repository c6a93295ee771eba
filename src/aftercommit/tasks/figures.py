"""What became of one task's runs in this process: counted where it happens.

They hang on the task, which belongs to one ``Database``. Signals would not do: those are everybody's, and two
databases of one process must not mix their figures.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from aftercommit.watch.timing import Meter

__all__ = ["Counts", "TaskFigures"]


@dataclass(slots=True, kw_only=True)
class Counts:
    """How often something happened, since the process started.

    Attributes:
        done: Runs succeeded.
        failed: Runs failed for good.
        retried: Runs failed, and a later attempt follows.
        conflicts: Runs, or chunks of a batch in them, were repeated without using up an attempt.
        given_back: Runs were interrupted by a stop, or had not begun, and were queued again.
        expected: Runs failed in a way that the application knows; not among ``failed``.
        discarded: Runs ended with ``Discard``.
        postponed: Runs ended with ``RetryLater``.
    """

    done: int = 0
    failed: int = 0
    retried: int = 0
    conflicts: int = 0
    given_back: int = 0
    expected: int = 0
    discarded: int = 0
    postponed: int = 0


class TaskFigures:
    """The figures of one task; fed from any thread.

    Attributes:
        run: How long runs took, from their start here to their end, whatever it was.
        wait: How long they had been due when they began.
    """

    __slots__ = ("_counts", "_lock", "run", "wait")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()
        self.run = Meter()
        self.wait = Meter()

    def succeeded(self, seconds: float) -> None:
        """A run succeeded, so many seconds after it began."""
        with self._lock:
            self._counts.done += 1
        self.run.add(seconds)

    def failed(self, seconds: float, *, expected: bool = False) -> None:
        """A run failed for good; 0.0 seconds if it never began."""
        with self._lock:
            if expected:
                self._counts.expected += 1
            else:
                self._counts.failed += 1
        if seconds:
            self.run.add(seconds)

    def discarded(self, seconds: float) -> None:
        """A run has said that there is nothing to do."""
        with self._lock:
            self._counts.discarded += 1
        self.run.add(seconds)

    def postponed(self, seconds: float) -> None:
        """A run has said that it cannot be done yet."""
        with self._lock:
            self._counts.postponed += 1
        self.run.add(seconds)

    def repeats(self, *, counts: bool) -> None:
        """A run will be made again; *counts*: as a new attempt."""
        with self._lock:
            if counts:
                self._counts.retried += 1
            else:
                self._counts.conflicts += 1

    def given_back(self, number: int = 1) -> None:
        """Runs were queued again by a stop."""
        with self._lock:
            self._counts.given_back += number

    def counts(self) -> Counts:
        """What was counted so far."""
        with self._lock:
            return replace(self._counts)
