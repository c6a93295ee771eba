"""Our tables: made, brought forward step by step, and checked for their version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import insert, inspect, select, text, update
from sqlalchemy.exc import DBAPIError

from aftercommit.errors import SchemaError
from aftercommit.records.steps import STEPS, pending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, MetaData

    from aftercommit.records.steps import Change

__all__ = ["LOCK_MILLISECONDS", "SCHEMA_VERSION", "create_tables", "details", "schema_problem"]

SCHEMA_VERSION: Final = STEPS[-1].version

LOCK_MILLISECONDS: Final = 500
"""For which a change waits for its lock before it lets others through. Below PostgreSQL's ``deadlock_timeout``: if two
wait for each other, it is the change that gives way."""

_LOCK: Final = 0x61667463  # "aftc": any number will do, as long as nobody else takes the same
_TRIES: Final = 60
_PAUSE: Final = text("SELECT pg_sleep(0.25)")  # on the server: here it would stop an event loop
_LIMIT: Final = text("SELECT set_config('lock_timeout', :value, true)")
_LOCKED: Final = "55P03"


def create_tables(connection: Connection, also: MetaData | None = None, *, indexes: bool = True) -> None:
    """Make what is missing of our tables, and bring older ones forward, in the transaction of *connection*.

    Harmless where they stand. Several processes may do so at once: the second waits for the first. On PostgreSQL a
    change waits for its lock for half a second at a time, so that whoever works with the table is never kept for long.

    Args:
        connection: In a transaction, or about to begin one.
        also: The application's own tables, to be made under the same lock.
        indexes: Whether to change indexes, too; without, the tables stay of the version they are.

    Raises:
        SchemaError: If somebody has a table locked for so long that it could not be changed.
    """
    from aftercommit.records.tables import Base, SchemaRecord  # mapping them takes time that an import must not

    if connection.dialect.name == "postgresql":
        # Of the transaction, not of the session: a transaction pooler lets no other kind through.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    Base.metadata.create_all(connection)
    if also is not None:
        also.create_all(connection)
    version = connection.scalar(select(SchemaRecord.version))
    if version is not None and version >= SCHEMA_VERSION:
        return
    # Last: from here to the end of the transaction nobody else can use them.
    _change(connection, [each for each in pending(connection) if indexes or not each.is_index])
    if pending(connection):
        return
    if version is None:
        connection.execute(insert(SchemaRecord).values(id=1, version=SCHEMA_VERSION))
    else:
        connection.execute(update(SchemaRecord).values(version=SCHEMA_VERSION))


def _change(connection: Connection, changes: Sequence[Change]) -> None:
    statements = [sql for each in changes for sql in each.statements(connection.dialect, concurrently=False)]
    if connection.dialect.name == "postgresql" and statements:
        _change_under_locks(connection, sorted({each.table for each in changes}), statements)
        return
    for sql in statements:
        connection.exec_driver_sql(sql)


def _change_under_locks(connection: Connection, tables: Sequence[str], statements: Sequence[str]) -> None:
    before = connection.scalar(text("SELECT current_setting('lock_timeout')"))
    for left in reversed(range(_TRIES)):
        try:
            with connection.begin_nested():
                connection.execute(_LIMIT, {"value": f"{LOCK_MILLISECONDS}ms"})
                # All at once: one that is held while another is waited for would keep everybody.
                connection.exec_driver_sql(f"LOCK TABLE {', '.join(tables)} IN ACCESS EXCLUSIVE MODE")
                for sql in statements:
                    connection.exec_driver_sql(sql)
                connection.execute(_LIMIT, {"value": before})
        except DBAPIError as exc:
            if getattr(exc.orig, "sqlstate", None) != _LOCKED:
                raise
            if not left:
                raise _too_long(tables) from exc
            connection.execute(_PAUSE)
        else:
            return


def _too_long(tables: Sequence[str]) -> SchemaError:
    return SchemaError(
        f"{', '.join(tables)} could not be changed: somebody has kept a lock for "
        f"{_TRIES * LOCK_MILLISECONDS / 1000:.0f} s. As long as a transaction that has read a table is open, its "
        "columns stay as they are. End that transaction (SELECT pid, state, xact_start, query FROM pg_stat_activity "
        "ORDER BY xact_start), and do this again."
    )


def schema_problem(connection: Connection) -> str | None:
    """Say what is wrong with our tables, or None."""
    from aftercommit.records.tables import SchemaRecord

    missing = _missing(connection)
    has_version = SchemaRecord.__tablename__ not in missing
    version = connection.scalar(select(SchemaRecord.version)) if has_version else None
    if has_version and version is not None and version < SCHEMA_VERSION:
        # An older version lacks tables, too: its number says more.
        return f"the tables are of version {version}, and this release needs version {SCHEMA_VERSION}"
    if missing:
        return (
            f"the tables {', '.join(missing)} are missing" if len(missing) > 1 else f"the table {missing[0]} is missing"
        )
    if version is None:
        return f"the tables are of version {version}, and this release needs version {SCHEMA_VERSION}"
    return None


def details(connection: Connection) -> str | None:
    """Say what is wrong with our tables, down to each column and index, or None."""
    from aftercommit.records.tables import SchemaRecord

    problem, missing = schema_problem(connection), _missing(connection)
    if SchemaRecord.__tablename__ in missing:
        return problem
    if (connection.scalar(select(SchemaRecord.version)) or 0) > SCHEMA_VERSION:
        return problem
    lacking = ", ".join([*map(str, pending(connection)), *(f"the table {name}" for name in missing)])
    if problem is None or "version" not in problem:
        return f"the tables say that they are of version {SCHEMA_VERSION}, and lack {lacking}" if lacking else problem
    return f"{problem}: it lacks {lacking}" if lacking else problem


def _missing(connection: Connection) -> list[str]:
    from aftercommit.records.tables import Base  # mapping them takes time that an import must not

    inspector = inspect(connection)
    return sorted(name for name in Base.metadata.tables if not inspector.has_table(name))
