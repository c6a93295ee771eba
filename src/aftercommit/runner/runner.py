"""Who runs tasks in this process: started with the application, woken by commits, stopped in order."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID

from sqlalchemy.exc import DBAPIError

from aftercommit import signals
from aftercommit.errors import ConfigurationError, TaskTimeout
from aftercommit.pools import network, taking
from aftercommit.records import moves, notifying, waiting, workers
from aftercommit.records.ids import uuid7
from aftercommit.records.statement import savepoint
from aftercommit.runner.around import around
from aftercommit.runner.bookkeeper import Bookkeeper
from aftercommit.runner.lanes import Lane
from aftercommit.runner.listening import Herald, Listener
from aftercommit.runner.outcome import decide_outcome
from aftercommit.runner.patience import in_the_end
from aftercommit.runner.recording import end, tell_failed
from aftercommit.runner.rounds import OVERRUN_SECONDS, Pace, Rounds, is_lost
from aftercommit.runner.run import Run, failure_of, now
from aftercommit.runner.shells import run_async, run_sync
from aftercommit.tasks.transient import Fault, fault_of
from aftercommit.wording import told, without_values

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from sqlalchemy import URL, Connection

    from aftercommit.sessions import SessionFactory
    from aftercommit.tasks import Task

__all__ = ["Pace", "Runner"]

logger = logging.getLogger(__name__)

_UNWINDING_SECONDS: Final = 5.0
_WRITING_SECONDS: Final = 10.0
_LOST_RUNS: Final = 10_000


class Duty(Protocol):
    """Something that the housekeeping does now and then, besides what every runner needs."""

    @property
    def due(self) -> float:
        """When it wants to be called, by the monotonic clock; infinity for not at all."""
        ...

    def start(self, connection: Connection) -> None:
        """Called once, in a transaction, before this process takes any work."""

    def make(self) -> None:
        """Do it; on the housekeeping thread."""

    def look(self) -> None:
        """Something was changed somewhere: be due soon. From any thread."""

    def expect_in(self, seconds: float) -> None:
        """A look at the database says when the next schedule is due."""


class Runner:
    """Runs the tasks of some pools in this process.

    Args:
        sessions: Makes their sessions.
        tasks: All that this process knows, by name and alias.
        pools: The pools it runs.
        pace: How often it looks around.
        notify_url: Where it listens, instead of the database's own URL.
    """

    def __init__(
        self,
        sessions: SessionFactory,
        tasks: Mapping[str, Task[Any, Any]],
        pools: Sequence[str],
        pace: Pace,
        *,
        notify_url: URL | None = None,
    ) -> None:
        self.id: UUID = uuid7()
        self.sessions = sessions
        self.tasks = tasks
        self.rounds = Rounds(self, pace)
        self.books = Bookkeeper(sessions.pools, self.rounds.make, between=self.rounds.stay_alive)
        self.herald = Herald(self.books, sessions.pools)
        self.held: dict[UUID, Run] = {}
        self.progressing: dict[UUID, Run] = {}
        self.settling: deque[Callable[[], bool]] = deque()
        self.stopping = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.loop_thread = 0
        self.is_durable = False
        self._notify_url = notify_url
        self.lost_runs: dict[UUID, int] = {}
        self.duties: list[Duty] = []
        self.declared: Collection[str] = ()
        """The schedules that the code of this process declares."""
        self._listener: Listener | None = None
        self._overrun: set[threading.Thread] = set()
        self._writing_seconds = _WRITING_SECONDS
        self._changed = threading.Condition()
        self._draining = 0
        self._changed_on_loop: asyncio.Event | None = None
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

    async def start(self, *, durable: bool, check: Callable[[], Awaitable[None]]) -> None:
        """Start, in the running event loop.

        Args:
            durable: Whether there are tables to look into; without, only tasks in memory are run.
            check: Called when this process can be counted, before it takes any work; what it raises keeps it from
                starting.
        """
        self.loop = asyncio.get_running_loop()
        self.loop_thread = threading.get_ident()
        self.books.start()
        self.sessions.pools.backends.on_connect = self.rounds.connected
        if durable:
            # The bookkeeping has little patience, because its heartbeats come again, and this does not.
            await in_the_end(partial(self.books.async_call, self.rounds.register))
            for duty in self.duties:
                await in_the_end(partial(self.books.async_call, duty.start))
        # Entered first: of processes that start together none would see another, and each would be content.
        try:
            await check()
        except BaseException:
            if durable:
                await self._sign_off()
            raise
        if durable:
            self.is_durable = True
            for lane in self.lanes.values():
                # Something may wait from before: until we have looked, it came first.
                lane.expect()
            self._start_listening()
        self.books.wake()
        signals.emit(signals.WorkerStarted(worker=self.id, pools=tuple(self.lanes)))

    def _start_listening(self) -> None:
        pools = self.sessions.pools
        url = self._notify_url or pools.flavours.asynchronous
        if pools.is_sqlite or url is None:
            return
        options = pools.options("async").get("connect_args") or {}
        self._listener = Listener(url, options, self._heard)
        self._listener.start()

    @property
    def is_listening(self) -> bool:
        """Whether news of other processes are known to arrive."""
        return self._listener is not None and self._listener.is_trusted

    @property
    def listens_elsewhere(self) -> bool:
        """Whether news arrive by another URL than the database's."""
        return self._notify_url is not None

    async def stop(self, *, grace: float) -> None:
        """Stop in order: take nothing more, let what runs finish, give the rest back.

        Args:
            grace: Seconds for what runs.
        """
        self._changed_on_loop = asyncio.Event()
        try:
            await self._stop(grace)
        except asyncio.CancelledError:
            # The loop is being closed, or somebody has lost patience: no more grace, but in order all the same.
            await self._stop(0.0)
            raise

    async def _stop(self, grace: float) -> None:
        if self._listener is not None:
            await self._listener.stop()
        given_back = await self._hand_back([run for lane in self.lanes.values() for run in lane.drain()])
        await self._wait_idle(grace)
        # What waits in memory has had its time, and what was asked for in a transaction that is still open is not
        # ours to wait for any longer.
        for run in [run for lane in self.lanes.values() for run in lane.close()]:
            self._report_memory_lost(run)
        given_back += await self._interrupt()
        if self.is_durable:
            await self._sign_off()
        self.sessions.pools.backends.on_connect = None
        await asyncio.to_thread(self._stop_threads)
        signals.emit(signals.WorkerStopped(worker=self.id, given_back=given_back))

    async def _interrupt(self) -> int:
        """End what still runs: async tasks are cancelled and give themselves back, threads are left behind."""
        leftover = [run for lane in self.lanes.values() for run in lane.active()]
        self.stopping.set()
        for run in leftover:
            run.stopping = True
            if run.job is not None and run.started:
                run.job.cancel()
        if not leftover:
            return 0
        # A thread between two tries, or in its last commit, ends by itself in a moment; so does what is cancelled.
        is_async = any(run.task.is_async for run in leftover)
        await self._wait_idle(_UNWINDING_SECONDS if is_async else 0.5)
        hanging = [run for lane in self.lanes.values() for run in lane.active()]
        taken: list[Callable[[], bool]] = []
        for run in hanging:
            # From here on it cannot commit: its record is no longer its own.
            run.is_taken_over = True
            run.stop_with(run.lost())
            logger.warning(
                "Task %r (%s) did not end in time: it goes on in a process that is stopping, and can commit nothing",
                run.name, run.id,
            )  # fmt: skip
            if self.sessions.pools.is_sqlite:
                # It may hold the write lock, and what is given back has to be written.
                taken.append(taking.take(run.connection))
            elif run.task.is_async and run.connection is not None:
                # It may be the server that does not answer, and a loop does not close before its last task has ended.
                network.cut(run.connection)
        await taking.all_over(taken)
        await self._hand_back(hanging)
        return len(leftover)

    async def _sign_off(self) -> None:
        def leave(connection: Connection) -> None:
            self.rounds.has_left = True
            notifying.notify(connection, self.lanes)
            workers.sign_off(connection, self.id)

        try:
            await self._write_patiently(leave)
        except Exception as exc:  # noqa: BLE001  # others see by its silence what it could not say
            logger.warning("The worker could not sign off; it will be seen as silent: %s", told(exc))

    def _stop_threads(self) -> None:
        for lane in self.lanes.values():
            lane.stop_threads(0.5)
        for thread in list(self._overrun):
            thread.join(_UNWINDING_SECONDS)
        self.books.stop(5.0)

    async def _hand_back(self, runs: Sequence[Run]) -> int:
        """Queue again what this worker will not run any more, as if it had never been claimed."""
        for run in runs:
            if run.claim is None:
                self._report_memory_lost(run)
            elif _is_left_to_others(run):
                self._let_go(run)
        # What may not begin again has failed. Its `on_failure` is called by the worker that finds it without one: this
        # process has no time left for the application's code.
        mine = [run for run in runs if run.claim is not None and not _is_left_to_others(run)]
        given: list[Run] = []
        failed: list[Run] = []
        if not mine:
            return 0

        def write(connection: Connection) -> None:
            again = [run for run in mine if not _may_not_begin_again(run)]
            given[:] = [run for run in again if _if_free(connection, run, _write_back)]
            failed[:] = [run for run in mine if run not in again and _if_free(connection, run, _write_interrupted)]

        try:
            await self._write_patiently(write)
        except Exception as exc:  # noqa: BLE001  # the database itself may be what is failing
            logger.warning("%d task(s) could not be given back; they will be rescued: %s", len(mine), told(exc))
            return 0
        for run in mine:
            self._let_go(run)
        for run in failed:
            tell_failed(run, run.interrupted())
        for run in given:
            run.task.figures.given_back()
            signals.emit(signals.TaskGivenBack(**run.facts(), reason="its worker is stopping"))
        return len(given)

    async def _write_patiently(self, work: Callable[[Connection], None]) -> None:
        """Write, as soon as whoever is in the way lets us: on SQLite, a task with the write lock."""
        try:
            async with asyncio.timeout(self._writing_seconds):
                while True:
                    try:
                        await self.books.async_call(work)
                    except DBAPIError as exc:
                        if fault_of(exc) not in (Fault.CONFLICT, Fault.CANCELLED):
                            raise
                        await asyncio.sleep(0.01)
                    else:
                        return
        except TimeoutError as exc:
            # A database that does not answer is not asked for as long once more: all stops together have their limit.
            seconds, self._writing_seconds = self._writing_seconds, 1.0
            raise TimeoutError(f"the database did not answer within {seconds:g} s") from exc

    def _report_memory_lost(self, run: Run) -> None:
        self._let_go(run)
        logger.error("Task %r (%s) was in memory and its process is stopping: it is lost", run.name, run.id)
        signals.emit(signals.TasksLost(tasks=(run.name,), lines=("the runner stopped",)))

    async def _wait_idle(self, seconds: float) -> None:
        """Wait until nothing runs, waits, or is about to be committed."""
        changed = self._changed_on_loop
        assert changed is not None  # noqa: S101  # made by stop
        deadline = time.monotonic() + seconds
        while not all(lane.is_idle for lane in self.lanes.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            changed.clear()
            if all(lane.is_idle for lane in self.lanes.values()):
                return
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                return

    # --- taking work --------------------------------------------------------------------------------------------

    def runs(self, pool: str) -> bool:
        """Whether tasks of *pool* run in this process."""
        return pool in self.lanes

    def names(self) -> list[str]:
        """The durable tasks that this process knows, by every name."""
        return [name for name, task in list(self.tasks.items()) if task.settings.durable]

    def reserve(self, run: Run) -> bool:
        """Take a place for a task that is about to be committed: then it is born claimed."""
        lane = self.lanes.get(run.pool)
        if lane is None or (run.claim is not None and not self.is_durable):
            return False
        if not lane.reserve(urgent=run.claim is None):
            return False
        self.held[run.id] = run
        return True

    def release(self, run: Run) -> None:
        """Give back what ``reserve`` took: the transaction was rolled back.

        If the answer of its COMMIT was lost, the record may stand and say that we run it: the next heartbeat sees it.
        """
        if self.held.pop(run.id, None) is not None:
            self.lanes[run.pool].release()
            self._lane_changed(self.lanes[run.pool])

    def submit(self, run: Run, *, reserved: bool) -> bool:
        """Start a run, or let it wait its turn; False if this process does not run it any more."""
        lane = self.lanes.get(run.pool)
        if lane is None:
            return False
        run.on_progress = self._progressed
        run.on_deadline = self.rounds.watch
        run.taken = time.monotonic()
        self.held[run.id] = run
        try:
            if lane.submit(run, reserved=reserved):
                return True
        except RuntimeError as exc:
            # No thread can be started, or the loop is closed. The commit that brought us here is done, and right.
            logger.error(  # noqa: TRY400  # without values
                "Task %r (%s) could not be started here; it is queued again", run.name, run.id,
                exc_info=without_values(exc),
            )  # fmt: skip
            lane.abandon(run)
        # The runner stopped between the commit and now.
        self.held.pop(run.id, None)
        claim = run.claim
        if claim is not None and self.books.is_alive:
            self.books.submit(lambda c: moves.give_back(c, claim, None, at="", delay=0.0, refund=True))
        return False

    def expect(self, pool: str) -> None:
        """Look into the database soon: something of *pool* was queued."""
        lane = self.lanes.get(pool)
        if lane is None or not self.is_durable:
            self.herald.tell(pool)
            return
        lane.expect()
        if lane.is_full or lane.is_paused:
            self.herald.tell(pool)
        else:
            self.books.wake()

    def settle(self, check: Callable[[], bool]) -> None:
        """Call *check* again and again, soon, until it returns True."""
        self.settling.append(check)
        self.books.wake()

    def cancelled(self, id: UUID, by: str | None = None) -> None:
        """End a run whose record was cancelled, if it is held here; others see it by their heartbeats."""
        run = self.held.get(id)
        if run is None or run.claim is None:
            return
        if self.lanes[run.pool].withdraw(run):
            self._let_go(run)
        else:
            self.stop_run(run, run.cancelled(by))

    def look(self) -> None:
        """Find out soon what was paused and resumed."""
        self.rounds.look()

    def _heard(self, news: notifying.News) -> None:
        if news.look:
            self.rounds.look()
        if not news.cancelled.isdisjoint(self.held):
            self.rounds.hear_of_cancelled()
        for pool in news.pools.intersection(self.lanes):
            self.lanes[pool].expect()
            self.books.wake()

    def set_paused(self, lane: Lane, *, paused: bool) -> None:
        """Follow what the database says of a pool; on the bookkeeping thread."""
        if paused and not lane.is_paused:
            self._give_back(lane.pause())
            signals.emit(signals.PoolPaused(pool=lane.name))
        elif lane.is_paused and not paused:
            lane.resume()
            signals.emit(signals.PoolResumed(pool=lane.name))

    def share(self, lane: Lane) -> None:
        """Let other processes run what waits here for long; on the bookkeeping thread."""
        stuck = lane.take_stuck()
        if stuck:
            self._give_back(stuck)
            lane.expect()
            self.herald.tell(lane.name)

    def _give_back(self, runs: Sequence[Run]) -> None:
        """Queue again what has not begun."""
        if not runs:
            return
        try:
            self.books.execute(lambda connection: [_write_back(connection, run) for run in runs])
        finally:
            # Even if that could not be written now: the next heartbeat sees what we do not hold, and queues it again.
            for run in runs:
                self._let_go(run)

    # --- running ------------------------------------------------------------------------------------------------

    def _work_sync(self, run: Run) -> None:
        try:
            run_sync(run, self, ask_first=self.rounds.was_silent)
        except BaseException:
            self.leave(run)
            raise
        finally:
            if not run.is_taken_over:
                self._let_go(run)

    def _start_async(self, run: Run) -> None:
        loop = self.loop
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
        assert self.loop is not None  # noqa: S101  # set at the start
        # A context of its own: nothing of the request crosses by way of context variables.
        run.job = self.loop.create_task(
            self._work_async(run), name=f"aftercommit:{run.name}", context=contextvars.Context()
        )

    async def _work_async(self, run: Run) -> None:
        try:
            await run_async(run, self, ask_first=self.rounds.was_silent)
        except asyncio.CancelledError:
            # The run has been settled; a cancellation that came while it was is not for us to pass on.
            pass
        except Exception as exc:
            self.leave(run)
            logger.error(  # noqa: TRY400  # without values
                "The run of task %r (%s) ended in an error of the library", run.name, run.id,
                exc_info=without_values(exc),
            )  # fmt: skip
        finally:
            if not run.is_taken_over:
                self._let_go(run)
            following = self.lanes[run.pool].finished(run)
            if following is not None:
                self.lanes[run.pool].start(following)

    def leave(self, run: Run) -> None:
        """Remember a run whose end could not be recorded: its record is put right by a heartbeat."""
        if run.claim is not None:
            self.rounds.leave(run)

    def stop_run(self, run: Run, error: Exception) -> None:
        """Have *run* end, because of *error*: an async one at once, a thread at its next statement or commit."""
        if run.is_finishing or is_lost(run):
            return
        run.stop_with(error)
        job, loop = run.job, self.loop
        if job is not None and loop is not None:
            loop.call_soon_threadsafe(job.cancel)

    def replace_thread(self, run: Run) -> None:
        """Give up on a ``def`` task whose time is over: record that, and give its place and its connection to others.

        On a thread for this alone, because ``on_failure`` is the user's code.
        """
        run.is_taken_over = True
        logger.error(
            "Task %r (%s) is still running %s s after its time was over: its thread is left to itself, and can commit "
            "nothing", run.name, run.id, OVERRUN_SECONDS,
        )  # fmt: skip
        thread = threading.Thread(target=self._record_overrun, args=(run,), name="aftercommit-overrun", daemon=True)
        self._overrun.add(thread)
        thread.start()

    def _record_overrun(self, run: Run) -> None:
        error = run.abandoned if isinstance(run.abandoned, TaskTimeout) else run.overdue()
        try:
            # On SQLite it may hold the write lock, and its end has to be written.
            taking.take_patiently(run.connection)
            self.lanes[run.pool].abandon(run)
            with around(run, watched=False):
                end(run, error, decide_outcome(run, error), self)
            # What it was given is still used by the thread that hangs, so the run is not closed.
            self.held.pop(run.id, None)
        finally:
            self._overrun.discard(threading.current_thread())

    def _let_go(self, run: Run) -> None:
        if self.held.get(run.id) is run:
            # The record may have been queued and claimed again by now, and the new run is held under the same id.
            del self.held[run.id]
        self._count_lost(run)
        run.close()
        if run.id in self.progressing:
            self.books.wake()

    def _count_lost(self, run: Run) -> None:
        """Remember how often a record's runs were lost here: the record itself may have been set back by its task."""
        if not run.was_lost:
            self.lost_runs.pop(run.id, None)
            return
        if len(self.lost_runs) >= _LOST_RUNS:
            self.lost_runs.clear()
        self.lost_runs[run.id] = self.lost_runs.get(run.id, 0) + 1

    def _lane_changed(self, lane: Lane) -> None:
        if lane.has_queued and lane.capacity():
            self.books.wake()
        if self._draining:
            with self._changed:
                self._changed.notify_all()
        if self._changed_on_loop is not None and self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._changed_on_loop.set)

    def _progressed(self, run: Run) -> None:
        if run.claim is not None and run.id not in self.progressing:
            self.progressing[run.id] = run
            self.books.wake()

    # --- waiting ------------------------------------------------------------------------------------------------

    def is_drained(self) -> bool:
        """Whether nothing that is due is left, here or anywhere; not from the event loop."""
        if not all(lane.is_idle for lane in self.lanes.values()) or self.settling:
            return False
        if self.is_durable and any(lane.has_queued and not lane.is_paused for lane in self.lanes.values()):
            return False
        return not self.is_durable or self.books.call(self._nothing_due)

    def _nothing_due(self, connection: Connection) -> bool:
        found, schedule = waiting.look_around(connection, names=self.names(), declared=self.declared)
        if schedule is not None and schedule <= 0:
            self.look()
            return False
        due = [
            pool
            for pool, each in found.items()
            if pool in self.lanes and each.seconds is not None and each.seconds <= 0
        ]
        for pool in due:
            self.lanes[pool].expect()
        return not due and not moves.any_running(connection, names=self.names())

    def refuse_own_loop(self) -> None:
        """Raise where waiting would keep the very tasks that are waited for from running."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if running is self.loop:
            raise ConfigurationError(
                "db.drain() on the event loop that runs the tasks would wait for itself. Write await db.async_drain()."
            )

    def drain(self, timeout: float) -> None:
        """Wait until nothing that is due is left.

        Raises:
            TimeoutError: If something is left after *timeout* seconds.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            self._draining += 1
        try:
            self._wait_drained(deadline, timeout)
        finally:
            with self._changed:
                self._draining -= 1

    def _wait_drained(self, deadline: float, timeout: float) -> None:
        while not self.is_drained():
            left = deadline - time.monotonic()
            if left <= 0:
                names = sorted({run.name for run in list(self.held.values())})
                raise TimeoutError(
                    f"After {timeout} s there are still tasks running or due"
                    + (f": {', '.join(names)}." if names else ".")
                    + " Give db.drain(timeout=…) more time, or look for what holds them."
                )
            self.books.wake()
            with self._changed:
                self._changed.wait(min(left, 0.05))


def _may_not_begin_again(run: Run) -> bool:
    return bool(run.started) and run.task.settings.retry.attempts == 1


def _is_left_to_others(run: Run) -> bool:
    return _may_not_begin_again(run) and run.task.settings.on_failure is not None


def _if_free(connection: Connection, run: Run, write: Callable[[Connection, Run], bool]) -> bool:
    """Write, unless somebody has locked the record: the others' are written all the same, and this one is rescued."""
    if connection.dialect.name == "sqlite":
        return write(connection, run)
    try:
        with savepoint(connection):
            return write(connection, run)
    except DBAPIError as exc:
        if fault_of(exc) is not Fault.CONFLICT:
            raise
        return False


def _write_back(connection: Connection, run: Run) -> bool:
    """Queue it again."""
    assert run.claim is not None  # noqa: S101  # those in memory cannot be queued
    return moves.give_back(connection, run.claim, None, at="", delay=0.0, refund=True)


def _write_interrupted(connection: Connection, run: Run) -> bool:
    """Fail it: it may begin only once, and has."""
    assert run.claim is not None  # noqa: S101  # those in memory have no record
    return moves.fail(connection, run.claim, failure_of(run.interrupted()), at=now())
