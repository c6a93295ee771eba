"""Which line is the user's own: the frames of libraries are left out, and nobody else's."""

import contextlib
from functools import partial, wraps
from pathlib import Path
from typing import Any

import fastapi
import pytest
import sqlalchemy

from aftercommit.watch.call_sites import CallSite, line_of, user_line

SOURCE = """
def ask(look):
    return look()
"""


def asked_from(file: str) -> CallSite | None:
    """The line that is found when a function of *file* asks."""
    space: dict[str, Any] = {}
    exec(compile(SOURCE, file, "exec"), space)
    return space["ask"](user_line)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "file",
    ["/srv/fastapi/main.py", "/opt/asyncio/app.py", "/app/starlette/jobs.py", "/srv/sqlalchemy-shop/threading.py"],
)
def test_a_project_may_be_called_like_a_library(file: str) -> None:
    """A project is told from a library by where it lies, and not by what its directories are called."""
    assert str(asked_from(file)) == f"{file}:3 in ask"


@pytest.mark.parametrize(
    "file",
    [
        str(Path(fastapi.__file__).parent / "routing.py"),
        str(Path(sqlalchemy.__file__).parent / "orm" / "session.py"),
        str(contextlib.__file__),
        "<string>",
    ],
)
def test_frames_of_libraries_are_left_out(file: str) -> None:
    """The line behind them is the one that the reader can change."""
    line = asked_from(file)

    assert line is not None
    assert (line.file, line.function) == (__file__, "asked_from")


def test_a_function_is_found_behind_its_decorators() -> None:
    """The place of a wrapped function is its own; what has no source has no place."""

    def inner() -> None: ...

    @wraps(inner)
    def outer() -> None:
        inner()

    assert str(line_of(outer)) == f"{__file__}:{inner.__code__.co_firstlineno} in inner"
    assert str(line_of(partial(partial(inner), 1))) == f"{__file__}:{inner.__code__.co_firstlineno} in inner"
    assert line_of(len) is None
    assert line_of(None) is None


def test_an_object_that_is_called_is_found_by_its_call() -> None:
    """An endpoint or a task may be an object: its place is that of its ``__call__``."""

    class Endpoint:
        def __call__(self) -> None: ...

    call: Any = Endpoint.__call__
    assert str(line_of(Endpoint())) == f"{__file__}:{call.__code__.co_firstlineno} in __call__"


def test_lines_are_counted_when_somebody_asks() -> None:
    """The line of a place is the one that its code had come to, however long the function goes on after it."""

    def ask() -> tuple[CallSite | None, CallSite | None]:
        first = user_line()
        second = (
            0,
            user_line(),
        )
        return first, second[1]

    first, second = ask()

    start = ask.__code__.co_firstlineno
    assert first is not None
    assert second is not None
    assert (first.number - start, second.number - start) == (1, 4)
