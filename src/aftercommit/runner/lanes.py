"""A lane per kind of task: its places, its short backlog, and its threads."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from aftercommit.runner.run import Run

__all__ = ["Lane", "Threads"]

logger = logging.getLogger(__name__)

_IDLE_SECONDS: Final = 10.0


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
            alive = list(self._alive)
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._queue.put(None)
        for thread in alive:
            if thread is not threading.current_thread():
                thread.join(timeout)

    def _serve(self, run: Run | None) -> None:
        try:
            while run is not None:
                # A context of its own: nothing that one task sets is seen by the next.
                following: Run | None = contextvars.Context().run(self._work, run)
                run = following if following is not None else self._wait()
        finally:
            with self._lock:
                self._alive.discard(threading.current_thread())

    def _wait(self) -> Run | None:
        with self._lock:
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
        self._reserved = 0
        self._active: set[Run] = set()
        self._backlog: deque[Run] = deque()
        self._backlog_limit = 2 * width
        self._threads = Threads(name, self._work)
        self.has_queued = False
        """Whether the database is known to hold due tasks of this pool."""
        self.is_paused = False

    # -- taking --

    def reserve(self, *, urgent: bool = False) -> bool:
        """Take a place, or one in the short backlog, for a task that is about to be committed.

        Not while others wait in the database: they came first. *urgent*: a task in memory, which has nowhere else
        to go, and so is taken whatever the backlog.
        """
        with self._lock:
            if not self._open:
                return False
            taken = len(self._active) + len(self._backlog) + self._reserved
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
            if not self._open:
                return False
            if len(self._active) >= self.width:
                self._backlog.append(run)
                return True
            self._active.add(run)
        self.start(run)
        return True

    def capacity(self) -> int:
        """How many claims would be welcome: none until the backlog runs low, and then a good number at once."""
        with self._lock:
            if not self._open or self.is_paused:
                return 0
            taken = len(self._active) + len(self._backlog) + self._reserved
            if len(self._backlog) > self._backlog_limit // 4:
                return 0
            return max(0, self.width + self._backlog_limit - taken)

    # -- ending --

    def finished(self, run: Run) -> Run | None:
        """Free the place of *run*; return the next, which the calling thread may go on with if it is sync."""
        with self._lock:
            self._active.discard(run)
            following = self._backlog.popleft() if self._backlog and len(self._active) < self.width else None
            if following is not None:
                self._active.add(following)
        self._ended(self)
        return following

    def abandon(self, run: Run) -> None:
        """Give the place of a run that hangs to the next; its thread is left to itself."""
        following = self.finished(run)
        if following is not None:
            self.start(following)

    def close(self) -> list[Run]:
        """Take nothing more; return what had not begun."""
        with self._lock:
            self._open = False
            waiting = list(self._backlog)
            self._backlog.clear()
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

    @property
    def waiting(self) -> int:
        """How many wait in this process."""
        with self._lock:
            return len(self._backlog)

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
        except BaseException:
            # Whatever it was, it has been recorded as far as that was possible; the thread and its place go on.
            logger.exception("The run of task %r (%s) ended in an error of the library", run.name, run.id)
        following = self.finished(run) if run in self._active else None
        if following is not None and following.task.is_async:
            self._start_async(following)
            return None
        return following
