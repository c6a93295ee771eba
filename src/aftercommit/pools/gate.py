"""SQLite's driver connections, with a gate: one that is taken from a run takes no further statement, from nobody.

A thread cannot be stopped, and what it will do next cannot be seen: between any check of ours and the driver's
``execute`` somebody may have rolled its transaction back, and as the driver's own transactions are off, the statement
would then commit by itself. SQLite's ``interrupt`` alone does so, too: it rolls a writing transaction back.

So each call into the driver passes a gate, which is held for as long as the call lasts. Whoever takes a connection
away says so first, and from then on every call is refused. If one is under way he interrupts it, and does not wait:
whoever leaves the gate looks whether the connection was taken, and then rolls it back himself. Nothing is forced: the
lock stays until the statement has ended.

Past the gate lead cursors of the application's own making and open blobs. So a connection that is taken is also made
one that can only read, by SQLite itself, before it is rolled back. It is closed by whoever has it: nobody else knows
when the last call into it has returned.
"""

from __future__ import annotations

import gc
import logging
import re
import sqlite3
import threading
from contextlib import suppress
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

from aftercommit.errors import ConfigurationError
from aftercommit.pools.turns import Held, refuse_own, take_turn
from aftercommit.watch.holders import held_by, note_lock
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

__all__ = ["BEGIN", "ConnectionTaken", "GatedConnection", "PlainTaking", "gated", "needs_lock"]

logger = logging.getLogger(__name__)

BEGIN: Final = "BEGIN IMMEDIATE"

_READS: Final = frozenset({"SELECT", "VALUES", "EXPLAIN"})
# These cannot run inside a transaction, or manage one themselves.
_OUTSIDE: Final = frozenset({"PRAGMA", "VACUUM", "ATTACH", "DETACH", "BEGIN", "COMMIT", "END", "ROLLBACK", "RELEASE"})
_FIRST_WORD = re.compile(r"(?:\s+|--[^\n]*\n|/\*.*?\*/|\()*([A-Za-z]+)", re.DOTALL)
_LOCKING_BEGIN = re.compile(r"\s*BEGIN\s+(?:IMMEDIATE|EXCLUSIVE)\b", re.IGNORECASE)
_WRITING_WORD = re.compile(r"\b(?:INSERT|UPDATE|DELETE|REPLACE)\b", re.IGNORECASE)


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


class ConnectionTaken(sqlite3.OperationalError):
    """A connection was used after it had been taken from a run that has ended."""

    def __init__(self) -> None:
        super().__init__("this connection was taken from its task, which has ended: nothing more of it is committed")


class GatedConnection(sqlite3.Connection):
    """A connection that can be taken away from whoever uses it.

    Attributes:
        gate: Held for the length of each call; by a thread that comes back from inside a call (a function of SQL's
            that is written in Python), more than once.
        expects_transaction: Whether SQLAlchemy has begun a transaction, which SQLite is told of with the first write:
            also with one that is sent past SQLAlchemy.
        is_taken: Whether it was taken away.
        file: Whose write lock it asks for.
        patience: Seconds for which it does.
    """

    expects_transaction = False
    is_taken = False
    file = ""
    patience = 0.0
    turn: Held | None = None
    _is_over = False
    _has_strangers = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.gate = threading.RLock()
        super().__init__(*args, **kwargs)

    def cursor(self, factory: Any = None) -> Any:
        """Make a cursor whose calls pass the gate."""
        made = super().cursor(GatedCursor if factory is None else _gated_cursor(factory))
        if not hasattr(made, "passes_gate"):
            self._has_strangers = True
        return made

    def execute(self, *args: Any) -> Any:
        """Run a statement on a cursor of its own."""
        return self.cursor().execute(*args)

    def executemany(self, *args: Any) -> Any:
        """Run a statement for each of many parameters."""
        return self.cursor().executemany(*args)

    def executescript(self, *args: Any) -> Any:
        """Run many statements."""
        return self.cursor().executescript(*args)

    def begin(self) -> None:
        """Begin, from inside the gate."""
        here: Any = self
        turn, left = take_turn(self.file, self.patience, held_by(here))
        cursor = sqlite3.Cursor(self)
        if left < self.patience:
            cursor.execute(f"PRAGMA busy_timeout = {left * 1000:.0f}")
        try:
            cursor.execute(BEGIN)
        except BaseException:
            # Or it would be held for as long as somebody keeps the error, with this frame in its traceback.
            turn = None
            raise
        finally:
            if left < self.patience:
                cursor.execute(f"PRAGMA busy_timeout = {self.patience * 1000:.0f}")
        self.turn = turn
        note_lock(here)

    def refuse_own(self) -> None:
        """Refuse a statement that would wait for a lock which the same work has on another connection.

        Raises:
            LockDeadlock: If it has.
        """
        here: Any = self
        refuse_own(self.file, held_by(here))

    def blobopen(self, *args: Any, **kwargs: Any) -> Any:
        """Open a blob, inside the transaction."""
        with self.gate:
            self._refuse_if_taken()
            if self.expects_transaction and not self.in_transaction and not kwargs.get("readonly", False):
                self.begin()
            return super().blobopen(*args, **kwargs)

    def commit(self) -> None:
        """Commit."""
        try:
            with self.gate:
                self._refuse_if_taken()
                super().commit()
        finally:
            self.left()

    def rollback(self) -> None:
        """Roll back; nothing is left to do where it was taken."""
        try:
            with self.gate:
                if not self.is_taken:
                    super().rollback()
        finally:
            self.left()

    def close(self) -> None:
        """Close, once the call that is under way has ended."""
        with self.gate:
            super().close()
            self._is_over = True
            self.turn = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        """Commit or roll back: the driver's own would do so past these methods."""
        if kind is None:
            self.commit()
        else:
            self.rollback()
        return False

    def left(self) -> None:
        """A call has left the gate: do what could not be done while it was under way."""
        if self.is_taken:
            self.take()
        elif self.turn is not None and (self._is_over or not self.in_transaction):
            self.turn = None

    def take(self) -> bool:
        """Take it away, from any thread, without waiting; whether its transaction is over.

        If not, a call is under way; it was interrupted, and whoever made it ends the transaction. It may just have been
        on its way into SQLite, where nothing was there to interrupt: so ask again.
        """
        self.is_taken = True
        if not self.gate.acquire(blocking=False):
            if not self._has_strangers and not self._is_over:
                # A cursor that does not pass the gate could begin anew, by itself, before it is rolled back.
                with suppress(sqlite3.Error):
                    self.interrupt()
            return False
        try:
            if not self._is_over:
                self._end()
        finally:
            self.gate.release()
        return self._is_over

    def _refuse_if_taken(self) -> None:
        if self.is_taken:
            raise ConnectionTaken

    def _end(self) -> None:
        try:
            try:
                _end(self)
            except sqlite3.OperationalError:
                # Rows that were not read to their end keep an interruption alive, also for statements of ours.
                for each in gc.get_referrers(self):
                    if isinstance(each, sqlite3.Cursor):
                        sqlite3.Cursor.close(each)
                _end(self)
        except sqlite3.Error as exc:
            logger.debug("A connection that was taken could not be rolled back yet", exc_info=without_values(exc))
            return
        self._is_over = True
        self.turn = None


def gated(factory: Any) -> type[GatedConnection]:
    """The class of connections for an engine whose options ask for *factory*; None for the driver's own.

    Raises:
        ConfigurationError: If it is not a class of connections.
    """
    if factory is None or factory is sqlite3.Connection:
        return GatedConnection
    if not (isinstance(factory, type) and issubclass(factory, sqlite3.Connection)):
        raise ConfigurationError(
            f"connect_args['factory']={factory!r}: a connection is taken from a task whose time is over, and one that "
            "any function may have made cannot be. Give a subclass of sqlite3.Connection."
        )
    if issubclass(factory, GatedConnection):
        return factory
    return type(factory.__name__, (GatedConnection, factory), {"__doc__": factory.__doc__})


class PlainTaking:
    """How a connection is taken that has no gate, because the application makes its connections itself.

    It is not interrupted, so that its transaction stays until it can only read. SQLite has us wait for a statement that
    is under way, for as long as it takes: on a thread of its own.

    Args:
        connection: The driver's.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._thread: threading.Thread | None = None

    def take(self) -> bool:
        """As a gated connection's."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._end, name="aftercommit-taking", daemon=True)
            self._thread.start()
        return not self._thread.is_alive()

    def _end(self) -> None:
        try:
            _end(self._connection)
        except sqlite3.Error as exc:
            logger.debug("A connection could not be taken", exc_info=without_values(exc))


def _end(connection: sqlite3.Connection) -> None:
    # In this order: a statement that finds another way in between the two is refused.
    sqlite3.Cursor(connection).execute("PRAGMA query_only=ON").close()
    sqlite3.Connection.rollback(connection)


# --- cursors ----------------------------------------------------------------------------------------------------


def _passing(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method that passes the gate."""

    def passing(self: Any, *args: Any, **kwargs: Any) -> Any:
        connection = self.connection
        try:
            with connection.gate:
                if connection.is_taken:
                    raise ConnectionTaken
                return call(self, *args, **kwargs)
        finally:
            if connection.is_taken:
                connection.take()

    return passing


def _executing(call: Callable[..., Any]) -> Callable[..., Any]:
    """One that runs a statement: inside the transaction, if there is to be one."""

    def executing(self: Any, sql: str, *args: Any) -> Any:
        connection = self.connection
        try:
            with connection.gate:
                if connection.is_taken:
                    raise ConnectionTaken
                if not connection.in_transaction:
                    if not connection.expects_transaction:
                        # Begun by hand, or a transaction by itself: it takes no turn.
                        if needs_lock(sql) or _LOCKING_BEGIN.match(sql):
                            connection.refuse_own()
                    elif sql == BEGIN:
                        connection.begin()
                        return self
                    elif needs_lock(sql):
                        connection.begin()
                return call(self, sql, *args)
        finally:
            if connection.is_taken or connection.turn is not None:
                connection.left()

    return executing


def _outside(connection: GatedConnection, parameters: Iterable[Any]) -> Iterator[Any]:
    """Fetch what comes next outside the gate: it is the application that makes it."""
    source = iter(parameters)
    while True:
        connection.gate.release()
        try:
            following = next(source, source)
        finally:
            connection.gate.acquire()
        if connection.is_taken:
            raise ConnectionTaken
        if following is source:
            return
        yield following


def _many(call: Callable[..., Any]) -> Callable[..., Any]:
    """One that runs a statement again and again."""

    def executemany(self: Any, sql: str, parameters: Iterable[Any]) -> Any:
        if not isinstance(parameters, (list, tuple)):
            parameters = _outside(self.connection, parameters)
        return call(self, sql, parameters)

    return executemany


def _script(call: Callable[..., Any]) -> Callable[..., Any]:
    """One that runs many statements: in a transaction one by one, because the driver would commit it first."""

    def executescript(self: Any, script: str) -> Any:
        connection = self.connection
        with connection.gate:
            if not connection.expects_transaction:
                return call(self, script)
            cursor = connection.cursor()
            for statement in _statements(script):
                cursor.execute(statement)
                cursor.fetchall()
            cursor.close()
            return self

    return executescript


def _closing(call: Callable[..., None]) -> Callable[..., None]:
    """A close, which nobody is refused."""

    def close(self: Any) -> None:
        with self.connection.gate:
            call(self)

    return close


def _statements(script: str) -> Iterator[str]:
    begin = 0
    for found in re.finditer(";", script):
        if sqlite3.complete_statement(script[begin : found.end()]):
            yield script[begin : found.end()]
            begin = found.end()
    if script[begin:].strip():
        yield script[begin:]


@cache
def _gated_cursor(kind: Any) -> Any:
    """A class of cursors whose calls pass the gate of their connection; what is no class stays as it is."""
    if not (isinstance(kind, type) and issubclass(kind, sqlite3.Cursor)) or hasattr(kind, "passes_gate"):
        return kind
    methods = {
        "passes_gate": True,
        "execute": _executing(kind.execute),
        "executemany": _many(_executing(kind.executemany)),
        "executescript": _script(_passing(kind.executescript)),
        "fetchone": _passing(kind.fetchone),
        "fetchmany": _passing(kind.fetchmany),
        "fetchall": _passing(kind.fetchall),
        "__next__": _passing(kind.__next__),
        "close": _closing(kind.close),
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), methods)


GatedCursor: Final = _gated_cursor(sqlite3.Cursor)
