"""What we know by heart: SQLAlchemy, SQLModel, database drivers, FastAPI, and a little of the standard library."""

from __future__ import annotations

from aftercommit_check.facts.values import SCALAR, UNKNOWN, Kind, Origin, Value

SESSION_NAMES = frozenset({"Session", "AsyncSession", "SQLModelSession"})
REGISTRY_NAMES = frozenset({"scoped_session", "async_scoped_session"})
FACTORY_NAMES = frozenset({"sessionmaker", "async_sessionmaker"})
ENGINE_NAMES = frozenset({"Engine", "AsyncEngine"})
ENGINE_CALLS = frozenset({"create_engine", "create_async_engine", "engine_from_config", "async_engine_from_config"})
CONNECTION_NAMES = frozenset(
    {"Connection", "AsyncConnection", "connection", "Cursor", "AsyncCursor", "cursor", "PoolConnectionProxy"}
)
DRIVERS = frozenset(
    {"psycopg", "psycopg2", "asyncpg", "sqlite3", "aiosqlite", "pymysql", "MySQLdb", "aiomysql", "asyncmy", "pyodbc",
     "oracledb", "cx_Oracle", "mysql", "aiopg", "psycopg_pool"}
)  # fmt: skip
POOL_NAMES = frozenset(
    {"ConnectionPool", "AsyncConnectionPool", "Pool", "SimpleConnectionPool", "ThreadedConnectionPool"}
)
POOL_CALLS = frozenset({"create_pool"})
BACKGROUND_TASKS = frozenset(
    {"fastapi.BackgroundTasks", "fastapi.background.BackgroundTasks", "starlette.background.BackgroundTasks"}
)
BACKGROUND_TASK = frozenset({"starlette.background.BackgroundTask", "fastapi.background.BackgroundTask"})

SESSION_LIKE_NAMES = frozenset(
    {"db", "session", "db_session", "async_session", "database_session", "sess", "dbsession", "async_db", "db_sess",
     "sql_session", "orm_session", "sa_session", "pg_session"}
)  # fmt: skip
"""Names that mean a session in most FastAPI code, for parameters that nothing else is known of."""

SESSION_METHODS = frozenset(
    {"query", "commit", "flush", "refresh", "rollback", "scalars", "scalar", "execute", "add", "add_all", "merge",
     "exec", "delete", "expunge", "begin_nested", "bulk_save_objects"}
)  # fmt: skip
TELLING_METHODS = frozenset({"query", "flush", "refresh", "scalars", "add_all", "expunge", "begin_nested", "exec"})
"""Methods that sessions have, and connections and the usual other things called ``db`` do not."""

HARMLESS_METHODS = frozenset(
    {"close", "aclose", "get_bind", "bind", "is_active", "in_transaction", "close_all", "remove", "expunge",
     "expunge_all", "info", "invalidate"}
)  # fmt: skip
"""What may be done with a session elsewhere without working on it."""


def root_of(name: str) -> str:
    """Return the top-level package of a dotted name."""
    return name.partition(".")[0]


def external_instance(name: str) -> Value:
    """Return an instance of the external class called *name*."""
    root, last = root_of(name), name.rpartition(".")[2]
    if root in ("sqlalchemy", "sqlmodel"):
        if last in SESSION_NAMES or last in REGISTRY_NAMES:
            return Value(
                Kind.SESSION,
                name=name,
                is_async=("sync" in name and last != "Session") or last.startswith(("Async", "async")),
            )
        if last in FACTORY_NAMES:
            return Value(Kind.FACTORY, name=name, is_async=last.startswith("async"))
        if last in ("Connection", "AsyncConnection"):
            return Value(Kind.CONNECTION, name=name)
        if last in ENGINE_NAMES:
            return Value(Kind.OBJECT, name=f"sqlalchemy.{last}")
    if root in DRIVERS:
        if last in CONNECTION_NAMES or last.endswith(("Connection", "Cursor")):
            return Value(Kind.CONNECTION, name=name)
        if last in POOL_NAMES:
            return Value(Kind.OBJECT, name="pool")
    if root == "builtins" or last in ("UUID", "Decimal", "datetime", "date", "Path"):
        return SCALAR if last not in ("object", "type") else UNKNOWN
    if name in ("typing.Any", "typing_extensions.Any", ""):
        return UNKNOWN
    return Value(Kind.OBJECT, name=name)


def external_call(name: str) -> Value | None:
    """Return what calling the external name gives, where that does not depend on the arguments."""
    root, last = root_of(name), name.rpartition(".")[2]
    if root in ("sqlalchemy", "sqlmodel"):
        if last in FACTORY_NAMES or last in REGISTRY_NAMES:
            return Value(Kind.FACTORY, name=name, is_async=last.startswith("async"))
        if last in SESSION_NAMES:
            return Value(
                Kind.SESSION, name=name, origin=Origin.OPENED, is_async=last.startswith("Async") or "asyncio" in name
            )
        if last in ENGINE_CALLS:
            return Value(Kind.OBJECT, name="sqlalchemy.AsyncEngine" if "async" in last else "sqlalchemy.Engine")
        if last in ("declarative_base", "automap_base"):
            return Value(Kind.EXTERNAL, name="sqlalchemy.orm.DeclarativeBase")
        if last in ("Column", "mapped_column", "column_property", "synonym", "Field", "func"):
            return SCALAR
    if root == "sqlmodel" and last == "Field":
        return SCALAR
    if root in DRIVERS:
        if last in ("connect", "Connection"):
            return Value(Kind.CONNECTION, name=name, origin=Origin.OPENED)
        if last in POOL_NAMES or last in POOL_CALLS:
            return Value(Kind.OBJECT, name="pool")
    if name == "fastapi.encoders.jsonable_encoder":
        return SCALAR
    return None


def describe(value: Value) -> str:
    """Return what a session or connection is called in a message."""
    if value.kind is Kind.CONNECTION:
        return "database cursor" if "ursor" in value.name else "database connection"
    return "AsyncSession" if value.is_async else "Session"
