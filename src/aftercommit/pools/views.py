"""Another view of an engine: the same pool, other options for each of its connections.

SQLAlchemy's own views keep their events apart, and every connection then looks through one more layer of listeners at
each of its steps. It also sets the isolation level at every checkout and sets it back at every checkin, which in
psycopg are four calls under its lock. Views made here share their engine's events, and a connection keeps the level
that it was given last: in a pool of tasks the next one wants the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

__all__ = ["LEVEL", "async_view_of", "set_up", "view_of"]

LEVEL: Final = "aftercommit_isolation_level"
"""The execution option that says at which isolation level the connections of a view begin; it costs no round trip."""


def set_up(engine: Engine) -> None:
    """Have the connections of *engine*, and of its views, begin at their level (an async engine: its sync one)."""
    event.listen(engine, "engine_connect", _set_level)


def view_of(engine: Engine, **options: Any) -> Engine:
    """Return a view of *engine*, which was set up, with execution *options*."""
    view = engine.execution_options(**options)
    # As its own attribute: the class has a descriptor of that name.
    vars(view)["dispatch"] = engine.dispatch
    return view


def async_view_of(engine: AsyncEngine, **options: Any) -> AsyncEngine:
    """Return a view of *engine*, which was set up, with execution *options*."""
    return AsyncEngine(view_of(engine.sync_engine, **options))


def _set_level(connection: Connection) -> None:
    wanted = connection.get_execution_options().get(LEVEL)
    pooled = connection.connection
    kept = pooled.info.get(LEVEL)
    driver: Any = pooled.dbapi_connection
    if wanted is not None:
        # Our note alone does not say it: SQLAlchemy sets back what somebody set on the connection himself.
        if kept != wanted or _level_of(driver) != wanted:
            connection.dialect.set_isolation_level(driver, wanted)
            pooled.info[LEVEL] = wanted
    elif kept is not None:
        connection.dialect.reset_isolation_level(driver)
        del pooled.info[LEVEL]


def _level_of(driver: Any) -> str | None:
    """What the driver will say at its next BEGIN, if that can be seen."""
    level = getattr(driver, "isolation_level", None)
    # asyncpg's is "repeatable_read", psycopg's an enum's REPEATABLE_READ.
    name = level if isinstance(level, str) else getattr(level, "name", None)
    return None if name is None else name.replace("_", " ").upper()
