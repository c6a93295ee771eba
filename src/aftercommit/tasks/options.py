"""When and how one hand-over of a task is to run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from aftercommit.errors import ConfigurationError

__all__ = ["Options"]

_MAX_KEY = 255
_MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``task.with_options(…)`` was given.

    Attributes:
        delay: Seconds from the commit's moment on, by the database's clock.
        at: The moment it is due; aware.
        key: A no-op while a task of this name and key is queued.
        priority: Higher runs first; 0 is the default.
    """

    delay: float = 0.0
    at: datetime | None = None
    key: str | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not math.isfinite(self.delay) or self.delay < 0:
            raise ConfigurationError(f"delay={self.delay!r}: give seconds, 0 or more.")
        if self.at is not None:
            if self.delay:
                raise ConfigurationError("Both delay= and at= were given: say one of them when the task is due.")
            if self.at.tzinfo is None or self.at.utcoffset() is None:
                raise ConfigurationError(
                    f"at={self.at!r} has no time zone, so nobody could say which moment it means. "
                    "Write datetime.now(UTC) + timedelta(…), or give it one with .replace(tzinfo=…)."
                )
        if self.key is not None and not 1 <= len(self.key) <= _MAX_KEY:
            raise ConfigurationError(f"key={self.key!r}: give 1 to {_MAX_KEY} characters.")
        if abs(self.priority) > _MAX_PRIORITY:
            raise ConfigurationError(f"priority={self.priority}: give a number between -2**31 and 2**31.")

    @property
    def is_plain(self) -> bool:
        """Whether nothing was asked for."""
        return self == _PLAIN


_PLAIN = Options()
