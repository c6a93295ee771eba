"""How long something took: counted over the life of the process, with percentiles of what happened lately."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import Final

__all__ = ["RECENT", "Meter", "Timing"]

RECENT: Final = 256
"""How many of the last values percentiles are taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long something took, in seconds; 0.0 everywhere where nothing was measured yet.

    Percentiles are exact, of the last 256 values: the smallest of them that at least so many per cent do not exceed.

    Attributes:
        count: How many were measured since the process started.
        total: Their sum.
        p50: The median of the last 256.
        p95: 95 per cent of these took no longer.
        p99: 99 per cent of these took no longer.
        longest: The longest of these.
    """

    count: int = 0
    total: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    longest: float = 0.0


_NOTHING: Final = Timing()


class Meter:
    """Takes measurements, from any thread; its memory does not grow.

    The last values are kept in order all the time, which costs a microsecond for each: sorted when somebody reads,
    they would cost him twenty times as much, for every task there is.
    """

    __slots__ = ("_count", "_lock", "_ordered", "_recent", "_total")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._total = 0.0
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []

    def add(self, seconds: float) -> None:
        """Take one."""
        with self._lock:
            self._count += 1
            self._total += seconds
            self._recent.append(seconds)
            if self._count > RECENT:
                del self._ordered[bisect_left(self._ordered, self._recent.popleft())]
            insort(self._ordered, seconds)

    def read(self) -> Timing:
        """What was measured so far."""
        with self._lock:
            if not self._count:
                return _NOTHING
            ordered = self._ordered
            return Timing(
                count=self._count,
                total=self._total,
                p50=percentile(ordered, 50),
                p95=percentile(ordered, 95),
                p99=percentile(ordered, 99),
                longest=ordered[-1],
            )


def percentile(ordered: list[float], percent: int) -> float:
    """Return the smallest value that at least *percent* per cent of *ordered* do not exceed.

    The nearest rank: no value is made up between two that were measured.

    Args:
        ordered: At least one value, the smallest first.
        percent: 1 to 100.
    """
    return ordered[-(-len(ordered) * percent // 100) - 1]
