"""A client that vanishes without a word: the server hears neither FIN nor RST, and its rows come free all the same."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from aftercommit import signals
from tests.crash.proxy import Proxy
from tests.crash.vanishing_child import IN_A_HEARTBEAT, IN_A_REQUEST, IN_A_TASK, SILENT_AFTER, make
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.processes import Log, spawn
from tests.support.servers import ROOT
from tests.support.workshop import Counter, Heard, Workshop

pytestmark = pytest.mark.drivers("psycopg", "asyncpg")

A_FEW_SECONDS = 5.0


@contextmanager
def vanished(database: DatabaseUnderTest, postgres: PostgresServer, where: str) -> Iterator[float]:
    """A process that stood still there, killed behind a network that lets nothing through any more.

    Gives the time at which it vanished, by the monotonic clock.
    """
    proxy = Proxy(postgres.port)
    url = make_url(database.url).set(port=proxy.port).render_as_string(hide_password=False)
    process = spawn(
        [sys.executable, "-m", "tests.crash.vanishing_child", url, database.driver, where],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
    )
    assert process.stdout is not None
    log = Log(process.stdout)
    try:
        log.wait_for("LISTED", timeout=60.0)
        proxy.swallow()
        process.kill()
        process.wait()
        yield time.monotonic()
    finally:
        process.kill()
        process.wait()
        log.join()
        proxy.close()


@pytest.fixture
def heir(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """Another process's application, on a network that works."""
    shop = make(database.url, database.driver)
    with Session(shop.outside) as session:
        session.add(Counter(id=1, n=0))
        session.commit()
    yield shop
    shop.close()


def locked(shop: Workshop) -> bool:
    """Whether the row of the counter is locked by somebody."""
    return bool(shop.sql("SELECT COUNT(*) = 0 FROM (SELECT 1 FROM counter FOR UPDATE SKIP LOCKED) AS free"))


def test_a_rescued_task_gets_the_row_that_its_vanished_run_had_locked(
    database: DatabaseUnderTest, postgres: PostgresServer, heir: Workshop
):
    """A power cut in the middle of a task: soon after the silence its row is free, and the next attempt has it."""
    with vanished(database, postgres, IN_A_TASK) as since:
        assert locked(heir)
        with Heard(signals.TaskSucceeded) as heard, heir.running():
            heard.wait(signals.TaskSucceeded)
            took = time.monotonic() - since

    assert took < SILENT_AFTER + A_FEW_SECONDS
    [record] = heir.records()
    assert (record.state, record.attempt) == ("succeeded", 2)
    assert heir.sql("SELECT n FROM counter") == 1


@pytest.mark.parametrize("where", [IN_A_REQUEST, IN_A_HEARTBEAT])
def test_what_a_vanished_worker_without_tasks_had_locked_comes_free(
    database: DatabaseUnderTest, postgres: PostgresServer, heir: Workshop, where: str
):
    """A request, or the worker's own bookkeeping, was in the middle of a transaction: ended all the same."""
    with vanished(database, postgres, where) as since:
        assert locked(heir)
        with heir.running():
            heir.ask(heir.count, "")  # type: ignore[attr-defined]
            heir.drain()
            took = time.monotonic() - since
            wait_for_no_list(heir, but=1)

    assert took < SILENT_AFTER + A_FEW_SECONDS
    assert heir.sql("SELECT n FROM counter") == 1


def test_a_process_that_was_only_frozen_loses_its_sessions_and_goes_on(database: DatabaseUnderTest, heir: Workshop):
    """Its request had a row locked that a task needs: it is rolled back, and the process works again when it wakes."""
    process = spawn(
        [sys.executable, "-m", "tests.crash.vanishing_child", database.url, database.driver, IN_A_REQUEST],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
    )
    assert process.stdout is not None
    log = Log(process.stdout)
    try:
        log.wait_for("LISTED", timeout=60.0)
        os.kill(process.pid, signal.SIGSTOP)
        with heir.running():
            heir.ask(heir.count, "")  # type: ignore[attr-defined]
            heir.drain()
            os.kill(process.pid, signal.SIGCONT)
            wait_for_lists(heir, of=2)
    finally:
        process.kill()
        process.wait()
        log.join()

    assert heir.sql("SELECT n FROM counter") == 1


def wait_for_lists(shop: Workshop, *, of: int) -> None:
    """Wait until so many live workers list backends."""
    deadline = time.monotonic() + 30
    lists = (
        "SELECT COUNT(*) FROM aftercommit_worker WHERE backends IS NOT NULL "
        "AND seen_at > clock_timestamp() - interval '1 second'"
    )
    while shop.sql(lists) < of:
        assert time.monotonic() < deadline, "a worker that woke up lists nothing"


def wait_for_no_list(shop: Workshop, *, but: int) -> None:
    """Wait until only so many workers list backends: a silent one's list goes when nothing of it is there."""
    deadline = time.monotonic() + 30
    while shop.sql("SELECT COUNT(*) FROM aftercommit_worker WHERE backends IS NOT NULL") > but:
        assert time.monotonic() < deadline, "the list of the silent worker stays"
