"""Which line of the application's code asked for something: the frames of libraries are left out."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import os
import sys
import threading
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy.engine.base
import sqlalchemy.orm.session

if TYPE_CHECKING:
    from types import CodeType, FrameType

__all__ = [
    "CallSite",
    "find_taker",
    "is_machinery",
    "is_users",
    "line_at",
    "line_of",
    "session_begins",
    "user_line",
]


class CallSite(tuple["CodeType", int]):
    """A place in the source.

    One is made for every session, and looked at by nearly nobody. So it is a tuple, which is made without a call of
    Python, of the code and how far that had come: to count its lines takes longer the longer the function is.
    """

    __slots__ = ()

    @property
    def file(self) -> str:
        """The path of the file."""
        return self[0].co_filename

    @property
    def number(self) -> int:
        """The line, from 1."""
        code, at = self
        lines = (line for begin, end, line in code.co_lines() if begin <= at < end and line is not None)
        return next(lines, code.co_firstlineno)

    @property
    def function(self) -> str:
        """The function it stands in."""
        return self[0].co_name

    def __str__(self) -> str:
        """``file:line in function``."""
        return f"{self.file}:{self.number} in {self.function}"


_MODULES: Final = (contextlib, threading)
_PACKAGES: Final = (asyncio, concurrent.futures, sqlalchemy)
# Found without being imported: they are optional, and an application may bring its own of any name.
_OPTIONAL: Final = ("anyio", "fastapi", "greenlet", "sqlmodel", "starlette", "uvicorn")
_OURS: Final = str(Path(__file__).parent.parent) + os.sep
_MACHINES: Final = (_OURS, str(Path(sqlalchemy.__file__ or "").parent) + os.sep)
_SESSIONS: Final = sqlalchemy.orm.session.__file__
_ENGINE: Final = str(Path(sqlalchemy.engine.base.__file__).parent) + os.sep
_WRAPPERS: Final = 16
"""How many frames are looked at for a session behind an engine or a pool whose methods are wrapped."""
_BEFORE: Final = -1
"""How far code has come that was not begun; its line is the one that defines it."""


@cache
def _roots() -> tuple[str, ...]:
    """Where libraries are: their files begin with one of these."""
    roots = [str(Path(__file__).parent.parent), *(str(Path(each.__file__ or "").parent) for each in _PACKAGES)]
    for name in _OPTIONAL:
        with contextlib.suppress(ValueError):  # somebody put a module of that name in its place
            found = importlib.util.find_spec(name)
            roots += [] if found is None else found.submodule_search_locations or []
    # Code without a file, such as the methods that dataclasses make, is nobody's line.
    return (*(root + os.sep for root in roots), *(each.__file__ or "" for each in _MODULES), "<")


class _Kinds(dict[str, int]):
    """Whose each source file is: found once, and looked up for each frame."""

    def __missing__(self, file: str) -> int:
        kind = _MACHINERY if file.startswith(_MACHINES) else _LIBRARY if file.startswith(_roots()) else _USERS
        self[file] = kind
        return kind


_USERS: Final = 0
_LIBRARY: Final = 1
_MACHINERY: Final = 2
_kinds: Final = _Kinds()


def is_users(file: str) -> bool:
    """Whether a source file belongs to no library."""
    return _kinds[file] == _USERS


def is_machinery(file: str) -> bool:
    """Whether a source file is this library's, or SQLAlchemy's."""
    return _kinds[file] == _MACHINERY


def user_line(behind: int = 0) -> CallSite | None:
    """The innermost line of the stack that belongs to no library; None where there is none.

    Args:
        behind: How many callers, counted from the one that calls this, are known to be this library's.
    """
    # inspect.stack() would read source files; and each frame that is looked at must be made an object for that.
    return _line_from(sys._getframe(1 + behind))  # noqa: SLF001  # see above


def _line_from(frame: FrameType | None) -> CallSite | None:
    while frame is not None:
        if not _kinds[frame.f_code.co_filename]:
            return CallSite((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return _behind_greenlets()


def find_taker() -> tuple[CallSite | None, bool | None]:
    """Find who takes a connection, asked by the pool that gives it: from which line, and whether a session does.

    The second is None where that is seen only at its BEGIN.

    By the files on the stack: whatever wraps an engine may stand in between, and so may a listener that takes one by
    hand in the middle of a session's work. Which of the two it is, says the BEGIN: the session sends its own.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # see user_line
    while frame is not None and _kinds[file := frame.f_code.co_filename] == _MACHINERY:
        if file == _SESSIONS:
            return _line_from(frame), True
        frame = frame.f_back
    line = _line_from(frame)
    for _ in range(_WRAPPERS):
        if frame is None:
            break
        if frame.f_code.co_filename == _SESSIONS:
            return line, None
        frame = frame.f_back
    return line, False


def session_begins() -> CallSite | None:
    """The line that uses the session which sends a BEGIN, asked by the dialect; None if no session sends it."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # see user_line
    while frame is not None and (frame.f_code.co_filename.startswith((_ENGINE, _OURS))):
        frame = frame.f_back
    return _line_from(frame) if frame is not None and frame.f_code.co_filename == _SESSIONS else None


def line_at(frame: FrameType) -> CallSite:
    """Where *frame* is at this moment."""
    return CallSite((frame.f_code, frame.f_lasti))


def line_of(function: Any) -> CallSite | None:
    """Where *function* is defined, whatever it is wrapped in; None for what has no source."""
    while True:
        inner = function.func if isinstance(function, partial) else getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return None if code is None else CallSite((code, _BEFORE))


def _behind_greenlets() -> CallSite | None:
    # SQLAlchemy runs what is behind an AsyncSession in a greenlet: who called it stands in the one outside.
    greenlet = sys.modules.get("greenlet")
    outer = None if greenlet is None else greenlet.getcurrent().parent
    while outer is not None:
        frame = outer.gr_frame
        while frame is not None:
            if not _kinds[frame.f_code.co_filename]:
                return line_at(frame)
            frame = frame.f_back
        outer = outer.parent
    return None
