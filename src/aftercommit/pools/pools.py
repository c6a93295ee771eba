"""A pool for each kind of work: an engine, and its async twin, opened on first use."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy
import sqlalchemy.ext.asyncio
from sqlalchemy import URL, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine

from aftercommit.errors import ConfigurationError
from aftercommit.pools import network, pipelines, raw, sqlite, views
from aftercommit.pools.backends import Backends
from aftercommit.pools.options import check_options, engine_options, engine_url
from aftercommit.pools.settings import PoolSettings
from aftercommit.pools.urls import Flavour, Flavours, flavours, is_sqlite, render
from aftercommit.watch import loops, private_names
from aftercommit.watch.notes import notes_of, renew_notes
from aftercommit.watch.register import Register

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import Engine
    from sqlalchemy import Pool as SQLAlchemyPool

__all__ = ["BOOKKEEPING", "REQUEST", "Pool", "Pools"]

REQUEST: Final = "request"
BOOKKEEPING: Final = "aftercommit"
"""The library's own small pool: heartbeats, claims and rescues never wait for anybody's work."""

WARN_AFTER: Final = 10.0
"""Seconds for which a connection may be held before that is reported, where ``PoolSettings`` say nothing else."""

_IDLE_ENOUGH_TO_PING: Final = 1.0
_IDLE_SINCE: Final = "idle since"


class Pool:
    """The connections of one kind of work: one engine per flavour, opened on first use, shared by all threads."""

    def __init__(self, name: str, settings: PoolSettings, owner: Pools) -> None:
        self.name = name
        self.settings = settings
        self.register = Register(name, WARN_AFTER if settings.warn_after is None else settings.warn_after)
        self._owner = owner
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._async_engine: AsyncEngine | None = None

    def __repr__(self) -> str:
        """Name and settings."""
        return f"Pool({self.name!r}, {self.settings!r})"

    @property
    def engine(self) -> Engine:
        """The engine, opened now if it was not.

        Raises:
            ConfigurationError: If the URL's driver serves async sessions only.
        """
        if self._engine is None:
            with self._lock:
                if self._engine is None:
                    url = engine_url(self._owner.flavours.url("sync"))
                    # Looked up now: what instruments SQLAlchemy replaces the function, perhaps after our import.
                    engine = sqlalchemy.create_engine(url, **self._options("sync"))
                    self._owner.set_up(engine, self.settings)
                    self.register.attach(engine)
                    self._engine = engine
        return self._engine

    @property
    def async_engine(self) -> AsyncEngine:
        """The async engine, opened now if it was not.

        Raises:
            ConfigurationError: If the URL's driver serves sync sessions only.
        """
        if self._async_engine is None:
            with self._lock:
                if self._async_engine is None:
                    url = engine_url(self._owner.flavours.url("async"))
                    engine = sqlalchemy.ext.asyncio.create_async_engine(url, **self._options("async"))
                    self._owner.set_up(engine.sync_engine, self.settings)
                    loops.note_loops(engine.sync_engine)
                    self.register.attach(engine.sync_engine)
                    self._async_engine = engine
        return self._async_engine

    @property
    def opened(self) -> Iterator[Engine]:
        """The engines that were opened, the async one by its sync side."""
        if self._engine is not None:
            yield self._engine
        if self._async_engine is not None:
            yield self._async_engine.sync_engine

    def dispose(self) -> None:
        """Close the idle connections of the sync flavour; those in use close when they come back."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            old = engine.pool
            engine.dispose()
            _close_what_returns(old, engine.pool)

    async def async_dispose(self) -> None:
        """Close the idle connections of both flavours."""
        with self._lock:
            engine, self._async_engine = self._async_engine, None
        if engine is not None:
            old = engine.pool
            await engine.dispose()
            _close_what_returns(old, engine.pool)
        self.dispose()

    def _options(self, flavour: Flavour) -> dict[str, Any]:
        given = self._owner.options(flavour)
        return engine_options(self.name, self.settings, flavour, self._owner.flavours.url(flavour), given)


class Pools:
    """All pools of one database, and the URL they share.

    Args:
        url: A URL, or a callable that returns one and is called once, when the first engine opens.
        settings: Per name of a pool.
        engine_options: For ``create_engine``.
        async_engine_options: For ``create_async_engine``.
        set_up: Called with each engine as it is made.
    """

    def __init__(
        self,
        url: str | URL | Callable[[], str | URL],
        settings: Mapping[str, PoolSettings],
        *,
        engine_options: Mapping[str, Any],
        async_engine_options: Mapping[str, Any],
        set_up: Callable[[Engine], None],
    ) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._flavours: Flavours | None = None
        self._options: dict[Flavour, Mapping[str, Any]] = {"sync": engine_options, "async": async_engine_options}
        self._set_up = set_up
        self.backends = Backends()
        if callable(url):
            self._check(None)
        else:
            self._flavours = flavours(url)
            self._check(self._flavours)
        self._pools = {name: Pool(name, each, self) for name, each in settings.items()}

    def __getitem__(self, name: str) -> Pool:
        """The pool called *name*.

        Raises:
            ConfigurationError: If there is none, naming those there are.
        """
        try:
            return self._pools[name]
        except KeyError:
            raise ConfigurationError(
                f"There is no pool {name!r}; this database has {', '.join(sorted(self.names))}. "
                f"Write Database(…, pools={{{name!r}: PoolSettings()}})."
            ) from None

    def report_late(self) -> None:
        """Report the connections that are held for too long, once each."""
        for pool in self._pools.values():
            pool.register.report_late()

    @property
    def names(self) -> list[str]:
        """The pools a user named, "request" and "default" among them."""
        return [name for name in self._pools if name != BOOKKEEPING]

    @property
    def flavours(self) -> Flavours:
        """What the URL serves; a callable URL is called now, once."""
        if self._flavours is None:
            with self._lock:
                if self._flavours is None:
                    found = flavours(self._url() if callable(self._url) else self._url)
                    self._check(found)
                    self._flavours = found
        return self._flavours

    def _check(self, found: Flavours | None) -> None:
        check_options("sync", self._options["sync"], None if found is None else found.sync)
        check_options("async", self._options["async"], None if found is None else found.asynchronous)

    @property
    def shown(self) -> str:
        """The URL without its password; a callable one is not called for that."""
        return "<callable>" if self._flavours is None else render(self._flavours.given)

    @property
    def namespace(self) -> str | None:
        """What to call the database among others: its name, or its file's; None while a callable was not called."""
        if self._flavours is None:
            return None
        return (self._flavours.given.database or "").rpartition("/")[2] or "memory"

    @property
    def is_sqlite(self) -> bool:
        """Whether this is a SQLite database."""
        return is_sqlite(self.flavours.given)

    @property
    def is_async_only(self) -> bool:
        """Whether the URL's driver has no sync flavour."""
        return self.flavours.sync is None

    def options(self, flavour: Flavour) -> Mapping[str, Any]:
        """The user's engine options for one flavour."""
        return self._options[flavour]

    def set_up(self, engine: Engine, settings: PoolSettings) -> None:
        """Attach to a new engine what every engine of this database has."""
        private_names.check()
        private_names.check(engine.dialect.driver)
        event.listen(engine, "connect", renew_notes, insert=True)
        if self.is_sqlite:
            sqlite.set_up(engine)
        else:
            network.set_up(engine)
            pipelines.set_up(engine)
            raw.set_up(engine)
            self.backends.attach(engine)
        if settings.pool_pre_ping and not self.is_sqlite:
            event.listen(engine, "checkin", _remember_idle)
            event.listen(engine, "checkout", partial(_ping_when_idle, engine))
        views.set_up(engine)
        self._set_up(engine)

    def dispose(self) -> None:
        """Close the idle connections of every pool's sync flavour."""
        for pool in self._pools.values():
            pool.dispose()

    async def async_dispose(self) -> None:
        """Close the idle connections of every pool."""
        for pool in self._pools.values():
            await pool.async_dispose()


def _close_what_returns(*pools: SQLAlchemyPool) -> None:
    # SQLAlchemy would put it back into a pool from which nobody takes anything any more: what is in use now into the
    # one that was disposed, what a session that was opened before connects later into the one made in its place.
    for each in pools:
        event.listen(each, "checkin", lambda _connection, record: record.close())


def _remember_idle(_connection: Any, entry: Any) -> None:
    notes_of(entry)[_IDLE_SINCE] = time.monotonic()


def _ping_when_idle(engine: Engine, connection: Any, entry: Any, _pooled: Any) -> None:
    """Try a connection that sat idle, or has heard from the server meanwhile.

    A ping at every checkout would cost a round trip each, on asyncpg two.
    """
    since = notes_of(entry).get(_IDLE_SINCE)
    if since is None or (time.monotonic() - since < _IDLE_ENOUGH_TO_PING and not network.has_unread(connection)):
        return
    dialect = engine.dialect
    try:
        alive = dialect.do_ping(connection)
    except (dialect.loaded_dbapi.Error, OSError):
        alive = False
    if not alive:
        # Its neighbours sat idle through the same restart: all that are as old are dropped.
        raise InvalidatePoolError
