"""What is not ours is left alone: importing aftercommit puts nothing on SQLAlchemy's classes."""

import subprocess
import sys
from pathlib import Path

import pytest

from aftercommit.commits import internals
from aftercommit.errors import ConfigurationError

PROGRAM = """
import sys
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

kinds = (Session, AsyncSession, Connection, Engine)


def heard():
    return {
        f"{kind.__name__}.{name}": len(getattr(kind.dispatch, name)._clslevel.get(kind, ()))
        for kind in (Session, Connection, Engine)
        for name in kind.dispatch._event_names
    }


before = [dict(vars(kind)) for kind in kinds], heard()
import aftercommit, aftercommit.fastapi, aftercommit.testing, aftercommit.events, aftercommit.batches
from aftercommit import Database, TaskRecord

db = Database("sqlite:///" + sys.argv[1])
with db.session() as session:
    session.execute(text("SELECT 1"))

assert ([dict(vars(kind)) for kind in kinds], heard()) == before
assert "Session.after_begin" in heard()

engine = create_engine("sqlite://")
with Session(engine) as session:
    connection = session.connection()
    session.execute(text("SELECT 1"))
    session.commit()
    ours = {name for name in {*vars(session), *vars(connection), *session.info} if "aftercommit" in str(name)}
    assert not ours, ours
"""


def test_importing_and_using_the_library_puts_nothing_on_sqlalchemy_s_classes(tmp_path: Path):
    """No listener on ``Session``, no method replaced, and nothing on a session that hands nothing over."""
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "test.db")], check=True)


@pytest.mark.parametrize("name", ["_connections", "_current_fn", "_savepoint", "_previous_nested"])
def test_a_private_name_that_means_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str):
    """A release of SQLAlchemy's that keeps these things elsewhere is refused, before a task could start too early."""
    internals.check.__wrapped__()

    with monkeypatch.context() as patch:
        for function in ("connections_of", "is_committing", "open_savepoints"):
            original = getattr(internals, function)

            def asked(thing: object, original=original) -> object:
                return original(_Hiding(thing, name))

            patch.setattr(internals, function, asked)
        with pytest.raises(ConfigurationError, match="does not know SQLAlchemy"):
            internals.check.__wrapped__()


class _Hiding:
    """Something of SQLAlchemy's, without one of its names."""

    def __init__(self, thing: object, name: str) -> None:
        self._thing = thing
        self._name = name

    def __getattr__(self, name: str) -> object:
        if name == self._name:
            raise AttributeError(name)
        found = getattr(self._thing, name)
        if name == "get_nested_transaction":
            return lambda: None if (nested := found()) is None else _Hiding(nested, self._name)
        return found
