"""Who has a session, in words an operator understands, and which line of the user's code asked for something."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import sqlalchemy

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

__all__ = ["OWNER", "Line", "Owner", "is_ours", "is_users", "owner_of", "serving", "user_line"]

OWNER: Final = "aftercommit.owner"
"""The key in ``session.info``."""

serving: Final[ContextVar[str | None]] = ContextVar("aftercommit_serving", default=None)
"""The request that has a session of ours here: what opens another one here says so. Its name, never the session."""

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
        name: A request line (``POST /files``), a task's name, or ``code``, with the request or task in which that runs,
            if it is known: ``code in POST /files``.
        line: Where it was opened, if that is known.
        kind: ``"request"``, ``"task"`` or ``"code"``.
        allowed: Seconds for which it may hold a connection; None for what the pool allows.
        task_id: The record of the task.
        attempt: The task's attempt.
        doing: What of its own the task does with it (``batch of handle``); None for the run itself.
    """

    name: str
    line: Line | None = None
    kind: str = "code"
    allowed: float | None = None
    task_id: UUID | None = None
    attempt: int | None = None
    doing: str | None = None

    def __str__(self) -> str:
        """Who, in words, and the line behind it; made when somebody asks, and not for every run."""
        text = self.name
        if self.task_id is not None:
            text = f"task {self.name!r}, attempt {self.attempt}, id {self.task_id}"
        if self.doing is not None:
            text = f"{self.doing} in {text}"
        return text if self.line is None else f"{text} ({self.line})"


def owner_of(session: Session) -> Owner | None:
    """The owner of a session of ours; None for anybody else's."""
    return session.info.get(OWNER)


def is_ours(file: str) -> bool:
    """Whether a source file is this library's, or SQLAlchemy's."""
    return file.startswith(_LIBRARIES[:2])


@lru_cache(maxsize=4096)
def is_users(file: str) -> bool:
    """Whether a source file belongs to no library."""
    return not file.startswith(_LIBRARIES[:3]) and not any(part in file for part in _LIBRARIES[3:])


def user_line() -> Line | None:
    """The innermost line of the stack that belongs to no library; None where there is none."""
    frame = sys._getframe(1)  # noqa: SLF001  # inspect.stack() reads source files, this costs a microsecond
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return Line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return None
