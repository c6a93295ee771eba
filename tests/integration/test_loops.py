"""One database serves any number of event loops, at once and one after another, within one limit."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from aftercommit import Database, PoolSettings, TaskRecord
from aftercommit.errors import PoolExhausted
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT

pytestmark = [
    pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite"),
    # asyncio's word, and the drivers', for what a loop leaves open when it is closed.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._started = threading.Event()
        self._end: asyncio.Event
        self.loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._started.wait(TIMEOUT)

    async def _main(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await self._end.wait()

    def submit(self, coroutine: Any) -> Future[Any]:
        """Start something there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Any) -> Any:
        """Do something there."""
        return self.submit(coroutine).result(TIMEOUT)

    def close(self) -> None:
        """Close it."""
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


Make = Callable[..., Database]


@pytest.fixture
def make(database: DatabaseUnderTest) -> Iterator[Make]:
    """Makes a database with one counter, whose connections are watched: no loop may meet another one's."""
    made: list[Database] = []
    strangers: list[str] = []

    def make(**options: Any) -> Database:
        db = Database(database.async_url, **options)
        loops: dict[int, Any] = {}
        engine = db.async_engine().sync_engine

        def opened(connection: Any, _record: Any) -> None:
            loops[id(connection)] = (connection, asyncio.get_running_loop())

        def used(connection: Any, *_: Any) -> None:
            if loops[id(connection)][1] is not asyncio.get_running_loop():
                strangers.append("a loop was given another one's connection")

        event.listen(engine, "connect", opened)
        event.listen(engine, "checkout", used)
        made.append(db)
        return db

    async def prepare() -> None:
        db = Database(database.async_url)
        async with db.async_session() as session:
            await session.execute(text("CREATE TABLE counter (n INTEGER)"))
            await session.execute(text("INSERT INTO counter VALUES (0)"))
        await db.async_create_tables()
        await db.async_dispose()

    asyncio.run(prepare())
    yield make
    for db in made:
        asyncio.run(db.async_dispose())
    gc.collect()
    assert not strangers


async def add(db: Database) -> None:
    """Count one."""
    async with db.async_session() as session:
        await session.execute(text("UPDATE counter SET n = n + 1"))


async def count(db: Database) -> int:
    """What was counted."""
    async with db.async_session() as session:
        found: int = (await session.execute(text("SELECT n FROM counter"))).scalar_one()
        return found


def test_one_loop_after_another(make: Make):
    """A loop for each test, say: what the last one left open is not used, and does not pile up."""
    db = make(pool=PoolSettings(pool_size=2, max_overflow=0))

    for _ in range(10):
        asyncio.run(add(db))

    assert asyncio.run(count(db)) == 10
    assert db.async_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a_def_task_that_runs_a_loop_of_its_own(make: Make):
    """The application's loop goes on with connections of its own, and counts exactly."""
    db = make()

    @db.task
    async def main_loops(session: AsyncSession) -> None:
        await session.execute(text("UPDATE counter SET n = n + 1"))

    def body() -> None:
        asyncio.run(add(db))

    async def main() -> None:
        async with db.running():
            for _ in range(12):
                async with db.async_session() as session:
                    await session.execute(text("UPDATE counter SET n = n + 1"))
                    db.after_commit(session, main_loops)
                with ThreadPoolExecutor(1) as threads:
                    await asyncio.get_running_loop().run_in_executor(threads, body)
            await db.async_drain(TIMEOUT)

    asyncio.run(main())

    assert asyncio.run(count(db)) == 36


def test_many_loops_at_once(make: Make):
    """Each is served within the limit, and none waits for ever."""
    db = make(pool=PoolSettings(pool_size=2, max_overflow=1, pool_timeout=TIMEOUT))
    loops = [Loop() for _ in range(4)]

    async def work() -> None:
        for _ in range(5):
            await asyncio.gather(*(add(db) for _ in range(3)))

    done = [loop.submit(work()) for loop in loops]
    for each in done:
        each.result(2 * TIMEOUT)
    total = loops[0].run(count(db))
    for loop in loops:
        loop.close()

    assert total == 60


def test_a_loop_that_waits_is_woken_by_another(make: Make):
    """The one connection there may be is given from loop to loop."""
    db = make(pool=PoolSettings(pool_size=1, max_overflow=0, pool_timeout=TIMEOUT))
    one, other = Loop(), Loop()

    async def hold(has: threading.Event, let: asyncio.Event) -> None:
        async with db.async_session() as session:
            await session.execute(text("UPDATE counter SET n = n + 1"))
            has.set()
            await let.wait()

    async def event_of() -> asyncio.Event:
        return asyncio.Event()

    has, let = threading.Event(), one.run(event_of())
    first = one.submit(hold(has, let))
    assert has.wait(TIMEOUT)
    second = other.submit(add(db))
    while not db.stats().pools["request"].waiting:
        pass
    one.loop.call_soon_threadsafe(let.set)
    first.result(TIMEOUT)
    second.result(TIMEOUT)

    assert one.run(count(db)) == 2
    one.close()
    assert other.run(count(db)) == 2
    other.close()


def test_a_wait_that_is_given_up_loses_no_place(make: Make):
    """By its time limit, or cancelled: the place goes to the next."""
    db = make(pool=PoolSettings(pool_size=1, max_overflow=0, pool_timeout=0.05))
    one, other = Loop(), Loop()

    async def hold(while_held: Callable[[], Awaitable[None]]) -> None:
        async with db.async_session() as session:
            await session.execute(text("SELECT 1"))
            await while_held()

    async def both() -> None:
        for _ in range(3):
            waiting = asyncio.wrap_future(other.submit(add(db)))
            with pytest.raises(PoolExhausted):
                await waiting

    async def cancel() -> None:
        waiting = other.submit(add(db))
        waiting.cancel()

    one.run(hold(both))
    one.run(hold(cancel))
    other.run(add(db))

    assert one.run(count(db)) == 1
    one.close()
    other.close()


@pytest.mark.drivers("psycopg", "asyncpg")
def test_the_server_sees_no_more_connections_than_the_limit(make: Make, database: DatabaseUnderTest):
    """Those of closed loops are closed on the server, too, when their places are used again."""
    db = make(pool=PoolSettings(pool_size=2, max_overflow=0))
    for _ in range(6):
        asyncio.run(add(db))

    async def backends() -> int:
        async with db.async_session() as session:
            own = "datname = current_database() AND backend_type = 'client backend'"
            counted = await session.execute(text(f"SELECT count(*) FROM pg_stat_activity WHERE {own}"))
            found: int = counted.scalar_one()
            return found

    # The server takes a moment to see that a client has gone.
    deadline = threading.Event()
    threading.Timer(TIMEOUT, deadline.set).start()
    while (found := asyncio.run(backends())) > 2 and not deadline.is_set():
        pass
    assert found <= 2


def test_records_are_handed_over_from_any_loop(make: Make):
    """To the runner of the application's loop."""
    db = make()
    ran: list[int] = []

    @db.task
    async def note(session: AsyncSession, number: int) -> None:
        ran.append(number)

    async def hand_over(number: int) -> None:
        async with db.async_session() as session:
            await session.execute(text("UPDATE counter SET n = n + 1"))
            db.after_commit(session, note, number)

    async def main() -> None:
        async with db.running():
            for number in range(5):
                await asyncio.to_thread(lambda number=number: asyncio.run(hand_over(number)))
            await db.async_drain(TIMEOUT)

    asyncio.run(main())

    assert sorted(ran) == list(range(5))

    async def states() -> list[str]:
        async with db.async_session() as session:
            return list(await session.scalars(select(TaskRecord.state)))

    assert set(asyncio.run(states())) == {"succeeded"}


@pytest.mark.drivers("aiosqlite")
def test_a_place_that_comes_back_in_the_middle_of_a_wait_is_taken(make: Make):
    """The garbage collector gives a dropped connection back on any thread, also on the one that begins to wait."""
    db = make(pool=PoolSettings(pool_size=1, max_overflow=0, pool_timeout=0.5))
    queue: Any = db.async_engine().pool._pool  # type: ignore[attr-defined]

    async def main() -> None:
        await add(db)
        idle = queue.get_nowait()
        find = queue._find

        def found(*args: Any, **options: Any) -> Any:
            nothing = find(*args, **options)
            if not queue._waiting and not queue._idle:
                queue.put_nowait(idle)
            return nothing

        queue._find = found
        await add(db)
        del queue._find
        assert await count(db) == 2

    thread = threading.Thread(target=lambda: done.append(asyncio.run(main())), daemon=True)
    done: list[None] = []
    thread.start()
    thread.join(TIMEOUT)
    assert done == [None], "it hangs, or the place was overlooked"
