"""When and how one hand-over of a task is to run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from aftercommit.errors import ConfigurationError

__all__ = ["Options", "check_by", "check_key"]

_MAX_KEY = 255
_MAX_PRIORITY = 2**31 - 1
_MAX_DELAY = 100 * 366 * 86400.0
"""A hundred years: beyond the year 9999 neither Python nor SQLite could read the time again."""
_MIN_YEAR, _MAX_YEAR = 1000, 9998
"""SQLite compares times as text, and writes earlier years with fewer digits; the last is over in some zone."""


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
        if not _is_number(self.delay) or not 0 <= self.delay <= _MAX_DELAY:
            raise ConfigurationError(f"delay={self.delay!r}: give seconds, 0 or more, and at most 100 years.")
        if self.at is not None:
            if not isinstance(self.at, datetime):
                raise ConfigurationError(f"at={self.at!r}: give a datetime, such as datetime.now(UTC) + timedelta(…).")
            if self.delay:
                raise ConfigurationError("Both delay= and at= were given: say one of them when the task is due.")
            if self.at.tzinfo is None or self.at.utcoffset() is None:
                raise ConfigurationError(
                    f"at={self.at!r} has no time zone, so nobody could say which moment it means. "
                    "Write datetime.now(UTC) + timedelta(…), or give it one with .replace(tzinfo=…)."
                )
            if not _is_storable(self.at):
                raise ConfigurationError(
                    f"at={self.at!r}: give a moment between the years {_MIN_YEAR} and {_MAX_YEAR}, "
                    "which both databases can hold and give back."
                )
        if self.key is not None:
            check_key(self.key)
        if type(self.priority) is not int or abs(self.priority) > _MAX_PRIORITY:
            raise ConfigurationError(f"priority={self.priority!r}: give a whole number between -2**31 and 2**31.")

    @property
    def is_plain(self) -> bool:
        """Whether nothing was asked for."""
        return self == _PLAIN


def check_key(key: object, *, such_as: str = "") -> None:
    """Refuse a key that one of the databases could not hold and give back as it is.

    Args:
        key: Of a task or of an event.
        such_as: What to add to the message.

    Raises:
        ConfigurationError: If it is no text, empty, too long, or holds a NUL or half a surrogate pair.
    """
    if not isinstance(key, str) or not 1 <= len(key) <= _MAX_KEY:
        raise ConfigurationError(f"key={key!r}: give 1 to {_MAX_KEY} characters{such_as}.")
    if "\0" in key or any("\ud800" <= each <= "\udfff" for each in key):
        raise ConfigurationError(
            f"key={key!r} holds a NUL or half a surrogate pair, which no database can hold. Take it out, or encode it."
        )


def check_by(by: object) -> None:
    """Refuse who asks for something, where the database could not hold it.

    Raises:
        ConfigurationError: If it is no text of 1 to 255 characters, or holds a NUL or half a surrogate pair.
    """
    if by is None:
        return
    is_text = isinstance(by, str) and 1 <= len(by) <= _MAX_KEY
    if not is_text or any(each == "\0" or "\ud800" <= each <= "\udfff" for each in str(by)):
        raise ConfigurationError(f"by={by!r}: give 1 to {_MAX_KEY} characters, without NUL, that say who asks.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_storable(at: datetime) -> bool:
    try:
        return _MIN_YEAR <= at.astimezone(UTC).year <= _MAX_YEAR
    except (OverflowError, ValueError):
        return False


_PLAIN = Options()
