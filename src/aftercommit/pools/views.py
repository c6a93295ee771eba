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

from aftercommit.watch.notes import NOTES, link_notes, notes_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Engine, PoolProxiedConnection

__all__ = ["LEVEL", "async_view_of", "set_up", "taken_with", "view_of"]

LEVEL: Final = "aftercommit_isolation_level"
"""The execution option that says at which isolation level the connections of a view begin; it costs no round trip."""

_OPTIONS: Final = "aftercommit_view"
_USERS_LEVEL: Final = "isolation_level"

# A context variable: a pool may wait, and others come by meanwhile.
_by_view: Final[ContextVar[Mapping[str, Any] | None]] = ContextVar("aftercommit_by_view", default=None)


def set_up(engine: Engine) -> None:
    """Have the connections of *engine*, and of its views, know whose they are (an async engine: its sync one)."""
    # At the checkout, which comes before whatever level a connection is given by hand, and with `raw_connection()` is
    # all there is.
    event.listen(engine, "checkout", partial(_taken, engine))
    if _USERS_LEVEL in engine.get_execution_options():
        # SQLAlchemy sets that of the application's options behind the checkout, and a view's is meant to win.
        event.listen(engine, "engine_connect", _set_again)


def view_of(engine: Engine, **options: Any) -> Engine:
    """Return a view of *engine*, which was set up, with execution *options*."""
    view = engine.execution_options(**options)
    # As its own attributes: the class has descriptors of these names.
    vars(view).update(
        dispatch=engine.dispatch,
        _connection_cls=engine._connection_cls,  # noqa: SLF001  # see private_names
        raw_connection=partial(_take_by_view, engine, options),
    )
    return view


def async_view_of(engine: AsyncEngine, **options: Any) -> AsyncEngine:
    """Return a view of *engine*, which was set up, with execution *options*."""
    return AsyncEngine(view_of(engine.sync_engine, **options))


def taken_with(pooled: PoolProxiedConnection, option: str) -> Any:
    """What the view by which a connection was taken says of *option*; None if it was taken past the views."""
    options: Mapping[str, Any] | None = notes_of(pooled).get(_OPTIONS)
    return None if options is None else options.get(option)


def _take_by_view(engine: Engine, options: Mapping[str, Any]) -> PoolProxiedConnection:
    token = _by_view.set(options)
    try:
        return engine.raw_connection()
    finally:
        _by_view.reset(token)


def _taken(engine: Engine, connection: Any, entry: Any, pooled: PoolProxiedConnection) -> None:
    options = _by_view.get()
    notes = vars(pooled).get(NOTES) or link_notes(entry, pooled)
    notes[_OPTIONS] = options
    wanted = None if options is None else options.get(LEVEL)
    if wanted is not None:
        _set_level(engine, connection, notes, wanted)
    elif LEVEL in notes:
        # A view has left it, and this one is taken past the views.
        engine.dialect.reset_isolation_level(connection)
        del notes[LEVEL]


def _set_again(connection: Connection) -> None:
    wanted = connection.get_execution_options().get(LEVEL)
    if wanted is not None:
        pooled = connection.connection
        _set_level(connection.engine, pooled.dbapi_connection, notes_of(pooled), wanted)


def _set_level(engine: Engine, driver: Any, notes: dict[str, Any], wanted: str) -> None:
    # Our note alone does not say it: SQLAlchemy sets back what somebody set on the connection himself.
    if notes.get(LEVEL) != wanted or _level_of(driver) != wanted:
        dialect: Any = engine.dialect
        dialect.set_isolation_level(driver, wanted)
        notes[LEVEL] = wanted


def _level_of(driver: Any) -> str | None:
    """What the driver will say at its next BEGIN, if that can be seen."""
    level = getattr(driver, "isolation_level", None)
    # asyncpg's is "repeatable_read", psycopg's an enum's REPEATABLE_READ.
    name = level if isinstance(level, str) else getattr(level, "name", None)
    return None if name is None else name.replace("_", " ").upper()
