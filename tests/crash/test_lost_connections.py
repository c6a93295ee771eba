"""Connections that are lost, at any moment, lose nothing else: every committed request takes effect exactly once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from aftercommit import Retry, TaskRecord, signals
from tests.crash.child import make, request
from tests.crash.proxy import ARM, Proxy
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.workshop import Counter, Effect, Heard, Workshop

pytestmark = pytest.mark.drivers("psycopg", "asyncpg")

REQUESTS = 120
PATIENT = Retry(attempts=1000, base=0.01, cap=0.1)


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """The application of ``child``, in this process, with a task that is tried for as long as it takes."""
    shop = make(database.url, database.driver, retry=PATIENT)
    yield shop
    shop.close()


def assert_exactly_once(shop: Workshop) -> None:
    """What was committed is what took effect, and nothing is left over."""
    with Session(shop.outside) as session:
        requests = sorted(str(each) for each in session.scalars(sa.select(Counter.id)))
        states = set(session.scalars(sa.select(TaskRecord.state)))
    assert shop.effects() == requests
    assert states <= {"succeeded"}


def ask_for_many(shop: Workshop, trouble: threading.Event, *, until: threading.Event) -> int:
    """Make requests, some of which fail; say when trouble may begin. Return how many were answered."""
    answered = 0
    for number in range(1, 100_000):
        if number == 20:
            trouble.set()
        if number > REQUESTS and until.is_set():
            break
        with suppress(Exception):
            request(shop, str(number))
            answered += 1
    return answered


def test_terminated_backends_under_load(database: DatabaseUnderTest, shop: Workshop):
    """An administrator who terminates every connection again and again stops nothing for good."""
    assert database.server_url is not None
    trouble, over = threading.Event(), threading.Event()
    name = make_url(database.url).database

    def terminate() -> None:
        trouble.wait(30)
        url = make_url(database.server_url or "").set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True) as admin:
            for _ in range(15):
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s "
                    "AND application_name LIKE 'aftercommit:%%'", (name,),
                )  # fmt: skip
                trouble.clear()
                # Some work is done in between: the next blow comes when something has happened since the last.
                with Heard(signals.TaskSucceeded) as heard:
                    heard.wait(signals.TaskSucceeded)
        over.set()

    with shop.running():
        shop.drain()
        thread = threading.Thread(target=terminate)
        thread.start()
        answered = ask_for_many(shop, trouble, until=over)
        thread.join()
        shop.db.drain(60.0)

    assert answered > 20
    assert_exactly_once(shop)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_server_that_crashes_in_the_middle(driver: str):
    """PostgreSQL loses a process, throws everybody out, recovers and goes on: so do we."""
    with PostgresServer() as server, server.database() as name:
        shop = make(server.url(name, driver=driver), driver, retry=PATIENT)
        trouble, over = threading.Event(), threading.Event()

        def crash() -> None:
            trouble.wait(30)
            with suppress(psycopg.OperationalError), psycopg.connect(server.url(name, driver=None)) as victim:
                os.kill(victim.info.backend_pid, signal.SIGKILL)
                victim.execute("SELECT 1")
            server.log.wait_for("ready to accept connections", count=2)
            over.set()

        with shop.running():
            shop.drain()
            thread = threading.Thread(target=crash)
            thread.start()
            answered = ask_for_many(shop, trouble, until=over)
            thread.join()
            shop.db.drain(60.0)
        # The tests' own connections were thrown out, too.
        shop.outside.dispose()
        server._admin.close()
        server._admin = psycopg.connect(server.url("postgres", driver=None), autocommit=True)

        assert answered > 20
        assert_exactly_once(shop)
        shop.close()


@contextmanager
def through_proxy(database: DatabaseUnderTest) -> Iterator[tuple[Workshop, Proxy]]:
    """The application behind a network that can lose an answer."""
    url = make_url(database.url)
    assert url.port is not None
    proxy = Proxy(url.port)
    shop = make(url.set(port=proxy.port).render_as_string(hide_password=False), database.driver, retry=PATIENT)
    try:
        yield shop, proxy
    finally:
        shop.close()
        proxy.close()


def arm(session: Session) -> None:
    """Have the answer to this transaction's COMMIT lost."""
    session.execute(sa.text(f"SELECT '{ARM.decode()}'"))


def test_the_askers_commit_loses_its_answer(database: DatabaseUnderTest):
    """The request fails, and was committed: its task, which says that we run it, is found and run."""
    with through_proxy(database) as (shop, proxy):

        def body(session: Session) -> None:
            session.add(Counter(id=1))
            shop.db.after_commit(session, shop.pay, "1")  # type: ignore[attr-defined]
            arm(session)

        with shop.running():
            shop.drain()
            with Heard(signals.TaskSucceeded) as heard:
                with pytest.raises(Exception, match=r"connection|closed"):
                    shop.commit(body)
                assert proxy.swallowed.acquire(timeout=30)
                heard.wait(signals.TaskSucceeded)

        record = shop.records()[0]
        assert (record.attempt, record.claims) == (1, 2)
        assert_exactly_once(shop)


def test_the_tasks_commit_loses_its_answer(database: DatabaseUnderTest):
    """A task whose COMMIT is in doubt is looked up before anything is run again: it was done."""
    with through_proxy(database) as (shop, proxy):
        runs: list[int] = []

        @shop.task(retry=PATIENT)
        def doubtful(session: Session, label: str) -> None:
            runs.append(1)
            session.add(Effect(label=label))
            session.flush()
            arm(session)

        with shop.running():
            shop.drain()
            with Heard(signals.TaskSucceeded) as heard:
                shop.commit(lambda session: (session.add(Counter(id=1)), shop.db.after_commit(session, doubtful, "1")))
                assert proxy.swallowed.acquire(timeout=30)
                heard.wait(signals.TaskSucceeded)

        assert runs == [1]
        assert_exactly_once(shop)
