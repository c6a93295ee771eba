"""One URL, two flavours: which driver serves sync and which async, and what is wrong with a URL."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from aftercommit.errors import ConfigurationError

__all__ = ["PACKAGES", "Flavour", "Flavours", "flavours", "identity", "is_sqlite", "render"]

Flavour = Literal["sync", "async"]

_DRIVERS: Final[dict[str, tuple[str | None, str | None]]] = {
    # name in the URL: (driver for sessions, driver for async sessions)
    "sqlite": ("sqlite+pysqlite", "sqlite+aiosqlite"),
    "sqlite+pysqlite": ("sqlite+pysqlite", None),
    "sqlite+aiosqlite": (None, "sqlite+aiosqlite"),
    "postgres": ("postgresql+psycopg", "postgresql+psycopg"),
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg"),
    "postgresql+psycopg": ("postgresql+psycopg", "postgresql+psycopg"),
    "postgresql+psycopg_async": (None, "postgresql+psycopg"),
    "postgresql+asyncpg": (None, "postgresql+asyncpg"),
}
PACKAGES: Final = {"pysqlite": "sqlite3", "aiosqlite": "aiosqlite", "psycopg": "psycopg", "asyncpg": "asyncpg"}
_TO_INSTALL: Final = {"aiosqlite": "aiosqlite", "psycopg": "psycopg[binary]", "asyncpg": "asyncpg"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavours:
    """What one URL can serve.

    Attributes:
        given: The URL as it was given.
        sync: The URL for sessions, or None where its driver has no sync flavour.
        asynchronous: The URL for async sessions, or None where its driver has no async flavour.
    """

    given: URL
    sync: URL | None
    asynchronous: URL | None

    def url(self, flavour: Flavour) -> URL:
        """Return the URL of one flavour.

        Raises:
            ConfigurationError: If the URL's driver does not serve it, or the driver is not installed.
        """
        url = self.sync if flavour == "sync" else self.asynchronous
        backend = self.given.get_backend_name()
        if url is None:
            driver = self.given.drivername.partition("+")[2]
            wanted = "A Session" if flavour == "sync" else "An AsyncSession"
            both = "sqlite" if backend == "sqlite" else "postgresql"
            package = _DRIVERS[both][0 if flavour == "sync" else 1] or ""
            raise ConfigurationError(
                f"{wanted} was asked for, but the driver {driver!r} of {render(self.given)} serves only the other "
                f"flavour. Write {both}://… to have both"
                + (
                    f" (pip install '{_TO_INSTALL[name]}')."
                    if (name := package.partition("+")[2]) in _TO_INSTALL
                    else "."
                )
            )
        driver = url.get_driver_name()
        if importlib.util.find_spec(PACKAGES[driver]) is None:
            raise ConfigurationError(
                f"{render(self.given)} needs the driver {driver!r}, which is not installed: "
                f"pip install '{_TO_INSTALL.get(driver, driver)}'."
            )
        return url


def flavours(url: str | URL) -> Flavours:
    """Read *url* and say what it can serve.

    Raises:
        ConfigurationError: If it is no URL, not of a supported database, or SQLite in memory.
    """
    try:
        given = make_url(url)
    except ArgumentError as exc:
        # The text may hold a password: it does not go into the message.
        raise ConfigurationError(
            "The database URL cannot be read. Write, for example, 'sqlite:///app.db' or "
            "'postgresql://user:password@host/name'."
        ) from exc
    if given.drivername not in _DRIVERS:
        raise ConfigurationError(
            f"{render(given)}: {given.drivername!r} is not supported. Use sqlite://, postgresql:// (psycopg 3, both "
            "flavours) or postgresql+asyncpg:// (async only)."
        )
    if is_sqlite(given) and _in_memory(given):
        raise ConfigurationError(
            f"{render(given)}: a SQLite database in memory exists once per connection, so requests and tasks would "
            "each see an empty one of their own. Use a file: 'sqlite:///app.db', in tests one under tmp_path."
        )
    sync, asynchronous = _DRIVERS[given.drivername]
    return Flavours(
        given=given,
        sync=given.set(drivername=sync) if sync else None,
        asynchronous=given.set(drivername=asynchronous) if asynchronous else None,
    )


def is_sqlite(url: URL) -> bool:
    """Whether *url* is one of SQLite's."""
    return url.get_backend_name() == "sqlite"


def render(url: URL) -> str:
    """*url* as it may be shown."""
    return url.render_as_string(hide_password=True)


def identity(url: URL) -> tuple[object, ...]:
    """Return what tells one database from another: the server and the name, or the file.

    The driver does not matter, nor the user, nor how the local host is spelt.
    """
    if is_sqlite(url):
        return ("sqlite", str(Path(url.database or "").resolve()))
    host = url.host or url.query.get("host") or "localhost"
    # A socket's folder, like a loopback address, is this machine.
    if isinstance(host, str) and (host in ("localhost", "127.0.0.1", "::1") or host.startswith("/")):
        host = "localhost"
    port = url.port or url.query.get("port") or 5432
    return (url.get_backend_name(), host, str(port), url.database or url.username)


def _in_memory(url: URL) -> bool:
    name = url.database or ""
    return name in ("", ":memory:") or ":memory:" in name or url.query.get("mode") == "memory" or "mode=memory" in name
