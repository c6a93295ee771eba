"""A start without its database: a clear error, an exit status that is not zero, and nothing left open."""

import asyncio
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from aftercommit import Database
from aftercommit.errors import DatabaseUnavailable
from aftercommit.runner.bookkeeper import Bookkeeper
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import ROOT, Server

DRIVERS = ["postgresql+psycopg", "postgresql+asyncpg", "sqlite+pysqlite", "sqlite+aiosqlite"]
APP = ROOT / "tests" / "crash" / "outage_app.py"


@pytest.fixture(params=DRIVERS)
def nowhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database that is not there, with a password that nobody must see."""
    if request.param.startswith("sqlite"):
        yield f"{request.param}:///{tmp_path}/missing/app.db"
        return
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        yield f"{request.param}://shop:open-sesame@127.0.0.1:{closed.getsockname()[1]}/shop"


def names_the_database(text: str, url: str) -> bool:
    """Whether *text* says which database, what the driver said, and no password."""
    where = "/missing/app.db" if url.startswith("sqlite") else "shop:***@127.0.0.1"
    said = ("unable to open", "refused", "Connect call failed")
    return where in text and any(each in text for each in said) and "open-sesame" not in text and "AC204" in text


@pytest.mark.parametrize("is_async", [False, True])
def test_running_without_a_database_is_refused_and_leaves_nothing(nowhere: str, is_async: bool):
    """``db.running()`` raises an error that names the database, and no thread outlives it."""
    before = set(threading.enumerate())
    db = Database(nowhere)

    async def run() -> None:
        try:
            async with db.running(create_tables=True):
                pytest.fail("it started")
        finally:
            # aiosqlite (0.22) does not wait for the thread of a connection that could not be opened; the thread then
            # answers to a loop that is closed.
            for thread in set(threading.enumerate()) - before:
                if "_connection_worker_thread" in thread.name:
                    await asyncio.to_thread(thread.join, 30)

    with pytest.raises(DatabaseUnavailable) as caught:  # noqa: PT012  # two ways of saying one thing
        if is_async:
            asyncio.run(run())
        else:
            with db.running(create_tables=True):
                pytest.fail("it started")

    assert names_the_database(str(caught.value), nowhere)
    assert db.runner is None
    for thread in set(threading.enumerate()) - before:
        # aiosqlite ends the thread of a connection that could not be opened without waiting for it.
        thread.join(30)
        assert not thread.is_alive(), thread


def test_an_application_without_a_database_does_not_start(nowhere: str):
    """uvicorn says which database, and ends with its own status for that."""
    server = Server(APP, env={"DATABASE_URL": nowhere})

    with pytest.raises(RuntimeError, match="AC204"):
        server.start()

    assert names_the_database(server.log.text, nowhere)
    assert server.process.returncode == 3


def test_a_worker_without_a_database_ends(nowhere: str):
    """The command prints one error, and ends with status 2."""
    ended = subprocess.run(
        [sys.executable, "-m", "aftercommit", "worker", "tests.crash.outage_app:db"],
        env={**os.environ, "DATABASE_URL": nowhere},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode == 2
    assert names_the_database(" ".join(ended.stderr.split()), nowhere)
    assert "Traceback" not in ended.stderr


@pytest.mark.drivers("pysqlite", "aiosqlite")
def test_a_process_starts_on_a_busy_file(database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch):
    """Somebody holds SQLite's write lock for longer than the bookkeeping is patient: the worker enters after him."""
    db = Database(database.url, heartbeat=0.2)
    _make_tables(db, is_async=database.is_async)
    waited: list[BaseException] = []
    ask = Bookkeeper.async_call
    with closing(sqlite3.connect(str(database.path), isolation_level=None, check_same_thread=False)) as other:

        async def ask_and_let_go(self: Bookkeeper, work: Any) -> Any:
            if not waited and not other.in_transaction:
                other.execute("BEGIN IMMEDIATE")
            try:
                return await ask(self, work)
            except OperationalError as exc:
                waited.append(exc)
                if len(waited) == 2:
                    other.execute("ROLLBACK")
                raise

        monkeypatch.setattr(Bookkeeper, "async_call", ask_and_let_go)
        with db.running(create_tables=False):
            assert db.runner is not None
            assert other.execute("SELECT count(*) FROM aftercommit_worker").fetchone() == (1,)
    assert len(waited) == 2
    db.dispose()


def _make_tables(db: Database, *, is_async: bool) -> None:
    if not is_async:
        db.create_tables()
        return

    async def make() -> None:
        await db.async_create_tables()
        await db.async_dispose()

    asyncio.run(make())
