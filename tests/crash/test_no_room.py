"""A disk that is full, and a database that refuses to write: all is refused for a while, and then made up for."""

import resource
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.crash.traffic import Traffic
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.servers import ROOT, Server

APP = ROOT / "tests" / "crash" / "outage_app.py"
SECONDS = 60.0

FULL_DISK = (
    "CREATE TABLE full_disk (is_full boolean)",
    """
CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM full_disk) THEN
        RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100';
    END IF;
    RETURN NEW;
END $$
""",
    # One by one: the application is at work, and two of these locks at once could be a deadlock.
    *(
        f"CREATE TRIGGER no_room BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION no_room()"
        for table in ("aftercommit_task", "aftercommit_worker", "counter", "effect")
    ),
)


Trouble = Callable[[Server], AbstractContextManager[None]]


def assert_goes_through(application: Server, engine: sa.Engine, trouble: Trouble, *, answer: int = 503) -> None:
    """Requests go well, are answered *answer* in the trouble, and go well again; in the end all took effect, once."""

    def value(statement: str) -> object:
        with engine.connect() as connection:
            return connection.exec_driver_sql(statement).scalar()

    with Traffic(application.url) as traffic:
        traffic.wait_for(lambda status: status == 201, more=60)
        with trouble(application):
            traffic.wait_for(lambda status: status == answer, more=60)
        traffic.wait_for(lambda status: status == 201, more=60)
        traffic.stop()
    deadline = time.monotonic() + SECONDS
    left = "SELECT count(*) FROM aftercommit_task WHERE state IN ('queued', 'running')"
    while value(left):
        assert time.monotonic() < deadline, value(left)

    with engine.connect() as connection:
        states = set(connection.exec_driver_sql("SELECT state FROM aftercommit_task").scalars())
        committed = sorted(connection.exec_driver_sql("SELECT id FROM counter").scalars())
        effects = sorted(int(label) for label in connection.exec_driver_sql("SELECT label FROM effect").scalars())
    assert states == {"succeeded"}
    assert effects == committed
    assert set(traffic.answers.values()) <= {201, 503, answer}, Counts(traffic.answers.values())
    assert {number for number, status in traffic.answers.items() if status == 201} == set(committed)


@pytest.mark.drivers("psycopg", "asyncpg")
@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_server_that_takes_nothing_for_a_while(database: DatabaseUnderTest, what: str):
    """53100 and 25006 in the middle of the load: requests fail, tasks wait, and nobody restarts anything."""
    with PostgresServer() as server:
        engine = sa.create_engine(server.url("postgres"), isolation_level="AUTOCOMMIT")

        @contextmanager
        def trouble(_application: Server) -> Iterator[None]:
            if what == "full":
                with engine.connect() as connection:
                    connection.exec_driver_sql("INSERT INTO full_disk VALUES (true)")
                    yield
                    connection.exec_driver_sql("DELETE FROM full_disk")
                return
            # What a primary is that has become a standby: it answers, and writes nothing.
            server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            server.execute("SELECT pg_reload_conf()")
            yield
            server.execute("ALTER SYSTEM RESET default_transaction_read_only")
            server.execute("SELECT pg_reload_conf()")

        with Server(APP, env={"DATABASE_URL": server.url("postgres", driver=database.driver)}) as application:
            with engine.connect() as connection:
                for statement in FULL_DISK if what == "full" else ():
                    connection.exec_driver_sql(statement)
            assert_goes_through(application, engine, trouble)
        engine.dispose()


@pytest.mark.drivers("pysqlite", "aiosqlite")
@pytest.mark.parametrize("what", ["full", "read-only", "failing"])
def test_a_file_that_takes_nothing_for_a_while(database: DatabaseUnderTest, tmp_path: Path, what: str):
    """SQLITE_FULL, SQLITE_READONLY and SQLITE_IOERR in the middle of the load: the same."""
    ill = tmp_path / "ill"
    ill.write_text("SELECT 1")
    engine = sa.create_engine(database.sync_url, isolation_level="AUTOCOMMIT")

    @contextmanager
    def trouble(application: Server) -> Iterator[None]:
        if what == "failing":
            # The system refuses every write beyond the first byte of a file.
            pid = application.process.pid
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            yield
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
            return
        wrong, well = {
            "full": ("PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1073741823"),
            "read-only": ("PRAGMA query_only = 1", "PRAGMA query_only = 0"),
        }[what]
        ill.write_text(wrong)
        yield
        ill.write_text(well)

    with Server(APP, env={"DATABASE_URL": database.url, "ILL": str(ill)}) as application:
        # On a disk that fails it is the COMMIT that fails, and what a later one finds there nobody knows.
        assert_goes_through(application, engine, trouble, answer=500 if what == "failing" else 503)
    engine.dispose()
