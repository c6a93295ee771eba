"""The stop in order: what runs gets its grace, what does not finish goes back, and nothing is left behind."""

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import PoolSettings, Retry, TaskRecord, signals
from aftercommit.errors import WorkerLost
from aftercommit.runner.bookkeeper import Bookkeeper
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import Server
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop


@pytest.fixture
def shop(database: DatabaseUnderTest):
    """A workshop on each driver in turn."""
    shop = Workshop(database, heartbeat=0.2, silent_after=30.0)
    yield shop
    shop.close()


@pytest.fixture
def narrow(database: DatabaseUnderTest):
    """One with a pool of a single place."""
    shop = Workshop(database, heartbeat=0.2, silent_after=30.0, pools={"narrow": PoolSettings(pool_size=1)})
    yield shop
    shop.close()


def effect(session: Session, label: str) -> None:
    """What most tasks here do."""
    session.add(Effect(label=label))


def join_left_behind() -> None:
    """Wait for the threads of tasks that did not end in time: a process would not."""
    for thread in threading.enumerate():
        if thread.name.startswith("aftercommit-default"):
            thread.join(TIMEOUT)


@contextmanager
def opened_at_the_end(gate: threading.Event) -> Iterator[None]:
    """Open a gate when the runner has stopped: a thread that waits there is not cancelled, and the loop's end waits."""

    def open_it(_: signals.WorkerStopped) -> None:
        gate.set()

    signals.subscribe(signals.WorkerStopped)(open_it)
    try:
        yield
    finally:
        signals.unsubscribe(open_it)


@contextmanager
def opened_by_the_stop(gate: threading.Event) -> Iterator[None]:
    """Open a gate once the stop has begun: the first that it does is to give back what waits."""

    def open_it(_: signals.TaskGivenBack) -> None:
        gate.set()

    signals.subscribe(signals.TaskGivenBack)(open_it)
    try:
        yield
    finally:
        signals.unsubscribe(open_it)
        gate.set()


def test_what_runs_may_finish(shop: Workshop):
    """A task that ends within the grace takes effect as ever, durable or in memory, begun or waiting."""
    gate, begun = threading.Event(), threading.Semaphore(0)
    kept = shop.task(gate=gate, begun=begun.release)(effect)
    in_memory = shop.db.task(name="in_memory", durable=False)(kept.function)
    stopping = threading.Thread(target=gate.set)

    with shop.running(grace=TIMEOUT):
        shop.drain()

        def ask(session: Session) -> None:
            for number in range(4):
                shop.db.after_commit(session, kept, f"kept {number}")
            for number in range(4):
                shop.db.after_commit(session, in_memory, f"memory {number}")

        shop.commit(ask)
        for _ in range(5):
            assert begun.acquire(timeout=TIMEOUT)
        stopping.start()
    stopping.join()

    assert {"memory 0", "memory 1", "memory 2", "memory 3"} <= set(shop.effects())
    states = {record.state for record in shop.records()}
    assert states <= {"succeeded", "queued"}
    assert len(shop.effects()) == 4 + sum(record.state == "succeeded" for record in shop.records())


def test_what_does_not_finish_goes_back(shop: Workshop):
    """A task that outlives the grace is queued again, its attempt not burned, and what waited behind it, too."""
    gate, begun = threading.Event(), threading.Semaphore(0)
    task = shop.task(gate=gate, begun=begun.release)(effect)
    with Heard(signals.WorkerStopped) as heard:
        with opened_at_the_end(gate), shop.running(grace=0.0):
            shop.drain()
            shop.commit(lambda session: [shop.db.after_commit(session, task, str(n)) for n in range(8)] and None)
            for _ in range(5):
                assert begun.acquire(timeout=TIMEOUT)
        gate.set()
        join_left_behind()

    assert {(record.state, record.attempt, record.worker) for record in shop.records()} == {("queued", 0, None)}
    assert heard.of(signals.WorkerStopped)[0].given_back == 8
    assert shop.effects() == []
    with shop.running():
        shop.drain()
    assert shop.effects() == [str(number) for number in range(8)]


def test_what_is_asked_for_during_the_stop_waits_for_the_next_start(narrow: Workshop):
    """A child that a task hands over while its process is stopping is queued, taken by nobody, and runs later."""
    gate, begun = threading.Event(), threading.Event()
    child = narrow.task(pool="narrow")(effect)

    @narrow.task(pool="narrow", gate=gate, begun=begun.set)
    def parent(session: Session, label: str) -> None:
        effect(session, "parent")
        narrow.db.after_commit(session, child, "child")

    with opened_by_the_stop(gate), narrow.running(grace=TIMEOUT):
        narrow.drain()
        narrow.ask(parent)
        assert begun.wait(TIMEOUT)
        narrow.ask(child, "waits behind it")

    found = {(each.task, each.state, each.attempt, each.worker is None) for each in narrow.records()}
    assert found == {("parent", "succeeded", 1, False), ("effect", "queued", 0, True)}
    [asked_for] = [each for each in narrow.records() if each.parent is not None]
    assert asked_for.claims == 0
    assert narrow.effects() == ["parent"]
    with narrow.running():
        narrow.drain()
    assert narrow.effects() == ["child", "parent", "waits behind it"]


def test_a_stop_takes_nothing_new(narrow: Workshop):
    """However long the grace, what waits in the database is left to others once the stop has begun."""
    gate, begun = threading.Event(), threading.Event()
    task = narrow.task(pool="narrow", gate=gate, begun=begun.set)(effect)

    with opened_by_the_stop(gate), narrow.running(grace=TIMEOUT):
        narrow.drain()
        narrow.ask(task, "first")
        assert begun.wait(TIMEOUT)
        narrow.commit(lambda session: [narrow.db.after_commit(session, task, "later") for _ in range(30)] and None)

    assert narrow.effects() == ["first"]
    first, *others = narrow.records()
    assert (first.state, first.claims) == ("succeeded", 1)
    assert {(each.state, each.attempt, each.worker) for each in others} == {("queued", 0, None)}
    # The backlog of one place holds two, and they are not taken again.
    assert sorted(each.claims for each in others) == [0] * 28 + [1] * 2


def test_once_means_once_even_at_a_stop(shop: Workshop):
    """``Retry(attempts=1)`` that has begun and is interrupted is failed, and not begun again."""
    gate, begun = threading.Event(), threading.Event()
    task = shop.task(gate=gate, begun=begun.set, retry=Retry(attempts=1))(effect)
    with Heard(signals.TaskFailed) as heard:
        with opened_at_the_end(gate), shop.running(grace=0.0):
            shop.drain()
            shop.ask(task, "never")
            assert begun.wait(TIMEOUT)
        gate.set()
        join_left_behind()

    assert [type(each.error) for each in heard.of(signals.TaskFailed)] == [WorkerLost]
    record = shop.records()[0]
    assert (record.state, "interrupted" in (record.error or ""), shop.effects()) == ("failed", True, [])


def test_a_stop_that_interrupts_leaves_no_connection_out_and_nothing_pending(database: DatabaseUnderTest):
    """After a stop that a task with an open transaction outlives, every pool has all its connections back."""
    shop = Workshop(database, heartbeat=0.2, silent_after=30.0)
    gate, begun = threading.Event(), threading.Event()

    def plain(session: Session) -> None:
        hold(session)
        begun.set()
        gate.wait(TIMEOUT)
        # What a thread does that has not heard of the stop.
        effect(session, "never")

    async def native(session: AsyncSession) -> None:
        await session.run_sync(hold)
        begun.set()
        await asyncio.Event().wait()

    def hold(session: Session) -> None:
        effect(session, "never")
        session.flush()

    task: Any = shop.db.task(name="holds")(native if shop.is_async else plain)

    async def main() -> set[Any]:
        async with shop.db.running(create_tables=True, grace=0.0):
            if shop.is_async:
                async with shop.db.async_session() as session:
                    shop.db.after_commit(session, task)
            else:
                with shop.db.session() as session:
                    shop.db.after_commit(session, task)
            assert await asyncio.to_thread(begun.wait, TIMEOUT)
            assert checked_out(shop) == 1
        left = asyncio.all_tasks() - {asyncio.current_task()}
        gate.set()
        await asyncio.to_thread(join_left_behind)
        out.append(checked_out(shop))
        await shop.db.async_dispose()
        return left

    out: list[int] = []
    with opened_at_the_end(gate):
        left = asyncio.run(main())

    assert (left, out) == (set(), [0])
    [record] = shop.records()
    assert (record.state, record.attempt, record.worker, shop.effects()) == ("queued", 0, None, [])
    shop.close()


def checked_out(shop: Workshop) -> int:
    """How many connections of all pools that tasks and requests use are in somebody's hands."""
    pools = shop.db.sessions.pools
    engines = [engine for name in pools.names for engine in pools[name].opened]
    return sum(engine.pool.checkedout() for engine in engines)  # type: ignore[attr-defined]


@pytest.mark.drivers("aiosqlite", "asyncpg")
def test_a_loop_that_is_closed_under_us_loses_nothing(database: DatabaseUnderTest):
    """Whoever cancels every task of the loop (Ctrl+C twice, asyncio.run's end) leaves records that others can take."""
    shop = Workshop(database)
    begun: list[int] = []

    @shop.db.task(name="waits")
    async def waits(session: AsyncSession) -> None:
        await session.execute(sa.text("SELECT 1"))
        begun.append(1)
        ready.set()
        await asyncio.Event().wait()

    async def main() -> None:
        async with shop.db.running(create_tables=True):
            async with shop.db.async_session() as session:
                shop.db.after_commit(session, waits)
            await ready.wait()
            for task in asyncio.all_tasks():
                task.cancel()
            await asyncio.sleep(0)

    ready = asyncio.Event()
    with pytest.raises(asyncio.CancelledError), asyncio.Runner() as runner:  # noqa: PT012  # closed on the loop
        try:
            runner.run(main())
        finally:
            runner.run(shop.db.async_dispose())

    assert begun
    assert [record.state for record in shop.records()] == ["queued"]
    shop.close()


def test_no_heartbeat_follows_the_sign_off(database: DatabaseUnderTest):
    """A worker that has signed off is not entered again by a heartbeat that is due at that moment."""
    shop = Workshop(database, heartbeat=1e-6, silent_after=30.0)

    for _ in range(10):
        with shop.running():
            shop.drain()

    assert shop.sql("SELECT count(*) FROM aftercommit_worker") == 0
    shop.close()


@pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite")
def test_a_hundred_starts_and_stops_leave_nothing(shop: Workshop):
    """No thread, no asyncio task, no worker's row and no connection outlives its runner."""
    task = shop.task()(effect)
    with shop.running():
        shop.ask(task, "first")
        shop.drain()
    gc.collect()
    before = threading.active_count()

    for _ in range(100):
        with shop.running():
            shop.drain()

    assert threading.active_count() <= before
    assert shop.sql("SELECT count(*) FROM aftercommit_worker") == 0
    if not shop.under_test.is_sqlite:
        shop.db.dispose()
        # The server needs a moment to see that a connection has been closed.
        others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        deadline = time.monotonic() + TIMEOUT
        while shop.sql(f"SELECT count(*) {others}"):
            assert time.monotonic() < deadline, shop.sql(f"SELECT string_agg(application_name, ', ') {others}")


APP = """
import asyncio, os, threading
from contextlib import asynccontextmanager
from fastapi import FastAPI
from sqlalchemy.orm import Session
from sqlalchemy.ext.asyncio import AsyncSession
from aftercommit import Database, signals
from aftercommit.fastapi import install, AfterCommitDep

db = Database(os.environ["URL"])
app = FastAPI()
install(app, db, grace=float(os.environ["GRACE"]))

@signals.subscribe(signals.WorkerStopped)
def said(signal):
    threads = [each.name for each in threading.enumerate() if each.name.startswith("aftercommit-default")]
    print("STOPPED, given back", signal.given_back, "threads", threads, flush=True)

@db.task
def waits(label: str) -> None:
    print("BEGUN", flush=True)
    with open(os.environ["FIFO"], "rb") as fifo:
        fifo.read()

@app.post("/")
def ask(after_commit: AfterCommitDep) -> None:
    after_commit(waits, "x")
"""


@pytest.mark.drivers("psycopg", "pysqlite")
@pytest.mark.parametrize("finishes", [True, False])
def test_sigterm_under_uvicorn(database: DatabaseUnderTest, tmp_path: Path, finishes: bool):
    """SIGTERM, and a second one: the task finishes within the grace, or is queued again as if it had never begun."""
    import httpx

    app = tmp_path / "stopping_app.py"
    app.write_text(APP)
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    engine = sa.create_engine(database.sync_url)
    shop = Workshop(database)
    shop.db.create_tables()
    shop.close()
    env: dict[str, Any] = {"URL": database.url, "FIFO": str(fifo), "GRACE": "20" if finishes else "0.2"}
    with Server(app, env=env) as server:
        httpx.post(f"{server.url}/").raise_for_status()
        server.log.wait_for("BEGUN")
        server.process.send_signal(signal.SIGTERM)
        server.log.wait_for("Waiting for application shutdown")
        server.process.send_signal(signal.SIGTERM)
        if finishes:
            with fifo.open("wb"):
                pass
        line = server.log.wait_for("STOPPED")
        server.process.wait(TIMEOUT)

    with Session(engine) as session:
        record = session.scalars(sa.select(TaskRecord)).one()
    engine.dispose()
    if finishes:
        assert (record.state, line) == ("succeeded", "STOPPED, given back 0 threads []")
    else:
        assert (record.state, record.attempt) == ("queued", 0)
        assert "given back 1" in line


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_second_try_of_the_bookkeeping_is_cut_off_too(database: DatabaseUnderTest):
    """It lost its connection, and on the new one the server does not answer either: the stop does not wait for it."""
    shop = Workshop(database)
    books = Bookkeeper(shop.db.sessions.pools)
    tries: list[None] = []
    is_waiting = threading.Event()

    def work(connection: sa.Connection) -> None:
        tries.append(None)
        if len(tries) == 1:
            connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
        is_waiting.set()
        connection.exec_driver_sql("SELECT pg_sleep(60)")

    books.start()
    answer = books.submit(work)
    assert is_waiting.wait(TIMEOUT)
    books.stop(0.5)

    assert answer.done()
    assert len(tries) == 2
    shop.close()
