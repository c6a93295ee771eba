"""What follows the error that ended a try: decided here, without I/O, and written down by ``recording``."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from aftercommit.errors import LostClaim, PayloadError, RowGone, WorkerLost
from aftercommit.tasks.ends import Discard, expected_end, is_foreign_exit
from aftercommit.tasks.retry import REFUNDS_LIMIT, Again, GiveUp, decide, is_named
from aftercommit.tasks.transient import Fault, describe, fault_of

if TYPE_CHECKING:
    import threading

    from aftercommit.runner.run import Run
    from aftercommit.sessions import SessionFactory

__all__ = [
    "Bookkeeping",
    "ClaimGone",
    "Discarded",
    "GiveBack",
    "Outcome",
    "Postponed",
    "RunContext",
    "decide_outcome",
    "error_to_record",
    "has_arguments",
    "is_in_doubt",
    "may_be_own_doing",
    "worn_out",
]

_rng = random.Random()  # noqa: S311  # jitter, not secrets


class Bookkeeping(Protocol):
    """Short transactions of the library's own, from any thread."""

    def call(self, work: Any) -> Any:
        """Run ``work(connection)`` in a transaction and wait for it; not from the event loop."""

    async def async_call(self, work: Any) -> Any:
        """The same, from the event loop."""


class RunContext(Protocol):
    """What a run needs of the worker that it runs in."""

    @property
    def sessions(self) -> SessionFactory:
        """Makes sessions."""
        ...

    @property
    def books(self) -> Bookkeeping:
        """Writes what must not depend on the task's own pool."""
        ...

    @property
    def stopping(self) -> threading.Event:
        """Set when nothing may be repeated any more."""
        ...

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that async sessions belong to, if it is known."""
        ...

    def leave(self, run: Run) -> None:
        """Remember a run whose end could not be recorded."""

    def expect(self, pool: str) -> None:
        """Look into the database soon: something of *pool* was queued."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Queue it again, as if this attempt had never been: it was interrupted."""


@dataclass(frozen=True, slots=True)
class ClaimGone:
    """Another worker or a canceller owns the record: there is nothing to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Discarded:
    """The task has said that there is nothing to do: ``cancelled``.

    Attributes:
        reason: Why.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Postponed:
    """The task has said that it cannot be done yet: queued again, and the attempt does not count.

    Attributes:
        delay: Seconds.
        reason: Why.
    """

    delay: float
    reason: str


Outcome = Again | GiveUp | GiveBack | ClaimGone | Discarded | Postponed


def decide_outcome(run: Run, error: BaseException, *, cancelled: bool = False) -> Outcome:
    """What follows *error*.

    Args:
        run: The claim.
        error: What ended the try.
        cancelled: Whether the asyncio task that runs it was cancelled from outside.
    """
    if isinstance(error, LostClaim) or isinstance(run.abandoned, LostClaim):
        return ClaimGone()
    return _as_it_wanted(run, error) or _interrupted(run, error, cancelled=cancelled) or _by_its_policy(run, error)


def _interrupted(run: Run, error: BaseException, *, cancelled: bool) -> Outcome | None:
    """What follows where the run was ended from outside."""
    policy = run.task.settings.retry
    if run.stopping or is_foreign_exit(error):
        if policy.attempts == 1 and run.started:
            return GiveUp(reason="interrupted by a stop; Retry(attempts=1) means once")
        return GiveBack()
    if not isinstance(error, asyncio.CancelledError):
        return None
    if not cancelled or run.claim is None or run.attempt >= policy.attempts:
        return GiveUp(reason="cancelled from inside the application")
    # An event loop that closes under us does this. It may be an application's habit, too, so it is an attempt.
    return Again(delay=0.0, in_place=False, counts=True, drop_connection=False)


def _by_its_policy(run: Run, error: BaseException) -> Outcome:
    policy = run.task.settings.retry
    step = decide(
        error,
        policy=policy,
        attempt=run.attempt,
        repeats=run.tries.seen_at(time.monotonic()),
        saw_unique=run.current.saw_unique,
        saw_conflict=run.current.saw_conflict,
        saw_cancelled=run.current.saw_cancelled,
        was_called=run.was_called,
        refunds=run.refunds,
        rng=_rng,
    )
    if isinstance(step, Again):
        if step.counts and _is_too_late(run, step.delay):
            step = GiveUp(reason=f"{describe(error)}; give_up_after={policy.give_up_after:g} s are over")
        elif run.claim is None:
            # A task in memory has no record to queue: it is retried here, or not at all.
            return replace(step, in_place=True)
    if isinstance(step, GiveUp) and is_named(error, run.task.settings.expected):
        return replace(step, expected=True)
    return step


def _as_it_wanted(run: Run, error: BaseException) -> Outcome | None:
    """What follows ``Discard`` and ``RetryLater``: whatever else the run has met, its code has decided."""
    wanted = expected_end(error)
    if wanted is None:
        return None
    if isinstance(wanted, Discard):
        return Discarded(reason=wanted.reason)
    if _is_too_late(run, wanted.seconds):
        return GiveUp(reason=f"give_up_after={run.task.settings.retry.give_up_after:g} s are over")
    if run.claim is None:
        return Again(delay=wanted.seconds, in_place=True, counts=False, drop_connection=False)
    return Postponed(delay=wanted.seconds, reason=wanted.reason)


def _is_too_late(run: Run, delay: float) -> bool:
    limit = run.task.settings.retry.give_up_after
    return limit is not None and run.since_hand_over + delay > limit


def worn_out(run: Run) -> BaseException | None:
    """The error of a task that killed its worker as often as it may be tried, or was claimed in vain too often."""
    if run.refunds >= REFUNDS_LIMIT:
        return run.in_vain()
    if run.attempt <= run.max_attempts:
        return None
    return WorkerLost(
        f"Task {run.name!r} ({run.id}) was begun {run.max_attempts} times, and each time its worker died or fell "
        "silent before the end. It may be what kills it: look at the memory it takes, and at native code. "
        "Mended, it can be queued again with db.retry(id).",
        task=run.name,
        run_id=run.id,
    )


def may_be_own_doing(run: Run, error: BaseException) -> bool:
    """Whether the fence found no claim, though nothing has told the run that it lost it."""
    return run.claim is not None and run.abandoned is None and isinstance(error, LostClaim)


def is_in_doubt(run: Run, error: BaseException) -> bool:
    """Whether the last COMMIT was cut off, so that the server may have done it all the same."""
    if run.claim is None or not run.is_finishing:
        return False
    return isinstance(error, asyncio.CancelledError) or fault_of(error) in (Fault.CONNECTION, Fault.IDLE)


def error_to_record(run: Run, error: BaseException, outcome: Outcome) -> BaseException:
    """The error that the record shows: a cancellation says nothing to its reader."""
    is_interrupted = run.stopping and isinstance(outcome, GiveUp) and isinstance(error, asyncio.CancelledError)
    return run.interrupted() if is_interrupted and not is_in_doubt(run, error) else error


def has_arguments(error: BaseException) -> bool:
    """Whether there is something to call ``on_failure`` with."""
    return not isinstance(error, (RowGone, PayloadError))
