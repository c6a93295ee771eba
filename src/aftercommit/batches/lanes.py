"""What one lane of a batch has done, and its failures as a task's position keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aftercommit.batches.report import MAX_FAILURES_KEPT
from aftercommit.wording import told

if TYPE_CHECKING:
    from aftercommit.batches.chunks import Settled
    from aftercommit.batches.sources import Source
    from aftercommit.records import positions

__all__ = ["Lane", "bare"]


class Lane:
    """What one lane has done.

    Args:
        number: Its number.
        stored: What is known of it from earlier attempts.
    """

    def __init__(self, number: int, stored: positions.Position | None = None) -> None:
        self.number = number
        self.succeeded = 0 if stored is None else stored.succeeded
        self.failed = 0 if stored is None else stored.failed
        self.commits = 0 if stored is None else stored.commits
        self.failures: list[Any] = [] if stored is None else list(stored.failures)

    def with_failures(self, settled: Settled, source: Source | None) -> list[Any] | None:
        """Its failures with those of *settled*, as they are stored; None where there are no new ones."""
        room = MAX_FAILURES_KEPT - len(self.failures)
        if not settled.failures or room <= 0:
            return None
        return [*self.failures, *(_stored(key, error, source) for key, error in settled.failures[:room])]

    def settle(self, settled: Settled, source: Source | None) -> None:
        """Count what was committed."""
        self.failures = self.with_failures(settled, source) or self.failures
        self.succeeded += settled.succeeded
        self.failed += len(settled.failures)
        self.commits += 1


def _stored(key: Any, error: BaseException, source: Source | None) -> list[Any]:
    line = told(error)[:300]
    if source is not None and source.codec is not None:
        return [source.codec.write(key if isinstance(key, tuple) else (key,)), line]
    if key is None or isinstance(key, (int, float, bool)):
        return [key, line]
    text = (key if isinstance(key, str) else repr(key))[:300]
    return [text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0"), line]


def bare(error: BaseException) -> BaseException:
    """Without its traceback: that would keep the session of the chunk, and every row in it."""
    link: BaseException | None = error
    while link is not None and link.__traceback__ is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
