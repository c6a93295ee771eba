"""Nobody starves anybody, under load: real uvicorn, real PostgreSQL, every place taken."""

import threading
import time
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.orm import Session

from aftercommit import PoolSettings, signals
from aftercommit.fastapi import AfterCommitDep, AsyncSessionDep, SessionDep, install
from benchmarks.overhead.load import send
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import serve
from tests.support.workshop import Effect, Heard, Workshop

TIMEOUT = 120.0
LOCK = 4711
WAIT_FOR_LOCK = sa.text(f"SELECT pg_advisory_xact_lock_shared({LOCK})")
WAITING = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = {LOCK} AND NOT granted"

postgres_drivers = pytest.mark.drivers("psycopg", "asyncpg")


def application(shop: Workshop) -> FastAPI:
    """Endpoints that write a line and hand over a task that writes another, in the flavour under test."""
    app = FastAPI()
    install(app, shop.db, create_tables=True)

    @shop.task()
    def quick(session: Session, label: str) -> None:
        session.add(Effect(label=f"task {label}"))

    @shop.task(pool="files")
    def slow(session: Session, label: str) -> None:
        session.execute(WAIT_FOR_LOCK)
        session.add(Effect(label=f"slow {label}"))

    tasks = {"quick": quick, "slow": slow}

    def ask(kind: str, session: SessionDep, after_commit: AfterCommitDep) -> UUID:
        session.add(Effect(label="request"))
        session.flush()
        return after_commit(tasks[kind], "a").id

    async def ask_async(kind: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> UUID:
        session.add(Effect(label="request"))
        await session.flush()
        return after_commit(tasks[kind], "a").id

    app.post("/{kind}", status_code=202)(ask_async if shop.is_async else ask)
    return app


@contextmanager
def locked(shop: Workshop) -> Iterator[None]:
    """Hold what slow tasks wait for, from outside."""
    with shop.outside.connect() as connection:
        connection.execute(sa.text(f"SELECT pg_advisory_lock({LOCK})"))
        try:
            yield
        finally:
            connection.execute(sa.text(f"SELECT pg_advisory_unlock({LOCK})"))


def wait_until(shop: Workshop, statement: str, wanted: int) -> None:
    """Look into the database until it says so."""
    deadline = time.monotonic() + TIMEOUT
    while (found := shop.sql(statement)) != wanted:
        assert time.monotonic() < deadline, f"{statement} never gave {wanted}, but {found}"


@postgres_drivers
def test_a_pool_whose_every_place_is_taken_disturbs_nobody(database: DatabaseUnderTest) -> None:
    """While all tasks of ``files`` hang, requests are answered and tasks of ``default`` run, as if nothing were."""
    two = PoolSettings(pool_size=2, max_overflow=0, pool_timeout=TIMEOUT)
    shop = Workshop(database, pool=two, pools={"files": two, "default": two})

    with serve(application(shop)) as url, Heard(signals.TaskSucceeded) as heard:
        with locked(shop):
            send(f"{url}/slow", times=6, width=6)
            wait_until(shop, WAITING, 2)
            send(f"{url}/quick", times=60, width=8)
            heard.wait(signals.TaskSucceeded, count=60, timeout=TIMEOUT)
            during = shop.db.stats()
            succeeded = Tally(each.task for each in heard.of(signals.TaskSucceeded))
            still_waiting = shop.sql(WAITING)
        heard.wait(signals.TaskSucceeded, count=66, timeout=TIMEOUT)

    files, default, request = (during.pools[name] for name in ("files", "default", "request"))
    assert succeeded == {"quick": 60}
    assert still_waiting == 2
    assert (files.running, files.in_use, files.waiting) == (2, 2, 0)
    assert (request.waiting, request.exhausted, default.waiting, default.exhausted) == (0, 0, 0, 0)
    assert all(each.owner == "slow" and each.idle is None for each in files.holders)
    assert Tally(shop.effects()) == {"request": 66, "task a": 60, "slow a": 6}
    shop.close()


@postgres_drivers
def test_500_requests_at_once_use_ten_connections(database: DatabaseUnderTest) -> None:
    """500 requests at once, a task each, on 5 + 5 connections: all answered, all done, and never one more open."""
    pool = PoolSettings(pool_size=5, max_overflow=0, pool_timeout=TIMEOUT)
    shop = Workshop(database, pool=pool, pools={"files": pool, "default": pool})

    with serve(application(shop)) as url, Heard(signals.TaskSucceeded) as heard:
        with counted(shop) as most:
            send(f"{url}/quick", times=500, width=500)
            heard.wait(signals.TaskSucceeded, count=500, timeout=TIMEOUT)
        stats = shop.db.stats()

    assert Tally(shop.effects()) == {"request": 500, "task a": 500}
    assert Tally(record.state for record in shop.records()) == {"succeeded": 500}
    assert max(record.attempt for record in shop.records()) == 1
    assert (stats.pools["request"].exhausted, stats.pools["default"].exhausted) == (0, 0)
    assert 1 <= most["aftercommit:request"] <= 5
    assert 1 <= most["aftercommit:default"] <= 5
    # The library's own: bookkeeping, and a listener.
    assert sum(most.values()) <= 5 + 5 + 3
    assert open_connections(shop) == 0
    shop.close()


@contextmanager
def counted(shop: Workshop) -> Iterator[dict[str, int]]:
    """Count, as long as it lasts, the most connections of each ``application_name`` that were open at once."""
    most: dict[str, int] = {}
    stopped = threading.Event()
    query = sa.text(
        "SELECT application_name, count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name LIKE 'aftercommit:%' GROUP BY application_name"
    )

    def look() -> None:
        with shop.outside.connect() as connection:
            while not stopped.wait(0.005):
                for name, number in connection.execute(query):
                    most[name] = max(number, most.get(name, 0))

    onlooker = threading.Thread(target=look)
    onlooker.start()
    try:
        yield most
    finally:
        stopped.set()
        onlooker.join()


def open_connections(shop: Workshop) -> int:
    """How many connections of the library the server still has, once those that are closing are gone."""
    statement = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE "
        "'aftercommit%'"
    )
    wait_until(shop, statement, 0)
    return int(shop.sql(statement))
