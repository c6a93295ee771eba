"""Which errors pass by themselves: what a database error means for the run that met it.

Errors are told apart by SQLSTATE, by SQLite's names of its codes and by the class names of the drivers, never by
importing a driver and, but for one line of asyncpg's, never by their text: servers speak the administrator's
language.

Which exceptions are looked at, and why:

- The error itself, and what SQLAlchemy (``orig``) and its async adapters (``__cause__``) wrapped in it.
- What it was raised *from*, link by link: ``raise Mine() from error`` says what the cause was.
- What was merely being handled (``__context__``) only below errors that mean nothing by themselves: "this
  transaction was aborted earlier". Elsewhere it proves nothing. A function called again in an ``except`` block
  carries the error of the last time as its context, and would be repeated for it for ever.
- A group of exceptions is what all its members agree upon.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import exc

from aftercommit.errors import LockDeadlock, PoolExhausted
from aftercommit.wording import code_of, is_drivers, unit_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

__all__ = [
    "Fault",
    "cancels_ours",
    "describe",
    "fault_of",
    "is_cancelled",
    "is_disconnect",
    "is_read_only",
    "met_in_commit",
]


class Fault(enum.Enum):
    """What an error means for the run that met it."""

    CONFLICT = "conflict"
    """Another transaction was in the way: 40001, 40P01, 55P03, SQLite busy or locked; or another run, at a standstill
    of those who hold a connection and wait for a second. Not an attempt."""

    CONNECTION = "connection"
    """The database cannot be reached, or lacks something for now: lost and refused connections, 57P01 to 57P03,
    classes 08 and 53, the pool's timeout; SQLite: a disk that is full or fails. An attempt."""

    STALE = "stale"
    """The connection is of no use any more, though it lives: 25006 (a primary no longer), 26000 and 0A000
    (prepared before a migration), an SQLite file opened read-only. Drop it and run again, once; a database that
    still refuses to write (``is_read_only``) uses up attempts from there."""

    IDLE = "idle"
    """Killed for being idle or open too long: 25P03, 25P04, 57P05. An attempt. asyncpg tells only where a statement
    was running, and raises what is seen as ``CONNECTION`` elsewhere: an attempt as well."""

    UNIQUE = "unique"
    """A row is there already: 23505, 23P01, SQLite's unique and primary keys. Deserves a few tries: two runs that
    both create a missing row race at any isolation below SERIALIZABLE, and the next try sees the row."""

    CANCELLED = "cancelled"
    """A statement of the library's own was cancelled: 57014 (``statement_timeout``, ``pg_cancel_backend``), asyncpg's
    ``command_timeout``. The task's code did nothing wrong, so the run is repeated a few times; after that it is an
    attempt. Which statements are the library's own says ``_is_ours``."""

    PERMANENT = "permanent"
    """Every other database error: wrong data, missing tables, and statements of the task's own that were cancelled or
    took longer than ``statement_timeout``."""

    APPLICATION = "application"
    """Not a database error."""


def fault_of(error: BaseException) -> Fault:
    """Return what *error* means for the run that raised it.

    An error of the application that was raised from a database error which may pass is seen as that one; from one
    which cannot pass, it stays the application's.
    """
    return _verdict(error).fault


def is_disconnect(error: BaseException) -> bool:
    """Tell whether the connection that met *error* must be dropped, not given back to its pool.

    Also true where the connection lives but is of no use (``Fault.STALE``), and for connections that are dropped
    already.
    """
    return _verdict(error).drop


def is_read_only(error: BaseException) -> bool:
    """Tell whether the database refused to write: a primary no longer, or a file that was opened read-only.

    Unlike the other reasons for ``Fault.STALE`` it may last: until somebody else is the primary.
    """
    code = code_of(unit_of(_verdict(error).link)) or ""
    return code == "25006" or code.startswith("SQLITE_READONLY")


def met_in_commit(error: BaseException) -> bool:
    """Tell whether *error* ended a COMMIT: if the connection was lost, nobody knows what the server did with it."""
    places = _places(error.__traceback__)
    return any(function == _SENDING_COMMIT and module.startswith("sqlalchemy.") for module, function in places)


def is_cancelled(error: BaseException) -> bool:
    """Tell whether the server cancelled a statement (57014), whoever's it was."""
    return code_of(unit_of(_verdict(error).link)) == _CANCELLED


def cancels_ours(error: BaseException) -> bool:
    """Tell, where *error* is first seen, whether it cancelled a statement of the library's own.

    For a listener of ``handle_error``: the error has not travelled yet, so its traceback does not name who sent the
    statement. The stack does.
    """
    return fault_of(error) is Fault.CANCELLED or (is_cancelled(error) and any(map(_sends_ours, _stack())))


def describe(error: BaseException) -> str:
    """Return *error* for a line in a log, by the driver's class and code: ``DeadlockDetected (40P01)``.

    The message is left out: "Key (email)=(…) already exists" holds a bound value.
    """
    link = _verdict(error).link
    unit = unit_of(link)
    code = code_of(unit)
    text = type(unit[-1]).__name__ + (f" ({code})" if code else "")
    return text if link is error else f"{type(error).__name__} from {text}"


# --- the tables -------------------------------------------------------------------------------------------------

_SQLSTATES: Final = {
    "40001": Fault.CONFLICT,  # serialization failure
    "40P01": Fault.CONFLICT,  # deadlock
    "55P03": Fault.CONFLICT,  # lock_timeout, NOWAIT
    "57P01": Fault.CONNECTION,  # terminated by an administrator, or by a shutdown
    "57P02": Fault.CONNECTION,  # crash of another backend
    "57P03": Fault.CONNECTION,  # starting up, or in recovery
    "25006": Fault.STALE,  # after a failover a demoted primary still answers SELECT 1
    "26000": Fault.STALE,  # prepared statement does not exist
    "0A000": Fault.STALE,  # "cached plan must not change result type", see _is_unsupported
    "25P03": Fault.IDLE,  # idle_in_transaction_session_timeout
    "25P04": Fault.IDLE,  # transaction_timeout
    "57P05": Fault.IDLE,  # idle_session_timeout
    "23505": Fault.UNIQUE,  # PostgreSQL's manual, 13.5, names this one …
    "23P01": Fault.UNIQUE,  # … and exclusion constraints, which race in the same way
    "57014": Fault.PERMANENT,  # cancelled, statement_timeout; of the library's own statements see _is_ours
}
_SQLSTATE_CLASSES: Final = {
    "08": Fault.CONNECTION,
    "53": Fault.CONNECTION,  # disk full, out of memory, too many connections
    "22": Fault.PERMANENT,
    "23": Fault.PERMANENT,
    "42": Fault.PERMANENT,
}
_CANCELLED: Final = "57014"
_UNSUPPORTED: Final = "0A000"
_CHECKS_PLANS: Final = "RevalidateCachedQuery"
"""The server's function that finds a plan outdated: messages come in the language of the server."""
_ABORTED: Final = "25P02"
"""An earlier error aborted the transaction, and somebody went on: says nothing by itself."""

# By the beginning of the name: SQLITE_BUSY_SNAPSHOT is a kind of SQLITE_BUSY. The first that fits counts.
_SQLITE_NAMES: Final = {
    "SQLITE_BUSY": Fault.CONFLICT,
    "SQLITE_LOCKED": Fault.CONFLICT,
    "SQLITE_PROTOCOL": Fault.CONFLICT,  # lost the race to begin in WAL mode, for seconds on end
    "SQLITE_FULL": Fault.CONNECTION,  # what 53100 is on PostgreSQL
    "SQLITE_IOERR": Fault.CONNECTION,
    "SQLITE_CANTOPEN": Fault.CONNECTION,  # what a refused connection is on PostgreSQL
    "SQLITE_READONLY": Fault.STALE,  # the file was moved or replaced, or was not ours when it was opened
    "SQLITE_CONSTRAINT_UNIQUE": Fault.UNIQUE,
    "SQLITE_CONSTRAINT_PRIMARYKEY": Fault.UNIQUE,
    "SQLITE_CONSTRAINT_ROWID": Fault.UNIQUE,
}

_INTERFACE_ERRORS: Final = frozenset({("asyncpg", "InterfaceError"), ("sqlalchemy", "InterfaceError")})
_ALIVE: Final = frozenset({Fault.CONFLICT, Fault.UNIQUE, Fault.CANCELLED, Fault.PERMANENT})
_CONNECTING: Final = frozenset({("asyncpg.connection", "connect"), ("asyncpg.connect_utils", "_connect")})

_SENDING_COMMIT: Final = "do_commit"
"""The method of SQLAlchemy's dialects that sends a COMMIT, and does nothing else."""

_SENDING_OURS: Final = frozenset(
    {
        ("aftercommit.records.statement", "execute"),  # every statement of ours goes through this door
        ("aftercommit.tasks.arguments", "load"),  # the rows among a task's arguments
        ("psycopg._connection_base", "_start_query"),  # BEGIN …
        ("sqlalchemy.dialects.postgresql.asyncpg", "_start_transaction"),  # … and asyncpg's
    }
)
_CONNECTING_POOL: Final = "sqlalchemy.pool."
"""What a pool sends makes a connection, or tries an old one: no statement of a task's passes through its modules."""


# --- the verdict ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What an error means.

    Attributes:
        fault: The meaning.
        drop: Whether the connection must be dropped.
        link: The exception of the chain that decided.
    """

    fault: Fault
    drop: bool
    link: BaseException


def _verdict(error: BaseException) -> _Verdict:
    verdict = _Verdict(fault=Fault.APPLICATION, drop=False, link=error)
    for link in _chain(error):
        found = _own(link)
        if found is not None and found.fault is not Fault.PERMANENT:
            return found
        if found is not None and link is error:
            verdict = found
    return verdict


def _chain(error: BaseException) -> Iterator[BaseException]:
    """*error* and what it was raised from; for an aborted transaction also what was being handled."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        link = waiting.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, exc.StatementError):
            waiting.append(link.orig)  # the cause, too, as a rule; but an error that was pickled has no cause
        waiting.append(link.__cause__)
        if _is_aftermath(link):
            waiting.append(link.__context__)


def _is_aftermath(link: BaseException) -> bool:
    return isinstance(link, exc.PendingRollbackError) or code_of(unit_of(link)) == _ABORTED


def _own(link: BaseException) -> _Verdict | None:
    """What *link* means by itself; None if it says nothing about the database."""
    unit = unit_of(link)
    if isinstance(link, exc.DBAPIError) or is_drivers(link):
        return _database(link, unit)
    if isinstance(link, LockDeadlock) or (isinstance(link, PoolExhausted) and link.is_standstill):
        # What a deadlock is in the database: this one was refused so that the others get on.
        return _Verdict(fault=Fault.PERMANENT if link.is_alone else Fault.CONFLICT, drop=False, link=link)
    if isinstance(link, exc.TimeoutError):  # the pool's: no connection was given
        return _Verdict(fault=Fault.CONNECTION, drop=False, link=link)
    if isinstance(link, exc.PendingRollbackError):
        lost = link.code == "8s2b"  # the connection was lost; "7s2a": a flush failed
        return _Verdict(fault=Fault.CONNECTION if lost else Fault.PERMANENT, drop=lost, link=link)
    if isinstance(link, OSError):
        return _network(link)
    return _group(link) if isinstance(link, BaseExceptionGroup) else None


def _database(link: BaseException, unit: list[BaseException]) -> _Verdict:
    code = code_of(unit)
    invalidated = isinstance(link, exc.DBAPIError) and link.connection_invalidated
    fault = _fault_of_code(code) if code else None
    if code == _UNSUPPORTED and _is_unsupported(unit[-1]):
        fault = Fault.PERMANENT
    if code == _CANCELLED and _is_ours(link):
        fault = Fault.CANCELLED
    if fault is None:
        lost = invalidated or (code is None and any(map(_is_lost, unit)))
        fault = Fault.CONNECTION if lost else Fault.PERMANENT
    # Class 53 and a full disk say that the server lacks something: the connection is as good as before.
    alive = fault in _ALIVE or (code or "").startswith(("53", "SQLITE_FULL"))
    return _Verdict(fault=fault, drop=invalidated or not alive, link=link)


def _network(link: OSError) -> _Verdict | None:
    """An OSError is the database's if asyncpg met it, which raises it bare; else it is the application's own."""
    places = set(_places(link.__traceback__))
    if not any(module.partition(".")[0] == "asyncpg" for module, _ in places):
        return None
    # The time limit of connecting passes by itself; `command_timeout` is what 57014 is on the server. The two are
    # told apart by the place alone.
    if not isinstance(link, TimeoutError) or places & _CONNECTING or met_in_commit(link):
        # A COMMIT that was given up may have been done all the same, as after a lost connection.
        fault = Fault.CONNECTION
    else:
        fault = Fault.CANCELLED if _is_ours(link) else Fault.PERMANENT
    return _Verdict(fault=fault, drop=True, link=link)


def _group(group: BaseExceptionGroup[BaseException]) -> _Verdict | None:
    verdicts = [_verdict(member) for member in group.exceptions]
    faults = {verdict.fault for verdict in verdicts}
    if len(faults) > 1 or Fault.APPLICATION in faults:
        return None
    return _Verdict(fault=faults.pop(), drop=any(verdict.drop for verdict in verdicts), link=verdicts[0].link)


# --- reading drivers' errors ------------------------------------------------------------------------------------


def _fault_of_code(code: str) -> Fault | None:
    if code.startswith("SQLITE_"):
        return next((fault for name, fault in _SQLITE_NAMES.items() if code.startswith(name)), None)
    return _SQLSTATES.get(code) or _SQLSTATE_CLASSES.get(code[:2])


def _is_unsupported(error: BaseException) -> bool:
    """Whether a 0A000 is about the statement itself, such as FOR UPDATE of an aggregate, and will be so for ever."""
    # asyncpg has it on the error, psycopg in what the server said.
    source = getattr(error, "server_source_function", None)
    source = source or getattr(getattr(error, "diag", None), "source_function", None)
    return source is not None and source != _CHECKS_PLANS


def _is_lost(error: BaseException) -> bool:
    """Whether an error without a code says that there is no connection."""
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    if ("psycopg", "OperationalError") in names:
        return True  # libpq gives no code when it cannot connect, or is cut off
    if ("asyncpg", "TargetServerAttributeNotMatched") in names:
        return True  # several hosts, none of them primary: in the middle of a failover
    return bool(names & _INTERFACE_ERRORS) and "connection is closed" in str(error)


def _is_ours(error: BaseException) -> bool:
    """Whether *error* ended a statement that the task's code did not ask for.

    Seen by the functions that it came through, so it costs nothing while there is no error: our own SQL, BEGIN, COMMIT,
    connecting, and the rows among the arguments.
    """
    return met_in_commit(error) or any(map(_sends_ours, _places(error.__traceback__)))


def _sends_ours(place: tuple[str, str]) -> bool:
    return place in _SENDING_OURS or place[0].startswith(_CONNECTING_POOL)


def _stack() -> Iterator[tuple[str, str]]:
    """The module and the function of every frame that is being executed, from here outwards."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # what traceback.walk_stack does
    while frame is not None:
        yield str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        frame = frame.f_back


def _places(traceback: TracebackType | None) -> Iterator[tuple[str, str]]:
    """The module and the function of every frame that an error came through."""
    while traceback is not None:
        frame = traceback.tb_frame
        yield str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        traceback = traceback.tb_next
