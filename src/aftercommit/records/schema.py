"""Our tables: made, and checked for their version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import insert, inspect, select, text, update

if TYPE_CHECKING:
    from sqlalchemy import Connection, MetaData

__all__ = ["SCHEMA_VERSION", "create_tables", "schema_problem"]

SCHEMA_VERSION: Final = 2

_LOCK: Final = 0x61667463  # "aftc": any number will do, as long as nobody else takes the same


def create_tables(connection: Connection, also: MetaData | None = None) -> None:
    """Make what is missing of our tables, in the transaction of *connection*; harmless where they stand.

    Several processes may do so at once: the second waits for the first.

    Args:
        connection: In a transaction, or about to begin one.
        also: The application's own tables, to be made under the same lock.
    """
    from aftercommit.records.tables import Base, SchemaRecord  # mapping them takes time that an import must not

    if connection.dialect.name == "postgresql":
        # Of the transaction, not of the session: a transaction pooler lets no other kind through.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    Base.metadata.create_all(connection)
    _add_missing_columns(connection, Base.metadata)
    if also is not None:
        also.create_all(connection)
    version = connection.scalar(select(SchemaRecord.version))
    if version is None:
        connection.execute(insert(SchemaRecord).values(id=1, version=SCHEMA_VERSION))
    elif version < SCHEMA_VERSION:
        connection.execute(update(SchemaRecord).values(version=SCHEMA_VERSION))


def _add_missing_columns(connection: Connection, metadata: MetaData) -> None:
    """Bring older tables forward: every column that came later may be empty or has a default."""
    inspector = inspect(connection)
    quote = connection.dialect.identifier_preparer
    for table in metadata.sorted_tables:
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                compiler: Any = connection.dialect.ddl_compiler(connection.dialect, None)  # type: ignore[arg-type]  # as Alembic makes it
                written = compiler.get_column_specification(column)
                connection.exec_driver_sql(f"ALTER TABLE {quote.format_table(table)} ADD COLUMN {written}")


def schema_problem(connection: Connection) -> str | None:
    """Say what is wrong with our tables, or None."""
    from aftercommit.records.tables import Base, SchemaRecord

    inspector = inspect(connection)
    missing = sorted(name for name in Base.metadata.tables if not inspector.has_table(name))
    if missing:
        return (
            f"the tables {', '.join(missing)} are missing" if len(missing) > 1 else f"the table {missing[0]} is missing"
        )
    version = connection.scalar(select(SchemaRecord.version))
    if version is None or version < SCHEMA_VERSION:
        return f"the tables are of version {version}, and this release needs version {SCHEMA_VERSION}"
    return None
