"""The ground that the tests stand on holds."""

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress

import httpx
import psycopg
import pytest
from fastapi import FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.support import chromium
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.processes import Log, spawn
from tests.support.servers import ROOT, Server, serve

APP = """
import os
from contextlib import asynccontextmanager
from fastapi import FastAPI

@asynccontextmanager
async def lifespan(app):
    print("coming up", flush=True)
    yield
    print("going down", flush=True)

app = FastAPI(lifespan=lifespan)

@app.get("/")
def read():
    return {"pid": os.getpid(), "colour": os.environ.get("COLOUR")}
"""


PARENT = """
import signal, sys
from tests.support.processes import spawn

child = spawn([sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"])
child.stdout.readline()
print(child.pid, flush=True)
signal.pause()
"""


def databases_of(server: PostgresServer) -> list[str]:
    """Return the names of the tests' databases on *server*."""
    with psycopg.connect(server.url("postgres", driver=None)) as connection:
        rows = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'test_%'")
        return [name for (name,) in rows]


async def test_each_driver_reaches_its_own_empty_database(database: DatabaseUnderTest):
    """What one connection commits, another one by the plain driver of the same database sees."""
    make = [text("CREATE TABLE thing (id integer)"), text("INSERT INTO thing VALUES (1)")]

    if database.is_async:
        engine = create_async_engine(database.url)
        async with engine.begin() as connection:
            for statement in make:
                await connection.execute(statement)
        await engine.dispose()
    else:
        plain = create_engine(database.url)
        with plain.begin() as connection:
            for statement in make:
                connection.execute(statement)
        plain.dispose()

    onlooker = create_engine(database.sync_url)
    with onlooker.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM thing")) == 1
    onlooker.dispose()


@pytest.mark.drivers("pysqlite", "asyncpg")
def test_drivers_can_be_chosen(database: DatabaseUnderTest):
    """A test that is about some drivers runs with those alone."""
    assert database.driver in {"pysqlite", "asyncpg"}


def test_database_is_gone_afterwards_even_if_in_use(postgres: PostgresServer):
    """A connection that a test forgot does not keep its database alive."""
    before = databases_of(postgres)

    with postgres.database() as name:
        assert name in databases_of(postgres)
        forgotten = psycopg.connect(postgres.url(name, driver=None))

    assert databases_of(postgres) == before
    with pytest.raises(psycopg.OperationalError):
        forgotten.execute("SELECT 1")
    forgotten.close()


def test_socket_reaches_the_same_server(postgres: PostgresServer):
    """The Unix socket leads where the port leads."""
    with psycopg.connect(postgres.socket_url("postgres", driver=None)) as connection:
        assert connection.info.server_version >= 180000


def test_postgres_stops_with_its_block():
    """A server's process and files are gone when its block ends, by an error as well."""
    with suppress(ZeroDivisionError), PostgresServer() as server:
        process, directory = server._process, server._directory
        raise ZeroDivisionError

    assert process.poll() == 0
    assert not directory.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_child_dies_with_its_parent():
    """A killed test run leaves no server behind."""
    parent = spawn([sys.executable, "-c", PARENT], cwd=ROOT)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())

    parent.kill()

    parent.wait()
    parent.stdout.close()
    # Ends as soon as the child is gone: `tail` watches it.
    subprocess.run(["tail", f"--pid={pid}", "-s", "0.01", "-f", "/dev/null"], timeout=10, check=True)


def test_log_says_what_a_child_wrote_before_it_ended():
    """Waiting for a line that never comes ends with the child, and shows what it wrote instead."""
    process = spawn([sys.executable, "-c", "print('one'); print('two')"])
    assert process.stdout is not None
    log = Log(process.stdout)

    with pytest.raises(RuntimeError, match="one\ntwo"):
        log.wait_for("three")

    assert log.wait_for("two") == "two"
    process.wait()


def test_server_in_a_process_of_its_own(tmp_path):
    """An application in a file is served with its variables, its output is kept, and it stops in order."""
    path = tmp_path / "my_app.py"
    path.write_text(APP)

    with Server(path, env={"COLOUR": "green"}) as server:
        answer = httpx.get(server.url).json()
        code = server.stop()

    assert answer == {"pid": server.process.pid, "colour": "green"}
    assert code == -signal.SIGTERM
    assert "going down" in server.log.text


def test_killed_server_can_be_started_again(tmp_path):
    """SIGKILL gives the application no time to say goodbye; a new process takes its place."""
    path = tmp_path / "my_app.py"
    path.write_text(APP)

    with Server(path) as server:
        first, log = server.process.pid, server.log
        server.kill()
        server.start()
        second = httpx.get(server.url).json()["pid"]

    assert first != second
    assert "going down" not in log.text


def test_server_with_several_workers(tmp_path):
    """Requests are served by one of the workers that are named."""
    path = tmp_path / "my_app.py"
    path.write_text(APP)

    with Server(path, workers=2) as server:
        assert len(server.worker_pids) == 2
        assert httpx.get(server.url).json()["pid"] in server.worker_pids


def test_server_that_cannot_start_shows_why(tmp_path):
    """The error of an application that fails at import is in the test's own error."""
    path = tmp_path / "broken_app.py"
    path.write_text("import nothing_of_this_name")

    with pytest.raises(RuntimeError, match="nothing_of_this_name"), Server(path):
        pass


def test_server_on_a_thread():
    """An application of the test itself is served, and its lifespan ends with the block."""
    events = []

    @asynccontextmanager
    async def lifespan(app):
        events.append("up")
        yield
        events.append("down")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    def read():
        return events

    with serve(app) as url:
        assert httpx.get(url).json() == ["up"]
    assert events == ["up", "down"]


def test_application_that_does_not_start_on_a_thread():
    """An application whose lifespan fails is an error of the block, not a test that waits for ever."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no table"})

    with pytest.raises(RuntimeError, match="did not start"), serve(app):
        pass


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("1", True), ("", False), ("false", False)])
def test_ci_is_a_variable(value, expected):
    """CI=true is what forbids leaving tests out."""
    assert chromium.is_ci({"CI": value}) is expected


@pytest.mark.parametrize(("is_ci", "code"), [(False, 0), (True, 1)])
def test_missing_chromium_is_said_loudly_and_fails_ci(monkeypatch, capsys, is_ci, code):
    """Where Chromium cannot be had, `make test` says what is left out; in CI it does not go on."""
    monkeypatch.setattr(chromium, "find", lambda: None)
    monkeypatch.setattr(chromium, "may_install", lambda: False)
    monkeypatch.setattr(chromium, "is_ci", lambda: is_ci)

    assert chromium.main() == code

    assert "LEFT OUT" in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "outcome"), [("", "1 skipped"), ("true", "1 failed")])
def test_nothing_is_left_out_in_ci(tmp_path, variable, outcome):
    """A test that skips itself passes unnoticed at home, and fails in CI."""
    (tmp_path / "test_skipping.py").write_text("import pytest\n\ndef test_one():\n    pytest.skip('no reason')\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", "pyproject.toml", str(tmp_path)]

    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CI": variable}, capture_output=True, text=True, check=False
    )

    assert outcome in done.stdout
