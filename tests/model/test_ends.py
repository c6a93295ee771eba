"""Whole runs and their ``on_failure``: exact, always called, always at an end; what is almost right is caught."""

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aftercommit import Database, Retry
from tests.model.checking import Change, check, no_change
from tests.model.ends import BROKEN, BROKEN_ON_POSTGRESQL, EndsMachine


@pytest.fixture
def sqlite_db(sqlite_engine: Engine, sqlite_url: str) -> Iterator[dict[str, Any]]:
    """A database on SQLite, and what the machine needs beside it."""
    yield from _given(sqlite_engine, sqlite_url)


@pytest.fixture
def postgres_db(postgres_engine: Engine, postgres_url: str) -> Iterator[dict[str, Any]]:
    """The same on PostgreSQL."""
    yield from _given(postgres_engine, postgres_url)


def _given(engine: Engine, url: str) -> Iterator[dict[str, Any]]:
    db = Database(url)

    def failed(session: Session, error: BaseException) -> None:
        EndsMachine.playing.failed(session)

    @db.task(name="task", retry=Retry(attempts=3), on_failure=failed)
    def task(session: Session) -> None:
        EndsMachine.playing.work(session)

    outside = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    yield {"db": db, "task": task, "books_engine": engine, "outside": outside}
    outside.dispose()
    db.dispose()


def run(given: dict[str, Any], *, examples: int, change: Change = no_change) -> None:
    """Let everything happen."""
    check(EndsMachine, examples=examples, steps=20, change=change, **given)


def test_the_books_balance_on_sqlite(sqlite_db: dict[str, Any]):
    """However a function and its ``on_failure`` end."""
    run(sqlite_db, examples=30)


def test_the_books_balance_on_postgresql(postgres_db: dict[str, Any]):
    """The same, with others in between, and statements that the server cancels."""
    run(postgres_db, examples=30)


@pytest.mark.parametrize("broken", BROKEN)
def test_the_model_catches_what_is_broken_on_sqlite(sqlite_db: dict[str, Any], broken: str):
    """An end that is no exception is an end."""
    with pytest.raises(AssertionError, match="without end"):
        run(sqlite_db, examples=200, change=BROKEN[broken])


@pytest.mark.parametrize("broken", BROKEN_ON_POSTGRESQL)
def test_the_model_catches_what_is_broken_on_postgresql(postgres_db: dict[str, Any], broken: str):
    """Each way of ending almost right is found out."""
    wanted = {
        "what is no exception is repeated": "without end",
        "on_failure runs at READ COMMITTED": "an update was lost",
        "a failure is recorded without the call": "was not called",
        "a statement of ours is as good as the task's": "that should not be|disagree",
    }
    with pytest.raises(AssertionError, match=wanted[broken]):
        run(postgres_db, examples=200, change=BROKEN_ON_POSTGRESQL[broken])
