"""Which line of the user's code asked for something: the frames of libraries are left out."""

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
import sqlalchemy.pool.base

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from sqlalchemy.orm import Session

__all__ = ["Line", "is_machinery", "is_users", "line_at", "line_of", "session_taking", "user_line"]


class Line(tuple["CodeType", int]):
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
_MACHINERY: Final = tuple(
    str(Path(file).parent) + os.sep for file in (Path(__file__).parent, sqlalchemy.__file__ or "")
)
_SESSIONS: Final = sqlalchemy.orm.session.__file__
_TAKES: Final = "_connection_for_bind"
"""The method of a ``SessionTransaction`` that takes a connection from an engine."""
_ENGINES: Final = frozenset(
    {sqlalchemy.pool.base.__file__, sqlalchemy.engine.base.__file__, str(Path(__file__).parent / "views.py")}
)
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


@cache
def _is_library(file: str) -> bool:
    return file.startswith(_roots())


def is_users(file: str) -> bool:
    """Whether a source file belongs to no library."""
    return not _is_library(file)


def is_machinery(file: str) -> bool:
    """Whether a source file is this library's, or SQLAlchemy's."""
    return file.startswith(_MACHINERY)


def user_line(behind: int = 0) -> Line | None:
    """The innermost line of the stack that belongs to no library; None where there is none.

    Args:
        behind: How many callers, counted from the one that calls this, are known to be this library's.
    """
    # inspect.stack() would read source files; and each frame that is looked at must be made an object for that.
    frame: FrameType | None = sys._getframe(1 + behind)  # noqa: SLF001  # see above
    while frame is not None:
        if not _is_library(frame.f_code.co_filename):
            return Line((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return _behind_greenlets()


def session_taking() -> Session | None:
    """The session that takes a connection, asked by the pool that gives it; None where it is taken by hand.

    Whoever is behind the engine's own frames has asked for it, and no listener that happens to run meanwhile: a session
    asks in one place, where it is known by the transaction that it begins.
    """
    # The pool's own `connect`, as seen from here, by way of its register.
    frame: FrameType | None = sys._getframe(5)  # noqa: SLF001  # see user_line
    while frame is not None and frame.f_code.co_filename in _ENGINES:
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != _TAKES or frame.f_code.co_filename != _SESSIONS:
        return None
    session: Session | None = getattr(frame.f_locals.get("self"), "session", None)
    return session


def line_at(frame: FrameType) -> Line:
    """Where *frame* is at this moment."""
    return Line((frame.f_code, frame.f_lasti))


def line_of(function: Any) -> Line | None:
    """Where *function* is defined, whatever it is wrapped in; None for what has no source."""
    while True:
        inner = function.func if isinstance(function, partial) else getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return None if code is None else Line((code, _BEFORE))


def _behind_greenlets() -> Line | None:
    # SQLAlchemy runs what is behind an AsyncSession in a greenlet: who called it stands in the one outside.
    greenlet = sys.modules.get("greenlet")
    outer = None if greenlet is None else greenlet.getcurrent().parent
    while outer is not None:
        frame = outer.gr_frame
        while frame is not None:
            if not _is_library(frame.f_code.co_filename):
                return line_at(frame)
            frame = frame.f_back
        outer = outer.parent
    return None
