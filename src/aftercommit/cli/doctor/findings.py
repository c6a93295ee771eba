"""What the doctor has found out: one finding for each thing that was looked at."""

from __future__ import annotations

import enum
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy.dialects import postgresql

if TYPE_CHECKING:
    from pathlib import Path

    from aftercommit.records.server import Server

__all__ = ["READ_ONLY", "Finding", "Level", "ago", "change", "identifier", "word"]

READ_ONLY: Final = "default_transaction_read_only"


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


def change(server: Server, name: str, value: str) -> str:
    """Return the line that changes a setting where it was made.

    A role's wins over its database's, both win over the server's, and what the client asks for over all of them.
    """
    source = server.sources.get(name, "")
    if source == "client":
        return f"Database(…)    # without {name} in the URL, or in connect_args"
    role, database = identifier(server.role), identifier(server.database)
    whose = {"user": f"ROLE {role}", "database user": f"ROLE {role} IN DATABASE {database}"}
    change = f"ALTER {whose.get(source, f'DATABASE {database}')} SET {name} = {value};"
    # Where all transactions are read-only, this one would be, too.
    return f"BEGIN READ WRITE; {change} COMMIT;" if name == READ_ONLY else change
