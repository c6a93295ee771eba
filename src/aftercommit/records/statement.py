"""One statement in the words of both databases, sent past SQLAlchemy's compiler.

These few run once or twice per task. As Core constructs they cost a quarter of a short task's time; written out,
the drivers prepare them and their cost disappears.
"""

from __future__ import annotations

import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Connection, CursorResult

__all__ = ["Statement", "savepoint"]

_NAME = re.compile(r"(?<![:\w]):([a-z_]+)")


class Statement:
    """SQL with ``:name`` for parameters.

    Args:
        postgresql: In PostgreSQL's words.
        sqlite: In SQLite's; None where they are the same.
    """

    __slots__ = ("_compiled", "_sql")

    def __init__(self, postgresql: str, sqlite: str | None = None) -> None:
        self._sql = {"postgresql": postgresql, "sqlite": postgresql if sqlite is None else sqlite}
        self._compiled: dict[tuple[str, str], tuple[str, list[str]]] = {}

    def execute(self, connection: Connection, parameters: Mapping[str, Any]) -> CursorResult[*tuple[Any, ...]]:
        """Run it on *connection*."""
        dialect = connection.dialect
        found = self._compiled.get((dialect.name, dialect.paramstyle))
        if found is None:
            found = self._compiled[dialect.name, dialect.paramstyle] = self._compile(dialect.name, dialect.paramstyle)
        sql, names = found
        if dialect.paramstyle == "pyformat":
            return connection.exec_driver_sql(sql, dict(parameters))
        values = [parameters[name] for name in names]
        if dialect.name == "sqlite":
            values = [value.hex if isinstance(value, UUID) else value for value in values]
        return connection.exec_driver_sql(sql, tuple(values))

    def _compile(self, dialect: str, style: str) -> tuple[str, list[str]]:
        sql = self._sql[dialect]
        names: list[str] = []
        if style == "pyformat":
            return _NAME.sub(r"%(\1)s", sql.replace("%", "%%")), names
        if style == "qmark":
            names = _NAME.findall(sql)
            return _NAME.sub("?", sql), names

        def numbered(match: re.Match[str]) -> str:
            if match[1] not in names:
                names.append(match[1])
            return f"${names.index(match[1]) + 1}"

        return _NAME.sub(numbered, sql), names


@contextmanager
def savepoint(connection: Connection) -> Iterator[None]:
    """Take back, on an error, what was done inside, and nothing else of somebody's transaction.

    By plain SQL: SQLAlchemy's own savepoints are events that hand-overs listen to, and this may be in a commit.
    """
    connection.exec_driver_sql("SAVEPOINT aftercommit")
    try:
        yield
    except BaseException:
        # On a connection that was lost there is nothing to take back, and the first error says more.
        with suppress(DBAPIError):
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT aftercommit")
            connection.exec_driver_sql("RELEASE SAVEPOINT aftercommit")
        raise
    connection.exec_driver_sql("RELEASE SAVEPOINT aftercommit")
