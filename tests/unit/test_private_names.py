"""A release of SQLAlchemy that has changed a name that is leant on is refused by that name, at the first engine."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, Engine
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.engine import ChunkedIteratorResult, CursorResult
from sqlalchemy.event import base as event_base
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.sql.selectable import GenerativeSelect

from aftercommit import Database
from aftercommit.errors import ConfigurationError
from aftercommit.pools.taking import TakeableConnection
from aftercommit.watch import private_names

Rename = Callable[[pytest.MonkeyPatch], None]


def is_hidden(name: str, *functions: str) -> Rename:
    """What *functions* of ours look at has lost a name."""

    def rename(patch: pytest.MonkeyPatch) -> None:
        for function in functions:
            original = getattr(private_names, function)
            patch.setattr(private_names, function, lambda thing, original=original: original(Hiding(thing, name)))

    return rename


class Hiding:
    """Something of SQLAlchemy's, without one of its names."""

    def __init__(self, thing: Any, name: str) -> None:
        self._thing = thing
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        found = getattr(self._thing, name)
        if name == "get_nested_transaction":
            return lambda: None if (nested := found()) is None else Hiding(nested, self._name)
        return found


def connections_say_otherwise_whose_they_are(patch: pytest.MonkeyPatch) -> None:
    """What stands beside a session's connection means something else."""
    original = SessionTransaction._connection_for_bind

    def connect(self: Any, *args: Any, **kwargs: Any) -> Any:
        connection = original(self, *args, **kwargs)
        for bind, (connected, transaction, should_commit, close) in dict(self._connections).items():
            self._connections[bind] = (connected, transaction, not should_commit, close)
        return connection

    patch.setattr(SessionTransaction, "_connection_for_bind", connect)


def who_commits_is_not_said(patch: pytest.MonkeyPatch) -> None:
    """The step that a transaction is in has another name."""
    patch.setattr(private_names, "_COMMITTING", frozenset({"another"}))


def listeners_are_in_a_list_of_another_kind(patch: pytest.MonkeyPatch) -> None:
    """The list of a session's listeners cannot be copied as it was."""
    patch.setattr(private_names, "deque", type("Another", (), {}))


def levels_are_kept_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """A dialect knows the level of ``create_engine`` by another name."""
    original = private_names.isolation_level_of

    def look(engine: Engine) -> Any:
        hiding: Any = SimpleNamespace(dialect=Hiding(engine.dialect, "_on_connect_isolation_level"))
        return original(hiding)

    patch.setattr(private_names, "isolation_level_of", look)


def connections_have_one_class(patch: pytest.MonkeyPatch) -> None:
    """An engine makes its connections without asking for a class."""
    patch.setattr(Engine, "_connection_cls", property(lambda _: Connection, lambda *_: None), raising=False)


def connections_are_taken_past_the_engine(patch: pytest.MonkeyPatch) -> None:
    """A connection is taken from the pool, and not by the engine's method."""
    original = Connection.__init__

    def init(self: Any, engine: Any, connection: Any = None, **kwargs: Any) -> None:
        original(self, engine, connection or engine.pool.connect(), **kwargs)

    patch.setattr(Connection, "__init__", init)


def limits_have_another_name(patch: pytest.MonkeyPatch) -> None:
    """A statement keeps its limit elsewhere."""
    patch.setattr(GenerativeSelect, "limit", lambda self, _limit: self)


def asyncpg_begins_otherwise(patch: pytest.MonkeyPatch) -> None:
    """SQLAlchemy's connection of asyncpg's begins by another method."""
    patch.delattr(asyncpg.AsyncAdapt_asyncpg_connection, "_start_transaction")


def statements_meet_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """What ``execute``, ``scalar`` and ``scalars`` meet in has another name."""
    original = Session._execute_internal
    patch.setattr(Session, "execute", original)
    patch.delattr(Session, "_execute_internal")


def binds_are_found_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """Sessions look for their bind in another way."""
    original = Session._execute_internal

    def execute(self: Session, statement: Any, **kwargs: Any) -> Any:
        return original(self, statement, **{**kwargs, "bind_arguments": {"bind": self.bind}})

    get_bind = Session.get_bind
    patch.setattr(Session, "_execute_internal", execute)
    patch.setattr(
        Session,
        "__getattribute__",
        lambda self, name: partial(get_bind, self) if name == "get_bind" else object.__getattribute__(self, name),
    )


def dispatch_is_kept_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """An object's dispatch is not among its attributes."""
    original = event_base.dispatcher.__get__

    def get(self: Any, instance: Any, owner: type) -> Any:
        found = original(self, instance, owner)
        if isinstance(instance, Session):
            vars(instance).pop("dispatch", None)
        return found

    patch.setattr(event_base.dispatcher, "__get__", get)


def chunks_have_another_name(patch: pytest.MonkeyPatch) -> None:
    """A result makes its rows of what is called otherwise."""
    original = ChunkedIteratorResult.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.pieces = self.__dict__.pop("chunks")

    patch.setattr(ChunkedIteratorResult, "__init__", init)


def strategies_have_another_name(patch: pytest.MonkeyPatch) -> None:
    """A result fetches its rows past the attribute."""
    for name in ("_fetchone_impl", "_fetchmany_impl", "_fetchall_impl"):
        original = getattr(CursorResult, name)

        def fetch(self: Any, *args: Any, original: Any = original) -> Any:
            self.cursor_strategy = vars(self.cursor_strategy).get("strategy", self.cursor_strategy)
            return original(self, *args)

        patch.setattr(CursorResult, name, fetch)


def listeners_are_kept_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """A dialect's listeners cannot be looked at."""
    patch.setattr(sqlalchemy.engine.default.DefaultDialect, "dispatch", object())


def what_is_pooled_takes_no_attributes(patch: pytest.MonkeyPatch) -> None:
    """What the pool gives out forgets what is set on it."""

    class Forgetful(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            """Nothing."""

    patch.setattr(private_names, "vars", lambda _: Forgetful(), raising=False)


CHANGES: dict[str, list[Rename]] = {
    "SessionTransaction._connections": [
        is_hidden("_connections", "connections_of"),
        connections_say_otherwise_whose_they_are,
    ],
    "SessionTransaction._current_fn": [is_hidden("_current_fn", "is_committing"), who_commits_is_not_said],
    "NestedTransaction._savepoint, ._previous_nested": [
        is_hidden("_savepoint", "open_savepoints"),
        is_hidden("_previous_nested", "open_savepoints"),
    ],
    "Session.dispatch.*.listeners": [listeners_are_in_a_list_of_another_kind],
    "Dialect._on_connect_isolation_level": [levels_are_kept_elsewhere],
    "Engine._connection_cls": [connections_have_one_class],
    "Engine.__dict__['raw_connection'], ['dispatch']": [connections_are_taken_past_the_engine],
    "Select._limit_clause, ._offset_clause": [limits_have_another_name],
    "Session._execute_internal": [statements_meet_elsewhere],
    "Session.get_bind, called before each begin": [binds_are_found_elsewhere],
    "Session.__dict__['dispatch']": [dispatch_is_kept_elsewhere],
    "ChunkedIteratorResult.chunks, .iterator, ._yield_per": [chunks_have_another_name],
    "CursorResult.cursor_strategy": [strategies_have_another_name],
    "Dialect.dispatch": [listeners_are_kept_elsewhere],
    "PoolProxiedConnection.__dict__, ConnectionPoolEntry.__dict__": [what_is_pooled_takes_no_attributes],
    "AsyncAdapt_asyncpg_connection._start_transaction": [asyncpg_begins_otherwise],
}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """A process in which no engine was opened yet."""
    private_names.check.cache_clear()
    yield
    private_names.check.cache_clear()


def test_every_name_is_tried() -> None:
    """Each has a change below that its trial must find."""
    assert [each.name for each in private_names.NAMES] == list(CHANGES)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "change"), [pytest.param(name, each, id=name) for name, changes in CHANGES.items() for each in changes]
)
def test_a_name_that_was_changed_is_found_as_the_first_engine_opens(
    name: str, change: Rename, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names it, what it is used for, and the release of SQLAlchemy's."""
    (tried,) = [each for each in private_names.NAMES if each.name == name]
    db = Database(f"sqlite:///{tmp_path}/a.db" if tried.driver is None else f"postgresql+{tried.driver}://host/a")
    change(monkeypatch)

    with pytest.raises(ConfigurationError) as caught:
        db.engine() if tried.driver is None else db.async_engine()
    monkeypatch.undo()

    assert str(caught.value).startswith(f"SQLAlchemy {sqlalchemy.__version__} has changed what aftercommit leans on: ")
    assert f"{name}, by which {tried.purpose}" in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_the_release_at_hand_has_them_all(tmp_path: Path) -> None:
    """They are tried once in a process, and a driver's own once it is used."""
    db = Database(f"sqlite:///{tmp_path}/a.db")

    db.engine()
    db.engine("default")
    of_sqlite = private_names.check.cache_info().misses
    Database("postgresql+asyncpg://host/a").async_engine()

    assert (of_sqlite, private_names.check.cache_info().misses) == (2, 3)


def test_a_connection_can_be_taken_where_overrides_are_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sees the commit instead takes nothing away from a run that hangs."""
    monkeypatch.setattr(private_names, "calls_overrides", lambda: False)
    db = Database(f"sqlite:///{tmp_path}/a.db")

    with db.engine().connect() as connection:
        assert isinstance(connection, TakeableConnection)
