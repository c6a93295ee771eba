"""A release of SQLAlchemy that has changed a name that is leant on is refused by that name, at the first engine."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.engine import ChunkedIteratorResult, CursorResult
from sqlalchemy.event import base as event_base
from sqlalchemy.orm import Session

from aftercommit import Database
from aftercommit.errors import ConfigurationError
from aftercommit.watch import private_names

Rename = Callable[[pytest.MonkeyPatch], None]


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


CHANGES: dict[str, Rename] = {
    "Session._execute_internal": statements_meet_elsewhere,
    "Session.get_bind, called before each begin": binds_are_found_elsewhere,
    "Session.__dict__['dispatch']": dispatch_is_kept_elsewhere,
    "ChunkedIteratorResult.chunks, .iterator, ._yield_per": chunks_have_another_name,
    "CursorResult.cursor_strategy": strategies_have_another_name,
    "Dialect.dispatch": listeners_are_kept_elsewhere,
    "PoolProxiedConnection.__dict__, ConnectionPoolEntry.__dict__": what_is_pooled_takes_no_attributes,
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
@pytest.mark.parametrize("name", CHANGES)
def test_a_name_that_was_changed_is_found_as_the_first_engine_opens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names it, what it is used for, and the release of SQLAlchemy's."""
    (purpose,) = [each.purpose for each in private_names.NAMES if each.name == name]
    db = Database(f"sqlite:///{tmp_path}/a.db")
    CHANGES[name](monkeypatch)

    with pytest.raises(ConfigurationError) as caught:
        db.engine()
    monkeypatch.undo()

    assert str(caught.value).startswith(f"SQLAlchemy {sqlalchemy.__version__} has changed what aftercommit leans on: ")
    assert f"{name}, by which {purpose}" in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_the_release_at_hand_has_them_all(tmp_path: Path) -> None:
    """They are tried once in a process."""
    db = Database(f"sqlite:///{tmp_path}/a.db")

    db.engine()
    db.engine("default")

    assert private_names.check.cache_info().misses == 1
