"""Another view of an engine: the same pool, other options for each of its connections.

SQLAlchemy's own views keep their events apart, and every connection then looks through one more layer of listeners at
each of its steps. It also sets the isolation level at every checkout and sets it back at every checkin, which in
psycopg are four calls under its lock. Views made here share their engine's events, and a connection keeps the level
that it was given last: in a pool of tasks the next one wants the same. Whoever takes one past the views is given it as
SQLAlchemy would.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, PoolProxiedConnection

__all__ = ["LEVEL", "async_view_of", "set_up", "view_of"]

LEVEL: Final = "aftercommit_isolation_level"
"""The execution option that says at which isolation level the connections of a view begin; it costs no round trip."""


# A context variable: a pool may wait, and others come by meanwhile.
_by_view: Final[ContextVar[bool]] = ContextVar("aftercommit_by_view", default=False)


def set_up(engine: Engine) -> None:
    """Have the connections of *engine*, and of its views, begin at their level (an async engine: its sync one)."""
    # At the checkout, which comes before whatever level the application's own options set, and with
    # `raw_connection()` is all there is.
    event.listen(engine, "checkout", partial(_forget_level, engine))
    event.listen(engine, "engine_connect", _set_level)


def view_of(engine: Engine, **options: Any) -> Engine:
    """Return a view of *engine*, which was set up, with execution *options*."""
    view = engine.execution_options(**options)
    # As its own attributes: the class has a descriptor of that name.
    vars(view)["dispatch"] = engine.dispatch
    if LEVEL in options:
        vars(view)["raw_connection"] = partial(_take_by_view, engine)
    return view


def async_view_of(engine: AsyncEngine, **options: Any) -> AsyncEngine:
    """Return a view of *engine*, which was set up, with execution *options*."""
    return AsyncEngine(view_of(engine.sync_engine, **options))


def _take_by_view(engine: Engine) -> PoolProxiedConnection:
    token = _by_view.set(True)
    try:
        return engine.raw_connection()
    finally:
        _by_view.reset(token)


def _forget_level(engine: Engine, connection: Any, record: Any, _proxy: Any) -> None:
    """Set back what a view has left on a connection that somebody takes past the views."""
    if LEVEL in record.info and not _by_view.get():
        engine.dialect.reset_isolation_level(connection)
        del record.info[LEVEL]


def _set_level(connection: Connection) -> None:
    wanted = connection.get_execution_options().get(LEVEL)
    if wanted is None:
        return
    pooled = connection.connection
    driver: Any = pooled.dbapi_connection
    # Our note alone does not say it: SQLAlchemy sets back what somebody set on the connection himself.
    if pooled.info.get(LEVEL) != wanted or _level_of(driver) != wanted:
        connection.dialect.set_isolation_level(driver, wanted)
        pooled.info[LEVEL] = wanted


def _level_of(driver: Any) -> str | None:
    """What the driver will say at its next BEGIN, if that can be seen."""
    level = getattr(driver, "isolation_level", None)
    # asyncpg's is "repeatable_read", psycopg's an enum's REPEATABLE_READ.
    name = level if isinstance(level, str) else getattr(level, "name", None)
    return None if name is None else name.replace("_", " ").upper()
