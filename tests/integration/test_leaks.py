"""A session that is dropped without being ended is reported with its line, and its connection comes back clean."""

import asyncio
import gc
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, signals
from aftercommit.fastapi import AsyncSessionDep, SessionDep, install
from aftercommit.sessions import Owner, line_of
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Base, Effect, Heard, Workshop

sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")
async_drivers = pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite")
ONE = PoolSettings(1, 0)
TIMEOUT = 30.0


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What is said of sessions that were dropped."""
    # What earlier tests left behind is collected now, and not in the middle of this one.
    gc.collect()
    with Heard(signals.SessionLeaked) as heard:
        yield heard


@pytest.fixture
def db(database: DatabaseUnderTest) -> Iterator[Database]:
    """A ``Database`` for sync sessions, with one connection."""
    db = Database(database.url, pool=ONE)
    Base.metadata.create_all(db.engine())
    yield db
    db.dispose()


@pytest.fixture
async def adb(database: DatabaseUnderTest) -> AsyncIterator[Database]:
    """A ``Database`` for async sessions, with one connection."""
    db = Database(database.url, pool=ONE)
    async with db.async_engine().begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield db
    await db.async_dispose()


def returned_to(engine: sa.Engine) -> "queue.SimpleQueue[None]":
    """Hear of each connection that comes back to an engine's pool."""
    returned: queue.SimpleQueue[None] = queue.SimpleQueue()
    event.listen(engine, "checkin", lambda *_: returned.put(None))
    return returned


def idle_in_transaction(database: DatabaseUnderTest) -> int:
    """Connections that the server sees in a transaction with nothing running in it."""
    if database.is_sqlite:
        return 0
    engine = sa.create_engine(database.sync_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
        count: int = connection.execute(sa.text(statement)).scalar_one()
    engine.dispose()
    return count


# --- sync -------------------------------------------------------------------------------------------------------


def enter(db: Database) -> Session:
    """Open a session, and lose what would end it."""
    session = db.session().__enter__()  # opened here
    session.add(Effect(label="never"))
    session.flush()
    return session


@sync_drivers
def test_a_dropped_session_is_reported_and_its_connection_is_clean(
    database: DatabaseUnderTest, db: Database, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """Pool, owner and line are told, once; what it wrote is rolled back, and the pool has its connection again."""
    with caplog.at_level(logging.ERROR, "aftercommit.sessions"):
        enter(db)
        gc.collect()

    (leaked,) = heard.of(signals.SessionLeaked)
    assert (leaked.pool, leaked.owner) == ("request", "code")
    assert str(leaked.line).endswith("in enter")
    assert leaked.seconds >= 0
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "in enter" in caplog.text
    assert idle_in_transaction(database) == 0
    with db.session() as session:
        assert session.scalars(sa.select(Effect)).all() == []


@sync_drivers
def test_an_exit_stack_that_is_lost_is_a_leak(db: Database, heard: Heard) -> None:
    """An ``ExitStack`` that nobody closes ends nothing; an error that lost it makes no difference."""

    def lose() -> None:
        stack = ExitStack()
        stack.enter_context(db.session()).execute(sa.text("SELECT 1"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        lose()
    del caught
    gc.collect()

    (leaked,) = heard.of(signals.SessionLeaked)
    assert str(leaked.line).endswith("in lose")
    assert db.engine().pool.checkedout() == 0  # type: ignore[attr-defined]


@sync_drivers
def test_a_session_dropped_in_another_thread_is_reported(db: Database, heard: Heard) -> None:
    """Opened in a thread that has gone, and collected in another."""
    thread = threading.Thread(target=lambda: enter(db))
    thread.start()
    thread.join(TIMEOUT)
    gc.collect()

    assert len(heard.of(signals.SessionLeaked)) == 1
    assert db.engine().pool.checkedout() == 0  # type: ignore[attr-defined]


@sync_drivers
def test_what_ends_is_no_leak(db: Database, heard: Heard) -> None:
    """Sessions that were ended, by an error too, unused ones, and those of a generator that was thrown away."""

    def get_session() -> Iterator[Session]:
        with db.session() as session:
            yield session

    with db.session() as session:
        session.add(Effect(label="kept"))
    with pytest.raises(ZeroDivisionError), db.session() as session:
        _ = 1 / 0
    next(get_session()).rollback()
    del session
    gc.collect()

    assert heard.of(signals.SessionLeaked) == []


@sync_drivers
def test_a_session_that_was_never_used_is_reported_too(db: Database, heard: Heard) -> None:
    """It holds no connection; the next one from that line will."""
    db.session().__enter__()
    gc.collect()

    assert len(heard.of(signals.SessionLeaked)) == 1


@sync_drivers
def test_a_dropped_connection_of_the_engine_comes_back_clean(database: DatabaseUnderTest, db: Database) -> None:
    """One that was taken by hand is named while it is held; dropped, it is rolled back and the pool has it again."""

    def take() -> sa.Connection:
        connection = db.engine().connect()
        connection.execute(sa.insert(Effect).values(label="never"))
        return connection

    connection = take()
    (holder,) = db.stats().pools["request"].holders
    del connection
    gc.collect()

    assert str(holder.line).endswith("in take")
    assert db.engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    assert db.stats().pools["request"].holders == ()
    assert idle_in_transaction(database) == 0
    with db.session() as session:
        assert session.scalars(sa.select(Effect)).all() == []


# --- async ------------------------------------------------------------------------------------------------------


async def async_enter(db: Database) -> AsyncSession:
    """Open a session, and lose what would end it."""
    session = await db.async_session().__aenter__()
    session.add(Effect(label="never"))
    await session.flush()
    return session


@async_drivers
async def test_a_dropped_async_session_is_reported_and_its_connection_is_clean(
    database: DatabaseUnderTest, adb: Database, heard: Heard
) -> None:
    """The connection is rolled back on its loop and used again, without a warning of SQLAlchemy's."""
    returned = returned_to(adb.async_engine().sync_engine)
    before = await backend(adb)
    await asyncio.to_thread(returned.get, timeout=TIMEOUT)

    await async_enter(adb)
    gc.collect()
    await asyncio.to_thread(returned.get, timeout=TIMEOUT)

    (leaked,) = heard.of(signals.SessionLeaked)
    assert (leaked.pool, leaked.owner) == ("request", "code")
    assert str(leaked.line).endswith("in async_enter")
    assert idle_in_transaction(database) == 0
    assert await backend(adb) == before
    async with adb.async_session() as session:
        assert (await session.scalars(sa.select(Effect))).all() == []


async def backend(db: Database) -> int:
    """Which connection of the driver's the pool gives out."""
    async with db.async_engine().connect() as connection:
        raw = await connection.get_raw_connection()
        return id(raw.driver_connection)


@async_drivers
async def test_a_session_lost_in_a_cancelled_coroutine_is_reported(
    database: DatabaseUnderTest, adb: Database, heard: Heard
) -> None:
    """A coroutine that is cancelled while it has a session entered by hand loses it: told, and rolled back."""
    returned = returned_to(adb.async_engine().sync_engine)
    has_it = asyncio.Event()

    async def lose() -> None:
        session = await async_enter(adb)
        has_it.set()
        await asyncio.Event().wait()
        await session.commit()

    task = asyncio.create_task(lose())
    await has_it.wait()
    task.cancel()
    # Not by awaiting it: the error would come here, and its traceback keep the session.
    await asyncio.wait([task])
    assert task.cancelled()
    del task
    gc.collect()
    await asyncio.to_thread(returned.get, timeout=TIMEOUT)

    (leaked,) = heard.of(signals.SessionLeaked)
    assert str(leaked.line).endswith("in async_enter")
    assert adb.async_engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    assert idle_in_transaction(database) == 0
    async with adb.async_session() as session:
        assert (await session.scalars(sa.select(Effect))).all() == []


@async_drivers
async def test_a_cancelled_scope_is_no_leak(database: DatabaseUnderTest, adb: Database, heard: Heard) -> None:
    """A coroutine that is cancelled inside ``async with`` ends its session: rolled back, and nothing to report."""
    has_it = asyncio.Event()

    async def use() -> None:
        async with adb.async_session() as session:
            session.add(Effect(label="never"))
            await session.flush()
            has_it.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await has_it.wait()
    task.cancel()
    # Not by awaiting it: the error would come here, and its traceback keep the session.
    await asyncio.wait([task])
    assert task.cancelled()
    del task
    gc.collect()

    assert heard.of(signals.SessionLeaked) == []
    assert adb.async_engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    assert idle_in_transaction(database) == 0


@async_drivers
async def test_an_async_session_dropped_in_a_thread_goes_back_on_its_loop(adb: Database, heard: Heard) -> None:
    """The garbage collector may run in any thread; the connection is spoken to on its own loop only."""
    returned = returned_to(adb.async_engine().sync_engine)
    sessions = [await async_enter(adb)]

    def drop() -> None:
        sessions.clear()
        gc.collect()

    await asyncio.to_thread(drop)
    await asyncio.to_thread(returned.get, timeout=TIMEOUT)

    assert len(heard.of(signals.SessionLeaked)) == 1
    async with adb.async_session() as session:
        assert (await session.scalars(sa.select(Effect))).all() == []


@async_drivers
async def test_an_abandoned_async_generator_is_no_leak(adb: Database, heard: Heard) -> None:
    """The loop ends a generator that was thrown away, and with it the session."""
    returned = returned_to(adb.async_engine().sync_engine)

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with adb.async_session() as session:
            yield session

    session = await anext(get_session())
    session.add(Effect(label="never"))
    del session
    gc.collect()
    async with adb.async_session() as session:
        await session.execute(sa.text("SELECT 1"))
    await asyncio.to_thread(returned.get, timeout=TIMEOUT)

    assert heard.of(signals.SessionLeaked) == []


# asyncio's own, of a transport whose loop has closed: it is told of every connection that outlives its loop.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@async_drivers
def test_an_async_session_that_outlives_its_loop_is_reported(
    database: DatabaseUnderTest, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """With its loop closed nobody can speak to the server any more: the connection is dropped, without noise."""
    sessions: list[AsyncSession] = []

    async def lose() -> None:
        db = Database(database.url, pool=ONE)
        async with db.async_engine().begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        sessions.append(await async_enter(db))

    asyncio.run(lose())
    sessions.clear()
    gc.collect()
    gc.collect()

    assert len(heard.of(signals.SessionLeaked)) == 1
    assert [record for record in caplog.records if record.name.startswith("sqlalchemy")] == []


@sync_drivers
def test_who_still_has_the_connection_of_a_lost_session_is_not_forgotten(db: Database, heard: Heard) -> None:
    """The connection is in use as long as somebody has it, and is told under the owner of the session."""
    session = enter(db)
    connection = session.connection()
    del session
    gc.collect()

    (hold,) = db.sessions.pools["request"].register.holds()
    name, line = hold.owner.name, str(hold.owner.line)
    connection.execute(sa.text("SELECT 'later'"))
    statement = hold.statement
    connection.close()

    assert (name, statement) == ("code", "SELECT 'later'")
    assert line.endswith("in enter")
    assert len(heard.of(signals.SessionLeaked)) == 1
    assert db.sessions.pools["request"].register.holds() == []


@async_drivers
async def test_a_connection_that_somebody_still_has_is_left_to_him(adb: Database, heard: Heard) -> None:
    """Whoever took the connection from the session, and dropped only the session, goes on with it."""
    session = await async_enter(adb)
    connection = await session.connection()
    del session
    gc.collect()

    seen = (await connection.execute(sa.select(Effect.label))).scalars().all()
    await connection.close()

    assert seen == ["never"]
    assert len(heard.of(signals.SessionLeaked)) == 1
    assert adb.async_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


# --- whose ------------------------------------------------------------------------------------------------------


def test_a_leak_in_a_task_names_the_task(database: DatabaseUnderTest, heard: Heard) -> None:
    """A session that a task opened and lost is told with the task, its attempt and the line."""
    workshop = Workshop(database)
    db = workshop.db

    def lose(session: Session) -> None:
        enter(db)
        gc.collect()

    async def lose_async(session: AsyncSession) -> None:
        await async_enter(db)
        gc.collect()

    task = db.task(name="lose")(lose_async if workshop.is_async else lose)  # type: ignore[arg-type]
    with workshop.running():
        workshop.ask(task)
        leaked = heard.wait(signals.SessionLeaked)
        workshop.drain()
    effects = workshop.effects()
    workshop.close()

    assert leaked.owner == "code in task 'lose', attempt 1"
    assert str(leaked.line).endswith("in async_enter" if workshop.is_async else "in enter")
    assert effects == []


async def test_a_leak_in_a_request_names_the_request(database: DatabaseUnderTest, heard: Heard) -> None:
    """A session that an endpoint opened and lost is told with the request and the line."""
    outside = sa.create_engine(database.sync_url)
    Base.metadata.create_all(outside)
    outside.dispose()
    db = Database(database.url)
    flavour = "async" if database.is_async else "sync"
    app = FastAPI()
    install(app, db, runs=())

    @app.get("/sync")
    def lose(session: SessionDep) -> None:
        enter(db)
        gc.collect()

    @app.get("/async")
    async def lose_async(session: AsyncSessionDep) -> None:
        returned = returned_to(db.async_engine().sync_engine)
        await async_enter(db)
        gc.collect()
        await asyncio.to_thread(returned.get, timeout=TIMEOUT)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.get(f"/{flavour}")

    assert answer.status_code == 200
    (leaked,) = heard.of(signals.SessionLeaked)
    assert leaked.owner == f"code in GET /{flavour}"
    assert str(leaked.line).endswith("in enter" if flavour == "sync" else "in async_enter")
    await db.async_dispose()


@pytest.mark.parametrize(
    ("owner", "line"),
    [
        (Owner("POST /files", kind="request"), None),
        (Owner("task 'file', attempt 2", kind="task"), None),
        (Owner("code", line_of(enter)), f"{__file__}:{enter.__code__.co_firstlineno} in enter"),
    ],
)
@sync_drivers
def test_every_kind_of_owner_is_named(db: Database, heard: Heard, owner: Owner, line: str | None) -> None:
    """The sessions of requests and of tasks' runs are watched like those of code, and on their own pool."""
    scopes: Any = [db.sessions.scope("default", owner), db.sessions.task_scope("default", owner, None)]
    for scope in scopes:
        scope.session.execute(sa.text("SELECT 1"))
    scopes.clear()
    del scope
    gc.collect()

    told = heard.of(signals.SessionLeaked)
    assert [(each.pool, each.owner, each.line) for each in told] == [("default", owner.name, line)] * 2
    assert db.engine("default").pool.checkedout() == 0  # type: ignore[attr-defined]


# --- the end of the process -------------------------------------------------------------------------------------

AT_EXIT = """
import asyncio, sys
import sqlalchemy as sa
from aftercommit import Database

db = Database(sys.argv[1])
session = db.session().__enter__()
session.execute(sa.text("SELECT 1"))
print("done")
"""


@pytest.mark.drivers("pysqlite")
def test_what_is_open_when_the_process_ends_is_no_news(database: DatabaseUnderTest) -> None:
    """A script that ends with a session open says nothing of it, and has no error in its last moments."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, database.url], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )

    assert done.stdout == "done\n"
    assert done.stderr == ""
