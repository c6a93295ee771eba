"""Who runs tasks in this process: started with the application, woken by commits, stopped in order."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from aftercommit import signals
from aftercommit.errors import ConfigurationError, LostClaim
from aftercommit.records import moves, workers
from aftercommit.records.ids import uuid7
from aftercommit.runner.bookkeeper import Bookkeeper
from aftercommit.runner.lanes import Lane
from aftercommit.runner.run import Run
from aftercommit.runner.shells import run_async, run_sync

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import Connection

    from aftercommit.sessions import SessionFactory
    from aftercommit.tasks import Task

__all__ = ["Pace", "Runner"]

logger = logging.getLogger(__name__)

_SETTLE_SECONDS: Final = 0.002
_PROGRESS_SECONDS: Final = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often the runner looks around.

    Attributes:
        heartbeat: Seconds between heartbeats.
        silent_after: Seconds without one after which a worker's tasks are given to others.
        poll: Seconds between looks for tasks of other processes, when idle.
        keep: Seconds for which finished records are kept, or None for ever.
        prune_every: Seconds between prunings.
    """

    heartbeat: float = 5.0
    silent_after: float = 30.0
    poll: float = 2.0
    keep: float | None = 7 * 24 * 3600.0
    prune_every: float = 60.0


class Runner:
    """Runs the tasks of some pools in this process.

    Args:
        sessions: Makes their sessions.
        tasks: All that this process knows, by name and alias.
        pools: The pools it runs.
        pace: How often it looks around.
    """

    def __init__(
        self, sessions: SessionFactory, tasks: Mapping[str, Task[Any, Any]], pools: Sequence[str], pace: Pace
    ) -> None:
        self.id: UUID = uuid7()
        self.sessions = sessions
        self.books = Bookkeeper(sessions.pools, self._round)
        self._tasks = tasks
        self._pace = pace
        self._held: dict[UUID, Run] = {}
        self._suspects: set[UUID] = set()
        self._progressing: dict[UUID, Run] = {}
        self._settling: list[Callable[[], bool]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._stop_now = threading.Event()
        self._changed = threading.Condition()
        self._durable = False
        self._next_beat = 0.0
        self._next_poll = 0.0
        self._next_prune = 0.0
        self._next_progress = 0.0
        self._last_beat = time.monotonic()
        self._loop_seen = time.monotonic()
        self._loop_asked = False
        self._is_down = False
        self.lanes = {
            name: Lane(
                name,
                sessions.pools[name].settings.width,
                start_async=self._start_async,
                work_sync=self._work_sync,
                ended=self._lane_changed,
            )
            for name in pools
        }

    # --- its life -----------------------------------------------------------------------------------------------

    async def start(self, *, durable: bool) -> None:
        """Start, in the running event loop.

        Args:
            durable: Whether there are tables to look into; without, only tasks in memory are run.
        """
        self._loop = asyncio.get_running_loop()
        self._durable = durable
        self.books.start()
        if durable:
            await self.books.async_call(self._register)
            self._next_beat = time.monotonic() + self._pace.heartbeat
            for lane in self.lanes.values():
                # Something may wait from before: until we have looked, it came first.
                lane.has_queued = True
            self.books.wake()
        signals.emit(signals.WorkerStarted(worker=self.id, pools=tuple(self.lanes)))

    async def stop(self, *, grace: float) -> None:
        """Stop in order: take nothing more, let what runs finish, give the rest back.

        Args:
            grace: Seconds for what runs.
        """
        given_back = 0
        for lane in self.lanes.values():
            for run in lane.close():
                given_back += await self._hand_back(run)
        deadline = time.monotonic() + grace
        await self._wait_idle(deadline)
        leftover = [run for lane in self.lanes.values() for run in lane.active()]
        self._stop_now.set()
        for run in leftover:
            run.stopping = True
            if run.job is not None:
                run.job.cancel()
        if leftover:
            # Cancelled async tasks give themselves back; a thread cannot be stopped, but from here on it cannot
            # commit either: its record is no longer its own.
            await self._wait_jobs()
            for run in leftover:
                if not run.task.is_async:
                    run.abandoned = run.lost()
                    given_back += await self._hand_back(run)
                else:
                    given_back += 1
        if self._durable:
            try:
                await self.books.async_call(lambda connection: workers.sign_off(connection, self.id))
            except Exception:
                logger.warning("The worker could not sign off; it will be seen as silent", exc_info=True)
        await asyncio.to_thread(self._stop_threads)
        signals.emit(signals.WorkerStopped(worker=self.id, given_back=given_back))

    def _stop_threads(self) -> None:
        for lane in self.lanes.values():
            lane.stop_threads(0.2)
        self.books.stop(5.0)

    async def _hand_back(self, run: Run) -> int:
        self._held.pop(run.id, None)
        claim = run.claim
        if claim is None:
            logger.error("Task %r (%s) was in memory and its process is stopping: it is lost", run.name, run.id)
            signals.emit(signals.TasksLost(tasks=(run.name,), lines=("the runner stopped",)))
            return 0

        def write(connection: Connection) -> bool:
            return moves.give_back(connection, claim, None, at="", delay=0.0, refund=True)

        try:
            if await self.books.async_call(write):
                signals.emit(signals.TaskGivenBack(**run.facts(), reason="its worker is stopping"))
                return 1
        except Exception:
            logger.warning("Task %r (%s) could not be given back; it will be rescued", run.name, run.id, exc_info=True)
        return 0

    async def _wait_idle(self, deadline: float) -> None:
        while any(lane.active() for lane in self.lanes.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            # In memory nothing may wait in a closed lane, so only what is active counts.
            await asyncio.to_thread(self._wait_change, min(left, 0.5))

    async def _wait_jobs(self) -> None:
        while jobs := {job for job in self._jobs if not job.done()}:
            await asyncio.wait(jobs)

    def _wait_change(self, timeout: float) -> None:
        with self._changed:
            if any(lane.active() for lane in self.lanes.values()):
                self._changed.wait(timeout)

    # --- taking work --------------------------------------------------------------------------------------------

    def runs(self, pool: str) -> bool:
        """Whether tasks of *pool* run in this process."""
        return pool in self.lanes

    def reserve(self, run: Run) -> bool:
        """Take a place for a task that is about to be committed: then it is born claimed."""
        lane = self.lanes.get(run.pool)
        if lane is None or (run.claim is not None and not self._durable):
            return False
        if not lane.reserve(urgent=run.claim is None):
            return False
        run.on_progress = self._progressed
        self._held[run.id] = run
        return True

    def release(self, run: Run) -> None:
        """Give back what ``reserve`` took: the transaction was rolled back.

        If the answer of its COMMIT was lost, the record may stand and say that we run it: the next heartbeat sees it.
        """
        if self._held.pop(run.id, None) is not None:
            self.lanes[run.pool].release()
            self._lane_changed(self.lanes[run.pool])

    def submit(self, run: Run, *, reserved: bool) -> bool:
        """Start a run, or let it wait its turn; False if this process does not run it any more."""
        lane = self.lanes.get(run.pool)
        if lane is None:
            return False
        run.on_progress = self._progressed
        self._held[run.id] = run
        if lane.submit(run, reserved=reserved):
            return True
        # The runner stopped between the commit and now.
        self._held.pop(run.id, None)
        claim = run.claim
        if claim is not None and self.books.is_alive:
            self.books.submit(lambda c: moves.give_back(c, claim, None, at="", delay=0.0, refund=True))
        return False

    def expect(self, pool: str) -> None:
        """Look into the database soon: something of *pool* was queued."""
        lane = self.lanes.get(pool)
        if lane is not None and self._durable:
            lane.has_queued = True
            self.books.wake()

    def settle(self, check: Callable[[], bool]) -> None:
        """Call *check* again and again, soon, until it returns True."""
        self._settling.append(check)
        self.books.wake()

    # --- running ------------------------------------------------------------------------------------------------

    def _work_sync(self, run: Run) -> None:
        try:
            run_sync(run, self, self._stop_now)
        finally:
            self._let_go(run)

    def _start_async(self, run: Run) -> None:
        loop = self._loop
        assert loop is not None  # noqa: S101  # set at the start
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            self._spawn(run)
        else:
            loop.call_soon_threadsafe(self._spawn, run, context=contextvars.Context())

    def _spawn(self, run: Run) -> None:
        assert self._loop is not None  # noqa: S101  # set at the start
        # A context of its own: nothing of the request crosses by way of context variables.
        job = self._loop.create_task(
            self._work_async(run), name=f"aftercommit:{run.name}", context=contextvars.Context()
        )
        run.job = job
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _work_async(self, run: Run) -> None:
        try:
            await run_async(run, self)
        except asyncio.CancelledError:
            # The run has been settled; a cancellation that came while it was is not for us to pass on.
            pass
        except Exception:
            logger.exception("The run of task %r (%s) ended in an error of the library", run.name, run.id)
        finally:
            self._let_go(run)
            following = self.lanes[run.pool].finished(run)
            if following is not None:
                if following.task.is_async:
                    self._spawn(following)
                else:
                    self.lanes[run.pool].start(following)

    def _let_go(self, run: Run) -> None:
        self._held.pop(run.id, None)
        if run.id in self._progressing:
            self.books.wake()

    def _lane_changed(self, lane: Lane) -> None:
        if lane.has_queued and lane.capacity():
            self.books.wake()
        with self._changed:
            self._changed.notify_all()

    def _progressed(self, run: Run) -> None:
        if run.claim is not None and run.id not in self._progressing:
            self._progressing[run.id] = run
            self.books.wake()

    # --- the bookkeeping thread's rounds ------------------------------------------------------------------------

    def _round(self) -> float:
        now = time.monotonic()
        self._check_loop(now)
        self._settling = [check for check in self._settling if not check()]
        if not self._durable:
            return _SETTLE_SECONDS if self._settling else 1.0
        try:
            self._work_round(now)
        except Exception as exc:
            self._database_is_down(exc)
            return 0.5
        if self._is_down:
            self._is_down = False
            logger.warning("The database answers again")
        due = [self._next_beat, self._next_poll, self._next_prune]
        if self._progressing:
            due.append(self._next_progress)
        if self._settling:
            due.append(time.monotonic() + _SETTLE_SECONDS)
        return max(0.0, min(due) - time.monotonic())

    def _work_round(self, now: float) -> None:
        if now >= self._next_beat:
            self._beat()
            self._next_beat = time.monotonic() + self._pace.heartbeat
        if now >= self._next_poll:
            self._poll()
        for lane in self.lanes.values():
            if lane.has_queued:
                self._claim(lane)
        if self._progressing and now >= self._next_progress:
            self._write_progress()
            self._next_progress = time.monotonic() + _PROGRESS_SECONDS
        if now >= self._next_prune:
            self._prune()

    def _database_is_down(self, error: BaseException) -> None:
        if not self._is_down:
            self._is_down = True
            logger.error("The bookkeeping cannot reach the database; it tries again until it can", exc_info=error)

    def _register(self, connection: Connection) -> None:
        workers.register(
            connection,
            self.id,
            host=socket.gethostname()[:255],
            pid=os.getpid(),
            pools=list(self.lanes),
            names=sorted(self._names()),
        )

    def _beat(self) -> None:
        late = time.monotonic() - self._last_beat
        pulse = self.books.execute(
            lambda c: workers.beat(c, self.id, silent_after=self._pace.silent_after), autocommit=True
        )
        held = dict(self._held)
        self._last_beat = time.monotonic()
        if pulse is None:
            # We were silent for so long that our row was taken away, and with it what we ran.
            self.books.execute(self._register)
            return
        orphans = pulse.running - held.keys()
        if orphans:
            released = self.books.execute(lambda c: workers.release_orphans(c, self.id, orphans))
            if released:
                logger.warning("%d task(s) said that this worker runs them and it did not; queued again", len(released))
                for lane in self.lanes.values():
                    lane.has_queued = True
        self._abandon_lost(pulse.running, held)
        # A worker that was silent itself does not judge others: their heartbeats may have waited for the same lock.
        if pulse.has_silent and late < self._pace.silent_after / 2:
            self._rescue()

    def _abandon_lost(self, running: frozenset[UUID], held: dict[UUID, Run]) -> None:
        """End runs whose record is no longer ours; twice seen, because a commit may be on its way."""
        missing = {id for id, run in held.items() if run.claim is not None and run.started and id not in running}
        for id in missing & self._suspects:
            run = held[id]
            if run.is_finishing or isinstance(run.abandoned, LostClaim):
                continue
            run.abandoned = run.lost()
            job, loop = run.job, self._loop
            if job is not None and loop is not None:
                loop.call_soon_threadsafe(job.cancel)
        self._suspects = missing

    def _rescue(self) -> None:
        rescued = self.books.execute(lambda c: workers.rescue(c, silent_after=self._pace.silent_after))
        if rescued:
            logger.warning("%d task(s) of silent workers were queued again", len(rescued))
            signals.emit(signals.TasksRescued(requeued=tuple(rescued), failed=()))
            for lane in self.lanes.values():
                lane.has_queued = True

    def _poll(self) -> None:
        names = self._names()
        due = self.books.execute(lambda c: moves.next_due(c, names=names), autocommit=True)
        following = self._pace.poll
        for name, lane in self.lanes.items():
            seconds = due.get(name)
            lane.is_paused = name in due and seconds is None
            if seconds is None:
                continue
            if seconds <= 0:
                lane.has_queued = True
            else:
                following = min(following, seconds)
        self._next_poll = time.monotonic() + following

    def _claim(self, lane: Lane) -> None:
        count = lane.capacity()
        if not count:
            return
        names = self._names(lane.name)
        claimed = self.books.execute(
            lambda c: moves.claim(c, pool=lane.name, names=names, worker=self.id, count=count), autocommit=True
        )
        if len(claimed) < count:
            lane.has_queued = False
            # What is due later is seen by the poll that follows.
            self._next_poll = min(self._next_poll, time.monotonic()) if not claimed else self._next_poll
        for each in claimed:
            task = self._tasks[each.task]
            run = Run(
                task=task,
                id=each.claim.id,
                claim=each.claim,
                attempt=each.claim.attempt,
                max_attempts=each.max_attempts,
                arguments=each.arguments,
                context=each.context,
                checkpoint=each.checkpoint,
                waited=each.waited,
            )
            self.submit(run, reserved=False)

    def _write_progress(self) -> None:
        for run in list(self._progressing.values()):
            session = run.session
            is_sqlite = self.sessions.pools.is_sqlite
            if is_sqlite and run.id in self._held and session is not None and session.in_transaction():
                # It holds the write lock, or will: it writes its progress itself, with its next commit.
                continue
            del self._progressing[run.id]
            progress = run.current.take_progress()
            if progress is not None:
                done, total = progress
                self.books.execute(lambda c, run=run: moves.set_progress(c, run.id, done, total))  # type: ignore[misc]

    def _prune(self) -> None:
        self._next_prune = time.monotonic() + self._pace.prune_every
        keep = self._pace.keep
        if keep is None:
            return
        pruned = self.books.execute(lambda c: workers.prune(c, keep=keep))
        if pruned >= 1000:  # noqa: PLR2004  # a full piece: there is more
            self._next_prune = time.monotonic() + 1.0

    def _names(self, pool: str | None = None) -> list[str]:
        return [
            name
            for name, task in list(self._tasks.items())
            if task.settings.durable and task.settings.pool in self.lanes and pool in (None, task.settings.pool)
        ]

    # --- the event loop's pulse ---------------------------------------------------------------------------------

    def _check_loop(self, now: float) -> None:
        """Report an event loop that does not turn: heartbeats go on without it, but its tasks do not."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        if self._loop_asked and now - self._loop_seen > self._pace.heartbeat:
            names = tuple(sorted({run.name for run in list(self._held.values()) if run.task.is_async and run.started}))
            logger.warning(
                "The event loop has not turned for %.1f s; running on it: %s. Something computes or waits without "
                "await: make it a `def` task, or await it.", now - self._loop_seen, ", ".join(names) or "no tasks",
            )  # fmt: skip
            signals.emit(signals.LoopBlocked(seconds=now - self._loop_seen, tasks=names))
            self._loop_seen = now
        elif not self._loop_asked:
            self._loop_asked = True
            self._loop_seen = now
            try:
                loop.call_soon_threadsafe(self._loop_turned)
            except RuntimeError:
                self._loop_asked = False

    def _loop_turned(self) -> None:
        self._loop_asked = False

    # --- waiting ------------------------------------------------------------------------------------------------

    def is_drained(self) -> bool:
        """Whether nothing that is due is left, here or anywhere; not from the event loop."""
        if not all(lane.is_idle for lane in self.lanes.values()) or self._settling:
            return False
        return not self._durable or self.books.call(self._nothing_due)

    def _nothing_due(self, connection: Connection) -> bool:
        due = moves.next_due(connection, names=self._names())
        waiting = [pool for pool, seconds in due.items() if seconds is not None and seconds <= 0 and pool in self.lanes]
        for pool in waiting:
            self.lanes[pool].has_queued = True
        return not waiting and not moves.any_running(connection, names=self._names())

    def refuse_own_loop(self) -> None:
        """Raise where waiting would keep the very tasks that are waited for from running."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if running is self._loop:
            raise ConfigurationError(
                "db.drain() on the event loop that runs the tasks would wait for itself. Write await db.async_drain()."
            )

    def drain(self, timeout: float) -> None:
        """Wait until nothing that is due is left.

        Raises:
            TimeoutError: If something is left after *timeout* seconds.
        """
        deadline = time.monotonic() + timeout
        while not self.is_drained():
            left = deadline - time.monotonic()
            if left <= 0:
                names = sorted({run.name for run in list(self._held.values())})
                raise TimeoutError(
                    f"After {timeout} s there are still tasks running or due"
                    + (f": {', '.join(names)}." if names else ".")
                    + " Give db.drain(timeout=…) more time, or look for what holds them."
                )
            self.books.wake()
            with self._changed:
                self._changed.wait(min(left, 0.05))
