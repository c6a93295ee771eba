"""What a user may say of a batch, beside its source and its handler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from aftercommit.errors import ConfigurationError

__all__ = ["Options"]

_MAX_SIZE: Final = 10_000
_MAX_WORKERS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of ``run_batch``, but source and handler.

    Attributes:
        size: Records in a chunk.
        workers: Chunks at once.
        pool: Whose connections it uses.
        entity: The class that keys are of.
        on_error: Marks a record that failed.
        max_failures: How many failures are tolerated.
        per_chunk: Whether the handler takes a list.
        progress: Where progress is shown.
    """

    size: int
    workers: int
    pool: str
    entity: type | None
    on_error: Callable[..., Any] | None
    max_failures: int | None
    per_chunk: bool
    progress: bool | Callable[[int, int | None], None] | None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 1 <= self.size <= _MAX_SIZE:
            raise ConfigurationError(
                f"size={self.size}: a chunk is one transaction of 1 to {_MAX_SIZE} records; 100 to 1000 is a good size."
            )
        if not 1 <= self.workers <= _MAX_WORKERS:
            raise ConfigurationError(f"workers={self.workers}: give 1 to {_MAX_WORKERS} chunks at once.")
        if self.max_failures is not None and self.max_failures < 0:
            raise ConfigurationError(f"max_failures={self.max_failures}: give how many are tolerated, 0 or more.")
