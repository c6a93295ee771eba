"""``aftercommit schema``: our tables, printed, brought forward or checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from sqlalchemy import insert, inspect, select, update
from sqlalchemy.schema import CreateIndex, CreateTable

from aftercommit.cli.target import DatabaseOption, in_autocommit, in_session, load
from aftercommit.records.schema import LOCK_MILLISECONDS, SCHEMA_VERSION, create_tables, details
from aftercommit.records.steps import pending
from aftercommit.records.tables import AUTOVACUUM, SchemaRecord, TaskRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection, Executable, Table
    from sqlalchemy.orm import Session

    from aftercommit.database import Database


def schema(
    target: Annotated[str | None, typer.Argument(help="The Database, as module:name.")] = None,
    db: DatabaseOption = None,
    apply: Annotated[  # noqa: FBT002  # a flag
        bool, typer.Option("--apply", help="Make what is missing, and bring older tables forward.")
    ] = False,
    show: Annotated[  # noqa: FBT002
        bool, typer.Option("--print", help="Print what --apply would do to this database, to be run by hand.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it fits; exit with 1 if not.")] = False,  # noqa: FBT002
) -> None:
    """Print the statements that make the aftercommit_* tables; or what this database needs; or apply it."""
    database = load(target or db)
    if check:
        problem = in_session(database, lambda session: details(session.connection()))
        if problem is not None:
            typer.echo(f"{problem}. Run `aftercommit schema --apply`.")
            raise typer.Exit(1)
        typer.echo(f"The tables are there, in version {SCHEMA_VERSION}.")
    elif apply:
        _apply(database)
        typer.echo(f"The tables are there, in version {SCHEMA_VERSION}.")
    elif show:
        typer.echo(in_session(database, _needed))
    else:
        typer.echo(in_session(database, _whole))


def _apply(database: Database) -> None:
    """Columns in a transaction; then indexes without a lock, each by itself; then the version."""
    in_session(database, lambda session: create_tables(session.connection(), indexes=False))
    in_autocommit(database, _change_indexes)
    in_session(database, lambda session: create_tables(session.connection()))


def _change_indexes(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    for change in pending(connection):
        for statement in change.statements(connection.dialect, concurrently=True) if change.is_index else ():
            connection.exec_driver_sql(statement)


def _whole(session: Session) -> str:
    """All of it, for a database that has none of it."""
    return "\n\n".join(_statements(session.connection(), TaskRecord.metadata.sorted_tables, is_new=True))


def _needed(session: Session) -> str:
    """What this database lacks: new tables and columns in one transaction, indexes each by itself."""
    connection = session.connection()
    inspector = inspect(connection)
    tables = TaskRecord.metadata.sorted_tables
    missing = [table for table in tables if not inspector.has_table(table.name)]
    if len(missing) == len(tables):
        return _whole(session)
    has_version = SchemaRecord.__table__ not in missing
    version = connection.scalar(select(SchemaRecord.version)) if has_version else None
    changes = [] if version is not None and version > SCHEMA_VERSION else pending(connection)
    if not missing and not changes and version is not None and version >= SCHEMA_VERSION:
        return f"-- The tables are there, in version {version}: there is nothing to do."
    is_server = connection.dialect.name == "postgresql"
    parts = [f"SET lock_timeout = '{LOCK_MILLISECONDS}ms';  -- if it ends with 55P03, run all of it again"] * is_server
    parts += ["BEGIN;" if is_server else "BEGIN IMMEDIATE;"]
    parts += _statements(connection, missing, is_new=False)
    for is_index in (False, True):
        if is_index:
            parts += ["COMMIT;"]
        for change in changes:
            if change.is_index is is_index:
                parts += [f"{each};" for each in change.statements(connection.dialect, concurrently=True)]
    number: Executable = insert(SchemaRecord).values(id=1, version=SCHEMA_VERSION)
    if version is not None:
        number = update(SchemaRecord).values(version=SCHEMA_VERSION)
    if version is None or version < SCHEMA_VERSION:
        parts.append(_literal(number, connection))
    return "\n\n".join([*parts, *["RESET lock_timeout;"] * is_server])


def _statements(connection: Connection, tables: Iterable[Table], *, is_new: bool) -> list[str]:
    dialect = connection.dialect
    parts: list[str] = []
    for table in tables:
        parts.append(str(CreateTable(table).compile(dialect=dialect)).strip() + ";")
        parts += [_index(index, dialect) for index in sorted(table.indexes, key=lambda each: str(each.name))]
        if dialect.name == "postgresql" and table is TaskRecord.__table__ and not is_new:
            parts.append(f"{AUTOVACUUM};")
    if is_new:
        if dialect.name == "postgresql":
            parts.append(f"{AUTOVACUUM};")
        parts.append(_literal(insert(SchemaRecord).values(id=1, version=SCHEMA_VERSION), connection))
    return parts


def _literal(statement: Any, connection: Connection) -> str:
    return f"{statement.compile(dialect=connection.dialect, compile_kwargs={'literal_binds': True})};"


def _index(index: Any, dialect: Any) -> str:
    return str(CreateIndex(index).compile(dialect=dialect)).strip() + ";"
