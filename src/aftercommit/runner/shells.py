"""The two shells around a user's function, sync and async, in the same order.

A try has a session of its own. Its end is one of: committed, repeated here, queued again, failed for good, lost.
Everything that is decided is decided in ``tasks.retry``; everything that is written is written in ``records.moves``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy.exc import SQLAlchemyError

from aftercommit import signals
from aftercommit.errors import LostClaim, PayloadError, RowGone, WorkerLost
from aftercommit.records import moves
from aftercommit.runner.run import Run, failure_of, now
from aftercommit.sessions import shielded
from aftercommit.tasks.context import restored
from aftercommit.tasks.current import as_current
from aftercommit.tasks.retry import Again, GiveUp, decide
from aftercommit.tasks.transient import Fault, fault_of

if TYPE_CHECKING:
    import threading

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from aftercommit.sessions import AsyncScope, Scope, SessionFactory

__all__ = ["Bookkeeping", "Ground", "run_async", "run_sync", "try_async", "try_sync"]

logger = logging.getLogger(__name__)

_rng = random.Random()  # noqa: S311  # jitter, not secrets
_RECORDING_TRIES = 5


class Bookkeeping(Protocol):
    """Short transactions of the library's own, from any thread."""

    def call(self, work: Any) -> Any:
        """Run ``work(connection)`` in a transaction and wait for it; not from the event loop."""

    async def async_call(self, work: Any) -> Any:
        """The same, from the event loop."""


class Ground(Protocol):
    """What the shells stand on."""

    @property
    def sessions(self) -> SessionFactory:
        """Makes sessions."""
        ...

    @property
    def books(self) -> Bookkeeping:
        """Writes where the task's own pool has no sync flavour."""
        ...


# --- sync -------------------------------------------------------------------------------------------------------


def run_sync(run: Run, ground: Ground, stopping: threading.Event) -> None:
    """Run a ``def`` task to the end of its claim, in a thread of its pool.

    Args:
        run: The claim.
        ground: What it stands on.
        stopping: Set when no run may be repeated any more.
    """
    run.begin()
    error = _worn_out(run)
    if error is not None:
        _end(run, error, GiveUp(reason="its worker died too often"), ground)
        return
    while True:
        error = try_sync(run, ground)
        if error is None:
            _succeeded(run)
            return
        step = _judge(run, error)
        if not (isinstance(step, Again) and step.in_place):
            break
        _repeating(run, error, step)
        if stopping.wait(step.delay) or run.stopping:
            run.stopping, step = True, None
            break
        if run.claim is not None and not _still_ours(run, ground.books.call(_standing(run))):
            return
    _end(run, error, step, ground)


def try_sync(run: Run, ground: Ground) -> BaseException | None:
    """Run the function once, in a session of its own; return what went wrong."""
    if ground.sessions.is_async_only:
        return _try_without_session(run, ground)
    scope = ground.sessions.task_scope(run.pool, run.owner, run.task.settings.isolation_level)
    session = scope.session
    try:
        run.prepare(session)
        with restored(run.context), as_current(run.current):
            args, kwargs = run.task.arguments.load(session, run.arguments, run_id=run.id)
            result = run.task.function(*_with_session(run, session, args), **kwargs)
            run.finish_with(result)
            _last_commit(session)
    except BaseException as exc:  # noqa: BLE001  # it is judged, recorded and told of; nothing is swallowed
        _leave(scope, exc)
        return exc
    scope.end()
    return None


def _try_without_session(run: Run, ground: Ground) -> BaseException | None:
    """Run a ``def`` task that takes no session, where the URL's driver has no sync flavour."""
    try:
        with restored(run.context), as_current(run.current):
            args, kwargs = run.task.arguments.load(None, run.arguments, run_id=run.id)
            result = run.task.results.store(run.task.function(*args, **kwargs), task=run.name)
        if run.claim is not None and not ground.books.call(_finishing(run.claim, result)):
            raise run.lost()
    except BaseException as exc:  # noqa: BLE001  # it is judged, recorded and told of; nothing is swallowed
        return exc
    return None


def _finishing(claim: moves.Claim, result: str | None) -> Any:
    return lambda connection: moves.finish(connection, claim, result)


# --- async ------------------------------------------------------------------------------------------------------


async def run_async(run: Run, ground: Ground) -> None:
    """Run an ``async def`` task to the end of its claim, on the event loop.

    Args:
        run: The claim.
        ground: What it stands on.
    """
    run.begin()
    error = _worn_out(run)
    if error is not None:
        await shielded(_async_end(run, error, GiveUp(reason="its worker died too often"), ground))
        return
    while True:
        error = await try_async(run, ground)
        if error is None:
            _succeeded(run)
            return
        step = _judge(run, error)
        if not (isinstance(step, Again) and step.in_place):
            break
        _repeating(run, error, step)
        try:
            await asyncio.sleep(step.delay)
            if run.claim is not None and not _still_ours(run, await ground.books.async_call(_standing(run))):
                return
        except asyncio.CancelledError as exc:
            error, step = exc, _judge(run, exc)
            break
    await shielded(_async_end(run, error, step, ground))


async def try_async(run: Run, ground: Ground) -> BaseException | None:
    """Run the function once, in a session of its own; return what went wrong."""
    scope = ground.sessions.async_task_scope(run.pool, run.owner, run.task.settings.isolation_level)
    session = scope.session
    limit: asyncio.Timeout | None = None
    try:
        run.prepare(session.sync_session)
        with restored(run.context), as_current(run.current):
            async with asyncio.timeout(run.task.settings.timeout) as limit:
                args, kwargs = await session.run_sync(run.task.arguments.load, run.arguments, run_id=run.id)
                result = await run.task.function(*_with_session(run, session, args), **kwargs)
            run.finish_with(result)
            await shielded(session.run_sync(_last_commit))
    except BaseException as exc:  # noqa: BLE001  # it is judged, recorded and told of; nothing is swallowed
        error: BaseException = exc
        if isinstance(exc, TimeoutError) and limit is not None and limit.expired():
            error = run.overdue()
            error.__cause__ = exc
        await shielded(_async_leave(scope, error))
        return error
    await scope.end()
    return None


# --- what both do -----------------------------------------------------------------------------------------------


def _with_session(run: Run, session: Session | AsyncSession, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args if run.task.takes is None else (session, *args)


def _last_commit(session: Session) -> None:
    # A task that touched nothing has no transaction yet, and its record must be finished all the same.
    session.connection()
    session.commit()


def _leave(scope: Scope, error: BaseException) -> None:
    with contextlib.suppress(SQLAlchemyError, OSError):
        _drop_if_stale(scope.session, error)
        scope.end()


async def _async_leave(scope: AsyncScope, error: BaseException) -> None:
    with contextlib.suppress(SQLAlchemyError, OSError):
        await scope.session.run_sync(_drop_if_stale, error)
        await scope.end()


def _drop_if_stale(session: Session, error: BaseException) -> None:
    if fault_of(error) is Fault.STALE:
        # The server answers, so the pool would hand the connection out again.
        session.invalidate()


def _worn_out(run: Run) -> BaseException | None:
    """The error of a task that killed its worker as often as it may be tried."""
    if run.attempt <= run.max_attempts:
        return None
    return WorkerLost(
        f"Task {run.name!r} ({run.id}) was begun {run.max_attempts} times, and each time its worker died or fell "
        "silent "
        "before the end. It may be what kills it: look at the memory it takes, and at native code. "
        "Mended, it can be queued again with db.retry(id).",
        task=run.name,
        run_id=run.id,
    )


def _judge(run: Run, error: BaseException) -> Again | GiveUp | None:
    """What follows *error*; None where there is nothing to decide: lost, or interrupted."""
    if isinstance(error, LostClaim) or run.stopping or isinstance(run.abandoned, LostClaim):
        return None
    if isinstance(error, asyncio.CancelledError):
        return GiveUp(reason="cancelled from inside the application")
    if run.conflict_since is not None:
        run.repeats = replace(run.repeats, conflict_seconds=time.monotonic() - run.conflict_since)
    step = decide(
        error,
        policy=run.task.settings.retry,
        attempt=run.attempt,
        repeats=run.repeats,
        saw_unique=run.current.saw_unique,
        saw_conflict=run.current.saw_conflict,
        rng=_rng,
    )
    # A task in memory has no record to queue: it is retried here, or not at all.
    return replace(step, in_place=True) if isinstance(step, Again) and run.claim is None else step


def _repeating(run: Run, error: BaseException, step: Again) -> None:
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
    signals.emit(signals.TaskRetried(**run.facts(), error=error, delay=step.delay, in_place=True))


def _standing(run: Run) -> Any:
    def ask(connection: Connection) -> moves.Standing:
        assert run.claim is not None  # noqa: S101  # tasks in memory do not ask
        return moves.standing(connection, run.claim)

    return ask


def _still_ours(run: Run, standing: moves.Standing) -> bool:
    """Whether the function may run again. After a conflict the claim itself may be what was in conflict."""
    if standing.is_done:
        # The connection was lost during COMMIT, and the server had done it.
        _succeeded(run)
        return False
    if not standing.is_held:
        _lost(run)
        return False
    run.checkpoint = standing.checkpoint
    return True


def _succeeded(run: Run) -> None:
    signals.emit(signals.TaskSucceeded(**run.facts(), seconds=run.seconds, repeats=run.repeated))


def _lost(run: Run) -> None:
    logger.warning("%s", run.lost())


def _end(run: Run, error: BaseException, step: Again | GiveUp | None, ground: Ground) -> None:
    """Record the end of a claim that did not succeed."""
    for number in range(1, _RECORDING_TRIES + 1):
        try:
            _settle(run, error, step, ground)
        except Exception as exc:  # noqa: BLE001  # the database itself may be what is failing
            if not _try_recording_again(run, exc, number):
                return
            time.sleep(0.05 * 2**number)
        else:
            return


async def _async_end(run: Run, error: BaseException, step: Again | GiveUp | None, ground: Ground) -> None:
    """Record the end of a claim that did not succeed."""
    for number in range(1, _RECORDING_TRIES + 1):
        try:
            await _async_settle(run, error, step, ground)
        except Exception as exc:  # noqa: BLE001  # the database itself may be what is failing
            if not _try_recording_again(run, exc, number):
                return
            await asyncio.sleep(0.05 * 2**number)
        else:
            return


def _try_recording_again(run: Run, error: BaseException, number: int) -> bool:
    if number < _RECORDING_TRIES and fault_of(error) in (Fault.CONFLICT, Fault.CONNECTION, Fault.STALE, Fault.IDLE):
        return True
    # The record still says that this worker runs it; the next heartbeat finds that it does not, and queues it again.
    logger.error(
        "The end of task %r (%s, attempt %d) could not be recorded; it will be queued again",
        run.name, run.id, run.attempt, exc_info=error,
    )  # fmt: skip
    return False


def _settle(run: Run, error: BaseException, step: Again | GiveUp | None, ground: Ground) -> None:
    """Write what became of the claim, and tell of it."""
    call = ground.books.call
    if _is_in_doubt(run, error) and not _still_ours(run, call(_standing(run))):
        return
    if isinstance(step, GiveUp):
        _failed(run, error, held=_fail_sync(run, error, ground))
    else:
        _queued_again(run, error, step, held=call(_writing_back(run, error, step)))


async def _async_settle(run: Run, error: BaseException, step: Again | GiveUp | None, ground: Ground) -> None:
    """Write what became of the claim, and tell of it."""
    call = ground.books.async_call
    if _is_in_doubt(run, error) and not _still_ours(run, await call(_standing(run))):
        return
    if isinstance(step, GiveUp):
        _failed(run, error, held=await _fail_async(run, error, ground))
    else:
        _queued_again(run, error, step, held=await call(_writing_back(run, error, step)))


def _is_in_doubt(run: Run, error: BaseException) -> bool:
    """Whether the connection was lost during the last COMMIT: the server may have done it all the same."""
    return run.claim is not None and run.is_finishing and fault_of(error) in (Fault.CONNECTION, Fault.IDLE)


def _writing_back(run: Run, error: BaseException, step: Again | None) -> Any:
    """Queue the record again; the attempt of an interrupted run does not count."""

    def write(connection: Connection) -> bool:
        if run.claim is None or (step is None and not run.stopping):
            return False
        failure, delay = (None, 0.0) if step is None else (failure_of(error), step.delay)
        refund = step is None or not step.counts
        return moves.give_back(connection, run.claim, failure, at=now(), delay=delay, refund=refund)

    return write


def _queued_again(run: Run, error: BaseException, step: Again | None, *, held: bool) -> None:
    if run.claim is None:
        # A run in memory comes here only when it was stopped.
        logger.error("Task %r (%s) was in memory and its process is stopping: it is lost", run.name, run.id)
    elif not held:
        _lost(run)
    elif step is None:
        signals.emit(signals.TaskGivenBack(**run.facts(), reason="its worker is stopping"))
    else:
        signals.emit(signals.TaskRetried(**run.facts(), error=error, delay=step.delay, in_place=False))


def _failed(run: Run, error: BaseException, *, held: bool) -> None:
    if not held:
        _lost(run)
        return
    signals.emit(signals.TaskFailed(**run.facts(), error=error, seconds=run.seconds))


def _fail_sync(run: Run, error: BaseException, ground: Ground) -> bool:
    """Record the failure for good, and call ``on_failure``, in one transaction of a fresh session."""
    if run.task.settings.on_failure is not None and _has_arguments(error):
        try:
            with ground.sessions.scope(run.pool, run.owner) as session, restored(run.context), as_current(run.current):
                if not _write_failure(session.connection(), run, error):
                    return False
                args, kwargs = run.task.arguments.load(session, run.arguments, run_id=run.id)
                run.task.settings.on_failure(session, error, *args, **kwargs)
        except Exception as exc:  # noqa: BLE001  # recorded beside the error that it was called for
            _note_on_failure(run, error, exc)
        else:
            return True
    return bool(ground.books.call(lambda connection: _write_failure(connection, run, error)))


async def _fail_async(run: Run, error: BaseException, ground: Ground) -> bool:
    on_failure = run.task.settings.on_failure
    if on_failure is not None and _has_arguments(error):
        try:
            scope = ground.sessions.async_scope(run.pool, run.owner)
            async with scope as session:
                with restored(run.context), as_current(run.current):
                    if not await session.run_sync(lambda sync: _write_failure(sync.connection(), run, error)):
                        return False
                    args, kwargs = await session.run_sync(run.task.arguments.load, run.arguments, run_id=run.id)
                    if asyncio.iscoroutinefunction(on_failure):
                        await on_failure(session, error, *args, **kwargs)
                    else:
                        await session.run_sync(on_failure, error, *args, **kwargs)
        except Exception as exc:  # noqa: BLE001  # recorded beside the error that it was called for
            _note_on_failure(run, error, exc)
        else:
            return True
    return bool(await ground.books.async_call(lambda connection: _write_failure(connection, run, error)))


def _has_arguments(error: BaseException) -> bool:
    return not isinstance(error, (RowGone, PayloadError))


def _write_failure(connection: Connection, run: Run, error: BaseException) -> bool:
    return run.claim is None or moves.fail(connection, run.claim, failure_of(error), at=now())


def _note_on_failure(run: Run, error: BaseException, raised: Exception) -> None:
    if fault_of(raised) in (Fault.CONFLICT, Fault.CONNECTION, Fault.STALE, Fault.IDLE):
        raise raised
    error.add_note(f"on_failure raised, too, and what it wrote was rolled back: {type(raised).__name__}: {raised}")
    logger.error("on_failure of task %r (%s) raised", run.name, run.id, exc_info=raised)
