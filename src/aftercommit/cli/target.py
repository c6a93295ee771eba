"""Which ``Database`` a command is about, and how it gets there."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from aftercommit.database import Database
from aftercommit.errors import AfterCommitError
from aftercommit.plain import several_lines
from aftercommit.pools.pools import REQUEST
from aftercommit.wording import told, told_fully

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import ModuleType

    from sqlalchemy import Connection

__all__ = ["DatabaseOption", "fail", "import_module", "in_autocommit", "in_session", "load", "option_for_tasks"]

T = TypeVar("T")

DatabaseOption = Annotated[
    str | None,
    typer.Option("--db", "-d", envvar="AFTERCOMMIT_DB", help="The Database, as module:name, such as shop.main:db."),
]


def fail(message: str) -> typer.Exit:
    """Say what is wrong; raise what this returns."""
    typer.secho(several_lines(message), fg=typer.colors.RED, err=True)
    return typer.Exit(2)


def load(target: str | None) -> Database:
    """Import the ``Database`` that *target* names.

    Args:
        target: ``module:name``.

    Raises:
        typer.Exit: If it cannot be found; the reason has been printed.
    """
    if not target:
        raise fail("Which Database? Write --db module:name, such as --db shop.main:db, or set AFTERCOMMIT_DB.")
    module, colon, name = target.partition(":")
    if not colon or not name:
        raise fail(f"{target!r} is not of the form module:name, such as shop.main:db.")
    # As `python -m` does: the application lies where the command is typed.
    if os.getcwd() not in sys.path:  # noqa: PTH109  # sys.path holds strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    found: object = import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise fail(f"The module {module!r} has nothing called {name!r}.")
        found = getattr(found, part)
    if not isinstance(found, Database):
        raise fail(f"{target!r} is of type {type(found).__name__}, and not a Database.")
    return found


def import_module(module: str) -> ModuleType:
    """Import a module of the application.

    Raises:
        typer.Exit: If it cannot be imported; the reason has been printed, with the traceback where we have no better.
    """
    try:
        return importlib.import_module(module)
    except AfterCommitError as exc:
        raise fail(str(exc)) from exc
    except Exception as exc:
        if isinstance(exc, ModuleNotFoundError) and exc.name is not None and f"{module}.".startswith(f"{exc.name}."):
            raise fail(f"There is no module {exc.name!r} here. Run the command in the application's folder.") from exc
        typer.echo(told_fully(exc), err=True)
        raise fail(f"The module {module!r} cannot be imported, and says why above.") from exc


def option_for_tasks(target: str) -> str:
    """Return the option for a command that should know the tasks of an application, as well as that can be guessed.

    Args:
        target: The ``Database``, as ``module:name``.
    """
    package = target.partition(":")[0].rpartition(".")[0]
    guess = f"{package}.tasks" if package else "tasks"
    try:
        is_there = importlib.util.find_spec(guess) is not None
    except (ImportError, ValueError):
        is_there = False
    return f"--import {guess if is_there else 'MODULE'}"


def in_session(db: Database, work: Callable[[Session], T]) -> T:
    """Run ``work(session)`` in one transaction, by whichever flavour the URL has.

    Raises:
        typer.Exit: If the database cannot do it; the reason has been printed.
    """

    def with_session(connection: Connection) -> T:
        with Session(bind=connection) as session:
            result = work(session)
            session.flush()
            return result

    return _run(db, lambda: db.async_call_anyhow(with_session))


def in_autocommit(db: Database, work: Callable[[Connection], T]) -> T:
    """Run ``work(connection)`` in no transaction: each statement stands by itself.

    Raises:
        typer.Exit: If the database cannot do it; the reason has been printed.
    """
    pools = db.sessions.pools

    async def call() -> T:
        if not pools.is_async_only:
            with pools[REQUEST].engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                return work(connection)
        async with pools[REQUEST].async_engine.connect() as asynchronous:
            return await (await asynchronous.execution_options(isolation_level="AUTOCOMMIT")).run_sync(work)

    return _run(db, call)


def _run(db: Database, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        try:
            return await call()
        finally:
            await db.async_dispose()

    try:
        with asyncio.Runner() as runner:
            return runner.run(run())
    except AfterCommitError as exc:
        raise fail(str(exc)) from exc
    except SQLAlchemyError as exc:
        text = told(exc)
        hint = " Run `aftercommit schema --apply` first." if "aftercommit_" in text else ""
        raise fail(f"{db!r}: {text}{hint}") from exc
