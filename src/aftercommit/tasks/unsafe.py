"""What must never cross to a task, how it is recognised without importing it, and what to pass instead.

Nothing but JSON crosses, so this walk is not what keeps a session out of a task: it is what says, with the path to
it, *why* the hand-over was refused and what to write. It reads ``__dict__`` and slots only, never properties, so it
runs no code of the user's and loads nothing lazily.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import decimal
import functools
import io
import ipaddress
import logging
import pathlib
import re
import types
import uuid
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import pydantic
import sqlalchemy

__all__ = [
    "Finding",
    "Unsafe",
    "describe",
    "find_unsafe",
    "is_mapped_type",
    "key_hint",
    "recognise",
    "spell",
    "steps_to",
]

type_name = "{0.__module__}.{0.__qualname__}".format


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unsafe:
    """A kind of thing that cannot cross.

    Attributes:
        thing: What it is, in words.
        code: The rule that it breaks.
        remedy: What to write instead.
    """

    thing: str
    code: str
    remedy: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something unsafe inside a value.

    Attributes:
        kind: What it is and what to do.
        steps: The way to it from the value, one string per step: ``("[2]", ".owner")``.
        value: The thing itself.
    """

    kind: Unsafe
    steps: tuple[str, ...]
    value: object


_OWN_SESSION = "the task gets a session of its own as its first parameter, injected: leave this one out of the call"
_SESSION = Unsafe(thing="a database session", code="AC101", remedy=_OWN_SESSION)
_SESSION_FACTORY = Unsafe(thing="a factory of database sessions", code="AC101", remedy=_OWN_SESSION)
_CONNECTION = Unsafe(
    thing="a database connection",
    code="AC105",
    remedy="the task gets a session of its own as its first parameter; `session.connection()` is its connection",
)
_TRANSACTION = Unsafe(thing="a database transaction", code="AC105", remedy=_CONNECTION.remedy)
_CURSOR = Unsafe(
    thing="a database cursor",
    code="AC105",
    remedy="run the query in the task, in its own session, or fetch the values here and pass them",
)
_RESULT = Unsafe(
    thing="a query's result",
    code="AC105",
    remedy="fetch it here and pass plain values, or run the query in the task, in its own session",
)
_ROW = Unsafe(
    thing="a row of a query's result",
    code="AC109",
    remedy="pass the values the task needs, such as `row.id`, or `dict(row._mapping)` for all of them",
)
_MAPPED = Unsafe(thing="a mapped instance", code="AC102", remedy="")  # its remedy names the class and its key
_REQUEST = Unsafe(
    thing="the request",
    code="AC109",
    remedy="it ends before the task starts: read what the task needs (`request.url.path`, `await request.json()`) "
    "and pass that",
)
_RESPONSE = Unsafe(
    thing="a response", code="AC109", remedy="it is sent before the task starts: pass the data that it was made from"
)
_WEBSOCKET = Unsafe(
    thing="a web socket",
    code="AC109",
    remedy="it lives in this process only: pass an id, and let the endpoint that holds the socket send the news",
)
_UPLOAD = Unsafe(
    thing="an upload",
    code="AC109",
    remedy="its file is closed when the request ends: read the upload first, store it, pass its path",
)
_BACKGROUND = Unsafe(
    thing="the request's background tasks",
    code="AC109",
    remedy="a task asks for further tasks with `db.after_commit(session, …)` on its own session",
)
_FILE = Unsafe(thing="an open file", code="AC109", remedy="close it and pass its path: the task opens it again")
_LOCK = Unsafe(
    thing="a lock or another thing of this process's threads",
    code="AC109",
    remedy="the task may run in another process: lock a row in the database instead (`with_for_update`)",
)
_GENERATOR = Unsafe(
    thing="a generator or iterator", code="AC109", remedy="it can be read once, here: pass `list(…)` of it"
)
_COROUTINE = Unsafe(
    thing="a coroutine or future", code="AC109", remedy="await it before the hand-over and pass what it returns"
)
_SOCKET = Unsafe(thing="a socket", code="AC109", remedy="pass the address: the task opens a connection of its own")
_HANDLE = Unsafe(thing="aftercommit's own database object", code="AC105", remedy=_CONNECTION.remedy)

# By the module's first name and the class's, anywhere among the bases: nothing of these has to be imported.
_BY_NAME: dict[str, tuple[tuple[frozenset[str], Unsafe], ...]] = {
    "sqlalchemy": (
        (frozenset({"Session", "AsyncSession", "scoped_session", "async_scoped_session", "Query"}), _SESSION),
        (frozenset({"sessionmaker", "async_sessionmaker"}), _SESSION_FACTORY),
        (
            frozenset({"SessionTransaction", "AsyncSessionTransaction", "Transaction", "AsyncTransaction"}),
            _TRANSACTION,
        ),
        (
            frozenset(
                {
                    "Connection",
                    "AsyncConnection",
                    "Engine",
                    "AsyncEngine",
                    "AdaptedConnection",
                    "ManagesConnection",
                    "Pool",
                    "_ConnectionFairy",
                }
            ),
            _CONNECTION,
        ),
        (frozenset({"AsyncAdapt_dbapi_cursor", "AsyncAdapt_dbapi_ss_cursor"}), _CURSOR),
        (frozenset({"Result", "FilterResult", "ResultInternal", "CursorResult"}), _RESULT),
        (frozenset({"Row", "BaseRow", "RowMapping"}), _ROW),
    ),
    "starlette": (
        (frozenset({"WebSocket"}), _WEBSOCKET),
        (frozenset({"Request", "HTTPConnection", "State"}), _REQUEST),
        (frozenset({"Response"}), _RESPONSE),
        (frozenset({"UploadFile", "FormData"}), _UPLOAD),
        (frozenset({"BackgroundTask", "BackgroundTasks"}), _BACKGROUND),
    ),
    "aftercommit": ((frozenset({"AfterCommit"}), _SESSION), (frozenset({"Database"}), _HANDLE)),
    "tempfile": ((frozenset({"_TemporaryFileWrapper", "SpooledTemporaryFile"}), _FILE),),
    "_thread": ((frozenset({"lock", "LockType", "RLock", "_local"}), _LOCK),),
    "threading": (
        (
            frozenset({"Thread", "Condition", "Event", "Semaphore", "Barrier", "Timer", "local", "_RLock"}),
            _LOCK,
        ),
    ),
    "multiprocessing": ((frozenset({"SemLock", "BaseProcess", "BaseManager", "Event", "Condition"}), _LOCK),),
    "asyncio": (
        (frozenset({"Lock", "Event", "Condition", "Semaphore", "Barrier", "Queue", "AbstractEventLoop"}), _LOCK),
        (frozenset({"Future", "Task"}), _COROUTINE),
        (frozenset({"StreamReader", "StreamWriter", "BaseTransport"}), _SOCKET),
    ),
    "_asyncio": ((frozenset({"Future", "Task"}), _COROUTINE),),
    "concurrent": (
        (frozenset({"Future"}), _COROUTINE),
        (frozenset({"Executor"}), _LOCK),
    ),
    "queue": ((frozenset({"Queue"}), _LOCK),),
    "_queue": ((frozenset({"SimpleQueue"}), _LOCK),),
    "_contextvars": ((frozenset({"Context", "Token"}), _LOCK),),
    "socket": ((frozenset({"socket"}), _SOCKET),),
    "_socket": ((frozenset({"socket"}), _SOCKET),),
}
_BY_NAME["fastapi"] = _BY_NAME["starlette"]

_DRIVERS = frozenset(
    [
        "sqlite3",
        "_sqlite3",
        "aiosqlite",
        "psycopg",
        "psycopg_binary",
        "psycopg_pool",
        "psycopg2",
        "asyncpg",
        "pg8000",
        "pymysql",
        "MySQLdb",
        "mysql",
        "asyncmy",
        "aiomysql",
        "oracledb",
        "pyodbc",
        "apsw",
        "duckdb",
    ]
)
_BY_BASE: tuple[tuple[tuple[type, ...], Unsafe], ...] = (
    ((io.IOBase,), _FILE),
    ((types.GeneratorType, types.AsyncGeneratorType), _GENERATOR),
    ((types.CoroutineType,), _COROUTINE),
)

# Nothing can hide in these.
_ATOMS = frozenset(
    {
        int, str, float, bool, bytes, bytearray, complex, type(None), type(Ellipsis), type, range, memoryview,
        dt.datetime, dt.date, dt.time, dt.timedelta, decimal.Decimal, uuid.UUID, re.Pattern,
        types.ModuleType, types.BuiltinFunctionType, pydantic.SecretStr, pydantic.SecretBytes,
    }
)  # fmt: skip
_ATOM_BASES = (
    type, Enum, dt.date, dt.time, dt.tzinfo, uuid.UUID, pathlib.PurePath, logging.Logger, logging.LoggerAdapter,
    ipaddress.IPv4Address, ipaddress.IPv6Address, types.ModuleType,
)  # fmt: skip

_seen_types: weakref.WeakKeyDictionary[type, Unsafe | None] = weakref.WeakKeyDictionary()

# More objects than this are never looked at: a payload that large is refused for its size, and what else is reached
# (a closure over half of an application) cannot be written as JSON either.
_MOST_OBJECTS = 200_000

_WRITTEN_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def recognise(cls: type) -> Unsafe | None:
    """Return what makes instances of *cls* unsafe, None if nothing does by itself (mapped classes: see below)."""
    try:
        return _seen_types[cls]
    except KeyError:
        found = _seen_types[cls] = _recognise(cls)
        return found


def _recognise(cls: type) -> Unsafe | None:
    named = next((kind for base in cls.__mro__ for kind in _by_name(base)), None)
    based = next((kind for bases, kind in _BY_BASE if issubclass(cls, bases)), None)
    if named or based:
        return named or based
    if hasattr(cls, "__next__") or hasattr(cls, "__anext__"):
        return _GENERATOR
    return _COROUTINE if hasattr(cls, "__await__") else None


def _by_name(base: type) -> Iterator[Unsafe]:
    name = base.__name__
    package = (getattr(base, "__module__", None) or "").partition(".")[0]
    yield from (kind for names, kind in _BY_NAME.get(package, ()) if name in names)
    if package in _DRIVERS or name.startswith("AsyncAdapt_"):
        lowered = name.lower()
        if "cursor" in lowered:
            yield _CURSOR
        if "connection" in lowered or lowered.endswith("pool"):
            yield _CONNECTION
        if "transaction" in lowered:
            yield _TRANSACTION


def is_mapped_type(cls: object) -> bool:
    """Tell whether *cls* is a class mapped by SQLAlchemy, in whatever style."""
    # The attribute is SQLAlchemy's mark; asking for it first keeps `inspect` away from every other class.
    return (
        isinstance(cls, type)
        and hasattr(cls, "_sa_class_manager")
        and sqlalchemy.inspect(cls, raiseerr=False) is not None
    )


def key_hint(cls: type) -> str:
    """Return how to spell the key of an instance of mapped *cls*: ``order.id``, ``(line.order_id, line.number)``."""
    mapper: Any = sqlalchemy.inspect(cls)
    variable = re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", cls.__name__).lower()
    parts = [f"{variable}.{mapper.get_property_by_column(column).key}" for column in mapper.primary_key]
    return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"


def find_unsafe(value: object, *, rows: tuple[type, ...] = ()) -> Finding | None:
    """Return the unsafe thing nearest to the surface of *value*, None if there is none.

    Args:
        value: Anything; cycles are no matter.
        rows: Mapped classes whose instances may stand in this value: they cross by reference.
    """
    for steps, thing in _walk(value):
        cls = type(thing)
        kind = recognise(cls)
        if kind is not None:
            return Finding(kind=kind, steps=_unroll(steps), value=thing)
        if is_mapped_type(cls) and not isinstance(thing, rows):
            remedy = (
                f"annotate a parameter of its own with the class (`{variable_hint(cls)}: {cls.__name__}`) and pass the "
                f"row itself: only its key crosses; or pass the key, `{key_hint(cls)}`"
            )
            return Finding(kind=dataclasses.replace(_MAPPED, remedy=remedy), steps=_unroll(steps), value=thing)
    return None


def steps_to(value: object, target: object) -> tuple[str, ...]:
    """Return the way from *value* to *target* in it, nothing where there is none."""
    return next((_unroll(steps) for steps, thing in _walk(value) if thing is target), ())


def spell(parameter: str, steps: tuple[str, ...]) -> str:
    """Return the path as a user would write it: ``items[2].owner``."""
    return parameter + "".join(steps)


def describe(value: object) -> str:
    """Return what *value* is by its type, never its contents: they may be secret."""
    cls = type(value)
    return f"`{cls.__qualname__}`" if cls.__module__ == "builtins" else f"`{type_name(cls)}`"


def variable_hint(cls: type) -> str:
    """Return what a variable for an instance of mapped *cls* would be called: ``file_record``."""
    return key_hint(cls).lstrip("(").partition(".")[0]


# A step knows the one before it: spelled out only when there is something to tell.
_Steps = tuple[Any, str] | None


def _unroll(steps: _Steps) -> tuple[str, ...]:
    found: list[str] = []
    while steps is not None:
        steps, step = steps
        found.append(step)
    return tuple(reversed(found))


def _walk(value: object) -> Iterator[tuple[_Steps, object]]:
    """Visit *value* and everything in it that is not plain, each once, nearest first."""
    if type(value) in _ATOMS:
        return
    visited = {id(value)}
    waiting: deque[tuple[_Steps, object]] = deque([(None, value)])
    while waiting:
        steps, thing = waiting.popleft()
        if isinstance(thing, _ATOM_BASES):
            continue
        yield steps, thing
        for step, child in _children(thing):
            if type(child) in _ATOMS or id(child) in visited:
                continue
            if len(visited) >= _MOST_OBJECTS:
                return
            # What is visited stays alive: it hangs on `value`, or is a cell's or a slot's content that does.
            visited.add(id(child))
            waiting.append(((steps, step), child))


def _children(thing: object) -> Iterator[tuple[str, object]]:
    cls = type(thing)
    if is_mapped_type(cls):
        return  # its attributes are its session's affair
    if isinstance(thing, (dict, list, tuple, deque, set, frozenset)):
        yield from _contained(thing)
    elif isinstance(thing, functools.partial):
        yield ".func", thing.func
        yield from ((f".args[{index}]", child) for index, child in enumerate(thing.args))
        yield from ((f".keywords[{name!r}]", child) for name, child in thing.keywords.items())
    elif isinstance(thing, types.MethodType):
        yield ".__self__", thing.__self__
        yield ".__func__", thing.__func__
    elif isinstance(thing, types.FunctionType):
        yield from _captured(thing)
    yield from _attributes(thing, cls)


_Container = dict[Any, Any] | list[Any] | tuple[Any, ...] | deque[Any] | set[Any] | frozenset[Any]


def _contained(thing: _Container) -> Iterator[tuple[str, object]]:
    """What a container holds, but for plain values: they are most of it."""
    if isinstance(thing, dict):
        for key, child in dict.items(thing):
            if type(key) not in _ATOMS:
                yield f"[{describe(key)}]", key
            if type(child) not in _ATOMS:
                yield _subscript(key), child
    elif isinstance(thing, (set, frozenset)):
        yield from ((f"{{{describe(child)}}}", child) for child in thing if type(child) not in _ATOMS)
    else:
        names = getattr(type(thing), "_fields", None) if isinstance(thing, tuple) else None
        for index, child in enumerate(thing):
            if type(child) not in _ATOMS:
                yield (f".{names[index]}" if names else f"[{index}]"), child


def _captured(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f".<closure>.{name}", cell.cell_contents
        except ValueError:  # an empty cell: the name is not bound yet
            continue
    for index, child in enumerate(function.__defaults__ or ()):
        yield f".__defaults__[{index}]", child
    for name, child in (function.__kwdefaults__ or {}).items():
        yield f".__kwdefaults__[{name!r}]", child


def _attributes(thing: object, cls: type) -> Iterator[tuple[str, object]]:
    found: list[Mapping[str, object] | None] = []
    if isinstance(thing, pydantic.BaseModel):
        found += [thing.__pydantic_extra__, thing.__pydantic_private__]
    with contextlib.suppress(AttributeError):  # it has slots only
        found.append(object.__getattribute__(thing, "__dict__"))
    for attributes in found:
        if isinstance(attributes, Mapping):
            yield from ((f".{name}", child) for name, child in attributes.items())
    yield from _slots(thing, cls)


def _slots(thing: object, cls: type) -> Iterator[tuple[str, object]]:
    if not cls.__flags__ & _WRITTEN_IN_PYTHON:
        return
    for base in cls.__mro__:
        # A slot is a place in memory: extension types that only claim a base (asyncpg's UUID) do not have it, and
        # reading it would crash.
        if "__slots__" not in base.__dict__ or base.__basicsize__ > cls.__basicsize__:
            continue
        for name, descriptor in base.__dict__.items():
            # Slots only: a property would run code. Their names may be mangled, so they are not read off `__slots__`.
            if isinstance(descriptor, types.MemberDescriptorType):
                try:
                    yield f".{name}", descriptor.__get__(thing, cls)
                except AttributeError:  # never set
                    continue


def _subscript(key: object) -> str:
    if isinstance(key, int) or (isinstance(key, str) and len(key) <= 40):  # noqa: PLR2004 - longer ones may be text
        return f"[{key!r}]"
    return f"[{describe(key)}]"
