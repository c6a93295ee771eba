"""What became of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

__all__ = ["MAX_FAILURES_KEPT", "BatchFailure", "BatchReport"]

MAX_FAILURES_KEPT: Final = 100
"""Failures that a report carries; all of them go through ``on_error``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFailure:
    """One record that failed.

    Attributes:
        key: The row's primary key (a tuple if it has several parts), or the value itself.
        error: What it failed with, without its traceback. Of a failure in an earlier attempt of the task only the
            line is known: then it is a ``RuntimeError`` with that line.
    """

    key: Any
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """What a batch has done: ``total == succeeded + failed``.

    Attributes:
        total: Records read and settled; with those of earlier attempts, where the batch went on from one.
        succeeded: Records done.
        failed: Records that failed.
        failures: The first 100 of these, with key and error.
        seconds: How long it took; this attempt only.
        rate: Records per second; of this attempt only.
    """

    total: int
    succeeded: int
    failed: int
    failures: tuple[BatchFailure, ...]
    seconds: float
    rate: float

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"{self.total} records: {self.succeeded} succeeded, {self.failed} failed, in {self.seconds:.1f} s "
            f"({self.rate:.0f}/s)"
        )
