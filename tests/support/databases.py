"""The four drivers, each with a database of its own for every test."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, make_url

DRIVERS = ("psycopg", "asyncpg", "pysqlite", "aiosqlite")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseUnderTest:
    """An empty database that belongs to one test.

    Attributes:
        url: SQLAlchemy's URL, with the driver in it.
        driver: One of ``DRIVERS``.
        server_url: Where other databases of the same PostgreSQL can be reached (its ``postgres`` database, by
            psycopg); None on SQLite.
        path: The file on SQLite; None on PostgreSQL.
    """

    url: str
    driver: str
    server_url: str | None = None
    path: Path | None = None

    @property
    def is_async(self) -> bool:
        """Whether this test is about ``AsyncSession``. psycopg serves both, and stands for the plain one."""
        return self.driver in {"asyncpg", "aiosqlite"}

    @property
    def is_sqlite(self) -> bool:
        """Whether this is SQLite."""
        return self.driver in {"pysqlite", "aiosqlite"}

    @property
    def sync_url(self) -> str:
        """The same database by a plain driver: for a test that looks on from outside."""
        return self._by("pysqlite" if self.is_sqlite else "psycopg")

    @property
    def async_url(self) -> str:
        """The same database by an async driver."""
        return self._by("aiosqlite" if self.is_sqlite else "asyncpg")

    def _by(self, driver: str) -> str:
        url: URL = make_url(self.url)
        return url.set(drivername=f"{url.get_backend_name()}+{driver}").render_as_string(hide_password=False)
