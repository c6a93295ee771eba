"""The server processes of a silent worker are ended, and nobody else's."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from aftercommit import TaskRecord
from aftercommit.records import schema
from aftercommit.records.backends import end_silent
from aftercommit.records.tables import WorkerRecord
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Workshop

pytestmark = pytest.mark.drivers("psycopg", "asyncpg")

SILENT_AFTER = 10.0
WHO_AM_I = (
    "SELECT pid, CAST(EXTRACT(EPOCH FROM backend_start) * 1000000 AS bigint), CAST(usename AS text) "
    "FROM pg_stat_activity WHERE pid = pg_backend_pid()"
)


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """An application with a worker that looks at others several times a second."""
    shop = Workshop(database, heartbeat=0.2, silent_after=SILENT_AFTER)
    with shop.outside.begin() as connection:
        schema.create_tables(connection)
    yield shop
    shop.close()


@contextmanager
def client(database: DatabaseUnderTest, **options: Any) -> Iterator[tuple[psycopg.Connection, list[Any]]]:
    """Another application's connection, and how a worker would list it."""
    url = make_url(database.sync_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True, **options) as connection:
        row = connection.execute(WHO_AM_I).fetchone()
        assert row is not None
        yield connection, list(row)


def silent(shop: Workshop, *listed: list[Any]) -> UUID:
    """Enter a worker that was last heard of long ago and lists these backends; return its id."""
    long_ago = datetime.now(UTC) - timedelta(seconds=5 * SILENT_AFTER)
    id = uuid4()
    with Session(shop.outside) as session:
        session.add(
            WorkerRecord(
                id=id, host="gone", pid=1, started_at=long_ago, seen_at=long_ago, pools=[], names=[],
                backends=[[*each, False] for each in listed],
            )
        )  # fmt: skip
        session.commit()
    return id


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline


def is_listed(shop: Workshop, worker: UUID) -> bool:
    """Whether the worker still lists backends."""
    return bool(shop.sql("SELECT backends IS NOT NULL FROM aftercommit_worker WHERE id = :id", id=worker))


def is_alive(connection: psycopg.Connection) -> bool:
    """Whether the server still answers on it."""
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def test_the_backends_that_a_silent_worker_lists_are_ended(database: DatabaseUnderTest, shop: Workshop):
    """Number, beginning, role and database are those that it has listed: they end, and its list goes."""
    with client(database) as (connection, me):
        worker = silent(shop, me)

        with shop.running():
            wait_until(lambda: not is_listed(shop, worker))

        assert not is_alive(connection)


@pytest.mark.parametrize(
    "other",
    [
        lambda pid, began, role: [pid, began - 1, role],
        lambda pid, began, role: [pid, began + 1, role],
        lambda pid, began, role: [pid + 1, began, role],
        lambda pid, began, _: [pid, began, "somebody"],
    ],
    ids=["used again", "older", "other number", "other role"],
)
def test_whoever_has_taken_over_the_number_is_left_alone(
    database: DatabaseUnderTest, shop: Workshop, other: Callable[..., list[Any]]
):
    """A backend that differs in anything from what was listed is somebody else's."""
    with client(database) as (connection, me):
        worker = silent(shop, other(*me))

        with shop.running():
            wait_until(lambda: not is_listed(shop, worker))

        assert is_alive(connection)


def test_another_application_of_the_same_name_is_left_alone(database: DatabaseUnderTest, shop: Workshop):
    """The name of an application is nobody's own."""
    with client(database, application_name="aftercommit:default") as (connection, _), client(database) as (_, me):
        worker = silent(shop, me)

        with shop.running():
            wait_until(lambda: not is_listed(shop, worker))

        assert is_alive(connection)


def test_another_database_is_left_alone(database: DatabaseUnderTest, shop: Workshop):
    """A copy of the tables in another database of the same server lists the backends of those that work there."""
    with client(database, dbname="postgres") as (connection, me):
        worker = silent(shop, me)

        with shop.running():
            wait_until(lambda: not is_listed(shop, worker))

        assert is_alive(connection)


def test_what_a_live_worker_lists_is_left_alone(database: DatabaseUnderTest, shop: Workshop):
    """One that could not sign off and was started again in the same process left a row with the same connections."""
    runner_of: Callable[[], Any] = lambda: shop.db.runner  # noqa: E731
    with shop.running():
        runner = runner_of()
        pid = shop.commit(lambda session: session.scalar(sa.text("SELECT pg_backend_pid()")))
        wait_until(lambda: pid in [each[0] for each in own_list(shop, runner.id)])

        def keeps_books() -> Any:
            pids = [each[0] for each in own_list(shop, runner.id) if each[3]]
            return pids and shop.sql("SELECT COUNT(*) FROM pg_stat_activity WHERE pid = :pid", pid=pids[0])

        # Those of the start-up may be closed by now, and the bookkeeping's, once it is known that there is no pooler.
        wait_until(lambda: runner.books.is_direct and keeps_books())
        own = [each for each in own_list(shop, runner.id) if each[0] == pid or each[3]]
        worker = silent(shop, *[each[:3] for each in own])
        with client(database) as (connection, me):
            control = silent(shop, me)
            wait_until(lambda: not is_listed(shop, control))
            assert not is_alive(connection)

        assert not is_listed(shop, worker)
        there = shop.sql(
            "SELECT COUNT(*) FROM pg_stat_activity WHERE pid IN "
            "(SELECT CAST(json_array_elements_text(CAST(:pids AS json)) AS integer))",
            pids=json.dumps([each[0] for each in own]),
        )
        assert there == len(own) == 2


def own_list(shop: Workshop, worker: UUID) -> list[Any]:
    """What a worker lists."""
    with Session(shop.outside) as session:
        return session.scalars(sa.select(WorkerRecord.backends).where(WorkerRecord.id == worker)).one() or []


def test_a_worker_that_wakes_up_at_this_very_moment_keeps_its_backends(database: DatabaseUnderTest, shop: Workshop):
    """Its heartbeat is on its way: it is waited for by nobody, and nothing is ended."""
    with client(database) as (connection, me), client(database) as (beating, _):
        worker = silent(shop, me)
        with beating.transaction():
            beating.execute("UPDATE aftercommit_worker SET seen_at = clock_timestamp() WHERE id = %s", (worker,))
            during = ended_by(shop)
        after = ended_by(shop)

        assert (during, after) == ({}, {})
        assert is_alive(connection)
        assert is_listed(shop, worker)


def ended_by(shop: Workshop) -> dict[UUID, int]:
    """What a look of somebody else ends."""
    with shop.outside.connect().execution_options(isolation_level="READ COMMITTED") as connection, connection.begin():
        return end_silent(connection, uuid4(), silent_after=SILENT_AFTER).ended


def test_without_the_right_it_is_said_once_and_everything_else_goes_on(
    database: DatabaseUnderTest, shop: Workshop, caplog: pytest.LogCaptureFixture
):
    """A role that may not end another's backend says so, rescues the tasks, and keeps the row for one that may."""
    role = f"plain_{uuid4().hex}"
    shop.sql(f"CREATE ROLE {role} LOGIN")
    try:
        shop.sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        shop.sql(f"GRANT ALL ON SCHEMA public TO {role}")
        url = make_url(database.url).set(username=role).render_as_string(hide_password=False)
        plain = Workshop(
            DatabaseUnderTest(url=url, driver=database.driver), heartbeat=0.2, silent_after=SILENT_AFTER
        )  # fmt: skip
        try:
            with client(database) as (connection, me), caplog.at_level(logging.WARNING):
                worker = silent(shop, me)
                with plain.db.running(create_tables=False):
                    wait_until(lambda: "may not be ended by this role" in caplog.text)
                    runner: Any = plain.db.runner
                    seen = own_seen(shop, runner.id)
                    wait_until(lambda: own_seen(shop, runner.id) > seen)
                assert is_alive(connection)
                assert is_listed(shop, worker)
                assert caplog.text.count("may not be ended by this role") == 1
        finally:
            plain.close()
    finally:
        shop.sql(f"DROP OWNED BY {role}")
        shop.sql(f"DROP ROLE {role}")


def own_seen(shop: Workshop, worker: UUID) -> datetime:
    """When a worker was last heard of."""
    with Session(shop.outside) as session:
        return session.scalars(sa.select(WorkerRecord.seen_at).where(WorkerRecord.id == worker)).one()


def test_the_same_role_needs_no_right_of_its_own(database: DatabaseUnderTest, shop: Workshop):
    """Every role may end what it has begun itself, superuser or not."""
    role = f"plain_{uuid4().hex}"
    shop.sql(f"CREATE ROLE {role} LOGIN")
    try:
        shop.sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        url = make_url(database.sync_url).set(username=role)
        engine = sa.create_engine(url)
        with client(database, user=role) as (connection, me):
            silent(shop, me)
            with engine.begin() as other:
                assert list(end_silent(other, uuid4(), silent_after=SILENT_AFTER).ended.values()) == [1]
            wait_until(lambda: not is_alive(connection))
        engine.dispose()
    finally:
        shop.sql(f"DROP OWNED BY {role}")
        shop.sql(f"DROP ROLE {role}")


@pytest.mark.parametrize("nonsense", ["3", '"x"', "{}", "[3]", '["x", {}]', '[["x", "y", 3]]', "null"])
def test_a_list_that_was_edited_by_hand_stops_nothing(shop: Workshop, nonsense: str):
    """Whatever stands there, heartbeats and rescues go on."""
    worker = silent(shop)
    shop.sql(
        "UPDATE aftercommit_worker SET backends = CAST(:backends AS json) WHERE id = :id", backends=nonsense, id=worker
    )

    @shop.task()
    def nothing(session: Session, label: str) -> None: ...

    dead = uuid4()
    now = datetime.now(UTC)
    with Session(shop.outside) as session:
        session.add(
            TaskRecord(
                id=uuid4(), task="nothing", pool="default", state="running", arguments={"label": ""}, attempt=1,
                claims=1, run_at=now, enqueued_at=now, started_at=now, worker=dead,
            )
        )  # fmt: skip
        session.commit()
    with shop.running():
        wait_until(lambda: [each.state for each in shop.records()] == ["succeeded"])


def test_every_pool_of_a_worker_is_listed_soon(shop: Workshop):
    """Its own bookkeeping, its tasks and its requests, as the server has them."""

    @shop.task()
    def nothing(session: Session, label: str) -> None:
        session.execute(sa.text("SELECT 1"))

    with shop.running():
        runner: Any = shop.db.runner
        shop.ask(nothing)
        shop.drain()
        names = sa.text(
            "SELECT DISTINCT a.application_name FROM aftercommit_worker w, json_array_elements(w.backends) AS e (b), "
            "pg_stat_activity a WHERE w.id = :id AND a.pid = CAST(e.b ->> 0 AS integer) "
            "AND CAST(e.b ->> 1 AS bigint) = CAST(EXTRACT(EPOCH FROM a.backend_start) * 1000000 AS bigint) ORDER BY 1"
        )

        def listed() -> list[str]:
            with shop.outside.connect() as connection:
                return list(connection.scalars(names, {"id": runner.id}))

        wait_until(lambda: listed() == ["aftercommit:aftercommit", "aftercommit:default", "aftercommit:request"])
        keeps_books = [each[3] for each in own_list(shop, runner.id)]

    assert keeps_books.count(True) == 1


@pytest.mark.drivers("psycopg")
def test_a_fork_does_not_take_its_parents_connections_for_its_own(shop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """A server that loads the application before it forks: the parent's go on when the child falls silent."""
    with shop.db.session() as session:
        session.execute(sa.text("SELECT 1"))
    noted = shop.db.sessions.pools.backends.noted

    assert len(noted()) == 1
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert noted() == []


@pytest.mark.drivers("pysqlite", "aiosqlite")
def test_sqlite_has_no_backends(database: DatabaseUnderTest):
    """A worker lists nothing there."""
    shop = Workshop(database, heartbeat=0.1)
    with shop.running():
        runner: Any = shop.db.runner
        seen = own_seen(shop, runner.id)
        wait_until(lambda: own_seen(shop, runner.id) > seen)
        assert own_list(shop, runner.id) == []
    shop.close()
