"""A transaction pooler in between: nothing that belongs to a session of the server is ever said."""

import asyncio
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings
from aftercommit.records.server import limits
from tests.contract.stand import Base, Row
from tests.support.databases import DatabaseUnderTest
from tests.support.pgbouncer import find
from tests.support.postgres import PostgresServer
from tests.support.processes import Log, spawn

pytestmark = pytest.mark.drivers("psycopg", "asyncpg")
PGBOUNCER = find()

# What outlives the transaction in which it is said; the next client of that server would find it. LISTEN is left
# out: it has a connection of its own, and where a pooler swallows it, polling finds the work.
OF_THE_SESSION = re.compile(
    r"^\s*(SET\s+(?!LOCAL|TRANSACTION)|RESET|DISCARD|PREPARE|DECLARE\s.*WITH\s+HOLD"
    r"|CREATE\s+(TEMP|TEMPORARY)\s|SELECT\s.*\bpg_(try_)?advisory_(lock|unlock)\w*\()"
    r"|set_config\([^)]*,\s*false\s*\)",
    re.IGNORECASE | re.DOTALL,
)


async def use_everything(db: Database, *, is_async: bool) -> int:
    """Tables, requests, tasks of both kinds: many at once. Give the counter they all counted up."""

    @db.task(pool="counting", timeout=30.0)
    async def async_count(session: AsyncSession, row: Row) -> None:
        row.n += 1

    @db.task(pool="counting")
    def count(session: Session, row: Row) -> None:
        row.n += 1

    task: Any = async_count if is_async else count

    async def request() -> None:
        async with db.async_session() as session:
            row = await session.get_one(Row, 1)
            db.after_commit(session, task, row)
            db.after_commit(session, task.with_options(key="k", priority=1), row)

    async with db.async_engine().begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with db.async_session() as session:
        session.add(Row(id=1))
    async with db.running(create_tables=True):
        await asyncio.gather(*(request() for _ in range(40)))
        await db.async_drain()
    async with db.async_session() as session:
        found = (await session.get_one(Row, 1)).n
    await db.async_dispose()
    return found


def test_nothing_outlives_its_transaction(database: DatabaseUnderTest, postgres: PostgresServer):
    """By the server's own log: no SET, no PREPARE, no lock of the session, over a whole life with tasks."""
    url = make_url(database.url)
    postgres.execute("ALTER DATABASE {} SET log_statement = 'all'", str(url.database))
    before = len(postgres.log.lines)
    marker = f"marker {uuid4()}"

    async def body() -> None:
        db = Database(url, pools={"counting": PoolSettings()})
        await use_everything(db, is_async=database.is_async)
        async with db.async_session() as session:
            await session.execute(text(f"SELECT '{marker}'"))
        await db.async_dispose()

    asyncio.run(body())
    postgres.log.wait_for(marker)

    said = re.findall(r"LOG:  (?:statement|execute [^:]*): (.*(?:\n\t.*)*)", "\n".join(postgres.log.lines[before:]))
    assert any("aftercommit_task" in each for each in said)
    assert [each for each in said if OF_THE_SESSION.search(each)] == []


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SET timezone TO 'UTC'", True),
        ("SELECT pg_advisory_lock(1)", True),
        ("SELECT set_config('a', 'b', false)", True),
        ("PREPARE x AS SELECT 1", True),
        ("SET LOCAL timezone TO 'UTC'", False),
        ("SELECT pg_advisory_xact_lock(1)", False),
        ("SELECT set_config('a', 'b', true)", False),
        ("UPDATE t SET n = 1", False),
    ],
)
def test_the_rule_itself_sees(statement: str, *, expected: bool):
    """The pattern above tells the two kinds apart."""
    assert bool(OF_THE_SESSION.search(statement)) is expected


@contextmanager
def pgbouncer(server: PostgresServer, database: str, directory: Path) -> Iterator[int]:
    """A real PgBouncer in transaction mode, with fewer connections than we have; give its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    users = directory / "users.txt"
    users.write_text('"postgres" ""\n', encoding="utf-8")
    settings = directory / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n{database} = host=127.0.0.1 port={server.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"auth_file = {users}\npool_mode = transaction\ndefault_pool_size = 4\nmax_client_conn = 200\n",
        encoding="utf-8",
    )
    for path in (directory, users, settings):
        path.chmod(0o755)
    for parent in directory.parents:
        if parent.owner() == "root" and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(0o755)
    process = spawn([str(PGBOUNCER), str(settings)], user="nobody" if os.geteuid() == 0 else None)
    assert process.stdout is not None
    log = Log(process.stdout)
    try:
        log.wait_for("process up")
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)
        log.join()


def asyncpg_name() -> str:
    """Statements that are kept on no server need names that are used once."""
    return f"__{uuid4()}__"


CONNECT_ARGS: dict[str, dict[str, Any]] = {
    "psycopg": {"prepare_threshold": None},
    "asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
}


def through(make: Callable[[], None]) -> Callable[[], None]:
    """Collect a test only where PgBouncer is installed: the one above holds what we promise without it.

    Not a skip, which CI takes for a failure: this is an extra, and the end of the run says that it was left out.
    """
    make.__test__ = PGBOUNCER is not None  # type: ignore[attr-defined]
    return make


@through
def test_everything_works_through_pgbouncer(
    database: DatabaseUnderTest, postgres: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Four servers for fifteen connections of ours, swapped at every commit: nothing fails, nothing is lost."""
    url = make_url(database.url)
    arguments = dict(CONNECT_ARGS[database.driver])
    if database.driver == "asyncpg":
        arguments["prepared_statement_name_func"] = asyncpg_name
    options: dict[str, Any] = {"async_engine_options": {"connect_args": arguments}}
    if database.driver == "psycopg":
        options["engine_options"] = {"connect_args": arguments}

    with pgbouncer(postgres, str(url.database), tmp_path) as port:
        db = Database(url.set(port=port), pools={"counting": PoolSettings(pool_size=10)}, **options)
        counted = asyncio.run(use_everything(db, is_async=database.is_async))

    # Forty without a key; of those with one, as many as found none queued.
    assert 41 <= counted <= 80
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == []


@through
def test_pgbouncer_is_recognised(database: DatabaseUnderTest, postgres: PostgresServer, tmp_path: Path):
    """A real PgBouncer is told from a server by the number of the process, by every driver, and the server is not."""
    url = make_url(database.url)
    options: dict[str, Any] = {"async_engine_options": {"connect_args": CONNECT_ARGS[database.driver]}}

    async def is_pooled(port: int) -> bool:
        db = Database(url.set(port=port), **options)
        try:
            return (await db.async_call_anyhow(limits)).is_pooled
        finally:
            await db.async_dispose()

    with pgbouncer(postgres, str(url.database), tmp_path) as port:
        found = asyncio.run(is_pooled(port))

    assert found
    assert not asyncio.run(is_pooled(postgres.port))


@through
def test_nothing_is_listed_through_pgbouncer(database: DatabaseUnderTest, postgres: PostgresServer, tmp_path: Path):
    """Its servers serve one client after the other: none is a worker's own, so that no rescuer may end it."""
    url = make_url(database.url)
    arguments = dict(CONNECT_ARGS[database.driver])
    if database.driver == "asyncpg":
        arguments["prepared_statement_name_func"] = asyncpg_name
    options: dict[str, Any] = {"async_engine_options": {"connect_args": arguments}}
    if database.driver == "psycopg":
        options["engine_options"] = {"connect_args": arguments}

    async def listed(port: int, **options: Any) -> tuple[bool, list[Any]]:
        db = Database(url.set(port=port), heartbeat=0.1, **options)
        try:
            async with db.running(create_tables=True), db.async_session() as session:
                runner = db.runner
                assert runner is not None
                first = await session.scalar(SEEN, {"id": runner.id})
                async with asyncio.timeout(30):
                    while await session.scalar(SEEN, {"id": runner.id}) in {None, first}:
                        await session.rollback()
                return runner.rounds.backends.is_off, await session.scalar(LISTED, {"id": runner.id}) or []
        finally:
            await db.async_dispose()

    with pgbouncer(postgres, str(url.database), tmp_path) as port:
        through = asyncio.run(listed(port, **options))
    direct = asyncio.run(listed(postgres.port))

    assert through == (True, [])
    assert not direct[0]
    assert direct[1]


SEEN = text("SELECT seen_at FROM aftercommit_worker WHERE id = :id")
LISTED = text("SELECT backends FROM aftercommit_worker WHERE id = :id")
