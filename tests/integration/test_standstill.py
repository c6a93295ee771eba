"""Those who hold a connection and wait for a second one: nobody stands still, and nobody is refused without need."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, signals
from aftercommit.errors import PoolExhausted
from aftercommit.fastapi import AsyncSessionDep, install
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Heard, Workshop

sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")
async_drivers = pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite")
ONE = sa.text("SELECT 1")
TIMEOUT = 30.0


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """Start *work* in a thread; what it returns or raises is the one item of the list, once the thread has ended."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as exc:  # noqa: BLE001  # it is what is looked at
            outcome.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


@sync_drivers
def test_of_threads_that_all_want_a_second_connection_one_is_refused(database: DatabaseUnderTest) -> None:
    """The one that would make the standstill complete is refused at once, with the holders; the others get theirs."""
    db = Database(database.url, pool=PoolSettings(3, 0, pool_timeout=TIMEOUT * 10))
    all_taken = threading.Barrier(3)

    def take_two() -> str:
        with db.session() as session:
            session.execute(ONE)
            all_taken.wait(TIMEOUT)
            with db.session() as second:
                return str(second.execute(ONE).scalar())

    started = [in_thread(take_two) for _ in range(3)]
    for thread, _ in started:
        thread.join(TIMEOUT)

    outcomes = [outcome[0] for _, outcome in started]
    refused = [each for each in outcomes if isinstance(each, PoolExhausted)]
    assert outcomes.count("1") == 2
    assert len(refused) == 1
    assert (refused[0].is_standstill, refused[0].is_alone, refused[0].waiting_themselves) == (True, False, 3)
    assert str(refused[0]).count("in take_two)") == 3
    assert "(connections that one needs - 1) + 1" in str(refused[0])
    assert db.engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


@sync_drivers
def test_a_session_that_another_thread_used_is_still_the_one_s_that_opened_it(database: DatabaseUnderTest) -> None:
    """A thread of an executor that worked on a session for somebody else may wait for it to end."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT))
    register = db.sessions.pools["request"].register

    def open_another() -> object:
        with db.session() as second:
            return second.execute(ONE).scalar()

    with ThreadPoolExecutor(1) as executor:
        with db.session() as session:
            executor.submit(session.execute, ONE).result(TIMEOUT)
            outcome = executor.submit(open_another)
            while not register.waiting:
                assert not outcome.done()
        seen = outcome.result(TIMEOUT)

    assert seen == 1
    db.dispose()


@async_drivers
async def test_a_connection_that_was_taken_after_a_commit_counts_as_well(database: DatabaseUnderTest) -> None:
    """A session that commits in a block of sync code, and goes on there, waits for itself like any other."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT * 10))

    def commit_and_go_on(session: Session) -> None:
        session.commit()
        session.execute(ONE)

    async with db.async_session() as first:
        await first.execute(ONE)
        await first.run_sync(commit_and_go_on)
        with pytest.raises(PoolExhausted) as caught:
            async with db.async_session() as second:
                await second.execute(ONE)
    await db.async_dispose()

    assert caught.value.is_alone


@sync_drivers
def test_the_second_engine_of_a_session_counts_as_well(database: DatabaseUnderTest) -> None:
    """A session that works on two pools stands in its own way on each of them."""
    one = PoolSettings(1, 0, pool_timeout=TIMEOUT * 10)
    db = Database(database.url, pools={"request": one, "files": one})

    with db.session() as session:
        session.execute(ONE)
        session.execute(ONE, bind_arguments={"bind": db.engine("files")})
        with pytest.raises(PoolExhausted) as caught, db.session("files") as other:
            other.execute(ONE)

    assert caught.value.is_alone
    db.dispose()


@async_drivers
async def test_of_coroutines_that_all_want_a_second_connection_one_is_refused(database: DatabaseUnderTest) -> None:
    """The same for asyncio tasks."""
    db = Database(database.url, pool=PoolSettings(3, 0, pool_timeout=TIMEOUT * 10))
    taken: list[None] = []
    all_taken = asyncio.Event()

    async def take_two() -> str:
        async with db.async_session() as session:
            await session.execute(ONE)
            taken.append(None)
            if len(taken) == 3:
                all_taken.set()
            await all_taken.wait()
            async with db.async_session() as second:
                return str((await second.execute(ONE)).scalar())

    outcomes = await asyncio.gather(*(take_two() for _ in range(3)), return_exceptions=True)

    refused = [each for each in outcomes if isinstance(each, PoolExhausted)]
    assert outcomes.count("1") == 2
    assert [each.is_standstill for each in refused] == [True]
    assert db.async_engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    await db.async_dispose()


@pytest.mark.drivers("psycopg", "asyncpg")
def test_tasks_that_all_open_a_second_session_on_their_pool_all_succeed(database: DatabaseUnderTest) -> None:
    """A full pool of tasks that each want another connection stands never still: one is repeated, all take effect."""
    width = 3
    workshop = Workshop(database, pools={"files": PoolSettings(width, 0, pool_timeout=TIMEOUT * 10)})
    db = workshop.db
    all_taken = threading.Barrier(width)

    def wait_for_all() -> None:
        if not all_taken.broken and not done.is_set():
            all_taken.wait(TIMEOUT)
            done.set()

    done = threading.Event()

    def plain(session: Session, label: str) -> None:
        session.execute(ONE)
        wait_for_all()
        with db.session(pool="files") as second:
            second.execute(ONE)
        session.add(Effect(label=label))

    async def native(session: AsyncSession, label: str) -> None:
        await session.execute(ONE)
        await asyncio.to_thread(wait_for_all)
        async with db.async_session(pool="files") as second:
            await second.execute(ONE)
        session.add(Effect(label=label))

    task = db.task(name="file", pool="files")(native if workshop.is_async else plain)  # type: ignore[arg-type]
    with Heard(signals.TaskSucceeded, signals.TaskRetried, signals.TaskFailed) as heard, workshop.running():
        ids = workshop.commit(lambda session: [db.after_commit(session, task, str(n)).id for n in range(width)])
        heard.wait(signals.TaskSucceeded, count=width)
    retried = heard.of(signals.TaskRetried)

    assert workshop.effects() == ["0", "1", "2"]
    assert [workshop.record(id).attempt for id in ids] == [1, 1, 1]
    assert retried
    assert all(isinstance(each.error, PoolExhausted) and each.error.is_standstill for each in retried)
    assert heard.of(signals.TaskFailed) == []
    workshop.close()


def test_a_task_that_alone_needs_more_than_its_pool_has_fails_at_once(database: DatabaseUnderTest) -> None:
    """What can never be served is not tried again: the task fails, and its error says what to write."""
    workshop = Workshop(database, pools={"files": PoolSettings(1, 0, pool_timeout=TIMEOUT * 10)})
    db = workshop.db

    def plain(session: Session) -> None:
        session.execute(ONE)
        with db.session(pool="files") as second:
            second.execute(ONE)

    async def native(session: AsyncSession) -> None:
        await session.execute(ONE)
        async with db.async_session(pool="files") as second:
            await second.execute(ONE)

    task = db.task(name="file", pool="files")(native if workshop.is_async else plain)  # type: ignore[arg-type]
    with Heard(signals.TaskRetried, signals.TaskFailed) as heard, workshop.running():
        workshop.ask(task)
        error = heard.wait(signals.TaskFailed).error

    assert isinstance(error, PoolExhausted)
    assert (error.is_standstill, error.is_alone) == (True, True)
    assert "task 'file', attempt 1" in str(error)
    assert heard.of(signals.TaskRetried) == []
    workshop.close()


def test_tasks_may_use_the_pool_of_requests(database: DatabaseUnderTest) -> None:
    """``db.session()`` in a task takes a connection of the request pool, and waits for nobody of its own kind."""
    workshop = Workshop(database, pools={"files": PoolSettings(1, 0)})
    db = workshop.db

    def plain(session: Session) -> None:
        with db.session() as other:
            other.execute(ONE)
        session.add(Effect(label="done"))

    async def native(session: AsyncSession) -> None:
        async with db.async_session() as other:
            await other.execute(ONE)
        session.add(Effect(label="done"))

    task = db.task(name="file", pool="files")(native if workshop.is_async else plain)  # type: ignore[arg-type]
    with workshop.running():
        workshop.ask(task)
        workshop.drain()

    assert workshop.effects() == ["done"]
    workshop.close()


@sync_drivers
def test_a_ring_through_two_pools_is_seen(database: DatabaseUnderTest) -> None:
    """One holds the only connection of a pool and wants the other's, and the other way round: one is refused."""
    one = PoolSettings(1, 0, pool_timeout=TIMEOUT * 10)
    db = Database(database.url, pools={"a": one, "b": one})
    both_taken = threading.Barrier(2)

    def take(first: str, then: str) -> str:
        with db.session(pool=first) as session:
            session.execute(ONE)
            both_taken.wait(TIMEOUT)
            with db.session(pool=then) as second:
                return str(second.execute(ONE).scalar())

    started = [in_thread(lambda: take("a", "b")), in_thread(lambda: take("b", "a"))]
    for thread, _ in started:
        thread.join(TIMEOUT)

    outcomes = sorted((outcome[0] for _, outcome in started), key=str)
    assert outcomes[0] == "1"
    assert isinstance(outcomes[1], PoolExhausted)
    assert outcomes[1].is_standstill
    db.dispose()


@sync_drivers
def test_whoever_may_be_served_waits(database: DatabaseUnderTest) -> None:
    """While one holder goes on, another that wants a second connection waits for it, and is counted in reports."""
    db = Database(database.url, pool=PoolSettings(2, 0, pool_timeout=TIMEOUT * 10))
    register = db.sessions.pools["request"].register

    def take_two() -> str:
        with db.session() as session:
            session.execute(ONE)
            with db.session() as second:
                return str(second.execute(ONE).scalar())

    with db.session() as session:
        session.execute(ONE)
        thread, outcome = in_thread(take_two)
        while not register.waiting:
            assert not outcome
        error = register.exhausted(db.engine().pool, 30.0)  # type: ignore[arg-type]
    thread.join(TIMEOUT)

    assert outcome == ["1"]
    assert error.waiting_themselves == 1
    assert not error.is_standstill
    assert "1 of the holders wait for a second connection themselves" in str(error)
    db.dispose()


@sync_drivers
def test_connections_may_be_handed_to_threads_that_give_them_back(database: DatabaseUnderTest) -> None:
    """Whoever takes connections by hand for others waits for them, although he took all that there are himself."""
    db = Database(database.url, pool=PoolSettings(2, 0, pool_timeout=TIMEOUT * 10))
    register = db.sessions.pools["request"].register
    is_waited_for = threading.Event()
    started: list[tuple[threading.Thread, list[Any]]] = []

    def work(connection: sa.Connection) -> str:
        with connection:
            is_waited_for.wait(TIMEOUT)
            return str(connection.execute(ONE).scalar())

    def take_for_others() -> None:
        for _ in range(4):
            taken = db.engine().connect()
            started.append(in_thread(partial(work, taken)))

    thread, outcome = in_thread(take_for_others)
    while not register.waiting:
        assert not outcome
    is_waited_for.set()
    thread.join(TIMEOUT)
    for each, _ in started:
        each.join(TIMEOUT)

    assert outcome == [None]
    assert [each for _, each in started] == [["1"]] * 4
    db.dispose()


@async_drivers
async def test_connections_may_be_handed_to_coroutines_that_give_them_back(database: DatabaseUnderTest) -> None:
    """The same for asyncio tasks."""
    db = Database(database.url, pool=PoolSettings(2, 0, pool_timeout=TIMEOUT))

    async def work(connection: AsyncConnection) -> str:
        try:
            return str((await connection.execute(ONE)).scalar())
        finally:
            await connection.close()

    started: list[asyncio.Task[str]] = []
    for _ in range(4):
        taken = await db.async_engine().connect()
        started.append(asyncio.create_task(work(taken)))

    assert await asyncio.gather(*started) == ["1"] * 4
    await db.async_dispose()


@sync_drivers
def test_a_thread_that_serves_the_next_request_is_not_taken_for_the_last_ones_holder(
    database: DatabaseUnderTest,
) -> None:
    """A session that was used in this thread, and is somebody else's to end now, will come back: waiting is right."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT * 10))
    register = db.sessions.pools["request"].register
    first = db.session()
    session = first.__enter__()

    def serve_two() -> str:
        contextvars.copy_context().run(session.execute, ONE)
        return contextvars.copy_context().run(serve_the_next)

    def serve_the_next() -> str:
        with db.session() as second:
            return str(second.execute(ONE).scalar())

    thread, outcome = in_thread(serve_two)
    while not register.waiting:
        assert not outcome
    first.__exit__(None, None, None)
    thread.join(TIMEOUT)

    assert outcome == ["1"]
    db.dispose()


@pytest.mark.drivers("asyncpg", "aiosqlite")
async def test_a_request_that_would_wait_for_itself_is_answered_at_once(
    database: DatabaseUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    """An endpoint that opens a second session on a pool that is empty because of it gets 503, and the log says why."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT * 10))
    app = FastAPI()
    install(app, db, runs=())

    @app.get("/twice")
    async def twice(session: AsyncSessionDep) -> None:
        await session.execute(ONE)
        async with db.async_session() as second:
            await second.execute(ONE)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.get("/twice")

    assert answer.status_code == 503
    assert "Deadlock in pool" in caplog.text
    assert "GET /twice" in caplog.text
    await db.async_dispose()
