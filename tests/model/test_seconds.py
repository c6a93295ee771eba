"""Second sessions on a run's connection, and a connection that is taken: effects stay what the record says."""

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aftercommit import Database
from tests.model.broken_seconds import BROKEN, BROKEN_ON_SQLITE
from tests.model.checking import Change, check, no_change
from tests.model.seconds import SecondsMachine


@pytest.fixture
def sqlite_db(sqlite_engine: Engine, sqlite_url: str) -> Iterator[dict[str, Any]]:
    """A database on SQLite, and what the machine needs beside it."""
    yield from _given(sqlite_engine, sqlite_url)


@pytest.fixture
def postgres_db(postgres_engine: Engine, postgres_url: str) -> Iterator[dict[str, Any]]:
    """The same on PostgreSQL."""
    yield from _given(postgres_engine, postgres_url)


def _given(engine: Engine, url: str) -> Iterator[dict[str, Any]]:
    # Nobody waits for SQLite's lock here.
    db = Database(url, engine_options={"connect_args": {"timeout": 1.0}} if "sqlite" in url else None)

    @db.task(name="task")
    def task(session: Session) -> list[int]:
        raise NotImplementedError

    outside = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    yield {"db": db, "task": task, "books_engine": engine, "outside": outside}
    outside.dispose()
    db.dispose()


def run(given: dict[str, Any], *, examples: int, change: Change = no_change) -> None:
    """Let everything happen."""
    check(SecondsMachine, examples=examples, change=change, **given)


def test_effects_are_what_the_record_says_on_sqlite(sqlite_db: dict[str, Any]):
    """Whatever works on its connection, whoever commits it, and when it is taken."""
    run(sqlite_db, examples=60)


def test_effects_are_what_the_record_says_on_postgresql(postgres_db: dict[str, Any]):
    """The same."""
    run(postgres_db, examples=60)


@pytest.mark.parametrize("broken", BROKEN_ON_SQLITE)
def test_the_model_catches_what_is_broken_on_sqlite(sqlite_db: dict[str, Any], broken: str):
    """Each way of fencing almost right is found out."""
    with pytest.raises(AssertionError, match=r"disagree|does not say so|without end|goes on"):
        run(sqlite_db, examples=2_000, change=BROKEN_ON_SQLITE[broken])


@pytest.mark.parametrize("broken", BROKEN)
def test_the_model_catches_what_is_broken_on_postgresql(postgres_db: dict[str, Any], broken: str):
    """The same."""
    with pytest.raises(AssertionError, match=r"disagree|does not say so|without end"):
        run(postgres_db, examples=2_000, change=BROKEN[broken])
