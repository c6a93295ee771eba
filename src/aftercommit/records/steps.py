"""What has changed in our tables from version to version, as steps that can be applied, printed and looked for.

A step first adds, and only a later release takes away, so that the code of both releases works with the tables in
between. What of a step is there already is left alone: whoever stopped half-way goes on from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy import inspect, text
from sqlalchemy.schema import CreateIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Dialect, Index, Table

__all__ = ["STEPS", "AddColumn", "AddIndex", "Change", "DropIndex", "Step", "pending"]

_CREATE: Final = re.compile(r"^CREATE (UNIQUE )?INDEX ")
# One that CONCURRENTLY could not finish is there, and serves nobody.
_HAS_INDEX: Final = text(
    "SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = to_regclass(:name) AND i.indrelid = to_regclass(:table)"
)


class Change(Protocol):
    """One change of one table."""

    @property
    def table(self) -> str:
        """Which."""
        ...

    @property
    def is_index(self) -> bool:
        """Whether it changes an index, which on PostgreSQL can be done while everybody goes on working."""
        ...

    def is_done(self, connection: Connection) -> bool:
        """Whether the database has it."""
        ...

    def statements(self, dialect: Dialect, *, concurrently: bool) -> list[str]:
        """The SQL for it.

        Args:
            dialect: Whose words.
            concurrently: Whether it runs outside of a transaction, where PostgreSQL makes indexes without a lock.
        """
        ...


@dataclass(frozen=True, slots=True)
class AddColumn:
    """Add a column that may be empty or has a constant default: from PostgreSQL 11 on that is done in an instant."""

    table: str
    column: str

    def __str__(self) -> str:
        """As people call it."""
        return f"the column {self.table}.{self.column}"

    @property
    def is_index(self) -> bool:
        """It is none."""
        return False

    def is_done(self, connection: Connection) -> bool:
        """Whether it is there."""
        return self.column in {each["name"] for each in inspect(connection).get_columns(self.table)}

    def statements(self, dialect: Dialect, *, concurrently: bool) -> list[str]:  # noqa: ARG002  # needs no index
        """One statement."""
        table = _table(self.table)
        compiler: Any = dialect.ddl_compiler(dialect, None)  # type: ignore[arg-type]  # as Alembic makes it
        written = compiler.get_column_specification(table.columns[self.column])
        name = dialect.identifier_preparer.format_table(table)
        unless = "IF NOT EXISTS " if dialect.name == "postgresql" else ""
        return [f"ALTER TABLE {name} ADD COLUMN {unless}{written}"]


@dataclass(frozen=True, slots=True)
class AddIndex:
    """Add an index of our metadata."""

    table: str
    index: str

    def __str__(self) -> str:
        """As people call it."""
        return f"the index {self.index}"

    @property
    def is_index(self) -> bool:
        """It is one."""
        return True

    def is_done(self, connection: Connection) -> bool:
        """Whether it is there and serves; also if a later step has taken it away again."""
        return self._found() is None or _has_index(connection, self.table, self.index)

    def statements(self, dialect: Dialect, *, concurrently: bool) -> list[str]:
        """One statement; two where it has to be made anew."""
        index = self._found()
        if index is None:
            return []
        sql = " ".join(str(CreateIndex(index).compile(dialect=dialect)).split())
        if dialect.name != "postgresql":
            return [_CREATE.sub(r"CREATE \1INDEX IF NOT EXISTS ", sql)]
        how = "CONCURRENTLY " if concurrently else ""
        return [
            f"DROP INDEX {how}IF EXISTS {self.index}",
            _CREATE.sub(rf"CREATE \1INDEX {how}", sql),
        ]

    def _found(self) -> Index | None:
        return next((each for each in _table(self.table).indexes if each.name == self.index), None)


@dataclass(frozen=True, slots=True)
class DropIndex:
    """Take an index away that no release in use needs any more."""

    table: str
    index: str

    def __str__(self) -> str:
        """As people call it."""
        return f"the index {self.index}, which is not needed any more"

    @property
    def is_index(self) -> bool:
        """It is one."""
        return True

    def is_done(self, connection: Connection) -> bool:
        """Whether it is gone."""
        return self.index not in {each["name"] for each in inspect(connection).get_indexes(self.table)}

    def statements(self, dialect: Dialect, *, concurrently: bool) -> list[str]:
        """One statement."""
        how = "CONCURRENTLY " if concurrently and dialect.name == "postgresql" else ""
        return [f"DROP INDEX {how}IF EXISTS {self.index}"]


@dataclass(frozen=True, slots=True)
class Step:
    """All that changed with one version.

    Attributes:
        version: The version that the tables have after it.
        changes: What changed, in the order in which it is to be done. New tables are made anyhow.
    """

    version: int
    changes: tuple[Change, ...]


STEPS: Final[tuple[Step, ...]] = (
    Step(
        2,
        (
            AddColumn("aftercommit_task", "refunds"),
            AddColumn("aftercommit_worker", "backends"),
            AddColumn("aftercommit_task", "schedule"),
            AddColumn("aftercommit_task", "scheduled_at"),
            AddColumn("aftercommit_worker", "declares"),
            AddIndex("aftercommit_task", "aftercommit_task_scheduled"),
        ),
    ),
    Step(3, (AddColumn("aftercommit_task", "expected"), AddColumn("aftercommit_task", "cancelled_by"))),
)
"""One for each version after the first, in order."""


def pending(connection: Connection, steps: Sequence[Step] | None = None) -> list[Change]:
    """Return what is to be done to the tables that are there, whatever version they say they have."""
    inspector = inspect(connection)
    # In order, and each once.
    changes = list(dict.fromkeys(change for step in (STEPS if steps is None else steps) for change in step.changes))
    there = {table for table in {change.table for change in changes} if inspector.has_table(table)}
    return [change for change in changes if change.table in there and not change.is_done(connection)]


def _table(name: str) -> Table:
    from aftercommit.records.tables import Base  # mapping them takes time that an import must not

    return Base.metadata.tables[name]


def _has_index(connection: Connection, table: str, index: str) -> bool:
    if connection.dialect.name != "postgresql":
        return index in {each["name"] for each in inspect(connection).get_indexes(table)}
    return bool(connection.scalar(_HAS_INDEX, {"name": index, "table": table}))
