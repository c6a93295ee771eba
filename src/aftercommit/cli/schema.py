"""``aftercommit schema``: our tables, printed or applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from sqlalchemy import insert
from sqlalchemy.schema import CreateIndex, CreateTable

from aftercommit.cli.target import DatabaseOption, in_session, load
from aftercommit.records.schema import SCHEMA_VERSION, create_tables, schema_problem
from aftercommit.records.tables import AUTOVACUUM, SchemaRecord, TaskRecord

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def schema(
    target: Annotated[str | None, typer.Argument(help="The Database, as module:name.")] = None,
    db: DatabaseOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Make what is missing.")] = False,  # noqa: FBT002  # a flag
    check: Annotated[bool, typer.Option("--check", help="Only say whether it fits; exit with 1 if not.")] = False,  # noqa: FBT002
) -> None:
    """Print the statements that make the aftercommit_* tables, or apply them."""
    database = load(target or db)
    if check:
        problem = in_session(database, lambda session: schema_problem(session.connection()))
        if problem is not None:
            typer.echo(f"{problem}. Run `aftercommit schema --apply`.")
            raise typer.Exit(1)
        typer.echo(f"The tables are there, in version {SCHEMA_VERSION}.")
    elif apply:
        in_session(database, lambda session: create_tables(session.connection()))
        typer.echo(f"The tables are there, in version {SCHEMA_VERSION}.")
    else:
        typer.echo(in_session(database, _statements))


def _statements(session: Session) -> str:
    dialect = session.connection().dialect
    parts: list[str] = []
    for table in TaskRecord.metadata.sorted_tables:
        parts.append(str(CreateTable(table).compile(dialect=dialect)).strip() + ";")
        parts += [_index(index, dialect) for index in sorted(table.indexes, key=lambda each: str(each.name))]
    if dialect.name == "postgresql":
        parts.append(f"{AUTOVACUUM};")
    version = insert(SchemaRecord).values(id=1, version=SCHEMA_VERSION)
    parts.append(f"{version.compile(dialect=dialect, compile_kwargs={'literal_binds': True})};")
    return "\n\n".join(parts)


def _index(index: Any, dialect: Any) -> str:
    return str(CreateIndex(index).compile(dialect=dialect)).strip() + ";"
