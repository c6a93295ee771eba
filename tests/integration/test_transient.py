"""The real errors of real databases, on every driver: each is seen for what it means.

Every test provokes one error. Where drivers report it differently, the test says so; it fails when that changes.
"""

import asyncio
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from aftercommit.tasks.transient import Fault, describe, fault_of, is_disconnect
from tests.support.databases import DatabaseUnderTest

postgres_drivers = pytest.mark.drivers("psycopg", "asyncpg")
sqlite_drivers = pytest.mark.drivers("pysqlite", "aiosqlite")


def error_of(database: DatabaseUnderTest, body: Callable[[sa.Engine], object], **options: Any) -> Exception:
    """Run *body* with an engine of the driver under test, natively or in a greenlet; return what it raised."""
    try:
        if database.is_async:
            asyncio.run(_run_async(database.url, body, options))
        else:
            _run(database.url, body, options)
    except Exception as error:  # noqa: BLE001  # which one it is, is the question of every test here
        return error
    pytest.fail("nothing was raised")


def _run(url: str, body: Callable[[sa.Engine], object], options: dict[str, Any]) -> None:
    engine = sa.create_engine(url, **options)
    try:
        body(engine)
    finally:
        engine.dispose()


async def _run_async(url: str, body: Callable[[sa.Engine], object], options: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    engine = create_async_engine(url, **options)
    try:
        await greenlet_spawn(body, engine.sync_engine)
    finally:
        await engine.dispose()
        # aiosqlite (0.22) stops the thread of a connection that could not be opened without waiting for it; the
        # thread then answers to a loop that is closed.
        for thread in set(threading.enumerate()) - before:
            if "_connection_worker_thread" in thread.name:
                await asyncio.to_thread(thread.join, 30)


@contextmanager
def rival(database: DatabaseUnderTest, isolation_level: str = "AUTOCOMMIT") -> Iterator[sa.Connection]:
    """Somebody else's connection, outside any transaction unless a level says otherwise."""
    engine = sa.create_engine(database.sync_url, isolation_level=isolation_level)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@contextmanager
def begun(engine: sa.Engine, *statements: str) -> Iterator[sa.Connection]:
    """A connection in a transaction in which *statements* have run. It is never committed."""
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        yield connection


def pid_of(connection: sa.Connection) -> int:
    """The server process of a connection."""
    pid: int = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    return pid


def wait_until(connection: sa.Connection, condition: str) -> None:
    """Ask the server until *condition* holds."""
    end = time.monotonic() + 30
    while not connection.exec_driver_sql(f"SELECT {condition}").scalar_one():
        assert time.monotonic() < end, f"never came true: {condition}"


def says_only_closed(error: Exception) -> bool:
    """Whether asyncpg lost the server's reason, which is an attempt as well.

    Before 0.32 it said 08003; and an error of its own where the reason comes between two of its messages.
    """
    lost = "(08003)" in describe(error) or "InternalClientError" in str(error)
    return lost and fault_of(error) is Fault.CONNECTION


@pytest.fixture
def table(database: DatabaseUnderTest) -> None:
    """A table ``t`` with rows 1 and 2; SQLite in WAL mode."""
    with rival(database) as connection:
        if database.is_sqlite:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        connection.exec_driver_sql("CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER, u INTEGER UNIQUE)")
        connection.exec_driver_sql("INSERT INTO t VALUES (1, 0, 1), (2, 0, 2)")


ADD_1 = "UPDATE t SET n = n + 1 WHERE id = 1"
ADD_2 = "UPDATE t SET n = n + 1 WHERE id = 2"


# --- PostgreSQL: conflicts --------------------------------------------------------------------------------------


@postgres_drivers
@pytest.mark.usefixtures("table")
def test_serialization_failure_is_a_conflict(database):
    """A row that changed after the snapshot: 40001, whatever class the driver makes of it."""

    def body(engine):
        with begun(engine, "SELECT * FROM t") as connection, rival(database) as other:
            other.exec_driver_sql(ADD_1)
            connection.exec_driver_sql(ADD_1)

    error = error_of(database, body, isolation_level="REPEATABLE READ")

    assert fault_of(error) is Fault.CONFLICT
    assert not is_disconnect(error)
    assert describe(error) == {"psycopg": "SerializationFailure", "asyncpg": "SerializationError"}[database.driver] + (
        " (40001)"
    )
    assert isinstance(error, exc.OperationalError) is (database.driver == "psycopg")


@postgres_drivers
@pytest.mark.usefixtures("table")
def test_a_conflict_at_commit_is_a_conflict(database):
    """At SERIALIZABLE it is the COMMIT that fails."""

    def body(engine):
        with (
            begun(engine, "SELECT sum(n) FROM t", ADD_1) as connection,
            rival(database, "SERIALIZABLE") as other,
        ):
            other.exec_driver_sql("SELECT sum(n) FROM t")
            other.exec_driver_sql(ADD_2)
            other.commit()
            connection.commit()

    error = error_of(database, body, isolation_level="SERIALIZABLE")

    assert fault_of(error) is Fault.CONFLICT
    assert "40001" in describe(error)


@postgres_drivers
@pytest.mark.usefixtures("table")
def test_deadlock_is_a_conflict(database):
    """Of two that wait for each other, the one that the server picks may try again."""

    def body(engine):
        # Only ours looks for deadlocks, so it is ours that is picked.
        with (
            begun(engine, "SET LOCAL deadlock_timeout = '10ms'", ADD_1) as connection,
            rival(database, "READ COMMITTED") as other,
            rival(database) as observer,
        ):
            other.exec_driver_sql("SET LOCAL deadlock_timeout = '1h'")
            other.exec_driver_sql(ADD_2)
            pid = pid_of(other)
            waiter = threading.Thread(target=other.exec_driver_sql, args=(ADD_1,))
            waiter.start()
            try:
                wait_until(observer, f"EXISTS (SELECT FROM pg_locks WHERE pid = {pid} AND NOT granted)")
                connection.exec_driver_sql(ADD_2)
            finally:
                connection.rollback()
                waiter.join()

    error = error_of(database, body)

    assert fault_of(error) is Fault.CONFLICT
    assert "40P01" in describe(error)


@postgres_drivers
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    "statements",
    [("SET LOCAL lock_timeout = '10ms'", ADD_1), ("SELECT * FROM t FOR UPDATE NOWAIT",)],
    ids=["lock_timeout", "NOWAIT"],
)
def test_a_lock_that_is_not_granted_is_a_conflict(database, statements):
    """55P03: whoever has the lock will be done with it."""

    def body(engine):
        with rival(database, "READ COMMITTED") as other:
            other.exec_driver_sql(ADD_1)
            with begun(engine, *statements):
                pass

    error = error_of(database, body)

    assert fault_of(error) is Fault.CONFLICT
    assert "55P03" in describe(error)


# --- PostgreSQL: connections ------------------------------------------------------------------------------------


@postgres_drivers
def test_a_backend_terminated_between_statements_is_a_lost_connection(database):
    """The next statement finds what the server left behind: 57P01."""

    def body(engine):
        with begun(engine) as connection, rival(database) as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({pid_of(connection)}, 10000)")
            connection.exec_driver_sql("SELECT 1")

    error = error_of(database, body)

    assert fault_of(error) is Fault.CONNECTION
    assert is_disconnect(error)
    assert "57P01" in describe(error) or says_only_closed(error)


@pytest.mark.drivers("asyncpg")
@pytest.mark.parametrize("setting", ["idle_in_transaction_session_timeout", "transaction_timeout", "none"])
def test_a_connection_that_asyncpg_saw_closing_has_no_code(database, setting):
    """While the loop runs, asyncpg reads the server's last words, and keeps none: an InterfaceError."""

    def body(engine):
        with begun(engine) as connection, rival(database) as other:
            closed = asyncio.Event()
            connection.connection.driver_connection.add_termination_listener(lambda _: closed.set())
            pid = pid_of(connection)
            if setting == "none":
                other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 10000)")
            else:
                connection.exec_driver_sql(f"SET LOCAL {setting} = '10ms'")
            await_only(asyncio.wait_for(closed.wait(), timeout=30))
            connection.exec_driver_sql("SELECT 1")

    error = error_of(database, body)

    assert fault_of(error) is Fault.CONNECTION
    assert is_disconnect(error)
    assert describe(error) == "InterfaceError"


@postgres_drivers
def test_a_backend_terminated_in_a_statement_is_a_lost_connection(database):
    """The statement that is running ends with it."""

    def body(engine):
        with begun(engine, "SELECT pg_terminate_backend(pg_backend_pid())"):
            pass

    error = error_of(database, body)

    assert fault_of(error) is Fault.CONNECTION
    assert is_disconnect(error)
    assert "57P01" in describe(error) or says_only_closed(error)


@postgres_drivers
@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("SET LOCAL idle_in_transaction_session_timeout = '10ms'", "25P03"),
        ("SET LOCAL transaction_timeout = '10ms'", "25P04"),
    ],
)
def test_an_idle_transaction_that_was_killed_counts(database, setting, code):
    """The next statement finds the reason, which asyncpg knows since 0.32."""

    def body(engine):
        with begun(engine) as connection, rival(database) as other:
            pid = pid_of(connection)
            connection.exec_driver_sql(setting)
            wait_until(other, f"NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})")
            connection.exec_driver_sql("SELECT 1")

    error = error_of(database, body)

    assert is_disconnect(error)
    assert (fault_of(error) is Fault.IDLE and code in describe(error)) or says_only_closed(error)


@postgres_drivers
def test_a_transaction_killed_in_a_statement_counts(database):
    """25P04 in the middle of a statement."""

    def body(engine):
        with begun(engine, "SET LOCAL transaction_timeout = '10ms'", "SELECT pg_sleep(60)"):
            pass

    error = error_of(database, body)

    assert is_disconnect(error)
    assert (fault_of(error) is Fault.IDLE and "25P04" in describe(error)) or says_only_closed(error)


@postgres_drivers
def test_an_idle_session_that_was_killed_counts(database):
    """57P05, outside a transaction."""

    def body(engine):
        with begun(engine) as connection, rival(database) as other:
            pid = pid_of(connection)
            connection.exec_driver_sql("SET idle_session_timeout = '10ms'")
            wait_until(other, f"NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})")
            connection.exec_driver_sql("SELECT 1")

    error = error_of(database, body, isolation_level="AUTOCOMMIT")

    assert is_disconnect(error)
    assert (fault_of(error) is Fault.IDLE and "57P05" in describe(error)) or says_only_closed(error)


@postgres_drivers
def test_a_refused_connection_is_a_connection_error(database):
    """Psycopg raises an OperationalError without a code, asyncpg a bare ConnectionRefusedError."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        port = closed.getsockname()[1]
        nowhere = DatabaseUnderTest(
            url=re.sub(r":\d+/", f":{port}/", database.url), driver=database.driver, server_url=None
        )

        error = error_of(nowhere, lambda engine: engine.connect())

    assert fault_of(error) is Fault.CONNECTION
    assert isinstance(error, exc.OperationalError) is (database.driver == "psycopg")
    assert isinstance(error, ConnectionRefusedError) is (database.driver == "asyncpg")


@postgres_drivers
def test_a_host_without_a_name_is_a_connection_error(database):
    """A name server that does not know the host today may know it tomorrow."""
    url = sa.make_url(database.url).set(host="nowhere.invalid").render_as_string(hide_password=False)

    error = error_of(DatabaseUnderTest(url=url, driver=database.driver), lambda engine: engine.connect())

    assert fault_of(error) is Fault.CONNECTION


@postgres_drivers
def test_a_connection_that_takes_too_long_is_a_connection_error(database):
    """The time limit of connecting passes by itself, though asyncpg's is a bare TimeoutError."""
    option = {"psycopg": {"connect_timeout": 2}, "asyncpg": {"timeout": 0.05}}[database.driver]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # the kernel accepts, and nobody answers
        url = re.sub(r":\d+/", f":{silent.getsockname()[1]}/", database.url)

        error = error_of(
            DatabaseUnderTest(url=url, driver=database.driver), lambda engine: engine.connect(), connect_args=option
        )

    assert fault_of(error) is Fault.CONNECTION
    assert isinstance(error, TimeoutError) is (database.driver == "asyncpg")


@pytest.mark.drivers("asyncpg")
def test_the_clients_own_statement_timeout_is_permanent(database):
    """`command_timeout` of asyncpg is a TimeoutError, too, but says what 57014 says."""

    def body(engine):
        with begun(engine, "SELECT pg_sleep(60)"):
            pass

    error = error_of(database, body, connect_args={"command_timeout": 0.05})

    assert isinstance(error, TimeoutError)
    assert fault_of(error) is Fault.PERMANENT


def test_the_applications_own_refused_connection_is_its_own():
    """Another service that is down is the application's affair: `Retry(on=ConnectionError)`."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError) as caught:
            socket.create_connection(closed.getsockname())

    assert fault_of(caught.value) is Fault.APPLICATION


def test_the_pools_timeout_is_a_connection_error_on_every_driver(database):
    """No connection was given, so there is none to drop."""

    def body(engine):
        with engine.connect(), engine.connect():
            pass

    error = error_of(database, body, pool_size=1, max_overflow=0, pool_timeout=0.01)

    assert fault_of(error) is Fault.CONNECTION
    assert not is_disconnect(error)


@postgres_drivers
def test_too_many_connections_pass(database):
    """Class 53. libpq gives psycopg no code when it cannot connect; the meaning is the same."""
    url = sa.make_url(database.url).set(username="few").render_as_string(hide_password=False)
    with rival(database) as other:
        other.exec_driver_sql("CREATE ROLE few LOGIN CONNECTION LIMIT 0")
        try:
            error = error_of(DatabaseUnderTest(url=url, driver=database.driver), lambda engine: engine.connect())
        finally:
            other.exec_driver_sql("DROP ROLE few")

    assert fault_of(error) is Fault.CONNECTION
    assert ("53300" in describe(error)) is (database.driver == "asyncpg"), describe(error)


# --- PostgreSQL: connections that live and are of no use --------------------------------------------------------


@postgres_drivers
@pytest.mark.usefixtures("table")
def test_a_read_only_transaction_is_stale(database):
    """25006: what a primary says that has become a standby."""

    def body(engine):
        with begun(engine, "SET TRANSACTION READ ONLY", ADD_1):
            pass

    error = error_of(database, body)

    assert fault_of(error) is Fault.STALE
    assert is_disconnect(error)
    assert "25006" in describe(error)


PREPARE_ALWAYS = {"psycopg": {"prepare_threshold": 0}, "asyncpg": {}}


@postgres_drivers
@pytest.mark.usefixtures("table")
def test_a_plan_from_before_a_migration_is_stale(database):
    """0A000 "cached plan must not change result type", whose code SQLAlchemy 2.1 loses on its way from asyncpg."""

    def body(engine):
        with engine.connect() as connection, rival(database) as other:
            connection.exec_driver_sql("SELECT * FROM t")
            connection.commit()
            other.exec_driver_sql("ALTER TABLE t ADD COLUMN more INTEGER")
            connection.exec_driver_sql("SELECT * FROM t")

    error = error_of(database, body, connect_args=PREPARE_ALWAYS[database.driver])

    assert fault_of(error) is Fault.STALE
    assert is_disconnect(error)
    assert "0A000" in describe(error)


@postgres_drivers
@pytest.mark.usefixtures("table")
def test_a_statement_that_the_server_does_not_support_is_permanent(database):
    """The same 0A000, and neither another connection nor another try will help: the application is wrong."""

    def body(engine):
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM t FOR UPDATE")

    error = error_of(database, body)

    assert fault_of(error) is Fault.PERMANENT
    assert not is_disconnect(error)
    assert "0A000" in describe(error)


@postgres_drivers
@pytest.mark.usefixtures("table")
def test_a_prepared_statement_that_is_gone_is_stale(database):
    """26000: a pooler changed the server below us, or somebody deallocated."""

    def body(engine):
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT * FROM t")
            connection.exec_driver_sql("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")
            connection.exec_driver_sql("SELECT * FROM t")

    error = error_of(database, body, connect_args=PREPARE_ALWAYS[database.driver])

    assert fault_of(error) is Fault.STALE
    assert is_disconnect(error)
    assert "26000" in describe(error)


# --- PostgreSQL: unique and permanent ---------------------------------------------------------------------------


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("values", ["(1, 0, 9)", "(9, 0, 1)"], ids=["primary key", "unique"])
def test_a_row_that_is_there_already_is_unique_on_every_driver(database, values):
    """23505, SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_UNIQUE."""

    def body(engine):
        with begun(engine, f"INSERT INTO t VALUES {values}"):
            pass

    error = error_of(database, body)

    assert fault_of(error) is Fault.UNIQUE
    assert not is_disconnect(error)


@postgres_drivers
def test_an_exclusion_constraint_is_unique(database):
    """23P01: bookings that must not overlap race as unique keys do."""

    def body(engine):
        with begun(
            engine,
            "CREATE TABLE booking (during int4range, EXCLUDE USING gist (during WITH &&))",
            "INSERT INTO booking VALUES ('[1,5)')",
            "INSERT INTO booking VALUES ('[2,3)')",
        ):
            pass

    error = error_of(database, body)

    assert fault_of(error) is Fault.UNIQUE
    assert "23P01" in describe(error)


@postgres_drivers
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("statements", "code"),
    [
        (("SET LOCAL statement_timeout = '10ms'", "SELECT pg_sleep(60)"), "57014"),
        (("SELECT * FROM missing",), "42P01"),
        (("INSERT INTO t (id, n) VALUES (9, 1 / 0)",), "22012"),
        (("CREATE TEMP TABLE c (n INTEGER CHECK (n > 0))", "INSERT INTO c VALUES (0)"), "23514"),
        (("SELEC 1",), "42601"),
    ],
)
def test_what_cannot_pass_is_permanent(database, statements, code):
    """A statement that took too long, wrong data, missing tables, our own mistakes."""

    def body(engine):
        with begun(engine, *statements):
            pass

    error = error_of(database, body)

    assert fault_of(error) is Fault.PERMANENT
    assert not is_disconnect(error)
    assert f"({code})" in describe(error)


# --- errors that come after another -----------------------------------------------------------------------------


@postgres_drivers
@pytest.mark.usefixtures("table")
def test_a_caught_conflict_is_seen_in_a_session_that_waits_for_its_rollback(database):
    """A flush that failed on a conflict leaves PendingRollbackError to whatever the handler does next."""

    class Base(sa.orm.DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "t"
        id: sa.orm.Mapped[int] = sa.orm.mapped_column(primary_key=True)
        n: sa.orm.Mapped[int]

    def body(engine):
        with Session(engine) as session, rival(database) as other:
            row = session.get_one(Row, 1)
            other.exec_driver_sql(ADD_1)
            row.n += 1
            try:
                session.flush()
            except exc.DBAPIError:
                session.execute(sa.select(Row))

    error = error_of(database, body, isolation_level="REPEATABLE READ")

    assert isinstance(error, exc.PendingRollbackError)
    assert fault_of(error) is Fault.CONFLICT


@postgres_drivers
@pytest.mark.usefixtures("table")
def test_a_transaction_that_somebody_went_on_with_is_permanent_by_itself(database):
    """25P02 alone does not tell what aborted the transaction: who saw it must say (`saw_conflict`)."""

    def body(engine):
        with begun(engine, "SELECT * FROM t") as connection, rival(database) as other:
            other.exec_driver_sql(ADD_1)
            with suppress(exc.DBAPIError):
                connection.exec_driver_sql(ADD_1)
            connection.exec_driver_sql("SELECT 1")

    error = error_of(database, body, isolation_level="REPEATABLE READ")

    assert "25P02" in describe(error)
    assert fault_of(error) is Fault.PERMANENT


@postgres_drivers
def test_a_connection_used_after_its_loss_was_caught_is_lost(database):
    """SQLAlchemy then asks for a rollback first, and does not name what was lost."""

    def body(engine):
        with begun(engine) as connection, rival(database) as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({pid_of(connection)}, 10000)")
            with suppress(exc.DBAPIError):
                connection.exec_driver_sql("SELECT 1")
            connection.exec_driver_sql("SELECT 1")

    error = error_of(database, body)

    assert isinstance(error, exc.PendingRollbackError)
    assert fault_of(error) is Fault.CONNECTION
    assert is_disconnect(error)


# --- SQLite -----------------------------------------------------------------------------------------------------

# No transactions of the driver's own, and no waiting for locks.
BY_HAND = {"isolation_level": None, "timeout": 0}


@sqlite_drivers
@pytest.mark.usefixtures("table")
def test_a_busy_database_is_a_conflict(database):
    """SQLITE_BUSY: somebody else writes."""

    def body(engine):
        with rival(database) as other:
            other.exec_driver_sql("BEGIN IMMEDIATE")
            with begun(engine, "BEGIN IMMEDIATE"):
                pass

    error = error_of(database, body, connect_args=BY_HAND)

    assert fault_of(error) is Fault.CONFLICT
    assert not is_disconnect(error)
    assert "(SQLITE_BUSY)" in describe(error)


@sqlite_drivers
@pytest.mark.usefixtures("table")
def test_a_snapshot_that_is_too_old_to_write_is_a_conflict(database):
    """SQLITE_BUSY_SNAPSHOT: somebody else wrote since this transaction read."""

    def body(engine):
        with begun(engine, "BEGIN", "SELECT * FROM t") as connection, rival(database) as other:
            other.exec_driver_sql(ADD_1)
            connection.exec_driver_sql(ADD_1)

    error = error_of(database, body, connect_args=BY_HAND)

    assert fault_of(error) is Fault.CONFLICT
    assert "(SQLITE_BUSY_SNAPSHOT)" in describe(error)


@pytest.mark.drivers("pysqlite")
@pytest.mark.usefixtures("table")
def test_a_locked_table_is_a_conflict(database):
    """SQLITE_LOCKED: a statement of the same connection still reads the table."""

    def body(engine):
        with begun(engine) as connection:
            driver = connection.connection.driver_connection
            reading = driver.execute("SELECT * FROM t")
            reading.fetchone()
            try:
                connection.exec_driver_sql("DROP TABLE t")
            finally:
                reading.close()

    error = error_of(database, body, connect_args=BY_HAND)

    assert fault_of(error) is Fault.CONFLICT
    assert "(SQLITE_LOCKED)" in describe(error)


@sqlite_drivers
@pytest.mark.usefixtures("table")
def test_a_full_disk_is_an_attempt_and_keeps_the_connection(database):
    """SQLITE_FULL, as 53100 on PostgreSQL: an administrator can help, a new connection cannot."""

    def body(engine):
        with begun(engine, "PRAGMA max_page_count = 1", "CREATE TABLE big AS SELECT zeroblob(1000000)"):
            pass

    error = error_of(database, body, connect_args=BY_HAND)

    assert fault_of(error) is Fault.CONNECTION
    assert not is_disconnect(error)
    assert "(SQLITE_FULL)" in describe(error)


@sqlite_drivers
def test_a_file_that_cannot_be_opened_is_a_connection_error(database):
    """SQLITE_CANTOPEN: a volume that is not mounted yet."""
    elsewhere = DatabaseUnderTest(url=database.url.replace("test.db", "missing/test.db"), driver=database.driver)

    error = error_of(elsewhere, lambda engine: engine.connect())

    assert fault_of(error) is Fault.CONNECTION
    assert "(SQLITE_CANTOPEN)" in describe(error)


@sqlite_drivers
@pytest.mark.usefixtures("table")
def test_a_read_only_file_is_stale(database):
    """SQLITE_READONLY: the file was opened that way, and may be writable by now."""

    def body(engine):
        with begun(engine, "PRAGMA query_only = 1", ADD_1):
            pass

    error = error_of(database, body, connect_args=BY_HAND)

    assert fault_of(error) is Fault.STALE
    assert is_disconnect(error)


@sqlite_drivers
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    "statement",
    ["SELECT * FROM missing", "SELEC 1", "INSERT INTO t VALUES ('x', 0, 9)"],
    ids=["no table", "syntax", "wrong data"],
)
def test_what_cannot_pass_is_permanent_on_sqlite(database, statement):
    """SQLite's own mistakes of ours."""

    def body(engine):
        with begun(engine, statement):
            pass

    error = error_of(database, body)

    assert fault_of(error) is Fault.PERMANENT
    assert not is_disconnect(error)


@sqlite_drivers
def test_a_closed_connection_is_lost(database):
    """Closed below SQLAlchemy, which notices and drops it."""

    def body(engine):
        with begun(engine) as connection:
            connection.connection.dbapi_connection.close()
            connection.exec_driver_sql("SELECT 1")

    error = error_of(database, body)

    assert fault_of(error) is Fault.CONNECTION
    assert is_disconnect(error)


# --- without SQLAlchemy -----------------------------------------------------------------------------------------


def test_the_drivers_own_errors_are_seen_without_sqlalchemy(postgres_url, sqlite_url):
    """A task may use a driver directly; nothing wraps its errors then."""
    import asyncpg
    import psycopg

    dsn = sa.make_url(postgres_url).set(drivername="postgresql").render_as_string(hide_password=False)

    async def by_asyncpg(statement: str) -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    with pytest.raises(psycopg.Error) as psycopg_error, psycopg.connect(dsn) as connection:
        connection.execute("SELECT * FROM missing")
    with pytest.raises(asyncpg.PostgresError) as asyncpg_error:
        asyncio.run(by_asyncpg("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))
    memory = sqlite3.connect(":memory:")
    with pytest.raises(sqlite3.Error) as sqlite_error:
        memory.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)").executemany("INSERT INTO t VALUES (?)", [(1,), (1,)])
    memory.close()

    assert fault_of(psycopg_error.value) is Fault.PERMANENT
    assert fault_of(asyncpg_error.value) is Fault.CONFLICT
    assert fault_of(sqlite_error.value) is Fault.UNIQUE
