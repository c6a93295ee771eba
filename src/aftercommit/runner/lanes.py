"""A lane per kind of task: its places, its short backlog, and its threads."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from aftercommit.runner.run import Run

__all__ = ["Lane", "Threads"]

logger = logging.getLogger(__name__)

_IDLE_SECONDS: Final = 10.0
_AHEAD_SECONDS: Final = 0.2
"""Seconds of work that a lane whose tasks end quickly keeps at hand: so many fewer claims are made."""
STUCK_SECONDS: Final = 1.0
"""Seconds without an end after which what a lane has at hand, beyond the least, is given to others."""


class Threads:
    """Threads that run one thing at a time, started when there is need and gone when there has been none for a while.

    Not a ``ThreadPoolExecutor``: that one can neither replace a thread that hangs nor let the process exit with one.
    """

    def __init__(self, name: str, work: Callable[[Run], Run | None]) -> None:
        self._name = name
        self._work = work
        self._queue: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._alive: set[threading.Thread] = set()
        self._number = 0
        self._stopped = False

    def put(self, run: Run) -> None:
        """Have *run* run by an idle thread, or by a new one."""
        with self._lock:
            if self._idle:
                self._idle -= 1
                thread = None
            else:
                self._number += 1
                thread = threading.Thread(
                    target=self._serve, args=(run,), name=f"aftercommit-{self._name}-{self._number}", daemon=True
                )
                self._alive.add(thread)
        if thread is None:
            self._queue.put(run)
        else:
            thread.start()

    def stop(self, timeout: float) -> None:
        """Let the idle ones go, and wait for them; one that hangs is left behind."""
        with self._lock:
            self._stopped = True
            alive = list(self._alive)
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._queue.put(None)
        deadline = time.monotonic() + timeout
        for thread in alive:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self, run: Run | None) -> None:
        try:
            while run is not None:
                # A context of its own: nothing that one task sets is seen by the next.
                run = contextvars.Context().run(self._work, run)
                # Nothing of the last run is kept while there is none: its arguments may hold much.
                run = run or self._wait()
        finally:
            with self._lock:
                self._alive.discard(threading.current_thread())

    def _wait(self) -> Run | None:
        with self._lock:
            if self._stopped:
                return None
            self._idle += 1
        try:
            return self._queue.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            with self._lock:
                if self._idle:
                    self._idle -= 1
                    return None
            # Somebody counted on this thread in the same moment: what he put is there, or about to be.
            return self._queue.get()


class Lane:
    """The places of one pool in this process.

    Args:
        name: The pool's name.
        width: How many tasks of it run at once.
        start_async: Starts an async run on the event loop, from any thread.
        work_sync: Runs a sync run to its end, in the calling thread.
        ended: Called after each run with the lane.
    """

    def __init__(
        self,
        name: str,
        width: int,
        *,
        start_async: Callable[[Run], None],
        work_sync: Callable[[Run], None],
        ended: Callable[[Lane], None],
    ) -> None:
        self.name = name
        self.width = width
        self._start_async = start_async
        self._work_sync = work_sync
        self._ended = ended
        self._lock = threading.Lock()
        self._open = True
        self._draining = False
        self._reserved = 0
        self._lent = 0
        self._active: set[Run] = set()
        self._backlog: deque[Run] = deque()
        self._backlog_limit = 2 * width
        self._ended_lately = 0
        self._counted_since = self._ended_at = time.monotonic()
        self._threads = Threads(name, self._work)
        self._heard = 0
        self._looked = 0
        self.is_paused = False
        """Whether nothing is to be started; said by the database."""

    # -- what waits in the database --

    @property
    def has_queued(self) -> bool:
        """Whether the database is known, or believed, to hold due tasks of this pool."""
        return self._heard != self._looked

    def expect(self) -> int:
        """Believe from now on that there are some; return a mark for ``looked``."""
        with self._lock:
            self._heard += 1
            return self._heard

    @property
    def heard(self) -> int:
        """The mark of the last ``expect``."""
        return self._heard

    def looked(self, mark: int) -> None:
        """Say that nothing was left for a look begun at *mark*: whatever was expected since then still is."""
        with self._lock:
            self._looked = mark

    # -- taking --

    def reserve(self, *, urgent: bool = False) -> bool:
        """Take a place, or one in the short backlog, for a task that is about to be committed.

        Not while others wait in the database: they came first. *urgent*: a task in memory, which has nowhere else
        to go, and so is taken whatever the backlog, and until the last moment of a stop.
        """
        with self._lock:
            if not self._open or (self._draining and not urgent):
                return False
            taken = len(self._active) + self._lent + len(self._backlog) + self._reserved
            if not urgent and (self.is_paused or self.has_queued or taken >= self.width + self._backlog_limit):
                return False
            self._reserved += 1
            return True

    def release(self) -> None:
        """Give back a place that was reserved."""
        with self._lock:
            self._reserved -= 1

    def submit(self, run: Run, *, reserved: bool) -> bool:
        """Start *run*, or let it wait its turn; False if the lane has closed meanwhile."""
        with self._lock:
            if reserved:
                self._reserved -= 1
            if not self._open or (run.claim is not None and (self._draining or self.is_paused)):
                return False
            if self.is_paused or len(self._active) + self._lent >= self.width:
                self._backlog.append(run)
                return True
            self._active.add(run)
        self.start(run)
        return True

    def capacity(self) -> int:
        """How many claims would be welcome: none until the backlog runs low, and then a good number at once."""
        with self._lock:
            if not self._open or self._draining or self.is_paused:
                return 0
            taken = len(self._active) + self._lent + len(self._backlog) + self._reserved
            if len(self._backlog) > self._backlog_limit // 4:
                return 0
            return max(0, self.width + self._backlog_limit - taken)

    def _fit_backlog(self) -> None:
        """Have the backlog hold what will be begun within a moment, by how fast tasks have ended lately."""
        pace = self._ended_lately / max(self._ended_at - self._counted_since, 1e-6)
        self._backlog_limit = max(2 * self.width, min(round(pace * _AHEAD_SECONDS), 12 * self.width))
        self._ended_lately, self._counted_since = 0, self._ended_at

    @property
    def is_ahead(self) -> bool:
        """Whether more waits here than would if tasks took long."""
        return len(self._backlog) > 2 * self.width

    def take_stuck(self) -> list[Run]:
        """What others should rather run: tasks ended quickly, so many were taken, and since then none has ended."""
        with self._lock:
            if not self.is_ahead or time.monotonic() - self._ended_at < STUCK_SECONDS:
                return []
            self._backlog_limit = 2 * self.width
            waiting = [run for run in self._backlog if run.claim is not None][self._backlog_limit :]
            for run in waiting:
                self._backlog.remove(run)
            return waiting

    @property
    def is_full(self) -> bool:
        """Whether every place is taken: what is queued now is better taken by somebody else."""
        with self._lock:
            return len(self._active) + self._lent >= self.width

    # -- lending --

    def lend(self) -> bool:
        """Give a free place to a further lane of a batch whose task runs here; never one that a task waits for."""
        with self._lock:
            taken = len(self._active) + self._lent + len(self._backlog) + self._reserved
            if not self._open or self._draining or self.is_paused or self.has_queued or taken >= self.width:
                return False
            self._lent += 1
            return True

    @property
    def is_wanted_back(self) -> bool:
        """Whether a task waits for a place, or nothing more is to be begun: what was lent should come back soon."""
        with self._lock:
            return bool(self._backlog) or self.has_queued or self._draining or self.is_paused

    def take_back(self) -> None:
        """Take back a place that was lent, and give it to a task that waits."""
        with self._lock:
            self._lent -= 1
            following = None
            if self._backlog and len(self._active) + self._lent < self.width and not self.is_paused:
                following = self._backlog.popleft()
                self._active.add(following)
        self._ended(self)
        if following is not None:
            self.start(following)

    # -- ending --

    def finished(self, run: Run) -> Run | None:
        """Free the place of *run*; return the next, which the calling thread may go on with if it is sync."""
        with self._lock:
            self._active.discard(run)
            self._ended_at = time.monotonic()
            self._ended_lately += 1
            if self._ended_lately >= 2 * self.width:
                self._fit_backlog()
            following = None
            if self._backlog and len(self._active) + self._lent < self.width and not self.is_paused:
                following = self._backlog.popleft()
                self._active.add(following)
        self._ended(self)
        return following

    def abandon(self, run: Run) -> None:
        """Give the place of a run that hangs to the next; its thread is left to itself."""
        following = self.finished(run)
        if following is not None:
            self.start(following)

    def withdraw(self, run: Run) -> bool:
        """Take a run that has not begun out of the backlog."""
        with self._lock:
            try:
                self._backlog.remove(run)
            except ValueError:
                return False
        self._ended(self)
        return True

    def pause(self) -> list[Run]:
        """Start nothing more; return what waited here and can wait in the database."""
        with self._lock:
            self.is_paused = True
            return self._take_durable()

    def resume(self) -> None:
        """Start again what waited here, and look for what waited elsewhere."""
        with self._lock:
            self.is_paused = False
            starting: list[Run] = []
            while self._backlog and len(self._active) + self._lent < self.width:
                starting.append(self._backlog.popleft())
                self._active.add(starting[-1])
        self.expect()
        for run in starting:
            self.start(run)

    def drain(self) -> list[Run]:
        """Take nothing more but what is in memory; return what had not begun and can wait in the database."""
        with self._lock:
            self._draining = True
            return self._take_durable()

    def close(self) -> list[Run]:
        """Take nothing more at all; return what had not begun."""
        with self._lock:
            self._open = False
            waiting = list(self._backlog)
            self._backlog.clear()
        return waiting

    def _take_durable(self) -> list[Run]:
        waiting = [run for run in self._backlog if run.claim is not None]
        self._backlog = deque(run for run in self._backlog if run.claim is None)
        return waiting

    def active(self) -> list[Run]:
        """What runs now."""
        with self._lock:
            return list(self._active)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, waits, or is about to be committed."""
        with self._lock:
            return not (self._active or self._backlog or self._reserved)

    def look(self) -> tuple[list[Run], list[Run]]:
        """What runs now, and what waits here for a place."""
        with self._lock:
            return list(self._active), list(self._backlog)

    def stop_threads(self, timeout: float) -> None:
        """Let the lane's threads go."""
        self._threads.stop(timeout)

    # -- running --

    def start(self, run: Run) -> None:
        """Start a run that has its place."""
        if run.task.is_async:
            self._start_async(run)
        else:
            self._threads.put(run)

    def _work(self, run: Run) -> Run | None:
        """Run one, and hand the thread its next: between two tasks there is no detour over the event loop."""
        try:
            self._work_sync(run)
        except BaseException as exc:
            # Whatever it was, it has been recorded as far as that was possible; the thread and its place go on.
            logger.error(  # noqa: TRY400  # without values
                "The run of task %r (%s) ended in an error of the library", run.name, run.id,
                exc_info=without_values(exc),
            )  # fmt: skip
        if run.is_taken_over:
            # It hung, its place went to others long ago, and so did its thread's.
            return None
        following = self.finished(run)
        if following is not None and following.task.is_async:
            self._start_async(following)
            return None
        return following
