"""Tasks that code of this process waits for or shows: one thread and one connection look for all of them.

There is neither while nothing is followed. What ends in this process is heard of at once, what ends elsewhere is found
by the next look.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aftercommit import signals
from aftercommit.runner.bookkeeper import Bookkeeper
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from uuid import UUID

    from sqlalchemy import Connection

    from aftercommit.pools import Pools
    from aftercommit.records.states import TaskState

__all__ = ["Followed", "Following"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE: Final = 0.02
_GROWTH: Final = 1.5
_LONGEST_PAUSE: Final = 1.0
_LINGER_SECONDS: Final = 5.0
_ENDS: Final = (
    signals.TaskSucceeded,
    signals.TaskFailed,
    signals.TaskDiscarded,
    signals.ClaimLost,
    signals.TasksCancelled,
)


@dataclass(eq=False, slots=True)
class Followed:
    """One who follows one task.

    Attributes:
        id: The task.
        told: Called after each look, on the thread that looks; None: there is no such task.
        stopped: Called when nothing is looked for any more: the process stops.
        is_urgent: Whether it waits for the end: looked for at first often, then rarer, and at once where the end is
            heard of. Else it is looked for once a second, together with all others.
    """

    id: UUID
    told: Callable[[TaskState | None], None]
    stopped: Callable[[], None]
    is_urgent: bool
    pause: float = _LONGEST_PAUSE
    due: float = 0.0


class Following:
    """Those who follow tasks of one ``Database``."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._lock = threading.Lock()
        self._all: set[Followed] = set()
        self._books: Bookkeeper | None = None
        self._idle_since = 0.0
        self.looks = 0
        """How often the database was asked."""

    def add(self, followed: Followed) -> None:
        """Follow it from now on. No I/O."""
        now = time.monotonic()
        with self._lock:
            followed.pause = _FIRST_PAUSE if followed.is_urgent else _LONGEST_PAUSE
            # Together with the others, so that many cost no more than one.
            together = [each.due for each in self._all]
            followed.due = now if followed.is_urgent else min([now + _LONGEST_PAUSE, *together])
            self._all.add(followed)
            if self._books is None or not self._books.is_alive:
                self._books = Bookkeeper(self._pools, self._round)
                self._books.start()
                signals.subscribe(*_ENDS)(self._heard)
            self._books.wake()

    def remove(self, followed: Followed) -> None:
        """Follow it no more."""
        with self._lock:
            self._all.discard(followed)
            self._idle_since = time.monotonic()

    def submit(self, work: Callable[[Connection], T]) -> Future[T]:
        """Have ``work(connection)`` run on the connection that looks; for one who follows something."""
        with self._lock:
            books = self._books
        if books is None:
            raise TimeoutError("This process stops, and does not look for tasks any more.")
        return books.submit(work)

    def stop(self) -> None:
        """Tell all who follow that the process stops, and give the connection back."""
        with self._lock:
            everybody, self._all = list(self._all), set()
            books, self._books = self._books, None
        for each in everybody:
            each.stopped()
        if books is not None:
            signals.unsubscribe(self._heard)
            books.stop(5.0)

    def _heard(self, signal: Any) -> None:
        ids = signal.ids if isinstance(signal, signals.TasksCancelled) else (signal.id,)
        with self._lock:
            mine = [each for each in self._all if each.is_urgent and each.id in ids]
            for each in mine:
                each.due = 0.0
            if mine and self._books is not None:
                self._books.wake()

    def _round(self) -> float:
        from aftercommit.records.states import states_of  # mapping the tables takes time that an import must not

        now = time.monotonic()
        with self._lock:
            everybody = list(self._all)
            books = self._books
            if not everybody:
                return self._leave_if_idle(now)
            following = min(each.due for each in everybody)
            if now < following or books is None:
                return max(0.0, following - now)
            for each in everybody:
                each.due = now + each.pause
                each.pause = min(each.pause * _GROWTH, _LONGEST_PAUSE)
        try:
            found = books.execute(lambda c: states_of(c, {each.id for each in everybody}))
        except Exception as exc:  # whatever it was, the next look comes
            logger.debug("Tasks that are followed could not be looked for", exc_info=without_values(exc))
            return _LONGEST_PAUSE
        for each in everybody:
            each.told(found.get(each.id))
        self.looks += 1
        return max(0.0, min(each.due for each in everybody) - time.monotonic())

    def _leave_if_idle(self, now: float) -> float:
        """Give the connection back where nothing was followed for a while; under the lock, on the thread that ends."""
        left = self._idle_since + _LINGER_SECONDS - now
        if left > 0 or self._books is None:
            return max(left, 0.01)
        self._books.stop()
        self._books = None
        signals.unsubscribe(self._heard)
        return 0.0
