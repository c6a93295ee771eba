"""Makes the sessions of one database: which class, which engine, at which isolation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from aftercommit.errors import ConfigurationError
from aftercommit.pools.sqlite import IMMEDIATE
from aftercommit.pools.views import LEVEL, async_view_of, view_of
from aftercommit.sessions.scopes import AsyncScope, Scope

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aftercommit.pools import Pools
    from aftercommit.watch.owners import Owner

__all__ = ["SessionFactory"]

DEFAULT_LEVEL: Final = "REPEATABLE READ"
"""Of task runs on PostgreSQL: a run can be repeated as a whole, so a conflict costs a repeat and no update."""


class SessionFactory:
    """Makes sessions.

    Args:
        pools: Where their connections come from.
        session_class: For ``Session``.
        async_session_class: For ``AsyncSession``.
        options: For both classes.
        connection: A test's connection, which every session then joins, instead of the pools.
    """

    def __init__(
        self,
        pools: Pools,
        *,
        session_class: type[Session],
        async_session_class: type[AsyncSession],
        options: Mapping[str, Any],
        connection: Connection | AsyncConnection | None = None,
    ) -> None:
        for option in ("bind", "binds", "twophase", "autobegin"):
            if option in options:
                raise ConfigurationError(
                    f"session_options[{option!r}]: sessions are bound to their pool, and begin by themselves. Leave "
                    "it out."
                )
        _check_class("session_class", session_class, Session, options)
        _check_class("async_session_class", async_session_class, AsyncSession, options)
        self.pools = pools
        self.connection = connection
        self.session_class = session_class
        self.async_session_class = async_session_class
        self._options = dict(options)
        # Whatever the user prefers elsewhere: after a commit in the middle of a task, `row.n += 1` on a value that
        # was not expired loses an update that no isolation level can see.
        self._task_options = {**self._options, "expire_on_commit": True}
        # Whoever says himself what becomes of rows at a commit, means it.
        self._keeps_rows = "expire_on_commit" not in options
        self._engines: dict[tuple[str, str | None], tuple[Engine, Engine]] = {}
        self._async_engines: dict[tuple[str, str | None], tuple[AsyncEngine, AsyncEngine]] = {}

    @property
    def is_async_only(self) -> bool:
        """Whether there are no sync sessions to be had."""
        return isinstance(self.connection, AsyncConnection) or (self.connection is None and self.pools.is_async_only)

    def joined_to(self, connection: Connection | AsyncConnection) -> SessionFactory:
        """Return a factory of the same sessions, which all join *connection*."""
        return SessionFactory(
            self.pools,
            session_class=self.session_class,
            async_session_class=self.async_session_class,
            options=self._options,
            connection=connection,
        )

    def on(self, pools: Pools) -> SessionFactory:
        """Return a factory of the same sessions on other *pools*."""
        return SessionFactory(
            pools,
            session_class=self.session_class,
            async_session_class=self.async_session_class,
            options=self._options,
        )

    def scope(self, pool: str, owner: Owner) -> Scope:
        """A session that is not a task's."""
        bind = self._joined() or self.pools[pool].engine
        return Scope(
            lambda: self.session_class(bind=bind, **self._joining(), **self._options),
            owner,
            pool=pool,
            keeps_rows=self._keeps_rows,
        )

    def async_scope(self, pool: str, owner: Owner) -> AsyncScope:
        """An async session that is not a task's."""
        bind = self._async_joined() or self.pools[pool].async_engine
        return AsyncScope(
            lambda: self.async_session_class(bind=bind, **self._joining(), **self._options),
            owner,
            pool=pool,
            keeps_rows=self._keeps_rows,
        )

    def task_scope(self, pool: str, owner: Owner, isolation_level: str | None) -> Scope:
        """A task's session."""
        bind = self._joined() or self._engine(pool, isolation_level)
        return Scope(lambda: self.session_class(bind=bind, **self._joining(), **self._task_options), owner, pool=pool)

    def async_task_scope(self, pool: str, owner: Owner, isolation_level: str | None) -> AsyncScope:
        """A task's async session."""
        bind = self._async_joined() or self._async_engine(pool, isolation_level)
        return AsyncScope(
            lambda: self.async_session_class(bind=bind, **self._joining(), **self._task_options), owner, pool=pool
        )

    def _engine(self, pool: str, level: str | None) -> Engine:
        engine = self.pools[pool].engine
        known, view = self._engines.get((pool, level), (None, None))
        if view is None or known is not engine:
            # Another view of the same pool: the level costs no round trip.
            view = view_of(engine, **self._run_options(pool, level))
            self._engines[pool, level] = engine, view
        return view

    def _async_engine(self, pool: str, level: str | None) -> AsyncEngine:
        engine = self.pools[pool].async_engine
        known, view = self._async_engines.get((pool, level), (None, None))
        if view is None or known is not engine:
            view = async_view_of(engine, **self._run_options(pool, level))
            self._async_engines[pool, level] = engine, view
        return view

    def _run_options(self, pool: str, level: str | None) -> dict[str, Any]:
        if self.pools.is_sqlite:
            return {IMMEDIATE: True}
        chosen = level or self.pools[pool].settings.isolation_level or DEFAULT_LEVEL
        return {LEVEL: chosen.upper()}

    def _joined(self) -> Connection | None:
        if isinstance(self.connection, AsyncConnection):
            raise ConfigurationError(
                "A Session was asked for while the database is replaced by an AsyncConnection, which has no sync side. "
                "Use db.async_session(), or replace it with a Connection in tests of sync code."
            )
        return self.connection

    def _async_joined(self) -> AsyncConnection | None:
        if isinstance(self.connection, Connection):
            raise ConfigurationError(
                "An AsyncSession was asked for while the database is replaced by a Connection. "
                "Replace it with an AsyncConnection in tests of async code."
            )
        return self.connection

    def _joining(self) -> dict[str, Any]:
        return {} if self.connection is None else {"join_transaction_mode": "create_savepoint"}


def _check_class(name: str, given: Any, wanted: type, options: Mapping[str, Any]) -> None:
    if not (isinstance(given, type) and issubclass(given, wanted)):
        raise ConfigurationError(f"{name}={given!r} is no subclass of {wanted.__name__}. Pass a class, not a maker.")
    try:
        # Not bound, not connected: only to hear now of an option with which no session could be made.
        given(**options)
    except TypeError as exc:
        raise ConfigurationError(f"session_options: no {given.__name__} can be made with them: {exc}.") from exc
