"""What the bookkeeping thread does between its jobs: the heartbeat, looking for work, rescue, progress, pruning.

All of it on the one connection that is nobody else's, so that neither a blocked event loop nor a full pool nor a
task that hangs can hold it up.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from aftercommit import signals
from aftercommit.errors import LostClaim
from aftercommit.records import moves, sweeping, waiting, workers
from aftercommit.runner.backends import Backends
from aftercommit.runner.lanes import STUCK_SECONDS
from aftercommit.runner.run import Run
from aftercommit.tasks.transient import Fault, fault_of
from aftercommit.watch.loop_monitor import line_on_loop
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from sqlalchemy import Connection

    from aftercommit.runner.lanes import Lane
    from aftercommit.runner.runner import Runner

__all__ = ["Pace", "Rounds", "pause_between_sweeps"]

logger = logging.getLogger(__name__)

_SETTLE_SECONDS: Final = 0.002
_PROGRESS_SECONDS: Final = 0.3
_POLL_IN_TRANSACTIONS: Final = 10.0
_PULSE_SECONDS: Final = 1.0
_ENDING_SECONDS: Final = 0.2
OVERRUN_SECONDS: Final = 1.0
"""For which a ``def`` task that has been told that its time is over may go on, before its place is given to others."""
_PRUNED_AT_ONCE: Final = 1000
_SWEEP_SECONDS: Final = 60.0
_SWEEP_SECONDS_READ: Final = 15.0
_SWEEP_SHARE: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often the runner looks around.

    Attributes:
        heartbeat: Seconds between heartbeats.
        silent_after: Seconds without one after which a worker's tasks are given to others.
        poll: Seconds between looks for tasks of other processes, when idle.
        poll_listening: The same, while LISTEN works.
        keep: Seconds for which finished records are kept, or None for ever.
        prune_every: Seconds between prunings.
    """

    heartbeat: float = 5.0
    silent_after: float = 30.0
    poll: float = 2.0
    poll_listening: float = 20.0
    keep: float | None = 7 * 24 * 3600.0
    prune_every: float = 60.0


class Rounds:
    """The rounds of one runner. Everything here runs on the bookkeeping thread, unless it says otherwise.

    Args:
        runner: Whose.
        pace: How often.
    """

    def __init__(self, runner: Runner, pace: Pace) -> None:
        self._runner = runner
        self._pace = pace
        self._suspects: set[UUID] = set()
        self._has_cancelled = False
        self._homeless: dict[tuple[str, str], float] = {}
        self._left: set[UUID] = set()
        self._next_beat = 0.0
        self._next_poll = 0.0
        self._next_prune = 0.0
        self._next_progress = 0.0
        self._sweep: tuple[sweeping.Sweep, float] | None = None
        self._sweep_begun = float("-inf")
        self._sweep_took = 0.0
        self._sweep_read = 0.0
        self.backends = Backends(runner)
        self._fruitless = 0
        self._crowded: set[str] = set()
        self._wakes_at = 0.0
        self._last_beat = time.monotonic()
        self._loop_seen = time.monotonic()
        self._loop_told = float("-inf")
        self._loop_asked = False
        self._is_down = False
        self._down_since = 0.0
        self.has_left = False
        """Whether this worker has signed off: a heartbeat after that would enter it among the workers again."""

    # --- from any thread ----------------------------------------------------------------------------------------

    @property
    def was_silent(self) -> bool:
        """Whether the last heartbeat is so old that others may have taken what this worker holds."""
        return time.monotonic() - self._last_beat > self._pace.silent_after

    def leave(self, run: Run) -> None:
        """Remember a run that has begun, and whose end could not be recorded: its attempt counts."""
        self._left.add(run.id)

    def hear_of_cancelled(self) -> None:
        """Look soon which of the runs that are held were cancelled."""
        self._has_cancelled = True
        self._runner.books.wake()

    def watch(self, run: Run) -> None:
        """Look at a run with a time limit in time."""
        if run.deadline is not None and run.deadline < self._wakes_at:
            self._runner.books.wake()

    def connected(self) -> None:
        """List our backends soon: a connection was made."""
        if self.backends.changed() and self.backends.due < self._wakes_at:
            self._runner.books.wake()

    def look(self) -> None:
        """Poll soon."""
        for duty in self._runner.duties:
            duty.look()
        self._next_poll = 0.0
        self._runner.books.wake()

    def last_sweep(self) -> tuple[sweeping.Sweep, float] | None:
        """What the last look at the whole queue found, and when that was, by the monotonic clock.

        Whoever reads has the next look come sooner: nobody pays for figures that nobody wants.
        """
        self._sweep_read = time.monotonic()
        if self._runner.is_durable and self._next_sweep < self._wakes_at:
            self._runner.books.wake()
        return self._sweep

    @property
    def _next_sweep(self) -> float:
        is_read = self._sweep_read > self._sweep_begun
        return self._sweep_begun + pause_between_sweeps(self._sweep_took, is_read=is_read)

    # --- one round ----------------------------------------------------------------------------------------------

    def make(self) -> float:
        """Do what is due; return the seconds until something is again."""
        runner = self._runner
        now = time.monotonic()
        # A time limit that is set while this goes on wakes us again.
        self._wakes_at = float("inf")
        self._check_loop(now)
        deadline = self._end_overdue(now)
        for _ in range(len(runner.settling)):
            check = runner.settling.popleft()
            if not check():
                runner.settling.append(check)
        due = [now + _PULSE_SECONDS * 10 if deadline is None else deadline]
        if runner.settling:
            due.append(now + _SETTLE_SECONDS)
        if runner.is_durable and not self.has_left:
            try:
                self._work(now)
            except Exception as exc:  # noqa: BLE001  # whatever it is, the thread and its heartbeat go on
                self._note_down(exc)
                due.append(time.monotonic() + 0.5)
            else:
                self._note_up()
                due += self._following()
        if self._loop_asked:
            due.append(now + _PULSE_SECONDS)
        self._wakes_at = min(due)
        return max(0.0, self._wakes_at - time.monotonic())

    def _work(self, now: float) -> None:
        met: Exception | None = None
        for duty in self._due(now):
            try:
                duty()
            except Exception as exc:
                # Somebody has locked what this one needs, for as long as he likes: the others go on without it. On
                # SQLite there is one lock, and none of them would get it.
                if fault_of(exc) is not Fault.CONFLICT or self._runner.sessions.pools.is_sqlite:
                    raise
                met = met or exc
            self.stay_alive()
        if met is not None:
            raise met

    def _due(self, now: float) -> Iterator[Callable[[], object]]:
        runner = self._runner
        # A transaction pooler lets no LISTEN through, so where that works by the database's own URL there is none.
        runner.books.is_direct = runner.is_listening and not runner.listens_elsewhere
        # Before the heartbeat, which may find a silent worker that lists the same: it was in this process before.
        if now >= self.backends.due:
            yield self.backends.write_when_due
        if self._has_cancelled:
            yield self._find_cancelled
        if now >= self._next_beat:
            yield self._beat
        if now >= self._next_poll:
            yield self._poll
        for lane in runner.lanes.values():
            if lane.is_ahead:
                yield partial(runner.share, lane)
            if lane.has_queued:
                yield partial(self._claim, lane)
        yield from (duty.make for duty in runner.duties if now >= duty.due)
        if runner.progressing and now >= self._next_progress:
            yield self._write_progress
        if runner.herald.due() == 0.0:
            yield runner.herald.send
        rare = ((self._next_prune, self._prune), (self._next_sweep, self._look_at_all))
        yield from (duty for when, duty in rare if now >= when)

    def stay_alive(self) -> None:
        """Renew our row if a heartbeat is due: in the middle of a round, or of many jobs, each may take its second."""
        runner = self._runner
        late = time.monotonic() - self._last_beat
        # One that was silent itself has more to do than to say that it is there.
        if not runner.is_durable or self.has_left or not self._pace.heartbeat <= late < self._pace.silent_after / 2:
            return
        try:
            self._renew()
        except Exception as exc:  # the heartbeat itself, which follows, finds the same, and tells of it
            logger.debug("The worker's row could not be renewed between two jobs", exc_info=without_values(exc))

    def _renew(self) -> bool:
        runner = self._runner
        is_there = runner.books.execute(lambda c: workers.renew(c, runner.id), autocommit=True)
        if is_there:
            self._last_beat = time.monotonic()
        return is_there

    def _following(self) -> list[float]:
        due = [self._next_beat, self._next_poll, self._next_prune, self._next_sweep, self.backends.due]
        due += [duty.due for duty in self._runner.duties]
        if self._runner.progressing:
            due.append(self._next_progress)
        if any(lane.is_ahead for lane in self._runner.lanes.values()):
            due.append(time.monotonic() + STUCK_SECONDS)
        news = self._runner.herald.due()
        if news is not None:
            due.append(time.monotonic() + news)
        return due

    def _note_down(self, error: BaseException) -> None:
        if fault_of(error) is Fault.CONFLICT and not self.was_silent:
            # Somebody has SQLite's write lock, and will give it back.
            return
        if not self._is_down:
            self._is_down = True
            self._down_since = time.monotonic()
            logger.error(
                "The bookkeeping cannot work on the database; it tries again until it can",
                exc_info=without_values(error),
            )
            signals.emit(signals.DatabaseDown(error=error))

    def _note_up(self) -> None:
        if self._is_down:
            self._is_down = False
            logger.warning("The database answers again")
            signals.emit(signals.DatabaseUp(seconds=time.monotonic() - self._down_since))
            # What happened meanwhile, nobody told us: look at once, and not with the next heartbeat.
            self._next_poll = 0.0
            for lane in self._runner.lanes.values():
                lane.expect()

    # --- the heartbeat ------------------------------------------------------------------------------------------

    def register(self, connection: Connection) -> None:
        """Enter this process among the workers."""
        runner = self._runner
        workers.register(
            connection,
            runner.id,
            host=socket.gethostname()[:255],
            pid=os.getpid(),
            pools=list(runner.lanes),
            names=sorted(runner.names()),
        )
        self._next_beat = time.monotonic() + self._pace.heartbeat

    def _beat(self) -> None:
        """Say that we are alive, and look at the others."""
        runner = self._runner
        late = time.monotonic() - self._last_beat
        is_there = self._renew()
        self._next_beat = time.monotonic() + self._pace.heartbeat
        if not is_there or late > self._pace.silent_after:
            self.backends.rewrite()
        if is_there:
            pulse = runner.books.execute(
                lambda c: workers.look(c, runner.id, silent_after=self._pace.silent_after), autocommit=True
            )
        else:
            # We were silent for so long that our row was taken away, and with it what we ran.
            runner.books.execute(self.register)
            self._last_beat = time.monotonic()
            pulse = workers.Pulse(running=frozenset(), has_silent=False)
        # After the look, so that nothing that was taken before it is missing here.
        held = dict(runner.held)
        self._release_orphans(pulse.running - held.keys())
        self._stop_lost(pulse.running, held)
        # A worker that was silent itself does not judge others: their heartbeats may have waited for the same lock.
        if pulse.has_silent and late < self._pace.silent_after / 2 and self._rescue():
            # What held a record of theirs is gone in a moment, and the record can be taken then.
            self._next_beat = time.monotonic() + _ENDING_SECONDS

    def _release_orphans(self, orphans: frozenset[UUID]) -> None:
        runner = self._runner
        # Those that have begun count: or what cannot be recorded would be run for ever.
        for refund, records in ((True, orphans - self._left), (False, orphans & self._left)):
            if not records:
                continue

            def release(
                connection: Connection, *, records: frozenset[UUID] = records, refund: bool = refund
            ) -> list[UUID]:
                return workers.release_orphans(connection, runner.id, records, refund=refund)

            released = runner.books.execute(release)
            if released:
                logger.warning("%d task(s) said that this worker runs them and it did not; queued again", len(released))
                signals.emit(signals.TasksRequeued(ids=tuple(released), reason="this worker did not run them"))
                for lane in runner.lanes.values():
                    lane.expect()
        self._left &= orphans

    def _stop_lost(self, running: frozenset[UUID], held: dict[UUID, Run]) -> None:
        """End runs whose record is no longer ours; twice seen, because a commit may be on its way."""
        missing = {id for id, run in held.items() if run.claim is not None and run.started and id not in running}
        self._stop_cancelled(missing)
        for id in missing & self._suspects:
            self._runner.stop_run(held[id], held[id].lost())
        self._suspects = missing

    def _find_cancelled(self) -> None:
        self._has_cancelled = False
        self._stop_cancelled(set(self._runner.held))

    def _stop_cancelled(self, ids: set[UUID]) -> None:
        """End those that were cancelled under the claim that is held here."""
        runner = self._runner
        if not ids:
            return
        found = runner.books.execute(lambda c: moves.cancelled_among(c, ids), autocommit=True)
        for (id, claims), by in found.items():
            run = runner.held.get(id)
            if run is not None and run.claim is not None and run.claim.claims == claims:
                runner.cancelled(id, by)

    def _rescue(self) -> bool:
        is_ending = self.backends.end_silent(silent_after=self._pace.silent_after)
        rescued = self._runner.books.execute(lambda c: workers.rescue(c, silent_after=self._pace.silent_after))
        if rescued:
            logger.warning("%d task(s) of silent workers were queued again", len(rescued))
            signals.emit(signals.TasksRescued(requeued=tuple(rescued), failed=()))
            for lane in self._runner.lanes.values():
                lane.expect()
        return is_ending

    # --- looking for work ---------------------------------------------------------------------------------------

    def _poll(self) -> None:
        runner = self._runner
        names = runner.names()
        found, seconds = runner.books.execute(
            lambda c: waiting.look_around(c, names=names, declared=runner.declared), autocommit=True
        )
        if seconds is not None:
            for duty in runner.duties:
                duty.expect_in(seconds)
        due = {pool: each.seconds for pool, each in found.items() if each.seconds is not None}
        self._crowded = {pool for pool, each in found.items() if each.is_crowded}
        following = self._pace.poll_listening if runner.is_listening else self._pace.poll
        if runner.books.is_asyncpg and not runner.is_listening:
            # There a look is a transaction, three statements, and idle workers must cost next to nothing.
            following = max(following, _POLL_IN_TRANSACTIONS)
        if all(seconds > 0 for seconds in due.values()):
            self._fruitless = 0
        for name, lane in runner.lanes.items():
            runner.set_paused(lane, paused=name in found and found[name].is_paused)
            seconds = due.get(name)
            if seconds is None:
                continue
            if seconds <= 0:
                lane.expect()
            else:
                following = min(following, seconds)
        self._rehome(set(due))
        self._next_poll = time.monotonic() + following

    def _rehome(self, pools: set[str]) -> None:
        """Take in tasks that were queued in a pool which an earlier release had: nobody else would ever run them.

        It may be a pool of another application on this database. So it is not ours to take from as long as a worker
        runs it that knows the name, nor for a while after that one has signed off: it may be starting again.
        """
        runner = self._runner
        now = time.monotonic()
        homeless: dict[tuple[str, str], float] = {}
        for old in pools.difference(runner.sessions.pools.names):
            known = runner.books.execute(partial(workers.who_runs, pool=old), autocommit=True)
            by_pool: dict[str, list[str]] = {}
            for name in runner.names():
                if name in known:
                    continue
                since = homeless[old, name] = self._homeless.get((old, name), now)
                if now - since >= self._pace.silent_after:
                    by_pool.setdefault(runner.tasks[name].settings.pool, []).append(name)
            for new, names in by_pool.items():
                moved = runner.books.execute(partial(moves.rehome, old=old, new=new, names=names))
                if moved:
                    logger.warning("There is no pool %r any more: %d task(s) in it moved to %r", old, moved, new)
                    runner.expect(new)
        self._homeless = homeless

    def _claim(self, lane: Lane) -> None:
        runner = self._runner
        count = lane.capacity()
        if not count or runner.stopping.is_set():
            return
        mark = lane.heard
        names = runner.names()
        crowded = lane.name in self._crowded
        claimed = runner.books.execute(
            lambda c: moves.claim(c, pool=lane.name, names=names, worker=runner.id, count=count, crowded=crowded),
            autocommit=True,
        )
        if len(claimed) < (1 if crowded else count):
            lane.looked(mark)
        if claimed:
            self._fruitless = 0
        else:
            # Only a poll knows when what was queued for later is due. It may find again what cannot be taken, because
            # others are taking it: each time it waits longer.
            pause = min(self._pace.poll, 0.01 * 2**self._fruitless - 0.01)
            self._next_poll = min(self._next_poll, time.monotonic() + pause)
            self._fruitless = min(self._fruitless + 1, 10)
        for each in claimed:
            run = Run(
                task=runner.tasks[each.task],
                id=each.claim.id,
                claim=each.claim,
                attempt=each.claim.attempt,
                max_attempts=each.max_attempts,
                arguments=each.arguments,
                context=each.context,
                checkpoint=each.checkpoint,
                # The record says it, unless its task sets that back each time.
                refunds=max(each.refunds, runner.lost_runs.get(each.claim.id, 0)),
                waited=each.waited,
                asked_ago=each.asked_ago,
                pool=lane.name,
            )
            runner.submit(run, reserved=False)

    # --- progress, pruning --------------------------------------------------------------------------------------

    def _write_progress(self) -> None:
        self._next_progress = time.monotonic() + _PROGRESS_SECONDS
        runner = self._runner
        for run in list(runner.progressing.values()):
            session = run.session
            if runner.sessions.pools.is_sqlite and session is not None and session.in_transaction():
                # It holds the write lock, or will: it writes its progress itself, with its next commit.
                continue
            del runner.progressing[run.id]
            runner.books.execute(_progress_of(run))

    def _prune(self) -> None:
        self._next_prune = time.monotonic() + self._pace.prune_every
        keep = self._pace.keep

        def write(connection: Connection) -> int:
            workers.forget_silent(connection, silent_after=self._pace.silent_after)
            return 0 if keep is None else workers.prune(connection, keep=keep, count=_PRUNED_AT_ONCE)

        if self._runner.books.execute(write) >= _PRUNED_AT_ONCE:
            # A full piece: there is more.
            self._next_prune = time.monotonic() + 1.0

    # --- the whole queue ----------------------------------------------------------------------------------------

    def _look_at_all(self) -> None:
        """Count what is queued and runs anywhere, for ``db.stats()``."""
        begun = self._sweep_begun = time.monotonic()
        found = self._runner.books.execute(
            lambda c: sweeping.sweep(c, silent_after=self._pace.silent_after), autocommit=True
        )
        at = time.monotonic()
        self._sweep, self._sweep_took = (found, at), at - begun

    # --- time limits, and the event loop's pulse ----------------------------------------------------------------

    def _end_overdue(self, now: float) -> float | None:
        """Tell ``def`` tasks that their time is over, and give up those that do not listen; return when to go on."""
        following: float | None = None
        for run in list(self._runner.held.values()):
            deadline = run.deadline
            if deadline is None or run.task.is_async or run.is_finishing or run.is_taken_over:
                continue
            if now >= deadline:
                if run.abandoned is None:
                    run.stop_with(run.overdue())
                deadline += OVERRUN_SECONDS
                if now >= deadline:
                    self._runner.replace_thread(run)
                    continue
            following = deadline if following is None else min(following, deadline)
        return following

    def _check_loop(self, now: float) -> None:
        """Report an event loop that does not turn: heartbeats go on without it, but its tasks do not."""
        runner = self._runner
        loop = runner.loop
        if loop is None or loop.is_closed():
            return
        if self._loop_asked and now - max(self._loop_seen, self._loop_told) > self._pace.heartbeat:
            names = tuple(sorted({run.name for run in list(runner.held.values()) if run.task.is_async and run.started}))
            line = line_on_loop(runner.loop_thread)
            logger.warning(
                "The event loop has not turned for %.1f s; %srunning on it: %s. Something computes or waits without "
                "await: make it a `def`, which has a thread, or await it.",
                now - self._loop_seen, "" if line is None else f"it is at {line}; ", ", ".join(names) or "no tasks",
            )  # fmt: skip
            signals.emit(signals.LoopBlocked(seconds=now - self._loop_seen, tasks=names, line=line))
            self._loop_told = now
        elif not self._loop_asked and now - self._loop_seen >= _PULSE_SECONDS:
            self._loop_asked = True
            self._loop_seen = now
            try:
                loop.call_soon_threadsafe(self._loop_turned)
            except RuntimeError:
                self._loop_asked = False

    def _loop_turned(self) -> None:
        self._loop_asked = False


def pause_between_sweeps(took: float, *, is_read: bool) -> float:
    """Return the seconds from one look at the whole queue to the next.

    Args:
        took: Seconds that the last one took; with very many queued records they become rarer, so that at most half a
            per cent of the time goes into them.
        is_read: Whether somebody has read figures since.
    """
    return max(_SWEEP_SECONDS_READ if is_read else _SWEEP_SECONDS, _SWEEP_SHARE * took)


def is_lost(run: Run) -> bool:
    """Whether a run has been told that its record is somebody else's."""
    return isinstance(run.abandoned, LostClaim)


def _progress_of(run: Run) -> Callable[[Connection], None]:
    """Write how far a run is."""

    def write(connection: Connection) -> None:
        # Asked for under SQLite's lock: while we wait for it, the task may commit, and with it a newer figure.
        moves.take_lock(connection)
        progress = run.current.take_progress()
        if progress is not None:
            moves.set_progress(connection, run.id, *progress)

    return write
