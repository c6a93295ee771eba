"""Starting and stopping again and again leaves nothing behind: no thread, no task, no connection, no file."""

import asyncio
import gc
import threading
import time

import psutil
import sqlalchemy as sa

from aftercommit import Database
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Workshop

CONNECTIONS = sa.text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'aftercommit%'"
)
# A thousand where a start costs no connections to a server, a few where it does.
TIMES = {"pysqlite": 1000, "aiosqlite": 20, "psycopg": 20, "asyncpg": 20}


def open_files() -> int:
    """How many files and sockets this process has open."""
    gc.collect()
    return int(psutil.Process().num_fds())


def threads() -> set[threading.Thread]:
    """The threads there are."""
    return set(threading.enumerate())


def new_threads(before: set[threading.Thread]) -> list[str]:
    """The threads that have come since, and stay: aiosqlite's own end by themselves once their connection is closed."""
    for each in threads() - before:
        each.join(30)
    return [each.name for each in threads() - before]


def test_starts_and_stops_leave_nothing(database: DatabaseUnderTest) -> None:
    """A thousand times ``with db.running()`` on one driver, and twenty on the others."""
    shop = Workshop(database)
    with shop.running():
        pass
    before, files = threads(), open_files()

    for _ in range(TIMES[database.driver]):
        with shop.running():
            pass

    assert new_threads(before) == []
    assert open_files() <= files + 1
    shop.close()
    if not database.is_sqlite:
        assert connections(database) == 0


def test_starts_and_stops_on_one_loop_leave_nothing(database: DatabaseUnderTest) -> None:
    """The same with ``async with`` on the application's own loop, which keeps no task either."""
    db = Database(database.url)

    async def start_and_stop() -> set[str]:
        for _ in range(10):
            async with db.running(create_tables=True):
                pass
            left = {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}}  # type: ignore[arg-type]
            assert left == set()
        await db.async_dispose()
        return left

    before = threads()
    asyncio.run(start_and_stop())

    assert new_threads(before) == []
    if not database.is_sqlite:
        assert connections(database) == 0


def connections(database: DatabaseUnderTest) -> int:
    """How many connections of the library the server has, once those that are closing are gone."""
    engine = sa.create_engine(database.sync_url, isolation_level="AUTOCOMMIT")
    deadline = time.monotonic() + 30
    with engine.connect() as connection:
        while (left := connection.scalar(CONNECTIONS)) and time.monotonic() < deadline:
            pass
    engine.dispose()
    return int(left)
