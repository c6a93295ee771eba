"""What is thought of a database that cannot be asked: no URL, nobody there, or refused by whoever is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aftercommit.cli.doctor.findings import Finding, Level, word
from aftercommit.cli.doctor.setup import file_of
from aftercommit.pools.urls import render
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from sqlalchemy import URL

    from aftercommit.errors import ConfigurationError
    from aftercommit.pools import Pools

__all__ = ["configuration", "no_url", "unreachable", "who_has_open"]


def configuration(error: ConfigurationError) -> Finding:
    """Say what is wrong with a URL, or its options."""
    return Finding(check="url", level=Level.WRONG, found=str(error), why="Nothing can be connected to.")


def no_url(error: Exception) -> Finding:
    """Say that there is none."""
    return Finding(
        check="url",
        level=Level.WRONG,
        found=f"The function that gives the URL raised {type(error).__name__}",
        why="Nothing can be connected to. Does it read a variable that is not set here?",
        remedy=("env | cut -d= -f1    # the names of those that are set",),
    )


def unreachable(pools: Pools, error: BaseException) -> Finding:
    """Say that a database cannot be asked, in the driver's words, and what to type to learn more."""
    url = pools.flavours.given
    cause = getattr(error, "orig", None) or error
    said = " ".join(str(without_values(cause)).split()) or type(error).__name__
    if url.password:
        said = said.replace(str(url.password), "***")
    why, remedy = _of_file(url, cause) if pools.is_sqlite else _of_server(url, cause)
    return Finding(
        check="database",
        level=Level.WRONG,
        found=f"{render(url)} cannot be asked: {said}",
        why=f"Neither requests nor tasks can work without it. {why}".strip(),
        remedy=(remedy,),
    )


def who_has_open(url: URL) -> str:
    """Return the line that names the processes that have an SQLite file open."""
    return f"lsof {word(file_of(url))}    # who has it open"


def _of_file(url: URL, cause: BaseException) -> tuple[str, str]:
    name = getattr(cause, "sqlite_errorname", None) or ""
    path = word(file_of(url))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "Somebody has all of it locked.", who_has_open(url)
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return "The file is damaged, or is none of SQLite's.", f"sqlite3 {path} 'PRAGMA integrity_check'"
    return "", f"ls -l {path}*"


def _of_server(url: URL, cause: BaseException) -> tuple[str, str]:
    # psycopg knows no code before it is connected, and most languages of the server have this word.
    is_there = getattr(cause, "sqlstate", None) is not None or "FATAL" in str(cause)
    # As libpq finds the way where the URL does not say it, or says it in its query.
    parts = (
        ("-h", url.host or url.query.get("host")),
        ("-p", url.port or url.query.get("port")),
        *((("-U", url.username),) if is_there else ()),
        ("-d", url.database),
    )
    words = [f"{option} {word(_text(value))}" for option, value in parts if value]
    if is_there:
        why = "The server is there and refuses us: is it the right database, role and password, and are there any "
        return f"{why}connections left?", " ".join(["psql", *words])
    return "", " ".join(["pg_isready", *words])


def _text(value: object) -> str:
    # Several hosts, or their ports.
    return ",".join(value) if isinstance(value, tuple) else str(value)
