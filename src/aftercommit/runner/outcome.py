"""What follows the error that ended a try: decided here, without I/O, and written down by ``recording``."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from aftercommit.errors import LostClaim, PayloadError, RowGone, WorkerLost
from aftercommit.tasks.retry import REFUNDS_LIMIT, Again, GiveUp, decide
from aftercommit.tasks.transient import Fault, fault_of

if TYPE_CHECKING:
    import threading

    from aftercommit.runner.run import Run
    from aftercommit.sessions import SessionFactory

__all__ = [
    "Bookkeeping",
    "ClaimGone",
    "GiveBack",
    "Outcome",
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


Outcome = Again | GiveUp | GiveBack | ClaimGone


def decide_outcome(run: Run, error: BaseException, *, cancelled: bool = False) -> Outcome:
    """What follows *error*.

    Args:
        run: The claim.
        error: What ended the try.
        cancelled: Whether the asyncio task that runs it was cancelled from outside.
    """
    policy = run.task.settings.retry
    if isinstance(error, LostClaim) or isinstance(run.abandoned, LostClaim):
        return ClaimGone()
    if run.stopping:
        if policy.attempts == 1 and run.started:
            return GiveUp(reason="interrupted by a stop; Retry(attempts=1) means once")
        return GiveBack()
    if isinstance(error, asyncio.CancelledError):
        if not cancelled or run.claim is None or run.attempt >= policy.attempts:
            return GiveUp(reason="cancelled from inside the application")
        # An event loop that closes under us does this. It may be an application's habit, too, so it is an attempt.
        return Again(delay=0.0, in_place=False, counts=True, drop_connection=False)
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
    # A task in memory has no record to queue: it is retried here, or not at all.
    return replace(step, in_place=True) if isinstance(step, Again) and run.claim is None else step


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
