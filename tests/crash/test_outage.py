"""A database that is away for a while: requests fail quickly, tasks wait, and all goes on by itself afterwards."""

import os
import signal
import sys
import time
from collections import Counter as Counts
from collections.abc import Iterator
from contextlib import ExitStack
from subprocess import Popen

import httpx
import psycopg
import pytest
import sqlalchemy as sa

from aftercommit.records import schema
from tests.crash.traffic import Traffic
from tests.support.postgres import PostgresServer
from tests.support.processes import Log, spawn
from tests.support.servers import ROOT, Server
from tests.support.workshop import Base

APP = ROOT / "tests" / "crash" / "outage_app.py"
SECONDS = 60.0
"""For what takes a few: nothing here is a claim about speed, only about its happening."""


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own, to be taken away."""
    with PostgresServer() as server:
        yield server


def ask(server: PostgresServer, name: str, statement: str) -> object:
    """The one value that *statement* gives, on a connection of its own."""
    with psycopg.connect(server.url(name, driver=None), autocommit=True) as connection:
        row = connection.execute(statement).fetchone()  # type: ignore[arg-type]
    return None if row is None else row[0]


def wait_until(server: PostgresServer, name: str, condition: str) -> None:
    """Ask the server until *condition* holds."""
    deadline = time.monotonic() + SECONDS
    while not ask(server, name, f"SELECT {condition}"):
        seen = ask(server, name, "SELECT string_agg(state || ' ' || attempt, ', ') FROM aftercommit_task "
                   "WHERE state <> 'succeeded'")  # fmt: skip
        assert time.monotonic() < deadline, f"never came true: {condition}; {seen}"


NOTHING_IS_LEFT = "NOT EXISTS (SELECT FROM aftercommit_task WHERE state IN ('queued', 'running'))"
SOME_RUN_AND_SOME_WAIT = (
    "EXISTS (SELECT FROM aftercommit_task WHERE state = 'running') "
    "AND EXISTS (SELECT FROM aftercommit_task WHERE state = 'queued')"
)


def assert_exactly_once(server: PostgresServer, name: str) -> None:
    """What was committed is what took effect, once each, and every record says so."""
    states = ask(server, name, "SELECT string_agg(DISTINCT state, ',') FROM aftercommit_task")
    assert states == "succeeded"
    requests = ask(server, name, "SELECT array_agg(id ORDER BY id) FROM counter")
    effects = ask(server, name, "SELECT array_agg(label::int ORDER BY label::int) FROM effect")
    assert effects == requests


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
def test_a_server_that_is_away_for_a_while(server: PostgresServer, driver: str, how: signal.Signals):
    """Requests are answered 503 at once; what was committed is run, once, when the server is back; nobody restarts."""
    # Not a database that is dropped afterwards: by a connection that was thrown out as well.
    name = "postgres"

    with (
        Server(APP, env={"DATABASE_URL": server.url(name, driver=driver)}) as application,
        Traffic(application.url) as traffic,
    ):
        traffic.wait_for(lambda status: status == 201, more=100)
        wait_until(server, name, SOME_RUN_AND_SOME_WAIT)

        server.halt(how)
        traffic.wait_for(lambda status: status == 503, more=100)
        away = [httpx.get(application.url, timeout=20.0) for _ in range(3)]
        server.resume()
        traffic.wait_for(lambda status: status == 201, more=100)
        traffic.stop()
        wait_until(server, name, NOTHING_IS_LEFT)

        assert {(answer.status_code, answer.headers.get("retry-after")) for answer in away} == {(503, "1")}
        # 500: cut off in its COMMIT, so that nobody can say what became of it, and whoever asks again might double it.
        assert set(traffic.answers.values()) <= {201, 503, 500}
        assert Counts(traffic.answers.values())[500] <= 10
        assert_exactly_once(server, name)
        answered = {number for number, status in traffic.answers.items() if status == 201}
        committed = set(ask(server, name, "SELECT array_agg(id) FROM counter"))  # type: ignore[call-overload]
        refused = {number for number, status in traffic.answers.items() if status == 503}
        assert answered <= committed
        assert committed.isdisjoint(refused)
        assert application.process.poll() is None


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_server_that_stands_still_for_a_while(server: PostgresServer, driver: str):
    """Nothing is answered meanwhile; past the rescue, when it goes on, so does everything, and nothing comes twice."""
    name = "postgres"
    environment = {"DATABASE_URL": server.url(name, driver=driver), "SILENT_AFTER": "1"}

    with (
        Server(APP, env=environment) as application,
        Traffic(application.url, patience=3.0) as traffic,
    ):
        traffic.wait_for(lambda status: status == 201, more=100)
        wait_until(server, name, SOME_RUN_AND_SOME_WAIT)

        with server.frozen():
            traffic.wait_for(lambda status: status == 0, more=8)
        traffic.wait_for(lambda status: status == 201, more=100)
        traffic.stop()
        wait_until(server, name, NOTHING_IS_LEFT)

        assert_exactly_once(server, name)


# --- a stop -----------------------------------------------------------------------------------------------------


def worker(url: str) -> tuple["Popen[str]", Log]:
    """``aftercommit worker`` for the application."""
    process = spawn(
        [sys.executable, "-m", "aftercommit", "worker", "tests.crash.outage_app:db", "--grace", "1"],
        env={**os.environ, "DATABASE_URL": url, "SILENT_AFTER": "1", "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
    )
    assert process.stdout is not None
    return process, Log(process.stdout)


def queue(server: PostgresServer, name: str, count: int) -> None:
    """Make the tables, and have *count* tasks wait."""
    engine = sa.create_engine(server.url(name))
    with engine.begin() as connection:
        schema.create_tables(connection, Base.metadata)
        connection.execute(sa.text(f"INSERT INTO counter (id, n) SELECT i, 0 FROM generate_series(1, {count}) i"))
        connection.execute(
            sa.text(
                "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at) SELECT "
                "gen_random_uuid(), 'pay', 'default', 'queued', json_build_object('number', i), now(), now() "
                f"FROM generate_series(1, {count}) i"
            )
        )
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["gone", "frozen"])
def test_a_worker_is_stopped_without_its_database(server: PostgresServer, driver: str, is_frozen: bool):
    """SIGTERM ends it all the same, within its bounds; what it had is run by others when the database is back."""
    name, url = "postgres", server.url("postgres", driver=driver)
    queue(server, name, 400)
    process, log = worker(url)
    try:
        log.wait_for("Worker ")
        wait_until(server, name, SOME_RUN_AND_SOME_WAIT)

        with ExitStack() as stack:
            if is_frozen:
                stack.enter_context(server.frozen())
            else:
                server.halt()
                stack.callback(server.resume)
            process.send_signal(signal.SIGTERM)
            # One second of grace, and what the stop in order allows for tasks, for writing and for threads.
            code = process.wait(timeout=SECONDS)
        process, log = worker(url)
        wait_until(server, name, NOTHING_IS_LEFT)
    finally:
        process.kill()
        process.wait()
        log.join()

    assert code == 0
    assert_exactly_once(server, name)
