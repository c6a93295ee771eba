"""SQLite, set up for several writers: WAL, foreign keys, and a write lock that is asked for in time.

SQLite gives the write lock to one connection at a time. A transaction that begins deferred, reads, and then writes
cannot wait for it: its snapshot is old, and it fails at once with ``SQLITE_BUSY_SNAPSHOT``, whatever the busy
timeout. So the driver's own transactions are switched off here, and:

- nothing is begun for reads;
- ``BEGIN IMMEDIATE`` comes with the first write or savepoint, and waits its turn;
- a task's transaction begins immediate at once, so that what it read is still true when it writes.

What is sent past SQLAlchemy, by a cursor of the driver's, is in the same transaction: a connection of ours sees to it
itself (``gate``), and can be taken away from whoever uses it.
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from aftercommit.pools.gate import BEGIN, GatedConnection, PlainTaking, needs_lock
from aftercommit.pools.steps import steps_of
from aftercommit.pools.turns import take_turn
from aftercommit.pools.views import taken_with
from aftercommit.watch.holders import note_lock
from aftercommit.watch.notes import NOTES, notes_of

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, PoolProxiedConnection
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = ["AUTOCOMMIT", "BUSY_TIMEOUT", "IMMEDIATE", "be_impatient", "in_transaction", "set_up", "taking"]

BUSY_TIMEOUT: Final = 10.0
"""Seconds that a connection waits for the write lock, unless ``connect_args`` say otherwise."""

IMMEDIATE: Final = "aftercommit_immediate"
"""The execution option under which every transaction begins immediate."""

AUTOCOMMIT: Final = "aftercommit_autocommit"
"""The execution option under which nothing is begun: each statement is a transaction by itself.

Not SQLAlchemy's isolation level, which would leave the connection with the driver's own transactions.
"""

_FILE: Final = "aftercommit_file"
_PATIENCE: Final = "aftercommit_patience"


def set_up(engine: Engine) -> None:
    """Attach the rules of this module to *engine* (for an async engine: its ``sync_engine``)."""
    event.listen(engine, "connect", partial(_on_connect, str(engine.url.database)))
    event.listen(engine, "checkout", _on_checkout)
    event.listen(engine, "invalidate", _on_invalidate)
    steps = steps_of(engine)
    steps.before_begin.append(_before_begin)
    steps.before_statement.append(_before_statement)


def be_impatient(connection: DBAPIConnection, record: ConnectionPoolEntry, seconds: float) -> None:
    """Have a new connection wait for less long, behind ``set_up``: *seconds* for its turn, and as long for the lock."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")
    cursor.close()
    _be_patient(connection, record, seconds)


def in_transaction(connection: Connection) -> bool:
    """Whether SQLite itself is in a transaction on *connection*, whatever SQLAlchemy believes."""
    return bool(_driver(connection.connection.dbapi_connection).in_transaction)


def taking(connection: Connection) -> GatedConnection | PlainTaking | None:
    """What takes the driver's connection from whoever uses *connection*, by its ``take``; None where there is none."""
    pooled = connection.connection
    driver = _driver(pooled.dbapi_connection)
    if isinstance(driver, GatedConnection):
        return driver
    return PlainTaking(driver) if isinstance(driver, sqlite3.Connection) else None


def _on_invalidate(connection: DBAPIConnection, _record: Any, _error: BaseException | None) -> None:
    """End the transaction of a connection that is to be dropped.

    Closing it does not, as long as a cursor lives: in the traceback of the very error that it is dropped for. Whoever
    keeps that error, and tries to write what became of it, would wait for ever for the lock that it holds.
    """
    # Whatever state it is in, it is closed next.
    with suppress(Exception):
        connection.rollback()


def _on_connect(file: str, connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    notes_of(record)[_FILE] = file
    driver = _driver(connection)
    if isinstance(driver, GatedConnection):
        driver.file = file
        # The gate sees the lock being taken, and notes it where the pool will look.
        vars(driver)[NOTES] = notes_of(record)
    # The driver's own transactions are off, however the connection was made.
    connection.isolation_level = None
    cursor = connection.cursor()
    try:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except Exception as exc:
            # Another process is switching this very file, or it is read-only: the mode belongs to the file, so
            # there is nothing left to do here. What is really broken fails at the first statement, with its own error.
            if not any(word in str(exc) for word in ("locked", "readonly")):
                raise
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA busy_timeout")
        _be_patient(connection, record, cursor.fetchall()[0][0] / 1000)
    finally:
        cursor.close()


def _on_checkout(connection: DBAPIConnection, _record: Any, _proxy: Any) -> None:
    driver = _driver(connection)
    if isinstance(driver, GatedConnection):
        # Whoever takes a raw connection from the engine begins by himself.
        driver.expects_transaction = False


def _be_patient(connection: DBAPIConnection, record: ConnectionPoolEntry, seconds: float) -> None:
    notes_of(record)[_PATIENCE] = seconds
    driver = _driver(connection)
    if isinstance(driver, GatedConnection):
        driver.patience = seconds


def _before_begin(pooled: PoolProxiedConnection) -> None:
    driver = _driver(pooled.dbapi_connection)
    if isinstance(driver, GatedConnection):
        driver.expects_transaction = not taken_with(pooled, AUTOCOMMIT)
    if taken_with(pooled, IMMEDIATE):
        _begin_immediate(pooled)


def _before_statement(connection: Connection, statement: str) -> None:
    if not needs_lock(statement) or in_transaction(connection):
        return
    pooled = connection.connection
    if not _autocommits(connection):
        _begin_immediate(pooled)
        return
    driver = _driver(pooled.dbapi_connection)
    if isinstance(driver, GatedConnection):
        driver.expects_transaction = False


def _begin_immediate(pooled: PoolProxiedConnection) -> None:
    adapted: Any = pooled.dbapi_connection
    # By the driver, past SQLAlchemy's way of running a statement, which would cost as much as the task's own. A lock
    # that does not come free is its error all the same.
    try:
        if hasattr(adapted, "run_async"):
            # One trip to aiosqlite's thread, which is where a connection of ours waits for its turn; a cursor that is
            # made, used and closed would be three.
            adapted.run_async(lambda driver: driver.execute_fetchall(BEGIN))
        elif isinstance(adapted, GatedConnection):
            adapted.execute(BEGIN)
        else:
            turn, _left = take_turn(notes_of(pooled)[_FILE], notes_of(pooled)[_PATIENCE])
            try:
                adapted.execute(BEGIN)
            finally:
                # Nobody would see how its transaction ends.
                del turn
    except sqlite3.Error as exc:
        raise OperationalError(BEGIN, None, exc) from exc
    if not isinstance(_driver(adapted), GatedConnection):
        note_lock(pooled)


def _driver(connection: Any) -> Any:
    """SQLite's own connection: aiosqlite, behind SQLAlchemy's adapter, has it in this attribute."""
    if isinstance(connection, sqlite3.Connection):
        return connection
    return getattr(getattr(connection, "driver_connection", None), "_conn", None)


def _autocommits(connection: Connection) -> bool:
    options = connection.get_execution_options()
    return options.get("isolation_level") == "AUTOCOMMIT" or bool(options.get(AUTOCOMMIT))
