"""The threads of a process have SQLite's write lock one after the other, and give it back on every way out."""

import gc
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from aftercommit import Database
from aftercommit.pools.turns import Turns, take_turn
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT

pytestmark = pytest.mark.drivers("pysqlite")


@pytest.fixture
def db(database: DatabaseUnderTest) -> Iterator[Database]:
    """A database with one table."""
    db = Database(database.url)
    with db.session() as session:
        session.execute(text("CREATE TABLE entry (id INTEGER PRIMARY KEY, who TEXT)"))
    assert take_turn(str(database.path), 0.0)[0] is not None
    yield db
    db.dispose()


INSERT = "INSERT INTO entry (who) VALUES ('x')"


def raw(session: Session) -> Any:
    """The driver's connection."""
    return session.connection().connection.driver_connection


def fail(session: Session) -> None:
    """An error that passes through."""
    session.execute(text(INSERT))
    raise ZeroDivisionError


def conflict(session: Session) -> None:
    """SQLite rolls back by itself."""
    session.execute(text(INSERT))
    raw(session).execute("INSERT OR ROLLBACK INTO entry (id) VALUES (1)")
    raw(session).execute("INSERT OR ROLLBACK INTO entry (id) VALUES (1)")


def die(session: Session) -> None:
    """A thread that ends and leaves a connection to the garbage collector."""
    session.execute(text(INSERT))

    def body() -> None:
        connection = session.get_bind().connect()  # type: ignore[union-attr]
        connection.exec_driver_sql(INSERT)

    session.rollback()
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    gc.collect()


WAYS: dict[str, Callable[[Session], Any]] = {
    "commit": lambda s: (s.execute(text(INSERT)), s.commit()),
    "end": lambda s: s.execute(text(INSERT)),
    "rollback": lambda s: (s.execute(text(INSERT)), s.rollback()),
    "close": lambda s: (s.execute(text(INSERT)), s.close()),
    "invalidate": lambda s: (s.execute(text(INSERT)), s.invalidate()),
    "the driver's commit": lambda s: (s.execute(text(INSERT)), raw(s).commit()),
    "COMMIT": lambda s: (s.execute(text(INSERT)), raw(s).execute("COMMIT")),
    "ROLLBACK": lambda s: (s.execute(text(INSERT)), raw(s).cursor().execute("ROLLBACK")),
    "a statement of one's own": lambda s: raw(s).execute(INSERT),
    "the driver's close": lambda s: (s.execute(text(INSERT)), raw(s).close()),
    "taken": lambda s: (s.execute(text(INSERT)), raw(s).take()),
    "a savepoint": lambda s: s.begin_nested().__enter__() and s.execute(text(INSERT)),
    "an error": fail,
    "a conflict": conflict,
    "a thread that dies": die,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_turn_is_given_back(db: Database, database: DatabaseUnderTest, way: str):
    """However a transaction ends."""
    with suppress(ZeroDivisionError, OperationalError, sqlite3.Error, Exception), db.session() as session:
        WAYS[way](session)
    gc.collect()

    held, _ = take_turn(str(database.path), 0.0)

    assert held is not None


def test_the_turn_is_kept_to_the_end_of_the_transaction(db: Database, database: DatabaseUnderTest):
    """Who waits sleeps here, and not in SQLite."""
    with db.session() as session:
        session.execute(text(INSERT))
        with ThreadPoolExecutor(1) as others:
            assert others.submit(take_turn, str(database.path), 0.0).result()[0] is None
    assert take_turn(str(database.path), 0.0)[0] is not None


def test_who_came_first_is_first():
    """Nobody who comes anew overtakes those who wait."""
    turns = Turns()
    assert turns.acquire(0.0)
    order: list[int] = []

    def wait(number: int) -> None:
        assert turns.acquire(TIMEOUT)
        order.append(number)
        turns.release()

    with ThreadPoolExecutor(5) as threads:
        for number in range(5):
            threads.submit(wait, number)
            while len(turns._waiting) <= number:
                pass
        turns.release()
        # Whoever releases and asks again is behind all of them.
        assert turns.acquire(TIMEOUT)
        assert order == [0, 1, 2, 3, 4]
        turns.release()


def test_nobody_waits_for_turn_and_lock_longer_than_for_the_lock(database: DatabaseUnderTest):
    """The patience for SQLite's lock is one, whoever has it."""
    db = Database(database.url, engine_options={"connect_args": {"timeout": 0.3}})
    with db.session() as session:
        session.execute(text("CREATE TABLE entry (id INTEGER PRIMARY KEY, who TEXT)"))
    waited: list[float] = []

    def write() -> None:
        since = time.monotonic()
        with pytest.raises(OperationalError, match="locked"), db.session() as other:
            other.execute(text(INSERT))
        waited.append(time.monotonic() - since)

    with db.session() as session:
        session.execute(text(INSERT))
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    with db.session() as session:
        assert session.scalar(text("PRAGMA busy_timeout")) == 300
    db.dispose()
    assert waited[0] < 0.6
