"""SQLite, set up for several writers: WAL, foreign keys, and a write lock that is asked for in time.

SQLite gives the write lock to one connection at a time. A transaction that begins deferred, reads, and then writes
cannot wait for it: its snapshot is old, and it fails at once with ``SQLITE_BUSY_SNAPSHOT``, whatever the busy
timeout. So the driver's own transactions are switched off here, and:

- nothing is begun for reads;
- ``BEGIN IMMEDIATE`` comes with the first write or savepoint, and waits its turn;
- a task's transaction begins immediate at once, so that what it read is still true when it writes.

SQLite itself knows no queue: who waits looks again after up to a tenth of a second, and one that commits and begins
anew in the meantime never lets anybody in. So the threads of this process wait for their turn in one.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections import defaultdict
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from aftercommit.pools.steps import steps_of
from aftercommit.pools.views import taken_with
from aftercommit.watch.holders import note_lock
from aftercommit.watch.notes import notes_of

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, PoolProxiedConnection
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = ["AUTOCOMMIT", "BUSY_TIMEOUT", "IMMEDIATE", "be_impatient", "in_transaction", "set_up"]

BUSY_TIMEOUT: Final = 10.0
"""Seconds that a connection waits for the write lock, unless ``connect_args`` say otherwise."""

IMMEDIATE: Final = "aftercommit_immediate"
"""The execution option under which every transaction begins immediate."""

AUTOCOMMIT: Final = "aftercommit_autocommit"
"""The execution option under which nothing is begun: each statement is a transaction by itself.

Not SQLAlchemy's isolation level, which would leave the connection with the driver's own transactions.
"""

_BEGIN: Final = "BEGIN IMMEDIATE"
_FILE: Final = "aftercommit_file"
_PATIENCE: Final = "aftercommit_patience"
_turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
"""By file, held by the one thread of this process that asks SQLite for the write lock, until it has it."""
if hasattr(os, "register_at_fork"):
    # A forked process has none of the threads that hold them: nobody there would ever give a turn back.
    os.register_at_fork(after_in_child=_turns.clear)
_READS: Final = frozenset({"SELECT", "VALUES", "EXPLAIN"})
# These cannot run inside a transaction, or manage one themselves.
_OUTSIDE: Final = frozenset({"PRAGMA", "VACUUM", "ATTACH", "DETACH", "BEGIN", "COMMIT", "END", "ROLLBACK", "RELEASE"})
_FIRST_WORD = re.compile(r"(?:\s+|--[^\n]*\n|/\*.*?\*/|\()*([A-Za-z]+)", re.DOTALL)
_WRITING_WORD = re.compile(r"\b(?:INSERT|UPDATE|DELETE|REPLACE)\b", re.IGNORECASE)


def set_up(engine: Engine) -> None:
    """Attach the rules of this module to *engine* (for an async engine: its ``sync_engine``)."""
    event.listen(engine, "connect", partial(_on_connect, str(engine.url.database)))
    event.listen(engine, "invalidate", _on_invalidate)
    steps = steps_of(engine)
    steps.before_begin.append(_before_begin)
    steps.before_statement.append(_before_statement)


def be_impatient(connection: DBAPIConnection, record: ConnectionPoolEntry, seconds: float) -> None:
    """Have a new connection wait for less long, behind ``set_up``: *seconds* for its turn, and as long for the lock."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")
    cursor.close()
    notes_of(record)[_PATIENCE] = seconds


def in_transaction(connection: Connection) -> bool:
    """Whether SQLite itself is in a transaction on *connection*, whatever SQLAlchemy believes."""
    return bool(connection.connection.driver_connection.in_transaction)  # type: ignore[union-attr]


@lru_cache(maxsize=2048)
def needs_lock(statement: str) -> bool:
    """Whether *statement* must run under the write lock. In doubt, yes."""
    found = _FIRST_WORD.match(statement)
    word = found[1].upper() if found else ""
    if word in _READS or word in _OUTSIDE:
        return False
    if word == "WITH":
        return _WRITING_WORD.search(statement) is not None
    return True


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
        notes_of(record)[_PATIENCE] = cursor.fetchall()[0][0] / 1000
    finally:
        cursor.close()


def _before_begin(pooled: PoolProxiedConnection) -> None:
    if taken_with(pooled, IMMEDIATE):
        _begin_immediate(pooled)


def _before_statement(connection: Connection, statement: str) -> None:
    if needs_lock(statement) and not in_transaction(connection) and not _autocommits(connection):
        _begin_immediate(connection.connection)


def _begin_immediate(pooled: PoolProxiedConnection) -> None:
    adapted: Any = pooled.dbapi_connection
    # By the driver, past SQLAlchemy's way of running a statement, which would cost as much as the task's own. A lock
    # that does not come free is its error all the same.
    try:
        if hasattr(adapted, "run_async"):
            # One trip to aiosqlite's thread; a cursor that is made, used and closed would be three. No turn: waiting
            # for it would stop the event loop.
            adapted.run_async(lambda driver: driver.execute_fetchall(_BEGIN))
        else:
            turn = _turns[notes_of(pooled)[_FILE]]
            # Without a turn in time, SQLite itself says whether the lock is taken.
            has_turn = turn.acquire(timeout=notes_of(pooled)[_PATIENCE])
            try:
                adapted.execute(_BEGIN)
            finally:
                if has_turn:
                    turn.release()
    except sqlite3.Error as exc:
        raise OperationalError(_BEGIN, None, exc) from exc
    note_lock(pooled)


def _autocommits(connection: Connection) -> bool:
    options = connection.get_execution_options()
    return options.get("isolation_level") == "AUTOCOMMIT" or bool(options.get(AUTOCOMMIT))
