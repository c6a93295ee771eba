"""The two shells around a user's function, sync and async, in the same order.

A try has a session of its own. Its end is one of: committed, repeated here, or what ``ending`` makes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from itertools import count
from typing import TYPE_CHECKING, Any

from aftercommit.errors import TaskTimeout
from aftercommit.records import moves
from aftercommit.runner.around import around
from aftercommit.runner.on_failure import note_leaving
from aftercommit.runner.outcome import Bookkeeping, GiveBack, Outcome, RunContext, decide_outcome, worn_out
from aftercommit.runner.recording import async_end, async_still_ours, end, note_repeat, still_ours, succeeded
from aftercommit.runner.run import Run
from aftercommit.runner.surroundings import async_surrounded, surrounded
from aftercommit.sessions import to_the_end
from aftercommit.tasks.context import logged
from aftercommit.tasks.current import as_current
from aftercommit.tasks.ends import is_foreign_exit
from aftercommit.tasks.retry import CANCELLED_LIMIT, Again, GiveUp
from aftercommit.tasks.transient import Fault, describe, fault_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from aftercommit.sessions import AsyncScope, Scope

__all__ = ["Bookkeeping", "RunContext", "run_async", "run_sync", "try_async", "try_sync"]


# --- sync -------------------------------------------------------------------------------------------------------


def run_sync(run: Run, context: RunContext, *, ask_first: bool = False) -> None:
    """Run a ``def`` task to the end of its claim, in a thread of its pool.

    Args:
        run: The claim.
        context: What it stands on.
        ask_first: Whether this worker was silent for so long that the claim may be somebody else's by now.
    """
    with around(run):
        _run_sync(run, context, ask_first=ask_first)


def _run_sync(run: Run, context: RunContext, *, ask_first: bool) -> None:
    ended = _ended_before(run)
    if ended is not None:
        end(run, *ended, context)
        return
    if ask_first and run.claim is not None and not still_ours(run, context):
        return
    run.begin()
    while True:
        error = try_sync(run, context)
        if error is None:
            succeeded(run)
            return
        if run.is_taken_over:
            return
        outcome: Outcome = decide_outcome(run, error)
        if not (isinstance(outcome, Again) and outcome.in_place):
            break
        note_repeat(run, error, outcome)
        if context.stopping.wait(outcome.delay) or run.stopping:
            run.stopping = True
            outcome = decide_outcome(run, error)
            break
        if run.claim is not None and not still_ours(run, context):
            return
    _stop_for(error, context)
    end(run, error, outcome, context)
    if is_foreign_exit(error):
        raise error


def try_sync(run: Run, context: RunContext) -> BaseException | None:
    """Run the function once, in a session of its own; return what went wrong."""
    if context.sessions.is_async_only:
        return _try_without_session(run, context)
    scope = context.sessions.task_scope(run.pool, run.owner, run.task.settings.isolation_level)
    session = scope.session
    try:
        run.prepare(session)
        with logged(run.current), as_current(run.current):
            with surrounded(run, session):
                args, kwargs = run.task.arguments.load(session, run.arguments, run_id=run.id)
                run.was_called = True
                result = run.task.function(*_with_session(run, session, args), **kwargs)
            run.finish_with(result)
            _last_commit(session, run)
    except BaseException as exc:  # noqa: BLE001  # it is judged, recorded and told of; nothing is swallowed
        _leave(scope, exc)
        return None if run.is_committed else _overdue_if_so(run, exc)
    _leave(scope, None)
    return None


def _try_without_session(run: Run, context: RunContext) -> BaseException | None:
    """Run a ``def`` task that takes no session, where the URL's driver has no sync flavour."""
    try:
        with logged(run.current), as_current(run.current):
            args, kwargs = run.task.arguments.load(None, run.arguments, run_id=run.id)
            run.was_called = True
            result = run.task.results.store(run.task.function(*args, **kwargs), task=run.name)
        _finish_without_session(run, result, context)
    except BaseException as exc:  # noqa: BLE001  # it is judged, recorded and told of; nothing is swallowed
        return exc
    return None


def _finish_without_session(run: Run, result: str | None, context: RunContext) -> None:
    claim = run.claim
    for number in count(1):
        if run.abandoned is not None:
            raise run.abandoned
        if claim is None:
            return
        try:
            if context.books.call(lambda connection: moves.finish(connection, claim, result)):
                return
        except Exception as exc:
            # In a transaction of its own, this can be repeated by itself: what the function did is done.
            if fault_of(exc) is not Fault.CANCELLED or number > CANCELLED_LIMIT:
                raise
        else:
            raise run.lost()


# --- async ------------------------------------------------------------------------------------------------------


async def run_async(run: Run, context: RunContext, *, ask_first: bool = False) -> None:
    """Run an ``async def`` task to the end of its claim, on the event loop; cancelled, it is settled all the same.

    Args:
        run: The claim.
        context: What it stands on.
        ask_first: Whether this worker was silent for so long that the claim may be somebody else's by now.
    """
    with around(run):
        await _run_async(run, context, ask_first=ask_first)


async def _run_async(run: Run, context: RunContext, *, ask_first: bool) -> None:
    ended = _ended_before(run)
    if ended is not None:
        await _settle(run, *ended, context)
        return
    if ask_first and run.claim is not None and not await async_still_ours(run, context):
        return
    run.begin()
    while True:
        error = await try_async(run, context)
        if error is None:
            succeeded(run)
            return
        if run.is_taken_over:
            return
        outcome = decide_outcome(run, error, cancelled=_is_cancelled())
        if not (isinstance(outcome, Again) and outcome.in_place):
            break
        note_repeat(run, error, outcome)
        try:
            await _pause(outcome.delay)
            if run.claim is not None and not await async_still_ours(run, context):
                return
        except asyncio.CancelledError as exc:
            error, outcome = exc, decide_outcome(run, exc, cancelled=True)
            break
    _stop_for(error, context)
    await _settle(run, error, outcome, context)
    if is_foreign_exit(error):
        raise error


async def _pause(seconds: float) -> None:
    if _is_cancelled():
        # That came while the session was being closed, and was kept until now.
        raise asyncio.CancelledError
    await asyncio.sleep(seconds)


async def try_async(run: Run, context: RunContext) -> BaseException | None:
    """Run the function once, in a session of its own; return what went wrong."""
    scope = context.sessions.async_task_scope(run.pool, run.owner, run.task.settings.isolation_level)
    session = scope.session
    limit: asyncio.Timeout | None = None
    try:
        run.prepare(session.sync_session)
        with logged(run.current), as_current(run.current):
            if run.task.settings.timeout is None:
                result = await _async_call(run, session)
            else:
                async with asyncio.timeout(run.task.settings.timeout) as limit:
                    result = await _async_call(run, session)
            run.finish_with(result)
            has_ended = await to_the_end(session.run_sync(_last_commit_and_end, run, scope))
    except BaseException as exc:  # noqa: BLE001  # it is judged, recorded and told of; nothing is swallowed
        error: BaseException = exc
        if isinstance(exc, TimeoutError) and limit is not None and limit.expired():
            error = run.overdue()
            error.__cause__ = exc
        with contextlib.suppress(asyncio.CancelledError):
            await to_the_end(_async_leave(scope, error))
        return None if run.is_committed else _overdue_if_so(run, error)
    if not has_ended:
        with contextlib.suppress(asyncio.CancelledError):
            await to_the_end(_async_leave(scope, None))
    return None


async def _async_call(run: Run, session: AsyncSession) -> Any:
    async with async_surrounded(run, session):
        plan = run.task.arguments
        if plan.has_rows:
            args, kwargs = await session.run_sync(plan.load, run.arguments, run_id=run.id)
        else:
            args, kwargs = plan.load(session.sync_session, run.arguments, run_id=run.id)
        run.was_called = True
        return await run.task.function(*_with_session(run, session, args), **kwargs)


def _last_commit_and_end(session: Session, run: Run, scope: AsyncScope) -> bool:
    """Commit and end in one go; whether it has ended."""
    _last_commit(session, run)
    try:
        return scope.end_within(session)
    except Exception as exc:  # noqa: BLE001  # told of in the next line
        note_leaving(scope.owner, exc)
        return True


async def _settle(run: Run, error: BaseException, outcome: Outcome, context: RunContext) -> None:
    # A loop that closes cancels all tasks that there are, the innermost too, but only once.
    for _ in range(2):
        with contextlib.suppress(asyncio.CancelledError):
            await to_the_end(async_end(run, error, outcome, context))
            return
    context.leave(run)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


# --- what both do -----------------------------------------------------------------------------------------------


def _ended_before(run: Run) -> tuple[BaseException, Outcome] | None:
    """What ended a run before it began, if anything did."""
    if run.abandoned is not None:
        return run.abandoned, decide_outcome(run, run.abandoned)
    if run.stopping:
        return asyncio.CancelledError(), GiveBack()
    error = worn_out(run)
    return None if error is None else (error, GiveUp(reason="it was begun too often"))


def _stop_for(error: BaseException, context: RunContext) -> None:
    """Where the process is to end, have this worker take nothing more: it would take what is queued again now."""
    if is_foreign_exit(error):
        context.stopping.set()


def _with_session(run: Run, session: Session | AsyncSession, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args if run.task.takes is None else (session, *args)


def _last_commit(session: Session, run: Run) -> None:
    session.commit()
    run.is_committed = True


def _leave(scope: Scope, error: BaseException | None) -> None:
    try:
        try:
            if _is_stale(error):
                scope.session.invalidate()
        finally:
            # Whoever still uses the session, though its task has ended, is waited for.
            scope.end()
    except Exception as exc:  # noqa: BLE001  # told of in the next line
        note_leaving(scope.owner, exc)


async def _async_leave(scope: AsyncScope, error: BaseException | None) -> None:
    try:
        try:
            if _is_stale(error):
                await scope.session.invalidate()
        finally:
            # Whoever still uses the session, though its task has ended, is waited for.
            await scope.end()
    except Exception as exc:  # noqa: BLE001  # told of in the next line
        note_leaving(scope.owner, exc)


def _is_stale(error: BaseException | None) -> bool:
    """Whether the connection is of no use, though the server answers: the pool would hand it out again."""
    return error is not None and fault_of(error) is Fault.STALE


def _overdue_if_so(run: Run, error: BaseException) -> BaseException:
    """The server's own time limit ends a run with an error that does not say so."""
    if not run.is_overdue or isinstance(error, (TaskTimeout, asyncio.CancelledError)):
        return error
    # A connection lost while the last commit is made is in doubt, and stays so.
    cut_off = fault_of(error) in (Fault.IDLE, Fault.CONNECTION) and not run.is_finishing
    if not (cut_off or "57014" in describe(error)):
        return error
    overdue = run.overdue()
    overdue.__cause__ = error
    return overdue
