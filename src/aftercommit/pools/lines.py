"""Which line of the user's code asked for something: the frames of libraries are left out."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import os
import sys
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy.orm.session

if TYPE_CHECKING:
    from types import CodeType, FrameType

__all__ = ["Line", "is_machinery", "is_users", "line_of", "opening_line", "user_line"]


class Line(NamedTuple):
    """A place in the source; a tuple, because one is made for every session, and nothing immutable is made faster.

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


_MODULES: Final = (contextlib, threading)
_PACKAGES: Final = (asyncio, concurrent.futures, sqlalchemy)
# Found without being imported: they are optional, and an application may bring its own of any name.
_OPTIONAL: Final = ("anyio", "fastapi", "greenlet", "sqlmodel", "starlette", "uvicorn")
_MACHINERY: Final = tuple(
    str(Path(file).parent) + os.sep for file in (Path(__file__).parent, sqlalchemy.__file__ or "")
)
_SESSION: Final = sqlalchemy.orm.session.__file__


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


def user_line() -> Line | None:
    """The innermost line of the stack that belongs to no library; None where there is none."""
    # inspect.stack() would read source files; this costs a microsecond.
    return _innermost(sys._getframe(1))  # noqa: SLF001  # see above


def opening_line() -> Line | None:
    """The line that takes a connection from an engine by hand; None where a session takes it, which has an owner."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # see user_line
    while frame is not None and _is_library(frame.f_code.co_filename):
        if frame.f_code.co_filename == _SESSION:
            return None
        frame = frame.f_back
    return _innermost(frame)


def line_of(function: Any) -> Line | None:
    """Where *function* is defined, whatever it is wrapped in; None for what has no source."""
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        function = inner
    code = getattr(function, "__code__", None)
    return None if code is None else _line_of_code(code)


@lru_cache(maxsize=1024)
def _line_of_code(code: CodeType) -> Line:
    return Line(code.co_filename, code.co_firstlineno, code.co_name)


def _innermost(frame: FrameType | None) -> Line | None:
    seen = None
    while True:
        while frame is not None:
            if not _is_library(frame.f_code.co_filename):
                return Line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
            frame = frame.f_back
        # SQLAlchemy runs what is behind an AsyncSession in a greenlet: who called it stands in the one outside.
        greenlet = sys.modules.get("greenlet")
        if greenlet is None:
            return None
        seen = (greenlet.getcurrent() if seen is None else seen).parent
        if seen is None:
            return None
        frame = seen.gr_frame
