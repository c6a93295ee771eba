"""What ``create_engine`` is given: the user's options over ours, looked at before anything is opened."""

from __future__ import annotations

import importlib.util
import inspect
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import URL, NullPool, QueuePool, create_engine
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine

from aftercommit.errors import ConfigurationError
from aftercommit.pools import network, sqlite
from aftercommit.pools.gate import gated
from aftercommit.pools.urls import PACKAGES, Flavour, is_sqlite, render
from aftercommit.watch.register import AsyncWatchedPool, WatchedPool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aftercommit.pools.settings import PoolSettings

__all__ = ["check_options", "connect_args", "engine_options", "engine_url"]

_OURS: Final = ("pool_size", "max_overflow", "pool_timeout", "pool_recycle", "pool_pre_ping", "isolation_level")
_APPLICATION_NAME: Final = "application_name"


def engine_url(url: URL) -> URL:
    """Return *url* as the driver understands it: asyncpg knows no ``application_name`` there."""
    return url.difference_update_query([_APPLICATION_NAME]) if _is_asyncpg(url) else url


def engine_options(
    name: str, settings: PoolSettings, flavour: Flavour, url: URL, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what ``create_engine`` is given for the pool *name*: the user's options over ours."""
    options: dict[str, Any] = {"hide_parameters": True, **given}
    if not _is_null_pool(given):
        options |= {
            "pool_size": settings.pool_size,
            "max_overflow": settings.max_overflow,
            "pool_timeout": settings.pool_timeout,
            "pool_recycle": settings.pool_recycle,
        }
        options.setdefault("poolclass", AsyncWatchedPool if flavour == "async" else WatchedPool)
    options["connect_args"] = connect_args(f"aftercommit:{name}", url, given.get("connect_args") or {})
    return options


def connect_args(label: str, url: URL, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the driver is given at each connection: the user's arguments over ours."""
    if is_sqlite(url):
        return {"timeout": sqlite.BUSY_TIMEOUT, **given, "factory": gated(given.get("factory"))}
    named = url.query.get(_APPLICATION_NAME)
    ours = network.patience(url, given)
    if _is_asyncpg(url):
        server_settings = {_APPLICATION_NAME: named or label, **given.get("server_settings", {})}
        return {**ours, **given, "server_settings": server_settings}
    return {**ours, **given} if named else {**ours, _APPLICATION_NAME: label, **given}


def check_options(flavour: Flavour, options: Mapping[str, Any], url: URL | None) -> None:
    """Refuse engine options that cannot be, before anything is opened.

    Args:
        flavour: Which of the two options these are.
        options: For ``create_engine`` or ``create_async_engine``.
        url: The URL of this flavour; None where it is not known yet, or there is none.

    Raises:
        ConfigurationError: For options that belong into ``PoolSettings``, those that ``create_engine`` does not know,
            connect arguments that the driver does not know, and all that would take transactions away.
    """
    name = "engine_options" if flavour == "sync" else "async_engine_options"
    for option in _OURS:
        if option in options:
            raise ConfigurationError(
                f"{name}[{option!r}]: every pool has its own. Write PoolSettings({option}=…) in pool= or pools=."
            )
    _check_pool_class(name, options)
    _check_transactions(name, options, is_sqlite=url is not None and is_sqlite(url))
    # A driver that is not installed is named when its flavour is asked for; many applications use one only.
    if options and url is not None and importlib.util.find_spec(PACKAGES[url.get_driver_name()]) is not None:
        _check_arguments(flavour, name, options.get("connect_args") or {}, url)
        _check_by_trying(flavour, name, options, url)


def _check_pool_class(name: str, options: Mapping[str, Any]) -> None:
    if "pool" in options:
        raise ConfigurationError(f"{name}['pool']: every pool of a Database is made for it. Leave it out.")
    kind = options.get("poolclass")
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, (QueuePool, NullPool))):
        raise ConfigurationError(
            f"{name}['poolclass']={kind!r}: a pool here has a size and is shared by threads. "
            "Leave it out, or use NullPool to keep no connection open."
        )


def _check_transactions(name: str, options: Mapping[str, Any], *, is_sqlite: bool) -> None:
    arguments = options.get("connect_args") or {}
    level = (options.get("execution_options") or {}).get("isolation_level")
    if level == "AUTOCOMMIT" or arguments.get("autocommit"):
        raise ConfigurationError(
            f"{name}: in autocommit nothing could be rolled back, and no task could wait for a commit. Leave it out; "
            "for single statements there is db.engine().execution_options(isolation_level='AUTOCOMMIT')."
        )
    if is_sqlite:
        gated(arguments.get("factory"))
    for argument in ("isolation_level", "autocommit"):
        if is_sqlite and argument in arguments:
            raise ConfigurationError(
                f"{name}['connect_args'][{argument!r}]: transactions are begun for you, IMMEDIATE at the first write; "
                "the driver's own would lose updates. Leave it out."
            )


def _check_arguments(flavour: Flavour, name: str, arguments: Mapping[str, Any], url: URL) -> None:
    driver = url.get_driver_name()
    unknown = sorted(set(arguments) - _known_arguments(driver))
    if unknown:
        other = "async_engine_options" if flavour == "sync" else "engine_options"
        raise ConfigurationError(
            f"{name}: the driver {driver!r} knows no connect argument {', '.join(map(repr, unknown))}; every "
            f"connection would fail. Options of the other flavour's driver go into {other}."
        )


def _check_by_trying(flavour: Flavour, name: str, options: Mapping[str, Any], url: URL) -> None:
    make: Any = create_engine if flavour == "sync" else create_async_engine
    try:
        # Connects to nothing. No list of ours would keep up with what every release of SQLAlchemy takes.
        make(engine_url(url), **options)
    except (TypeError, ArgumentError) as exc:
        raise ConfigurationError(f"{name}: no engine for {render(url)} can be made with them: {exc}") from exc


def _known_arguments(driver: str) -> set[str]:
    if driver in ("pysqlite", "aiosqlite"):
        known = {"timeout", "detect_types", "isolation_level", "check_same_thread", "factory", "cached_statements"}
        return known | {"uri", "autocommit", "iter_chunk_size", "loop"}
    if driver == "asyncpg":
        import asyncpg  # type: ignore[import-untyped]  # optional, and known to be there

        # SQLAlchemy takes these out before it calls the driver.
        extra = {"prepared_statement_cache_size", "prepared_statement_name_func", "async_fallback", "async_creator_fn"}
        return set(inspect.signature(asyncpg.connect).parameters) | extra
    from psycopg import Connection  # optional, and known to be there
    from psycopg.pq import Conninfo

    options = {option.keyword.decode() for option in Conninfo.get_defaults()}
    return options | set(inspect.signature(Connection.connect).parameters) - {"kwargs"} | {"async_creator_fn"}


def _is_null_pool(options: Mapping[str, Any]) -> bool:
    kind = options.get("poolclass")
    return kind is not None and issubclass(kind, NullPool)


def _is_asyncpg(url: URL) -> bool:
    return url.get_driver_name() == "asyncpg"
