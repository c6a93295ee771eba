"""Every name of SQLAlchemy's that its documentation does not promise, and that this library leans on; each is tried.

When the first engine opens, each is tried out once, and a release of SQLAlchemy's that has it no more is refused with
an error that names it: what is leant on for the safety of data must not fail without a word.

First come the functions by which the commit is read, which are tried themselves; then a trial for each name that is
used where it belongs. What ``calls_overrides`` tries is refused nowhere: without it, public events do the same, and
cost more.
"""

from __future__ import annotations

import inspect
from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy
from sqlalchemy import Connection, create_engine, event, select, text
from sqlalchemy.engine import ChunkedIteratorResult
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.orm import Session

from aftercommit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import Engine
    from sqlalchemy.engine.base import NestedTransaction
    from sqlalchemy.orm import SessionTransaction

__all__ = [
    "NAMES",
    "PrivateName",
    "Taken",
    "calls_overrides",
    "check",
    "connections_of",
    "is_committing",
    "isolation_level_of",
    "open_savepoints",
    "without_iteration",
]

_COMMITTING: Final = frozenset({"commit", "_prepare_impl"})


class Taken(NamedTuple):
    """A connection of a session's transaction.

    Attributes:
        connection: The connection.
        is_own: Whether the session commits it; False where it has joined somebody else's transaction.
    """

    connection: Connection
    is_own: bool


def connections_of(root: SessionTransaction) -> list[Taken]:
    """The connections of a session's outermost transaction, in the order in which it took them."""
    found: dict[Connection, Taken] = {}
    for connection, transaction, should_commit, _ in root._connections.values():  # noqa: SLF001  # see above
        is_root = connection.get_transaction() is transaction
        found[connection] = Taken(connection, is_own=bool(should_commit) and is_root)
    return list(found.values())


def is_committing(root: SessionTransaction) -> bool:
    """Whether the session's outermost transaction is being committed by the session."""
    function = root._current_fn  # noqa: SLF001  # see above
    return function is not None and function.__name__ in _COMMITTING


def open_savepoints(connection: Connection) -> tuple[str, ...]:
    """Names of the savepoints that are open on *connection*, whoever made them."""
    names: list[str] = []
    nested: NestedTransaction | None = connection.get_nested_transaction()
    while nested is not None:
        names.append(nested._savepoint)  # noqa: SLF001  # see above
        nested = nested._previous_nested  # noqa: SLF001  # see above
    return tuple(names)


def without_iteration(session: Session, names: Iterable[str]) -> None:
    """Let listeners be added to *session* even from inside of one: the list at hand is left to whoever reads it."""
    for name in names:
        listeners: Any = getattr(session.dispatch, name)
        if isinstance(getattr(listeners, "listeners", None), deque):
            listeners.listeners = deque(listeners.listeners)


def isolation_level_of(engine: Engine | Connection) -> str | None:
    """The isolation level that ``create_engine`` was given; None where it was given none."""
    level: str | None = getattr(engine.dialect, "_on_connect_isolation_level", None)
    return level


@cache
def calls_overrides() -> bool:
    """Whether this SQLAlchemy calls what ``commits.WatchedConnection`` overrides, when it should."""
    seen: list[str] = []

    class Probe(Connection):
        def _commit_impl(self) -> None:
            seen.append("commit")
            super()._commit_impl()

        def _rollback_impl(self) -> None:
            seen.append("rollback")
            super()._rollback_impl()

        def _rollback_to_savepoint_impl(self, name: str) -> None:
            seen.append("rollback to savepoint")
            super()._rollback_to_savepoint_impl(name)

    engine = create_engine("sqlite://")
    engine._connection_cls = Probe  # noqa: SLF001  # that is what is tried
    try:
        with engine.connect() as connection:
            for step in ("commit", "rollback", "rollback to savepoint"):
                root = connection.begin()
                if step == "rollback to savepoint":
                    connection.begin_nested().rollback()
                (root.commit if step == "commit" else root.rollback)()
    except (AttributeError, TypeError):
        return False
    finally:
        engine.dispose()
    return seen == ["commit", "rollback", "rollback to savepoint", "rollback"]


# --- the trials -----------------------------------------------------------------------------------------------------


class PrivateName(NamedTuple):
    """A name that SQLAlchemy may change without saying so.

    Attributes:
        name: The name, as one would look for it in the source.
        purpose: What it is used for.
        works: Whether it is there and does what it is used for, tried on an engine in memory.
        driver: For which driver's engines it is used; None for all.
    """

    name: str
    purpose: str
    works: Callable[[Engine], bool]
    driver: str | None = None


def _statements_meet(engine: Engine) -> bool:
    seen: list[Any] = []

    class Probe(Session):
        def _execute_internal(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(args[0])
            return super()._execute_internal(*args, **kwargs)

    one = text("SELECT 1")
    with Probe(engine) as session:
        session.execute(one)
        session.scalar(one)
        session.scalars(one)
    return seen == [one] * 3


def _binds_are_asked_for(engine: Engine) -> bool:
    seen: list[Any] = []

    class Probe(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            seen.append("bind")
            return super().get_bind(*args, **kwargs)

    with Probe(engine) as session:
        event.listen(session, "after_begin", lambda *_: seen.append("begin"))
        session.execute(text("SELECT 1"))
    return seen == ["bind", "begin"]


def _sessions_keep_dispatch(_engine: Engine) -> bool:
    session = Session()
    is_late = "dispatch" not in vars(session)
    event.listen(session, "after_flush", lambda *_: None)
    return is_late and "dispatch" in vars(session)


def _rows_come_in_chunks(_engine: Engine) -> bool:
    result: Any = ChunkedIteratorResult(SimpleResultMetaData(["n"]), lambda _size: iter([[(1,)], [(2,)]]))
    is_plain = result._yield_per is None  # noqa: SLF001  # that is what is tried
    chunks = result.chunks
    result.chunks = lambda size: ([row for row in chunk if row != (1,)] for chunk in chunks(size))
    result.iterator = (row for chunk in result.chunks(None) for row in chunk)
    result.yield_per(5)
    is_known = result._yield_per == 5  # noqa: SLF001, PLR2004  # that is what is tried
    return is_plain and is_known and [tuple(row) for row in result] == [(2,)]


def _streams_fetch_by_strategy(engine: Engine) -> bool:
    fetched: list[str] = []

    class Probe:
        def __init__(self, strategy: Any) -> None:
            self.strategy = strategy

        def __getattr__(self, name: str) -> Any:
            fetched.append(name)
            return getattr(self.strategy, name)

    with engine.connect() as connection:
        result: Any = connection.execute(text("SELECT 1 UNION SELECT 2")).yield_per(1)
        is_buffered = isinstance(result.cursor_strategy, BufferedRowCursorFetchStrategy)
        result.cursor_strategy = Probe(result.cursor_strategy)
        rows = [result.fetchone(), *result.fetchmany(1), *result.fetchall()]
    return is_buffered and len(rows) == 2 and {"fetchone", "fetchmany", "fetchall"} <= set(fetched)  # noqa: PLR2004


def _listeners_are_counted(engine: Engine) -> bool:
    def listener(*_: Any) -> None:
        """Nothing."""

    dialect: Any = engine.dialect
    before = len(dialect.dispatch.do_execute)
    event.listen(engine, "do_execute", listener)
    listeners = list(dialect.dispatch.do_execute)
    return len(listeners) == before + 1 and listeners[-1] is listener


def _take_attributes(engine: Engine) -> bool:
    seen: list[Any] = []

    def note(_connection: Any, entry: Any, pooled: Any) -> None:
        vars(entry)["_aftercommit_probe"] = vars(pooled)["_aftercommit_probe"] = 1
        seen.append(pooled)

    event.listen(engine, "checkout", note)
    with engine.connect() as connection:
        pooled = connection.connection
        vars(connection)["_aftercommit_probe"] = 1
        return seen == [pooled] and vars(pooled).get("_aftercommit_probe") == 1


def _transactions_keep_connections(engine: Engine) -> bool:
    with Session(engine) as session:
        connection = session.connection()
        root = session.get_transaction()
        own = [] if root is None else connections_of(root)
    with engine.connect() as outer, outer.begin(), Session(outer, join_transaction_mode="create_savepoint") as joined:
        joined.connection()
        root = joined.get_transaction()
        theirs = [] if root is None else connections_of(root)
    return own == [Taken(connection, is_own=True)] and theirs == [Taken(outer, is_own=False)]


def _transactions_say_who_commits(engine: Engine) -> bool:
    seen: list[bool] = []
    with Session(engine) as session:
        root = session.get_transaction() or session.begin()
        event.listen(session.connection(), "commit", lambda _: seen.append(is_committing(root)))
        seen.append(is_committing(root))
        session.commit()
    with Session(engine) as session:
        root = session.begin()
        connection = session.connection()
        event.listen(connection, "commit", lambda _: seen.append(is_committing(root)))
        outermost = connection.get_transaction()
        if outermost is not None:
            outermost.commit()
    return seen == [False, True, False]


def _savepoints_have_names(engine: Engine) -> bool:
    seen: list[str] = []

    def note(_connection: object, name: str, _context: object) -> None:
        seen.append(name)

    with engine.connect() as connection:
        event.listen(connection, "rollback_savepoint", note)
        outer, inner = connection.begin_nested(), connection.begin_nested()
        names = open_savepoints(connection)
        inner.rollback()
        left = open_savepoints(connection)
        outer.rollback()
        return len(set(seen)) == 2 and names == tuple(seen) and left == names[1:]  # noqa: PLR2004


def _listeners_may_add_listeners(engine: Engine) -> bool:
    seen: list[str] = []

    def add(session: Session, *_: Any) -> None:
        seen.append("first")
        without_iteration(session, ["after_begin"])
        event.listen(session, "after_begin", lambda *_: seen.append("added"))

    with Session(engine) as session:
        event.listen(session, "after_begin", add)
        session.connection()
        session.rollback()
        session.connection()
    return seen == ["first", "first", "added"]


def _levels_are_kept(engine: Engine) -> bool:
    other = create_engine("sqlite://", isolation_level="AUTOCOMMIT")
    try:
        return isolation_level_of(engine) is None and isolation_level_of(other) == "AUTOCOMMIT"
    finally:
        other.dispose()


def _connections_have_a_class(engine: Engine) -> bool:
    class Probe(Connection):
        """Of another class."""

    engine._connection_cls = Probe  # noqa: SLF001  # that is what is tried
    with engine.connect() as connection:
        return isinstance(connection, Probe)


def _views_take_connections(engine: Engine) -> bool:
    seen: list[str] = []
    event.listen(engine, "engine_connect", lambda _: seen.append("heard"))
    view = engine.execution_options(probe=1)

    def take() -> Any:
        seen.append("taken")
        return engine.raw_connection()

    vars(view).update(dispatch=engine.dispatch, raw_connection=take)
    with view.connect() as connection:
        return seen == ["taken", "heard"] and connection.get_execution_options().get("probe") == 1


def _limits_can_be_seen(_engine: Engine) -> bool:
    plain, limited, later = select(1), select(1).limit(1), select(1).offset(1)
    limits = [each._limit_clause is not None for each in (plain, limited, later)]  # noqa: SLF001  # that is tried
    offsets = [each._offset_clause is not None for each in (plain, limited, later)]  # noqa: SLF001  # that is tried
    return (limits, offsets) == ([False, True, False], [False, False, True])


def _asyncpg_begins_by_hand(_engine: Engine) -> bool:
    from sqlalchemy.dialects.postgresql import asyncpg  # whoever has another driver does not need it

    begin: Any = asyncpg.AsyncAdapt_asyncpg_connection._start_transaction  # noqa: SLF001  # that is what is tried
    return inspect.iscoroutinefunction(begin) and list(inspect.signature(begin).parameters) == ["self"]


NAMES: Final = (
    PrivateName(
        "SessionTransaction._connections",
        "the connections that tasks wait for are found",
        _transactions_keep_connections,
    ),
    PrivateName(
        "SessionTransaction._current_fn", "a session's commit is told from one past it", _transactions_say_who_commits
    ),
    PrivateName(
        "NestedTransaction._savepoint, ._previous_nested",
        "tasks are dropped with their savepoint",
        _savepoints_have_names,
    ),
    PrivateName("Session.dispatch.*.listeners", "a listener may hand over", _listeners_may_add_listeners),
    PrivateName("Dialect._on_connect_isolation_level", "a hand-over in autocommit is refused", _levels_are_kept),
    PrivateName("Engine._connection_cls", "a connection is taken from a run that hangs", _connections_have_a_class),
    PrivateName(
        "Engine.__dict__['raw_connection'], ['dispatch']", "a run has its isolation level", _views_take_connections
    ),
    PrivateName("Select._limit_clause, ._offset_clause", "a batch refuses a limit", _limits_can_be_seen),
    PrivateName("Session._execute_internal", "a second user of a session is refused", _statements_meet),
    PrivateName("Session.get_bind, called before each begin", "a holder is named", _binds_are_asked_for),
    PrivateName("Session.__dict__['dispatch']", "a session's begin and flush are heard", _sessions_keep_dispatch),
    PrivateName("ChunkedIteratorResult.chunks, .iterator, ._yield_per", "rows are guarded", _rows_come_in_chunks),
    PrivateName("CursorResult.cursor_strategy", "streams are guarded", _streams_fetch_by_strategy),
    PrivateName("Dialect.dispatch", "a statement is told from the next", _listeners_are_counted),
    PrivateName(
        "PoolProxiedConnection.__dict__, ConnectionPoolEntry.__dict__",
        "a holder is noted",
        _take_attributes,
    ),
    PrivateName(
        "AsyncAdapt_asyncpg_connection._start_transaction",
        "what is sent past SQLAlchemy is rolled back with the rest",
        _asyncpg_begins_by_hand,
        driver="asyncpg",
    ),
)


@cache
def check(driver: str | None = None) -> None:
    """Try each name, once in a process.

    Args:
        driver: Whose own names are tried; None for those that are leant on whatever the driver.

    Raises:
        ConfigurationError: If the SQLAlchemy that is installed has one of them no more.
    """
    changed: list[PrivateName] = []
    reason: Exception | None = None
    for each in NAMES:
        if each.driver != driver:
            continue
        engine = create_engine("sqlite://")
        try:
            if not each.works(engine):
                changed.append(each)
        except Exception as exc:  # noqa: BLE001  # whatever comes of it, it does not work
            changed.append(each)
            reason = exc
        finally:
            engine.dispose()
    if changed:
        raise ConfigurationError(
            f"SQLAlchemy {sqlalchemy.__version__} has changed what aftercommit leans on: "
            + "; ".join(f"{each.name}, by which {each.purpose}" for each in changed)
            + ". It would fail there without a word. Use a release of SQLAlchemy that aftercommit names as supported, "
            "or a newer aftercommit."
        ) from reason
