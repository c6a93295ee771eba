"""Who has a session, in words an operator understands, and which line of the user's code asked for something."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import sqlalchemy

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["OWNER", "Line", "Owner", "owner_of", "user_line"]

OWNER: Final = "aftercommit.owner"
"""The key in ``session.info``."""

# Frames of these are left out: the reader wants the line that he can change.
_LIBRARIES: Final = (
    str(Path(__file__).parent.parent) + "/",
    str(Path(sqlalchemy.__file__).parent) + "/",
    str(Path(dataclass.__code__.co_filename).parent) + "/contextlib.py",
    "/fastapi/",
    "/starlette/",
    "/anyio/",
    "/concurrent/futures/",
    "/asyncio/",
    "/threading.py",
    "<",
)


@dataclass(frozen=True, slots=True)
class Line:
    """A place in the source.

    Attributes:
        file: The path of the file.
        number: The line, from 1.
        function: The function it stands in.
    """

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        """``file:line in function``."""
        return f"{self.file}:{self.number} in {self.function}"


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has a session.

    Attributes:
        name: A request line (``POST /files``), a task (``task 'process_file', attempt 2``), or ``code``.
        line: Where it was opened, if that is known.
        kind: ``"request"``, ``"task"`` or ``"code"``.
        allowed: Seconds for which it may hold a connection; None for what the pool allows.
    """

    name: str
    line: Line | None = None
    kind: str = "code"
    allowed: float | None = None

    def __str__(self) -> str:
        """The name, and the line behind it."""
        return self.name if self.line is None else f"{self.name} ({self.line})"


def owner_of(session: Session) -> Owner | None:
    """The owner of a session of ours; None for anybody else's."""
    return session.info.get(OWNER)


def user_line() -> Line | None:
    """The innermost line of the stack that belongs to no library; None where there is none."""
    frame = sys._getframe(1)  # noqa: SLF001  # inspect.stack() reads source files, this costs a microsecond
    while frame is not None:
        name = frame.f_code.co_filename
        if not _is_library(name):
            return Line(name, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return None


@lru_cache(maxsize=4096)
def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES[:3]) or any(part in file for part in _LIBRARIES[3:])
