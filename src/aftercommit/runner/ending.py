"""How a claim ends that did not succeed: judged, recorded on a session of its own, and told of.

What follows an error is decided in ``tasks.retry``; what is written is written in ``records.moves``. A record that
cannot be written stays ``running`` under this worker, and its next heartbeat finds that nobody runs it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Protocol

from aftercommit import signals
from aftercommit.errors import LostClaim, PayloadError, RowGone, WorkerLost
from aftercommit.records import moves
from aftercommit.runner.bookkeeper import BooksClosed
from aftercommit.runner.run import Run, failure_of, now
from aftercommit.tasks.context import logged
from aftercommit.tasks.current import as_current
from aftercommit.tasks.retry import Again, GiveUp, decide
from aftercommit.tasks.transient import Fault, fault_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from aftercommit.sessions import SessionFactory

__all__ = [
    "Bookkeeping",
    "End",
    "GiveBack",
    "Gone",
    "Ground",
    "Worker",
    "async_end",
    "async_still_ours",
    "end",
    "judge",
    "note_repeat",
    "still_ours",
    "succeeded",
    "tell_failed",
    "worn_out",
]

logger = logging.getLogger(__name__)

_rng = random.Random()  # noqa: S311  # jitter, not secrets
_RECORDING_TRIES: Final = 6
_MAY_PASS: Final = (Fault.CONFLICT, Fault.CONNECTION, Fault.STALE, Fault.IDLE, Fault.UNIQUE)


class Bookkeeping(Protocol):
    """Short transactions of the library's own, from any thread."""

    def call(self, work: Any) -> Any:
        """Run ``work(connection)`` in a transaction and wait for it; not from the event loop."""

    async def async_call(self, work: Any) -> Any:
        """The same, from the event loop."""


class Ground(Protocol):
    """What one try stands on."""

    @property
    def sessions(self) -> SessionFactory:
        """Makes sessions."""
        ...

    @property
    def books(self) -> Bookkeeping:
        """Writes where the task's own pool has no sync flavour."""
        ...


class Worker(Ground, Protocol):
    """What a whole claim stands on."""

    @property
    def stopping(self) -> threading.Event:
        """Set when nothing may be repeated any more."""
        ...

    def leave(self, run: Run) -> None:
        """Remember a run whose end could not be recorded."""

    def expect(self, pool: str) -> None:
        """Look into the database soon: something of *pool* was queued."""


# --- what follows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Queue it again, as if this attempt had never been: it was interrupted."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The record is somebody else's: there is nothing to write."""


End = Again | GiveUp | GiveBack | Gone


def judge(run: Run, error: BaseException, *, cancelled: bool = False) -> End:
    """What follows *error*.

    Args:
        run: The claim.
        error: What ended the try.
        cancelled: Whether somebody cancelled the asyncio task that runs it.
    """
    policy = run.task.settings.retry
    if isinstance(error, LostClaim) or isinstance(run.abandoned, LostClaim):
        return Gone()
    if run.stopping:
        if policy.attempts == 1 and run.started:
            return GiveUp(reason="interrupted by a stop; Retry(attempts=1) means once")
        return GiveBack()
    if isinstance(error, asyncio.CancelledError):
        if not cancelled or run.claim is None or run.attempt >= policy.attempts:
            return GiveUp(reason="cancelled from inside the application")
        # An event loop that closes under us does this. It may be somebody's habit, too, so it is an attempt.
        return Again(delay=0.0, in_place=False, counts=True, drop_connection=False)
    if run.conflict_since is not None:
        run.repeats = replace(run.repeats, conflict_seconds=time.monotonic() - run.conflict_since)
    step = decide(
        error,
        policy=policy,
        attempt=run.attempt,
        repeats=run.repeats,
        saw_unique=run.current.saw_unique,
        saw_conflict=run.current.saw_conflict,
        rng=_rng,
    )
    # A task in memory has no record to queue: it is retried here, or not at all.
    return replace(step, in_place=True) if isinstance(step, Again) and run.claim is None else step


def note_repeat(run: Run, error: BaseException, step: Again) -> None:
    """Count the repeat that follows, and tell of it."""
    fault = fault_of(error)
    seen = run.repeats
    if step.counts:
        run.attempt += 1
    elif fault is Fault.STALE:
        run.repeats = replace(seen, stales=seen.stales + 1)
    elif fault is Fault.UNIQUE or (run.current.saw_unique and fault is not Fault.CONFLICT):
        run.repeats = replace(seen, uniques=seen.uniques + 1)
    else:
        run.conflict_since = run.conflict_since or time.monotonic()
        run.repeats = replace(seen, conflicts=seen.conflicts + 1)
    run.repeated += 1
    run.task.figures.repeats(counts=step.counts)
    signals.emit(signals.TaskRetried(**run.facts(), error=error, delay=step.delay, in_place=True))


def worn_out(run: Run) -> BaseException | None:
    """The error of a task that killed its worker as often as it may be tried."""
    if run.attempt <= run.max_attempts:
        return None
    return WorkerLost(
        f"Task {run.name!r} ({run.id}) was begun {run.max_attempts} times, and each time its worker died or fell "
        "silent before the end. It may be what kills it: look at the memory it takes, and at native code. "
        "Mended, it can be queued again with db.retry(id).",
        task=run.name,
        run_id=run.id,
    )


# --- what became of it ------------------------------------------------------------------------------------------


def standing(run: Run) -> Any:
    """Work for the books: what became of the claim."""

    def ask(connection: Connection) -> moves.Standing:
        assert run.claim is not None  # noqa: S101  # tasks in memory do not ask
        return moves.standing(connection, run.claim)

    return ask


def is_still_ours(run: Run, found: moves.Standing) -> bool:
    """Whether the function may run again. After a conflict the claim itself may be what was in conflict."""
    if found.is_done:
        # The connection was lost during COMMIT, and the server had done it.
        succeeded(run)
        return False
    if not found.is_held:
        lost(run)
        return False
    run.checkpoint = found.checkpoint
    return True


def succeeded(run: Run) -> None:
    """Tell of it."""
    seconds = run.seconds
    run.task.figures.succeeded(seconds)
    signals.emit(signals.TaskSucceeded(**run.facts(), seconds=seconds, repeats=run.repeated))


def lost(run: Run) -> None:
    """Tell of it."""
    logger.warning("%s", run.lost())
    signals.emit(signals.ClaimLost(**run.facts(), seconds=run.seconds))


# --- recording, sync and async ----------------------------------------------------------------------------------


def still_ours(run: Run, ground: Worker) -> bool:
    """Ask what became of the claim, as often as it takes; False if the function must not run again."""
    for number in count(1):
        try:
            return is_still_ours(run, ground.books.call(standing(run)))
        except Exception as exc:  # noqa: BLE001  # the database itself may be what is failing
            delay = _again_in(run, exc, number, ground)
            if delay is None:
                return False
            ground.stopping.wait(delay)
    raise AssertionError  # count() has no end


async def async_still_ours(run: Run, ground: Worker) -> bool:
    """Ask what became of the claim, as often as it takes; False if the function must not run again."""
    for number in count(1):
        try:
            return is_still_ours(run, await ground.books.async_call(standing(run)))
        except Exception as exc:  # noqa: BLE001  # the database itself may be what is failing
            delay = _again_in(run, exc, number, ground)
            if delay is None:
                return False
            await asyncio.sleep(delay)
    raise AssertionError  # count() has no end


def end(run: Run, error: BaseException, step: End, ground: Worker) -> None:
    """Record the end of a claim that did not succeed."""
    run.end_try()
    for number in count(1):
        try:
            _settle(run, error, step, ground)
        except Exception as exc:  # noqa: BLE001  # the database itself may be what is failing
            delay = _again_in(run, exc, number, ground)
            if delay is None:
                return
            ground.stopping.wait(delay)
        else:
            return


async def async_end(run: Run, error: BaseException, step: End, ground: Worker) -> None:
    """Record the end of a claim that did not succeed."""
    run.end_try()
    for number in count(1):
        try:
            await _async_settle(run, error, step, ground)
        except Exception as exc:  # noqa: BLE001  # the database itself may be what is failing
            delay = _again_in(run, exc, number, ground)
            if delay is None:
                return
            await asyncio.sleep(delay)
        else:
            return


def _again_in(run: Run, error: BaseException, number: int, ground: Worker) -> float | None:
    """Seconds until recording is tried again; None to leave it."""
    fault = fault_of(error)
    # Somebody holds the record: the server process of a COMMIT in doubt may do so for as long as a network is down.
    has_time = fault is Fault.CONFLICT and not ground.stopping.is_set()
    if (fault in _MAY_PASS and number < _RECORDING_TRIES) or has_time:
        return min(0.05 * float(2**number), 2.0)
    ground.leave(run)
    logger.error(
        "The end of task %r (%s, attempt %d) could not be recorded; it will be queued again",
        run.name, run.id, run.attempt, exc_info=None if isinstance(error, BooksClosed) else error,
    )  # fmt: skip
    return None


def _settle(run: Run, error: BaseException, step: End, ground: Worker) -> None:
    """Write what became of the claim, and tell of it."""
    call = ground.books.call
    error = _named(run, error, step)
    if isinstance(step, Gone):
        lost(run)
    elif _is_in_doubt(run, error) and not is_still_ours(run, call(standing(run))):
        return
    elif isinstance(step, GiveUp):
        if not _fail(run, error, ground):
            _not_held(run, call)
    elif run.claim is None:
        _lost_with_its_memory(run)
    elif call(_writing_back(run, error, step)):
        _queued_again(run, error, step, ground)
    else:
        _not_held(run, call)


async def _async_settle(run: Run, error: BaseException, step: End, ground: Worker) -> None:
    """Write what became of the claim, and tell of it."""
    call = ground.books.async_call
    error = _named(run, error, step)
    if isinstance(step, Gone):
        lost(run)
    elif _is_in_doubt(run, error) and not is_still_ours(run, await call(standing(run))):
        return
    elif isinstance(step, GiveUp):
        if not await _async_fail(run, error, ground):
            is_still_ours(run, await call(standing(run)))
    elif run.claim is None:
        _lost_with_its_memory(run)
    elif await call(_writing_back(run, error, step)):
        _queued_again(run, error, step, ground)
    else:
        is_still_ours(run, await call(standing(run)))


def _named(run: Run, error: BaseException, step: End) -> BaseException:
    """A cancellation says nothing to whoever reads the record."""
    is_interrupted = run.stopping and isinstance(step, GiveUp) and isinstance(error, asyncio.CancelledError)
    return run.interrupted() if is_interrupted and not _is_in_doubt(run, error) else error


def _not_held(run: Run, call: Any) -> None:
    """The record is not ours any more: perhaps because it is done."""
    is_still_ours(run, call(standing(run)))


def _is_in_doubt(run: Run, error: BaseException) -> bool:
    """Whether the last COMMIT was cut off, so that the server may have done it all the same."""
    if run.claim is None or not run.is_finishing:
        return False
    return isinstance(error, asyncio.CancelledError) or fault_of(error) in (Fault.CONNECTION, Fault.IDLE)


def _writing_back(run: Run, error: BaseException, step: Again | GiveBack) -> Any:
    """Work for the books: queue the record again; the attempt of an interrupted run does not count."""
    claim = run.claim
    assert claim is not None  # noqa: S101  # asked by the callers
    if isinstance(step, GiveBack):
        return lambda connection: moves.give_back(connection, claim, None, at="", delay=0.0, refund=True)
    failure = failure_of(error)
    return lambda connection: moves.give_back(
        connection, claim, failure, at=now(), delay=step.delay, refund=not step.counts
    )


def _queued_again(run: Run, error: BaseException, step: Again | GiveBack, ground: Worker) -> None:
    ground.expect(run.pool)
    figures = run.task.figures
    if isinstance(step, GiveBack):
        figures.given_back()
        signals.emit(signals.TaskGivenBack(**run.facts(), reason="its worker is stopping"))
    else:
        figures.repeats(counts=step.counts)
        figures.run.add(run.seconds)
        signals.emit(signals.TaskRetried(**run.facts(), error=error, delay=step.delay, in_place=False))


def _lost_with_its_memory(run: Run) -> None:
    """A run in memory comes here only when it was stopped."""
    logger.error("Task %r (%s) was in memory and its process is stopping: it is lost", run.name, run.id)
    signals.emit(signals.TasksLost(tasks=(run.name,), lines=("the runner stopped",)))


# --- failing for good -------------------------------------------------------------------------------------------


def _fail(run: Run, error: BaseException, ground: Ground) -> bool:
    """Record the failure for good, and call ``on_failure``, in one transaction of a fresh session."""
    held = None
    if run.task.settings.on_failure is not None and _has_arguments(error) and not ground.sessions.is_async_only:
        held = _call_on_failure(run, error, ground)
    if held is None:
        held = bool(ground.books.call(lambda connection: _write_failure(connection, run, error)))
    if held:
        tell_failed(run, error)
    return held


def _call_on_failure(run: Run, error: BaseException, ground: Ground) -> bool | None:
    on_failure = run.task.settings.on_failure
    assert on_failure is not None  # noqa: S101  # asked by the caller
    try:
        with ground.sessions.scope(run.pool, run.owner) as session, logged(run.current), as_current(run.current):
            if not _write_failure(session.connection(), run, error):
                return False
            args, kwargs = run.task.arguments.load(session, run.arguments, run_id=run.id)
            on_failure(session, error, *args, **kwargs)
    except Exception as exc:  # noqa: BLE001  # recorded beside the error that it was called for
        _note_on_failure(run, error, exc)
        return None
    return True


async def _async_fail(run: Run, error: BaseException, ground: Ground) -> bool:
    """Record the failure for good, and call ``on_failure``, in one transaction of a fresh session."""
    held = None
    if run.task.settings.on_failure is not None and _has_arguments(error):
        held = await _async_call_on_failure(run, error, ground)
    if held is None:
        held = bool(await ground.books.async_call(lambda connection: _write_failure(connection, run, error)))
    if held:
        tell_failed(run, error)
    return held


async def _async_call_on_failure(run: Run, error: BaseException, ground: Ground) -> bool | None:
    on_failure = run.task.settings.on_failure
    assert on_failure is not None  # noqa: S101  # asked by the caller
    try:
        async with ground.sessions.async_scope(run.pool, run.owner) as session:
            with logged(run.current), as_current(run.current):
                if not await session.run_sync(lambda sync: _write_failure(sync.connection(), run, error)):
                    return False
                args, kwargs = await session.run_sync(run.task.arguments.load, run.arguments, run_id=run.id)
                if asyncio.iscoroutinefunction(on_failure):
                    await on_failure(session, error, *args, **kwargs)
                else:
                    await session.run_sync(on_failure, error, *args, **kwargs)
    except Exception as exc:  # noqa: BLE001  # recorded beside the error that it was called for
        _note_on_failure(run, error, exc)
        return None
    return True


def tell_failed(run: Run, error: BaseException) -> None:
    """Tell that *run* has failed for good."""
    seconds = run.seconds
    run.task.figures.failed(seconds)
    signals.emit(signals.TaskFailed(**run.facts(), error=error, seconds=seconds))


def _has_arguments(error: BaseException) -> bool:
    return not isinstance(error, (RowGone, PayloadError))


def _write_failure(connection: Connection, run: Run, error: BaseException) -> bool:
    return run.claim is None or moves.fail(connection, run.claim, failure_of(error), at=now())


def _note_on_failure(run: Run, error: BaseException, raised: Exception) -> None:
    if fault_of(raised) in (Fault.CONFLICT, Fault.CONNECTION, Fault.STALE, Fault.IDLE):
        raise raised
    error.add_note(f"on_failure raised, too, and what it wrote was rolled back: {type(raised).__name__}: {raised}")
    logger.error("on_failure of task %r (%s) raised", run.name, run.id, exc_info=raised)
