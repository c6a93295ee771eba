"""The check at start-up, on a server with room for few."""

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy import event
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings
from aftercommit.errors import PoolBudgetError
from aftercommit.fastapi import AsyncSessionDep, SessionDep, install, session_of
from aftercommit.records.tables import WorkerRecord
from tests.support.postgres import PostgresServer
from tests.support.servers import Server

SMALL = {"pool": PoolSettings(pool_size=2), "pools": {"default": PoolSettings(pool_size=2)}}
OURS = "aftercommit.runner.budgeting"


@pytest.fixture(scope="module")
def small_server() -> Iterator[PostgresServer]:
    """Twenty connections, three of them reserved."""
    with PostgresServer({"max_connections": "20", "superuser_reserved_connections": "3"}) as server:
        yield server


@pytest.fixture(params=["psycopg", "asyncpg"])
def url(request: pytest.FixtureRequest, small_server: PostgresServer) -> Iterator[str]:
    """An empty database on it."""
    with small_server.database() as name:
        yield small_server.url(name, driver=request.param)


def start(db: Database, **options: Any) -> None:
    """Start a process of the application, and stop it."""

    async def body() -> None:
        try:
            async with db.running(create_tables=True, **options):
                pass
        finally:
            await db.async_dispose()

    asyncio.run(body())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the check has warned of."""
    return [each.getMessage() for each in caplog.records if each.name == OURS and each.levelno == logging.WARNING]


def test_too_many_connections_are_a_warning_with_the_arithmetic(url: str, caplog: pytest.LogCaptureFixture):
    """The application starts all the same, and the log has the sum, pool by pool, and what to do."""
    start(Database(url), processes=4)

    (said,) = warnings(caplog)
    assert "4 processes × 18 connections = 72, but the server allows 17 (max_connections 20 - 3 reserved)" in said
    assert "request 10 + default 5 + bookkeeping 2 + listening 1" in said
    assert "Lower pool_size" in said


def test_strict_refuses_to_start(url: str):
    """With ``strict=True`` the same is an error that carries the figures, and nothing is left running."""
    db = Database(url)

    with pytest.raises(PoolBudgetError) as caught:
        start(db, processes=4, strict=True)

    assert (caught.value.processes, caught.value.per_process, caught.value.allowed) == (4, 18, 17)
    assert "AC403" in str(caught.value)
    assert db.runner is None


def test_what_fits_is_not_mentioned(url: str, caplog: pytest.LogCaptureFixture):
    """Within the limit there is neither a warning nor an error."""
    start(Database(url, **SMALL), processes=2, strict=True)

    assert warnings(caplog) == []


def test_live_workers_are_counted(url: str, caplog: pytest.LogCaptureFixture):
    """The third process of seven connections each is told that seventeen are too few; silent ones do not count."""
    start(Database(url, **SMALL))
    enter(url, host="one", seen_at=datetime.now(UTC))
    enter(url, host="long ago", seen_at=datetime(2026, 1, 1, tzinfo=UTC))
    start(Database(url, **SMALL))
    before = warnings(caplog)
    enter(url, host="two", seen_at=datetime.now(UTC))

    start(Database(url, **SMALL))

    assert before == []
    assert "3 processes × 7 connections = 21" in warnings(caplog)[0]


APPLICATION = """
import os
import psycopg
from fastapi import FastAPI
from aftercommit import Database
from aftercommit.fastapi import install

def wait_for_all():
    with psycopg.connect(os.environ["SHOP_URL"].replace("+psycopg", "")) as connection:
        connection.execute("SELECT pg_advisory_lock_shared(4711)")
    return os.environ["SHOP_URL"]

app = FastAPI()
install(app, Database(wait_for_all))
"""
WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


@pytest.mark.parametrize("url", ["psycopg"], indirect=True)
def test_processes_that_start_together_count_one_another(url: str, tmp_path: Path):
    """As those of ``uvicorn --workers 4`` do: whoever comes last sees all of them."""
    (tmp_path / "budget_shop.py").write_text(APPLICATION)
    db = Database(url)
    db.create_tables()
    db.dispose()

    def let_all_go() -> None:
        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute("SELECT pg_advisory_lock(4711)")
            holds.set()
            while connection.execute(WAITING).fetchone() != (4,):
                pass

    holds = threading.Event()
    gate = threading.Thread(target=let_all_go)
    gate.start()
    holds.wait(30)
    with Server(tmp_path / "budget_shop.py", workers=4, env={"SHOP_URL": url}) as server:
        gate.join(30)
        said = server.log.text

    assert "4 processes × 18 connections = 72, but the server allows 17" in said


@pytest.mark.parametrize("url", ["psycopg"], indirect=True)
def test_who_refuses_to_start_is_not_counted(url: str):
    """It has left by then, and whoever is told to use fewer connections does not find it in his way."""
    for _ in range(2):
        with pytest.raises(PoolBudgetError) as caught:
            start(Database(url), strict=True)

    engine = sa.create_engine(url)
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(WorkerRecord)).scalar() == 0
    engine.dispose()
    assert caught.value.processes == 1


def enter(url: str, *, host: str, seen_at: datetime) -> None:
    """Enter a worker by hand."""
    engine = sa.create_engine(url.replace("asyncpg", "psycopg"))
    with Session(engine) as session, session.begin():
        session.add(WorkerRecord(id=uuid4(), host=host, pid=1, started_at=seen_at, seen_at=seen_at, pools=[], names=[]))
    engine.dispose()


def test_a_predecessor_that_was_killed_does_not_keep_us_from_starting(url: str):
    """Its row still looks alive, but this machine knows better."""
    start(Database(url, **SMALL))
    for _ in range(5):
        enter(url, host=socket.gethostname(), seen_at=datetime.now(UTC))
    engine = sa.create_engine(url.replace("asyncpg", "psycopg"))
    with engine.begin() as connection:
        # No process has a number as large as this.
        connection.execute(sa.update(WorkerRecord).values(pid=2**31 - 1))
    engine.dispose()

    start(Database(url, **SMALL), strict=True)


@contextmanager
def role(server: PostgresServer, url: str, limit: str) -> Iterator[str]:
    """A role that is no superuser, with *limit*; give the URL with it."""
    name = f"shop_{uuid4().hex[:8]}"
    server.execute("CREATE ROLE {} LOGIN", name)
    database = str(sa.make_url(url).database)
    server.execute("ALTER DATABASE {} OWNER TO {}", database, name)
    if limit == "role":
        server.execute("ALTER ROLE {} CONNECTION LIMIT 6", name)
    elif limit == "database":
        server.execute("ALTER DATABASE {} CONNECTION LIMIT 6", database)
    try:
        yield sa.make_url(url).set(username=name).render_as_string(hide_password=False)
    finally:
        server.execute("ALTER DATABASE {} OWNER TO postgres", database)
        admin = sa.create_engine(url.replace("asyncpg", "psycopg"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {name}")
        admin.dispose()
        server.execute("DROP ROLE {}", name)


@pytest.mark.parametrize("limit", ["role", "database"])
def test_limits_of_the_role_and_of_the_database_count(small_server: PostgresServer, url: str, limit: str):
    """Whichever limit is the lowest is the one that is named."""
    with role(small_server, url, limit) as limited:
        db = Database(limited, **SMALL)

        with pytest.raises(PoolBudgetError, match=rf"allows 6 \(the {limit}'s CONNECTION LIMIT 6\)"):
            start(db, strict=True)


def test_a_server_that_does_not_say_is_no_reason_not_to_start(
    small_server: PostgresServer, url: str, caplog: pytest.LogCaptureFixture
):
    """Where the catalogue may not be read the application starts, strict or not, and says that nobody counted."""
    admin = sa.create_engine(url.replace("asyncpg", "psycopg"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("REVOKE SELECT ON pg_roles FROM PUBLIC")
    admin.dispose()

    with role(small_server, url, "none") as limited:
        start(Database(limited), processes=4, strict=True)

    assert "were not counted" in warnings(caplog)[0]


@pytest.mark.parametrize("url", ["psycopg"], indirect=True)
def test_it_costs_two_statements(url: str):
    """One of the limits and one of the workers; with ``processes`` the second is spared."""
    db = Database(url)
    start(db)
    said: list[str] = []
    event.listen(db.engine(), "before_cursor_execute", lambda *a: said.append(a[2]))

    async def body(processes: int | None) -> int:
        said.clear()
        async with db.running(processes=processes, strict=False):
            return sum("pg_database" in each or "FROM aftercommit_worker" in each for each in said)

    counts = asyncio.run(body(None)), asyncio.run(body(1))
    db.dispose()

    assert counts == (2, 1)


def test_sqlite_has_no_limits(sqlite_url: str, caplog: pytest.LogCaptureFixture):
    """Without a server there is nothing to count against, and nothing is asked."""
    start(Database(sqlite_url), processes=1000, strict=True)

    assert warnings(caplog) == []


@pytest.mark.parametrize("url", ["psycopg"], indirect=True)
def test_endpoints_of_both_flavours_count_twice(url: str):
    """The application knows which sessions its endpoints ask for, in routers, too, and whose they are."""
    db, other = Database(url), Database(url)
    app = FastAPI()
    install(app, db, strict=True, create_tables=True)
    install(app, other)

    @app.get("/sync")
    def sync(session: SessionDep) -> None: ...

    before = db.flavours_of_requests()

    @app.get("/async")
    async def native(session: AsyncSessionDep) -> None: ...

    @app.get("/other")
    def elsewhere(session: Annotated[Session, session_of(other)]) -> None: ...

    async def begin() -> None:
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(PoolBudgetError, match=r"request 20 \+ default 5"):
        asyncio.run(begin())
    assert before == {"sync"}
    assert other.flavours_of_requests() == {"sync"}


def test_no_limit_is_asked_for_where_the_database_is_replaced(sqlite_url: str, tmp_path: Path):
    """In a test that replaces the database, the server that is not there is not missed."""
    from aftercommit.testing import replace

    db = Database("postgresql://nobody@127.0.0.1:1/nowhere")
    with replace(db, url=f"sqlite:///{tmp_path / 'test.db'}"):
        start(db, strict=True)
