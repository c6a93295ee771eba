"""What the doctor has found out: one finding for each thing that was looked at."""

from __future__ import annotations

import enum
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.dialects import postgresql

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Finding", "Level", "ago", "identifier", "word"]


class Level(enum.Enum):
    """How bad it is."""

    OK = "ok"
    """As it should be."""

    NOTE = "note"
    """Good to know; nobody has to do anything."""

    WARNING = "warning"
    """It works, and somebody should look at it."""

    WRONG = "wrong"
    """It does not work, or will not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at, in one or two words; the same in every release.
        level: How bad it is.
        found: What was found, with the values.
        why: Why it matters; empty where everything is as it should be.
        remedy: What to type, or to write, line by line.
    """

    check: str
    level: Level
    found: str
    why: str = ""
    remedy: tuple[str, ...] = ()


def ago(seconds: float) -> str:
    """*seconds* for people: ``"4 s"``, ``"15 min"``, ``"2 h"``, ``"3 days"``."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def word(text: str | Path) -> str:
    """*text* as one word of a line for the shell."""
    return shlex.quote(str(text))


def identifier(name: str) -> str:
    """*name* as PostgreSQL reads it: in quotes where it needs them."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's own
    return dialect.identifier_preparer.quote(name)
