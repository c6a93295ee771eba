"""Work that waits for SQLite's write lock, which it holds itself on another connection, is refused at once."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, TaskRecord
from aftercommit.errors import LockDeadlock
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT

INSERT = text("INSERT INTO entry (who) VALUES ('x')")


@pytest.fixture
def db(database: DatabaseUnderTest):
    """A database with one table."""
    first = Database(f"sqlite:///{database.path}")
    first.create_tables()
    with first.engine().begin() as connection:
        connection.execute(text("CREATE TABLE entry (id INTEGER PRIMARY KEY, who TEXT)"))
    first.dispose()
    db = Database(database.url)
    yield db
    db.dispose()


def open_a_session(db: Database, _session: Session) -> None:
    """A helper that does not know of its caller's session."""
    with db.session() as second:
        second.execute(INSERT)


def open_a_connection(db: Database, session: Session) -> None:
    """The engine of the task's own session."""
    with session.get_bind().connect() as second:  # type: ignore[union-attr]
        second.execute(INSERT)


def open_a_raw_connection(db: Database, _session: Session) -> None:
    """The driver's own."""
    raw = db.engine().raw_connection()
    try:
        raw.cursor().execute("BEGIN IMMEDIATE")
    finally:
        raw.close()


def open_an_own_session(db: Database, session: Session) -> None:
    """A session of the application's class, on the engine of the request pool."""
    with Session(db.engine()) as second:
        second.execute(INSERT)


WAYS: dict[str, Callable[[Database, Session], None]] = {
    "a session": open_a_session,
    "a connection": open_a_connection,
    "a raw connection": open_a_raw_connection,
    "a session of one's own": open_an_own_session,
}


@pytest.mark.drivers("pysqlite")
@pytest.mark.parametrize("way", WAYS)
def test_a_task_that_waits_for_itself_is_refused_at_once(db: Database, way: str):
    """The error names who has the lock and where it was asked for; it is a failure, and no conflict."""
    took: list[float] = []
    starts: list[int] = []

    @db.task
    def work(session: Session) -> None:
        session.execute(INSERT)
        starts.append(1)
        since = time.monotonic()
        try:
            WAYS[way](db, session)
        finally:
            took.append(time.monotonic() - since)

    with db.running():
        with db.session() as session:
            run = db.after_commit(session, work)
        db.drain(TIMEOUT)

    with db.session() as session:
        record = session.get_one(TaskRecord, run.id)
        assert record.state == "failed"
        assert "LockDeadlock" in record.error
        assert "task 'work'" in record.error
        assert session.scalar(text("SELECT count(*) FROM entry")) == 0
    assert len(starts) == 1, "to try again would be in vain"
    assert took[0] < 5.0, "the lock's patience is ten seconds"


@pytest.mark.drivers("aiosqlite")
async def test_an_async_task_that_waits_for_itself_is_refused_at_once(db: Database):
    """The lock is asked for on a thread of the driver's, for the task that awaits it."""

    @db.task
    async def work(session: AsyncSession) -> None:
        await session.execute(INSERT)
        async with db.async_session() as second:
            await second.execute(INSERT)

    async with db.running():
        async with db.async_session() as session:
            run = db.after_commit(session, work)
        await asyncio.wait_for(db.async_drain(), 8.0)

    async with db.async_session() as session:
        record = await session.get_one(TaskRecord, run.id)
        assert (record.state, record.attempt) == ("failed", 1)
        assert "LockDeadlock" in str(record.error)


@pytest.mark.drivers("pysqlite")
def test_code_outside_of_tasks_is_refused_too(db: Database):
    """Both places are named."""
    with db.session() as first:
        first.execute(INSERT)
        with pytest.raises(LockDeadlock) as caught, db.session() as second:
            second.execute(INSERT)
        first.execute(INSERT)

    assert caught.value.is_alone
    assert str(caught.value).count("test_own_lock.py") == 2
    with db.session() as session:
        assert session.scalar(text("SELECT count(*) FROM entry")) == 2


@pytest.mark.drivers("pysqlite")
def test_who_waits_for_others_waits(db: Database):
    """Another thread has the lock, and gives it back."""
    locked, waits = threading.Event(), threading.Event()

    def other() -> None:
        with db.session() as session:
            session.execute(INSERT)
            locked.set()
            assert waits.wait(TIMEOUT)

    thread = threading.Thread(target=other)
    thread.start()
    assert locked.wait(TIMEOUT)
    with db.session() as session:
        threading.Timer(0.2, waits.set).start()
        session.execute(INSERT)
    thread.join()


@pytest.mark.drivers("pysqlite")
def test_many_threads_that_write_are_served_one_after_the_other(db: Database):
    """A turn that is handed on is no deadlock, in whichever moment another thread looks."""

    def write() -> None:
        for _ in range(60):
            with db.session() as session:
                session.execute(INSERT)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with db.session() as session:
        assert session.scalar(text("SELECT count(*) FROM entry")) == 480


@pytest.mark.drivers("pysqlite")
def test_a_ring_of_a_pool_and_the_lock_is_broken(database: DatabaseUnderTest):
    """One has the lock and waits for a connection; who has the connection asks for the lock: it is refused."""
    db = Database(database.url, pool=PoolSettings(pool_size=2, max_overflow=0))
    with db.session() as session:
        session.execute(text("CREATE TABLE entry (id INTEGER PRIMARY KEY, who TEXT)"))
    reads, errors = threading.Event(), []
    holds = threading.Event()

    def has_the_connection() -> None:
        try:
            with db.session() as session:
                session.execute(text("SELECT 1"))
                reads.set()
                assert holds.wait(TIMEOUT)
                while not _waits(db):
                    pass
                session.execute(INSERT)
        except LockDeadlock as exc:
            errors.append(exc)

    thread = threading.Thread(target=has_the_connection)
    thread.start()
    assert reads.wait(TIMEOUT)
    with db.session() as session:
        session.execute(INSERT)
        holds.set()
        with db.session() as second:
            second.execute(text("SELECT 1"))
    thread.join()

    assert [error.is_alone for error in errors] == [False]
    db.dispose()


def _waits(db: Database) -> bool:
    return any(pool.waiting for pool in db.stats().pools.values())


@pytest.mark.drivers("pysqlite")
def test_an_engine_of_ones_own_is_not_ours(db: Database, database: DatabaseUnderTest):
    """It waits as SQLite has it wait, and says so in SQLite's words."""
    foreign: Any = create_engine(f"sqlite:///{database.path}", connect_args={"timeout": 0.05})
    with db.session() as session:
        session.execute(INSERT)
        with pytest.raises(Exception, match="locked"), foreign.begin() as connection:
            connection.execute(INSERT)
    foreign.dispose()
