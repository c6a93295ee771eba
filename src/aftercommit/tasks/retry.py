"""Run again, or give up: the policy that a task declares, and the decision after each error.

Pure: time and randomness are arguments. What a database error means stands in ``transient.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from aftercommit.errors import CommitWithoutCheckpoint, ConfigurationError, LostClaim, PayloadError, RowGone
from aftercommit.tasks.transient import Fault, describe, fault_of, is_disconnect, is_read_only

if TYPE_CHECKING:
    from random import Random

__all__ = ["Again", "GiveUp", "Repeats", "Retry", "Tries", "backoff", "decide", "is_named"]


@dataclass(frozen=True, slots=True, init=False)
class Retry:
    """How often a task is tried, and how long it waits in between.

    Lost connections, idle-in-transaction kills and crashes of the worker use up attempts. Conflicts with other
    transactions do not: the run is repeated for as long as they last, without being asked. Errors of the
    application are retried only where ``on`` names them.

    ``Retry(attempts=1)`` means once, literally: a run that has begun is never begun again, not even after a
    conflict. It is for functions that do something outside the database which must not happen twice.

    Args:
        attempts: How often the task is tried at most, the first time included; at least 1.
        base: Seconds; the wait after the first failed attempt is anything up to this, and doubles from there.
        cap: Seconds; no wait is longer.
        on: Exceptions of the application, a class or several, that deserve another attempt. Database errors that
            never pass by themselves may be named here, too; conflicts stay what they are.
        give_up_after: Seconds since the hand-over, by the database's clock: what could begin again only later than
            that, because of ``RetryLater`` or after a failed attempt, has failed for good. None for no limit.

    Attributes:
        attempts: As given.
        base: As given, seconds.
        cap: As given, seconds.
        on: As given, always a tuple.
        give_up_after: As given, seconds.

    Raises:
        ConfigurationError: If a value is out of its range.
    """

    attempts: int
    base: float
    cap: float
    on: tuple[type[Exception], ...]
    give_up_after: float | None

    def __init__(
        self,
        attempts: int = 5,
        base: float = 0.5,
        cap: float = 60.0,
        on: type[Exception] | Iterable[type[Exception]] = (),
        *,
        give_up_after: float | None = None,
    ) -> None:
        if not _is_count(attempts):
            raise ConfigurationError(
                f"Retry(attempts={attempts!r}): a whole number of at least 1 is needed. "
                "The first try counts: 1 means once, without a retry."
            )
        if not (_is_seconds(base) and _is_seconds(cap) and base <= cap):
            raise ConfigurationError(
                f"Retry(base={base!r}, cap={cap!r}): both are seconds, finite, with 0 <= base <= cap."
            )
        if give_up_after is not None and not (_is_seconds(give_up_after) and give_up_after > 0):
            raise ConfigurationError(
                f"Retry(give_up_after={give_up_after!r}): give seconds since the hand-over, more than 0, or None."
            )
        classes = tuple(on) if isinstance(on, Iterable) else (on,)
        for kind in classes:
            if not _is_error_class(kind):
                raise ConfigurationError(
                    f"Retry(on=…): {kind!r} is not a subclass of Exception. "
                    "Name classes of errors; cancellation and exits always end a run."
                )
        # Frozen for everybody else: this is how dataclasses fill in a frozen instance themselves.
        object.__setattr__(self, "attempts", attempts)
        object.__setattr__(self, "base", float(base))
        object.__setattr__(self, "cap", float(cap))
        object.__setattr__(self, "on", classes)
        object.__setattr__(self, "give_up_after", None if give_up_after is None else float(give_up_after))


def backoff(policy: Retry, attempt: int, rng: Random) -> float:
    """Return how long to wait after failed try number *attempt*, in seconds.

    "Full jitter": uniform on ``[0, min(cap, base * 2**(attempt - 1))]``.
    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Args:
        policy: The policy in force.
        attempt: The try that failed; 1 is the first.
        rng: Source of randomness, an argument so that tests can seed it.

    Raises:
        ValueError: If *attempt* is below 1.
    """
    if attempt < 1:
        raise ValueError(f"attempt {attempt}: the first is 1")
    # A float overflows to infinity in a product, but not in a power: the exponent has its own limit.
    return rng.uniform(0.0, min(policy.cap, policy.base * 2.0 ** min(attempt - 1, 1023)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """Run the whole task again, in a fresh session.

    Attributes:
        delay: Seconds to wait first.
        in_place: Repeat here, under the same claim; else the record goes back ``queued``, due after the delay.
        counts: Whether the failed run used up an attempt.
        drop_connection: Whether the connection must be invalidated before the session gives it back.
        because: What the run is repeated for, where that is no attempt.
    """

    delay: float
    in_place: bool
    counts: bool
    drop_connection: bool
    because: Fault | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """The task has failed for good.

    Attributes:
        reason: One line for operators, without bound values.
        expected: Whether the application knows this end: ``@db.task(expected=…)`` names its error.
    """

    reason: str
    expected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """What one claim of a run has been repeated for so far, in this worker.

    Attributes:
        conflicts: Repeats after conflicts.
        conflict_seconds: How long ago the first of these conflicts was, in seconds; 0 before it.
        uniques: Repeats after unique violations.
        stales: Repeats after connections that had to be dropped.
        cancels: Repeats after statements of the library's own were cancelled.
    """

    conflicts: int = 0
    conflict_seconds: float = 0.0
    uniques: int = 0
    stales: int = 0
    cancels: int = 0

    def after(self, step: Again) -> Repeats:
        """What it will have been repeated for after *step*."""
        match step.because:
            case Fault.CONFLICT:
                return replace(self, conflicts=self.conflicts + 1)
            case Fault.UNIQUE:
                return replace(self, uniques=self.uniques + 1)
            case Fault.STALE:
                return replace(self, stales=self.stales + 1)
            case Fault.CANCELLED:
                return replace(self, cancels=self.cancels + 1)
            case _:
                return self


CONFLICT_LIMIT: Final = 10.0
"""Seconds for which conflicts are repeated in place; a run that still meets them goes back ``queued``."""

UNIQUE_LIMIT: Final = 3
"""Repeats after unique violations in one claim."""

CANCELLED_LIMIT: Final = 3
"""Repeats in one claim after statements of the library's own were cancelled; the next one is an attempt."""

_LATER: Final = (1.0, 5.0)
"""Seconds, from and to, before a run that went back because of conflicts is due again: at least long enough that
those in its way get on."""

_LATEST: Final = 300.0
"""Seconds for which it waits at most, where that has come to nothing again and again."""

REFUNDS_LIMIT: Final = 30
"""Claims of one record that may come to nothing without an attempt being used up. Conflicts reach it after an hour and
a half without one commit; orderly stops are not among them."""

_FINAL: Final = (RowGone, PayloadError, LostClaim, CommitWithoutCheckpoint)
"""Errors of ours that stay as they are however often the function runs, whatever broad class ``on`` names."""


def decide(
    error: BaseException,
    *,
    policy: Retry,
    attempt: int,
    repeats: Repeats,
    saw_unique: bool,
    rng: Random,
    saw_conflict: bool = False,
    saw_cancelled: bool = False,
    was_called: bool = True,
    refunds: int = 0,
) -> Again | GiveUp:
    """Decide what follows a run that has begun and was ended by *error*.

    Promise: attempts are used up only by answers that say so, and none is given out beyond ``policy.attempts``.
    Only conflicts that last can keep a run from an end.

    Args:
        error: What ended the run.
        policy: The task's policy.
        attempt: The attempt that failed; 1 is the first.
        repeats: What this claim has been repeated for already.
        saw_unique: Whether the database reported a unique violation during the run, even if the function caught
            it: the usual get-or-create then fails with an error of its own.
        rng: Source of randomness.
        saw_conflict: The same for conflicts. A function that catches one meets "transaction is aborted" next, or
            fails with an error of its own; repeated in place only, within the time limit.
        saw_cancelled: The same for statements of the library's own that were cancelled.
        was_called: Whether the function was called. Where it was not, because what it needs could not be had, a
            repeat is its first call, even for ``Retry(attempts=1)``.
        refunds: How many claims before this one came to nothing: what goes back again waits longer each time.
    """
    if isinstance(error, _FINAL):
        return GiveUp(reason=f"{type(error).__name__} does not pass by itself")
    if policy.attempts == 1 and was_called:
        return GiveUp(reason=f"{describe(error)}; Retry(attempts=1) means once")

    fault = fault_of(error)
    again = _repeat(
        error,
        fault,
        repeats=repeats,
        saw_unique=saw_unique,
        saw_conflict=saw_conflict,
        saw_cancelled=saw_cancelled,
        rng=rng,
        refunds=refunds,
    )
    if again is not None:
        return again
    may_pass = fault in _ATTEMPTS or is_read_only(error)
    if not may_pass and not is_named(error, policy.on):
        return GiveUp(reason=f"{describe(error)}: {_WHY[fault]}")
    if attempt >= policy.attempts:
        return GiveUp(reason=f"{describe(error)}; that was attempt {attempt} of {policy.attempts}")
    return Again(delay=backoff(policy, attempt, rng), in_place=False, counts=True, drop_connection=is_disconnect(error))


def _repeat(
    error: BaseException,
    fault: Fault,
    *,
    repeats: Repeats,
    saw_unique: bool,
    saw_conflict: bool,
    saw_cancelled: bool,
    rng: Random,
    refunds: int,
) -> Again | None:
    """What is repeated without being asked, and is not an attempt."""

    def again(because: Fault, delay: float, *, in_place: bool = True) -> Again:
        drop = because is Fault.STALE or is_disconnect(error)
        return Again(delay=delay, in_place=in_place, counts=False, drop_connection=drop, because=because)

    if fault is Fault.CONFLICT or (saw_conflict and fault in _ENDS):
        if repeats.conflict_seconds < CONFLICT_LIMIT:
            return again(Fault.CONFLICT, backoff(_CONFLICTS, repeats.conflicts + 1, rng))
        if fault is Fault.CONFLICT:
            delay = min(rng.uniform(*_LATER) * 1.5 ** min(max(0, refunds), 30), _LATEST)
            return again(Fault.CONFLICT, delay, in_place=False)
    if fault is Fault.STALE and repeats.stales == 0:
        return again(Fault.STALE, 0.0)
    if (fault is Fault.UNIQUE or (saw_unique and fault in _ENDS)) and repeats.uniques < UNIQUE_LIMIT:
        return again(Fault.UNIQUE, backoff(_UNIQUES, repeats.uniques + 1, rng))
    if (fault is Fault.CANCELLED or (saw_cancelled and fault in _ENDS)) and repeats.cancels < CANCELLED_LIMIT:
        return again(Fault.CANCELLED, backoff(_UNIQUES, repeats.cancels + 1, rng))
    return None


@dataclass(slots=True)
class Tries:
    """What one piece of work has been repeated for so far, and since when it meets conflicts.

    Attributes:
        repeats: How often, and for what.
        conflict_since: When the first of its conflicts was, by the caller's clock; None before it.
    """

    repeats: Repeats = field(default_factory=Repeats)
    conflict_since: float | None = None

    def seen_at(self, now: float) -> Repeats:
        """The same, for a decision at *now*."""
        if self.conflict_since is None:
            return self.repeats
        return replace(self.repeats, conflict_seconds=now - self.conflict_since)

    def count(self, step: Again, now: float) -> None:
        """Count the repeat that *step* asks for."""
        self.repeats = self.repeats.after(step)
        if step.because is Fault.CONFLICT and self.conflict_since is None:
            self.conflict_since = now


_ATTEMPTS: Final = frozenset({Fault.CONNECTION, Fault.IDLE, Fault.CANCELLED})
_ENDS: Final = frozenset({Fault.PERMANENT, Fault.APPLICATION})
_WHY: Final = {
    Fault.STALE: "a fresh connection did not help",
    Fault.UNIQUE: f"still there after {UNIQUE_LIMIT} repeats",
    Fault.PERMANENT: "a database error that does not pass by itself",
    Fault.APPLICATION: "an error of the task that its Retry(on=…) does not name",
}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)


def _is_error_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def is_named(error: BaseException, kinds: tuple[type[Exception], ...]) -> bool:
    """Whether *kinds* name *error*; for a group, all that is in it."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(kinds)[1] is None
    return isinstance(error, kinds)


# At the end, because making one needs the functions above.
_CONFLICTS: Final = Retry(base=0.005, cap=1.0)
_UNIQUES: Final = Retry(base=0.01, cap=0.1)
