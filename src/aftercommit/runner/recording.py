"""How a claim ends that did not succeed: recorded on a session of its own, and told of.

What follows an error is decided in ``outcome``; what is written is written in ``records.moves``. A record that cannot
be written stays ``running`` under this worker, and its next heartbeat finds that nobody runs it. Written once, for both
colours: an ``Executor`` waits, writes and opens sessions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NoReturn

from sqlalchemy.util import greenlet_spawn

from aftercommit import signals
from aftercommit.errors import RowGone, TaskCancelled
from aftercommit.records import moves
from aftercommit.records.moves import Failure
from aftercommit.runner.bookkeeper import BooksClosed
from aftercommit.runner.executor import AsyncExecutor, SyncExecutor
from aftercommit.runner.on_failure import OnFailure, Recorded
from aftercommit.runner.outcome import (
    ClaimGone,
    Discarded,
    GiveBack,
    Outcome,
    Postponed,
    RunContext,
    error_to_record,
    has_arguments,
    is_in_doubt,
    may_be_own_doing,
)
from aftercommit.runner.run import Run, failure_of, now
from aftercommit.tasks.ends import RetryLater, expected_end
from aftercommit.tasks.retry import Again, GiveUp
from aftercommit.tasks.transient import Fault, fault_of
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from aftercommit.runner.executor import Executor

__all__ = ["async_end", "async_still_ours", "end", "note_repeat", "still_ours", "succeeded", "tell_failed"]

logger = logging.getLogger(__name__)

_ROW_GONE: Final = "a row that it was made with is gone"

_RECORDING_TRIES: Final = 6
_MAY_PASS: Final = (
    Fault.CONFLICT,
    Fault.CONNECTION,
    Fault.STALE,
    Fault.IDLE,
    Fault.UNIQUE,
    Fault.CANCELLED,
)


# --- what became of it ------------------------------------------------------------------------------------------


def note_repeat(run: Run, error: BaseException, step: Again) -> None:
    """Count the repeat that follows, and tell of it."""
    if step.counts:
        run.attempt += 1
    run.tries.count(step, time.monotonic())
    run.repeated += 1
    postponed = expected_end(error)
    if isinstance(postponed, RetryLater):
        _told_postponed(run, step.delay, postponed.reason)
        return
    run.task.figures.repeats(counts=step.counts)
    signals.emit(signals.TaskRetried(**run.facts(), error=error, delay=step.delay, in_place=True))


def succeeded(run: Run) -> None:
    """Tell of it."""
    seconds = run.seconds
    run.task.figures.succeeded(seconds)
    signals.emit(signals.TaskSucceeded(**run.facts(), seconds=seconds, repeats=run.repeated))


def tell_failed(run: Run, error: BaseException, *, expected: bool = False) -> None:
    """Tell that *run* has failed for good."""
    seconds = run.seconds
    run.task.figures.failed(seconds, expected=expected)
    signals.emit(signals.TaskFailed(**run.facts(), error=error, seconds=seconds, expected=expected))
    tick = run.current.tick
    if tick is not None and run.ends_schedule:
        logger.warning("Schedule %r has ended: %s", tick.schedule, _ROW_GONE)
        signals.emit(signals.ScheduleEnded(schedule=tick.schedule, reason=_ROW_GONE))


def _told_postponed(run: Run, delay: float, reason: str) -> None:
    run.task.figures.postponed(run.seconds)
    signals.emit(signals.TaskPostponed(**run.facts(), delay=delay, reason=reason))


def _lost(run: Run) -> None:
    why = run.abandoned
    if isinstance(why, TaskCancelled):
        logger.info("%s", why)
        signals.emit(signals.ClaimLost(**run.facts(), seconds=run.seconds, is_cancelled=True, by=why.by))
        return
    run.was_lost = True
    logger.warning("%s", run.lost())
    signals.emit(signals.ClaimLost(**run.facts(), seconds=run.seconds))


def _lost_with_its_memory(run: Run) -> None:
    """A run in memory comes here only when it was stopped."""
    logger.error("Task %r (%s) was in memory and its process is stopping: it is lost", run.name, run.id)
    signals.emit(signals.TasksLost(tasks=(run.name,), lines=("the runner stopped",)))


# --- the doors: sync and async ----------------------------------------------------------------------------------


def still_ours(run: Run, context: RunContext) -> bool:
    """Ask what became of the claim, as often as it takes; False if the function must not run again."""
    return _Recording(run, context, SyncExecutor(context)).still_ours()


async def async_still_ours(run: Run, context: RunContext) -> bool:
    """Ask what became of the claim, as often as it takes; False if the function must not run again."""
    return await greenlet_spawn(_Recording(run, context, AsyncExecutor(context)).still_ours)


def end(run: Run, error: BaseException, outcome: Outcome, context: RunContext) -> None:
    """Record the end of a claim that did not succeed."""
    run.end_try()
    if context.sessions.is_async_only and isinstance(outcome, GiveUp) and run.task.settings.on_failure is not None:
        # A `def` that takes no session: its driver has none for a thread. Its `on_failure` takes one all the same.
        _run_on_loop(partial(async_end, run, error, outcome, context), context.loop)
        return
    _Recording(run, context, SyncExecutor(context)).record(error, outcome)


async def async_end(run: Run, error: BaseException, outcome: Outcome, context: RunContext) -> None:
    """Record the end of a claim that did not succeed."""
    run.end_try()
    await greenlet_spawn(_Recording(run, context, AsyncExecutor(context)).record, error, outcome)


def _run_on_loop(work: Callable[[], Any], loop: asyncio.AbstractEventLoop | None) -> None:
    if loop is None or not loop.is_running():
        with asyncio.Runner() as runner:
            runner.run(work())
    else:
        asyncio.run_coroutine_threadsafe(work(), loop).result()


# --- recording --------------------------------------------------------------------------------------------------


class _LeftBehind(Exception):
    """The end could not be recorded; the next heartbeat finds that, and has the record queued again."""


class _Recording:
    """The end of one run.

    Args:
        run: The run.
        context: What it stands on.
        executor: How to wait and write.
    """

    def __init__(self, run: Run, context: RunContext, executor: Executor) -> None:
        self._run = run
        self._context = context
        self._executor = executor

    def still_ours(self) -> bool:
        """Whether the function may run again."""
        try:
            return self._is_still_ours(self._standing())
        except _LeftBehind:
            return False

    def record(self, error: BaseException, outcome: Outcome) -> None:
        """Write what became of the claim, and tell of it."""
        try:
            self._record(error, outcome)
        except _LeftBehind:
            return

    def _record(self, error: BaseException, outcome: Outcome) -> None:
        run = self._run
        in_doubt = is_in_doubt(run, error)
        error = error_to_record(run, error, outcome)
        if isinstance(outcome, ClaimGone):
            found = self._standing() if may_be_own_doing(run, error) else None
            if found is None or not found.is_held:
                self._note_cancelled(found)
                _lost(run)
                return
            # Its own transaction changed or hid the record, and is rolled back by now. It would do so each time.
            hidden = run.hidden()
            hidden.__cause__ = error
            self._record_failure(hidden)
        elif in_doubt and not self._is_still_ours(self._standing()):
            return
        elif isinstance(outcome, GiveUp):
            self._record_failure(error, expected=outcome.expected)
        elif isinstance(outcome, Discarded):
            self._record_discarded(outcome)
        elif run.claim is None:
            _lost_with_its_memory(run)
        elif self._write(_writing_back(run, error, outcome)):
            _queued_again(run, error, outcome, self._context)
        else:
            # The record is not ours any more: perhaps because it is done.
            self._is_still_ours(self._standing())

    def _is_still_ours(self, found: moves.Standing) -> bool:
        """Whether the function may run again. After a conflict the claim itself may be what was in conflict."""
        if found.is_done:
            # The connection was lost during COMMIT, and the server had done it.
            succeeded(self._run)
            return False
        if not found.is_held:
            self._note_cancelled(found)
            _lost(self._run)
            return False
        self._run.checkpoint = found.checkpoint
        return True

    def _record_discarded(self, outcome: Discarded) -> None:
        run, claim = self._run, self._run.claim
        if claim is None or self._write(lambda connection: moves.discard(connection, claim, outcome.reason)):
            run.task.figures.discarded(run.seconds)
            signals.emit(signals.TaskDiscarded(**run.facts(), reason=outcome.reason, seconds=run.seconds))
        else:
            self._is_still_ours(self._standing())

    def _note_cancelled(self, found: moves.Standing | None) -> None:
        """The fence has found it before anybody told the run."""
        if found is not None and found.is_cancelled and self._run.abandoned is None:
            self._run.abandoned = self._run.cancelled(found.cancelled_by)

    # --- failing for good -----------------------------------------------------------------------------------------

    def _record_failure(self, error: BaseException, *, expected: bool = False) -> None:
        """Record the failure for good, and call ``on_failure``, in one transaction of a fresh session."""
        run = self._run
        recorded = Recorded.NOT_YET
        write = partial(_write_failure, run, error, expected)
        if run.task.settings.on_failure is not None and has_arguments(error):
            call = OnFailure(run, error, self._executor, write=write, look=self._standing)
            recorded = self._call(call)
        if recorded is Recorded.NOT_YET and (run.claim is None or self._write(write)):
            recorded = Recorded.DONE
        if recorded is not Recorded.DONE:
            found = self._standing()
            if not found.has_failed:
                self._is_still_ours(found)
                return
            # The answer of that COMMIT was lost; or `on_failure` committed before its end.
        tell_failed(run, error, expected=expected)

    def _call(self, on_failure: OnFailure) -> Recorded:
        """Call it until it has ended, one way or another."""
        for number in count(1):
            step = on_failure.attempt()
            if isinstance(step, Recorded):
                return step
            if isinstance(step, GiveUp) or (self._context.stopping.is_set() and number >= _RECORDING_TRIES):
                self._leave(on_failure.error)
            self._executor.wait(step.delay)
            became = on_failure.look_again()
            if became is not None:
                return became
        raise AssertionError  # count() has no end

    # --- writing ----------------------------------------------------------------------------------------------------

    def _standing(self) -> moves.Standing:
        """What became of the claim."""
        claim = self._run.claim
        if claim is None:
            # A task in memory has no record that another worker could own.
            return moves.Standing(is_held=True, is_done=False, has_failed=False, checkpoint=None)
        found: moves.Standing = self._write(lambda connection: moves.standing(connection, claim))
        return found

    def _write(self, work: Callable[[Connection], Any]) -> Any:
        """Do *work* on the books, as often as it takes: the database itself may be what is failing."""
        for number in count(1):
            try:
                return self._executor.call_books(work)
            except Exception as exc:  # noqa: BLE001  # told of by _leave
                if not self._may_pass(exc, number):
                    self._leave(exc)
            self._executor.wait(min(0.05 * float(2**number), 2.0))
        raise AssertionError  # count() has no end

    def _may_pass(self, error: BaseException, number: int) -> bool:
        fault = fault_of(error)
        # Somebody holds the record: the server process of a COMMIT in doubt may do so for as long as a network is down.
        has_time = fault is Fault.CONFLICT and not self._context.stopping.is_set()
        return has_time or (fault in _MAY_PASS and number < _RECORDING_TRIES)

    def _leave(self, error: BaseException | None) -> NoReturn:
        run = self._run
        self._context.leave(run)
        shown = None if error is None or isinstance(error, BooksClosed) else without_values(error)
        logger.error(
            "The end of task %r (%s, attempt %d) could not be recorded; it will be queued again",
            run.name, run.id, run.attempt, exc_info=shown,
        )  # fmt: skip
        raise _LeftBehind from error


def _write_failure(run: Run, error: BaseException, expected: bool, connection: Connection) -> bool:  # noqa: FBT001
    assert run.claim is not None  # noqa: S101  # asked by the callers
    held = moves.fail(connection, run.claim, failure_of(error, expected=expected), at=now())
    if held and isinstance(error, RowGone) and run.current.tick is not None:
        from aftercommit.records import schedules  # mapping the tables takes time that an import must not

        # Made for that row: it would fail for ever.
        run.ends_schedule = schedules.end_data(connection, run.current.tick.schedule, because=_ROW_GONE)
    return held


def _writing_back(run: Run, error: BaseException, step: Again | GiveBack | Postponed) -> Callable[[Connection], bool]:
    """Work for the books: queue the record again; the attempt of an interrupted run does not count."""
    claim = run.claim
    assert claim is not None  # noqa: S101  # asked by the callers
    if isinstance(step, GiveBack):
        return lambda connection: moves.give_back(connection, claim, None, at="", delay=0.0, refund=True)
    if isinstance(step, Postponed):
        said = Failure(error=str(step.reason or "RetryLater"), traceback=None)
        return lambda connection: moves.give_back(
            connection, claim, said, at="", delay=step.delay, refund=True, in_order=True
        )
    failure = failure_of(error)
    return lambda connection: moves.give_back(
        connection, claim, failure, at=now(), delay=step.delay, refund=not step.counts, got_on=run.got_on
    )


def _queued_again(run: Run, error: BaseException, step: Again | GiveBack | Postponed, context: RunContext) -> None:
    context.expect(run.pool)
    figures = run.task.figures
    if isinstance(step, Postponed):
        _told_postponed(run, step.delay, step.reason)
    elif isinstance(step, GiveBack):
        figures.given_back()
        signals.emit(signals.TaskGivenBack(**run.facts(), reason="its worker is stopping"))
    else:
        figures.repeats(counts=step.counts)
        figures.run.add(run.seconds)
        signals.emit(signals.TaskRetried(**run.facts(), error=error, delay=step.delay, in_place=False))
