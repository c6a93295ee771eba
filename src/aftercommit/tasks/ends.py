"""Ends of a run that are no accidents: what a task raises to say so, and how an exit from outside is told."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from aftercommit.plain import one_line

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["Discard", "RetryLater", "expected_end", "is_foreign_exit"]

_MAX_SECONDS: Final = 100 * 366 * 86400.0
_LONGEST: Final = 1000


class Discard(Exception):
    """Raised in a task: there is nothing to do any more.

    What the run wrote is rolled back, the record ends ``cancelled`` with the reason as its ``error``, and
    ``on_failure`` is not called.

    Args:
        reason: Why, in one line, for the record and the log.

    Attributes:
        reason: As given.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = one_line(str(reason), _LONGEST)


class RetryLater(Exception):
    """Raised in a task: it cannot be done yet, which is no failure.

    What the run wrote since its last commit is rolled back, and the task is queued again. The attempt does not count,
    and the pauses of its ``Retry`` stay what they are. ``Retry(give_up_after=…)`` is what ends it.

    Args:
        seconds: How long to wait, 0 or more.
        reason: Why, in one line, for the record and the log.

    Attributes:
        seconds: As given.
        reason: As given.

    Raises:
        ValueError: If *seconds* is no number of seconds that can be waited.
    """

    def __init__(self, seconds: float, reason: str = "") -> None:
        if type(seconds) not in {int, float} or not 0 <= seconds <= _MAX_SECONDS:  # nan is neither
            raise ValueError(f"RetryLater({seconds!r}): give seconds, 0 or more, and at most 100 years.")
        super().__init__(seconds, reason)
        self.seconds = float(seconds)
        self.reason = one_line(str(reason), _LONGEST)

    def __str__(self) -> str:
        """The reason, and for how long."""
        again = f"again in {self.seconds:g} s"
        return f"{self.reason} ({again})" if self.reason else again


def expected_end(error: BaseException) -> Discard | RetryLater | None:
    """Return what a task has raised to end its run; of a group, what all its members agree upon."""
    if isinstance(error, (Discard, RetryLater)):
        return error
    if not isinstance(error, BaseExceptionGroup):
        return None
    members = [expected_end(each) for each in error.exceptions]
    discards = [each for each in members if isinstance(each, Discard)]
    later = [each for each in members if isinstance(each, RetryLater)]
    if len(discards) == len(members):
        return discards[0]
    return max(later, key=lambda each: each.seconds) if len(later) == len(members) else None


def is_foreign_exit(error: BaseException) -> bool:
    """Tell whether a signal handler of the process raised *error*, a ``SystemExit``, and not the task itself.

    A handler may have taken itself off before it raised, so it is not looked up: it is told by what Python has called
    it with, a signal's number and the very frame that it interrupted.
    """
    if not isinstance(error, SystemExit):
        return False
    step = error.__traceback__
    while step is not None:
        if _handles_signal(step.tb_frame):
            return True
        step = step.tb_next
    return False


def _handles_signal(frame: FrameType) -> bool:
    interrupted = frame.f_back
    if interrupted is None:
        return False
    given: list[object] = []
    code = frame.f_code
    for name in code.co_varnames[: code.co_argcount + 2]:
        value = frame.f_locals.get(name)
        given += value if isinstance(value, tuple) else (value,)
    return any(each is interrupted for each in given) and any(
        isinstance(each, int) and not isinstance(each, bool) and each in _SIGNALS for each in given
    )


_SIGNALS: Final = frozenset(map(int, signal.valid_signals()))
