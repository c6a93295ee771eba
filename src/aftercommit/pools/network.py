"""A server that is gone without a word is noticed within a minute, and one that refuses is so in both drivers.

Left to themselves, psycopg and asyncpg wait for a connection for one or two minutes, and an operating system asks
after hours whether the other side of a silent one is still there.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import URL, Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection

__all__ = ["CONNECT_SECONDS", "before_connecting", "cut", "has_unread", "patience", "set_up"]

CONNECT_SECONDS: Final = 10
"""Seconds in which a connection must be made, host by host."""

_GOODBYE_SECONDS: Final = 2.0
_IDLE, _INTERVAL, _COUNT = 30, 10, 3
_UNACKNOWLEDGED_MS: Final = (_IDLE + _INTERVAL * _COUNT) * 1000
"""Milliseconds after which a connection is lost on which nothing that was sent is acknowledged."""

_LIBPQ: Final = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives_idle": _IDLE,
    "keepalives_interval": _INTERVAL,
    "keepalives_count": _COUNT,
    "tcp_user_timeout": _UNACKNOWLEDGED_MS,
}
_SOCKET: Final = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _IDLE),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _INTERVAL),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", _COUNT),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", _UNACKNOWLEDGED_MS),
)


def patience(url: URL, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the connect arguments that limit waiting; what the URL, *given* or libpq's environment say is left out."""
    if url.get_driver_name() == "asyncpg":
        return {} if "timeout" in given or "timeout" in url.query else {"timeout": float(CONNECT_SECONDS)}
    said = {*given, *url.query}
    if "PGCONNECT_TIMEOUT" in os.environ:
        said.add("connect_timeout")
    return {name: value for name, value in _LIBPQ.items() if name not in said}


def set_up(engine: Engine) -> None:
    """Give asyncpg what libpq has by itself: keepalives, and a database error where a connection cannot be made."""
    if engine.dialect.driver == "asyncpg":
        event.listen(engine, "do_connect", _connect)
        event.listen(engine, "connect", _keep_alive)
        event.listen(engine, "close", _limit_goodbye)
        event.listen(engine, "checkin", _drop_if_begun)


def before_connecting(engine: Engine, listener: Callable[..., None]) -> None:
    """Have a listener of ``do_connect`` called before the one of ours that connects; it may change the parameters."""
    if event.contains(engine, "do_connect", _connect):
        # These events know no order but that of listening.
        event.remove(engine, "do_connect", _connect)
        event.listen(engine, "do_connect", listener)
        event.listen(engine, "do_connect", _connect)
    else:
        event.listen(engine, "do_connect", listener)


def has_unread(connection: DBAPIConnection) -> bool:
    """Whether a connection that nobody uses has something to read: as a rule, that the server has ended it.

    Asks the operating system, which takes a microsecond, and not the server.
    """
    driver: Any = getattr(connection, "driver_connection", connection)
    try:
        transport = getattr(driver, "_transport", None)
        if transport is None:
            number = driver.pgconn.socket
        elif driver.is_closed():
            return True
        else:
            number = transport.get_extra_info("socket").fileno()
        return _is_readable(number)
    except Exception:  # noqa: BLE001  # it was closed, and each driver has an error of its own for that
        return True


def _is_readable(number: int) -> bool:
    if sys.platform == "win32":
        return bool(select.select((number,), (), (), 0)[0])
    # Which knows no highest number, as select() does.
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return bool(poll.poll(0))


def cut(connection: Connection) -> None:
    """Cut a connection off below its driver, from any thread: whoever waits for an answer hears that it is lost.

    For a server that does not answer, and so ends nothing by itself. Best effort: without a socket there is nothing
    to wait for.
    """
    with suppress(Exception):
        driver: Any = connection.connection.driver_connection
        transport = getattr(driver, "_transport", None)
        number = driver.fileno() if transport is None else transport.get_extra_info("socket").fileno()
        with socket.socket(fileno=os.dup(number)) as made:
            made.shutdown(socket.SHUT_RDWR)


def _connect(dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
    try:
        return dialect.connect(*arguments, **options)
    except OSError as exc:
        # asyncpg raises what the network raised, and SQLAlchemy wraps only what is the driver's: nobody who handles
        # OperationalError, as psycopg has it, would see a server that is down.
        reason = str(exc) or f"no connection within {options.get('timeout')} s"
        raise dialect.loaded_dbapi.OperationalError(reason, exc) from exc


def _keep_alive(connection: Any, _record: Any) -> None:
    transport = getattr(connection.driver_connection, "_transport", None)
    made = None if transport is None else transport.get_extra_info("socket")
    if made is None or made.family not in (socket.AF_INET, socket.AF_INET6):
        return
    for level, name, value in _SOCKET:
        # Not every operating system has each of them.
        with suppress(OSError, AttributeError):
            made.setsockopt(level, getattr(socket, name), value)


def _drop_if_begun(connection: Any, record: Any) -> None:
    """Close a connection that comes back inside a transaction, or that the driver takes for one.

    SQLAlchemy's adapter takes a transaction for ended once it has sent COMMIT or ROLLBACK. Where the server cancelled
    just that, it is still open. After a BEGIN that was cancelled asyncpg goes on believing in it, and would send the
    next one as a SAVEPOINT, and its COMMIT as a RELEASE. No public name says so; a test does, when this one goes away.
    """
    driver = None if connection is None else connection.driver_connection
    if driver is not None and (driver.is_in_transaction() or getattr(driver, "_top_xact", None) is not None):
        record.invalidate()


def _limit_goodbye(connection: Any, _record: Any) -> None:
    """Have a connection that is being closed end in time: asyncpg waits for the server's goodbye for ever."""
    transport = getattr(connection.driver_connection, "_transport", None)
    if transport is not None and not transport.is_closing():
        # Without a loop that runs SQLAlchemy terminates, and does not wait.
        with suppress(RuntimeError):
            asyncio.get_running_loop().call_later(_GOODBYE_SECONDS, transport.abort)
