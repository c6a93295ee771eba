"""``db.stats()``: what it says of connections, of tasks and of all processes, and that asking takes nothing."""

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, Retry, Stats, Timing, signals
from aftercommit.errors import PoolExhausted
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Counter, Effect, Heard, Workshop, held_elsewhere

postgres_drivers = pytest.mark.drivers("psycopg", "asyncpg")
sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")


@dataclasses.dataclass(frozen=True)
class Joined:
    """An event."""

    user: int


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn, with a pool in which one task runs at a time."""
    shop = Workshop(database, pools={"narrow": PoolSettings(pool_size=1)})
    yield shop
    shop.close()


def effect(session: Session, label: str) -> None:
    """What most tasks here do."""
    session.add(Effect(label=label))


def wait_for(shop: Workshop, wanted: Callable[[Stats], bool]) -> Stats:
    """Read until it is as *wanted*."""
    deadline = time.monotonic() + TIMEOUT
    while not wanted(stats := shop.db.stats()):
        assert time.monotonic() < deadline, stats
    return stats


# --- connections --------------------------------------------------------------------------------------------------


def test_nothing_has_happened_yet(database: DatabaseUnderTest) -> None:
    """Every pool and every task is there from the beginning, with zeros, and nothing was opened for that."""
    db = Database(database.url, pools={"files": PoolSettings(2, 1)})

    @db.task(pool="files", aliases=["older"])
    def idle() -> None: ...

    stats = db.stats()

    assert set(stats.pools) == {"request", "default", "files"}
    files = stats.pools["files"]
    assert (files.name, files.size, files.max_overflow, files.width) == ("files", 2, 1, 3)
    assert (files.in_use, files.idle, files.overflow, files.waiting, files.exhausted) == (0, 0, 0, 0, 0)
    assert (files.holders, files.longest, files.waits, files.is_paused) == ((), None, Timing(), False)
    assert stats.pools["request"].width == 0
    assert set(stats.tasks) == {"idle"}
    assert (stats.tasks["idle"].pool, stats.tasks["idle"].done, stats.tasks["idle"].run) == ("files", 0, Timing())
    assert stats.cluster is None
    assert [*db.sessions.pools["files"].opened] == []


def test_a_connection_is_idle_in_its_transaction_until_that_ends(shop: Workshop) -> None:
    """Behind a write its transaction is open, and on SQLite holds the lock; behind the commit neither is so."""
    seen: list[Any] = []

    def look() -> None:
        seen.extend(shop.db.stats().pools["request"].holders)

    def body(connection: sa.Connection) -> None:
        for end in (connection.commit, connection.rollback):
            connection.execute(sa.insert(Effect).values(label="x"))
            look()
            end()
            look()

    async def async_body() -> None:
        async with shop.db.async_engine().connect() as connection:
            await connection.run_sync(body)

    with shop.running():
        if shop.is_async:
            shop.on_loop(async_body())
        else:
            with shop.db.engine().connect() as connection:
                body(connection)

    assert [each.idle is not None for each in seen] == [True, False] * 2
    assert [each.locked for each in seen] == [shop.under_test.is_sqlite, False] * 2


@sync_drivers
def test_connections_are_counted(database: DatabaseUnderTest) -> None:
    """In use, idle and overflow are as the pool has them, and the longest holder comes first, with his line."""
    db = Database(database.url, pool=PoolSettings(1, 1))

    with db.session() as first, db.session() as second:
        first.execute(sa.text("SELECT 1"))
        second.execute(sa.text("SELECT\n  2"))
        held = db.stats().pools["request"]
    after = db.stats().pools["request"]

    assert (held.size, held.max_overflow, held.in_use, held.idle, held.overflow) == (1, 1, 2, 0, 1)
    assert (after.in_use, after.idle, after.overflow, after.holders) == (0, 1, 0, ())
    assert [each.statement for each in held.holders] == ["SELECT 1", "SELECT 2"]
    assert held.longest is held.holders[0]
    assert held.holders[0].seconds >= held.holders[1].seconds
    assert {(each.kind, each.owner, each.task_id, each.attempt) for each in held.holders} == {
        ("code", "code", None, None)
    }
    assert all("test_stats.py:" in str(each.line) for each in held.holders)
    assert all(each.idle is not None and not each.locked for each in held.holders)
    db.dispose()


@sync_drivers
def test_both_flavours_of_a_pool_are_added_up(database: DatabaseUnderTest) -> None:
    """A pool whose sessions are used in both flavours may have twice its connections, and says so."""
    url = sa.make_url(database.url)
    db = Database(url.set(drivername=url.get_backend_name()), pool=PoolSettings(2, 1))

    async def both() -> Stats:
        async with db.async_session() as other:
            await other.execute(sa.text("SELECT 1"))
            with db.session() as session:
                session.execute(sa.text("SELECT 1"))
                stats = db.stats()
        await db.async_dispose()
        return stats

    request = asyncio.run(both()).pools["request"]

    assert (request.size, request.max_overflow, request.in_use) == (4, 2, 2)


@sync_drivers
def test_those_who_wait_are_measured(database: DatabaseUnderTest) -> None:
    """Who waits is counted while he does; how long, and how often in vain, is known afterwards."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT))
    hasty = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=0.01))

    def wait() -> None:
        with db.session() as session:
            session.execute(sa.text("SELECT 2"))

    with db.session() as session:
        session.execute(sa.text("SELECT 1"))
        waiter = threading.Thread(target=wait)
        waiter.start()
        while not (counted := db.stats().pools["request"].waiting):
            assert waiter.is_alive()
        since = time.monotonic()
        until = time.monotonic()
    waiter.join(TIMEOUT)
    with held_elsewhere(hasty.engine()), hasty.session() as second, pytest.raises(PoolExhausted):
        second.execute(sa.text("SELECT 2"))

    served, refused = db.stats().pools["request"], hasty.stats().pools["request"]
    assert (counted, served.waiting, served.exhausted, served.waits.count) == (1, 0, 0, 1)
    assert served.waits.longest >= until - since
    assert (refused.exhausted, refused.waits.count, refused.waiting) == (1, 1, 0)
    assert refused.waits.longest >= 0.01
    db.dispose()
    hasty.dispose()


@pytest.mark.drivers("pysqlite", "aiosqlite")
def test_the_holder_of_the_write_lock_is_known(shop: Workshop) -> None:
    """On SQLite it says who has the one write lock."""
    seen: list[Stats] = []

    def write(session: Session) -> None:
        session.add(Effect(label="a"))
        session.flush()
        seen.append(shop.db.stats())

    with shop.running():
        shop.commit(write)

    (holder,) = seen[0].pools["request"].holders
    assert holder.locked


def test_asking_takes_no_connection(shop: Workshop) -> None:
    """With every connection taken, and from the event loop too, it answers, and sends no statement."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if threading.current_thread().name != "aftercommit-bookkeeper":
            sent.append(statement)

    def take(session: Session) -> None:
        session.execute(sa.text("SELECT 1"))
        sa.event.listen(sa.Engine, "before_cursor_execute", note)
        for _ in range(100):
            shop.db.stats()
        sa.event.remove(sa.Engine, "before_cursor_execute", note)

    shop.db = Database(shop.under_test.url, pool=PoolSettings(1, 0, pool_timeout=0.01))
    with shop.running():
        shop.commit(take)

    assert sent == []


@sync_drivers
def test_asking_waits_for_nobody(database: DatabaseUnderTest) -> None:
    """While every connection is held and a thread waits for one, it answers at once, to any thread, and says so."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT * 10))
    answers: list[Stats] = []

    def wait() -> None:
        with db.session() as session:
            session.execute(sa.text("SELECT 2"))

    with db.session() as session:
        session.execute(sa.text("SELECT 1"))
        waiter = threading.Thread(target=wait)
        waiter.start()
        while not db.stats().pools["request"].waiting:
            assert waiter.is_alive()
        asking = threading.Thread(target=lambda: answers.append(db.stats()), daemon=True)
        asking.start()
        asking.join(TIMEOUT)
        was_waiting = waiter.is_alive()
    waiter.join(TIMEOUT)

    (stats,) = answers
    assert was_waiting
    assert (stats.pools["request"].in_use, stats.pools["request"].waiting) == (1, 1)
    db.dispose()


# --- tasks --------------------------------------------------------------------------------------------------------


def test_a_task_that_waits_and_runs_is_counted_and_timed(shop: Workshop) -> None:
    """Running and queued are true while it is so; how long it waited and ran is known afterwards."""
    gate, begun = threading.Event(), threading.Event()
    slow = shop.task(pool="narrow", gate=gate, begun=begun.set)(effect)
    with shop.running():
        first = shop.ask(slow, "a")
        assert begun.wait(TIMEOUT)
        shop.ask(slow, "b")
        asked = time.monotonic()
        during = wait_for(shop, lambda stats: stats.tasks["effect"].queued == 1)
        opened = time.monotonic()
        gate.set()
        shop.drain()
        after = shop.db.stats()

    pool, task = during.pools["narrow"], during.tasks["effect"]
    assert (pool.width, pool.running, pool.backlog) == (1, 1, 1)
    assert (task.running, task.queued, task.done) == (1, 1, 0)
    assert (task.wait.count, task.run.count) == (1, 0)
    done = after.tasks["effect"]
    assert (done.running, done.queued, done.done, done.failed) == (0, 0, 2, 0)
    assert (done.retried, done.conflicts, done.given_back) == (0, 0, 0)
    assert (done.run.count, done.wait.count) == (2, 2)
    assert done.wait.longest >= opened - asked
    assert done.run.longest >= opened - asked
    assert shop.record(first).state == "succeeded"


def test_the_holder_of_a_task_s_connection_is_its_run(shop: Workshop) -> None:
    """It names the task, the id of its record and the attempt."""
    seen: list[Stats] = []

    @shop.task(pool="narrow")
    def looks(session: Session, label: str) -> None:
        session.execute(sa.text("SELECT 1"))
        seen.append(shop.db.stats())

    with shop.running():
        id = shop.ask(looks)
        shop.drain()

    longest = seen[0].pools["narrow"].longest
    assert longest is not None
    assert (longest.owner, longest.kind, longest.task_id, longest.attempt) == ("looks", "task", id, 1)


def test_attempts_and_failures_are_counted(shop: Workshop) -> None:
    """An attempt that another follows, and a failure for good, each count once, and both are timed."""
    tries: list[str] = []

    @shop.task(retry=Retry(attempts=3, base=0.001, cap=0.001, on=(ValueError,)))
    def fails(session: Session, label: str) -> None:
        tries.append(label)
        raise ValueError(label)

    with shop.running(), Heard(signals.TaskFailed) as heard:
        shop.ask(fails, "a")
        heard.wait(signals.TaskFailed)
        task = shop.db.stats().tasks["fails"]

    assert len(tries) == 3
    assert (task.done, task.failed, task.retried, task.conflicts) == (0, 1, 2, 0)
    assert (task.run.count, task.wait.count) == (3, 3)


@postgres_drivers
def test_a_conflict_shows_and_costs_no_attempt(shop: Workshop) -> None:
    """A run that meets another's change is repeated, and counted as a conflict: a hot row costs retries."""
    tries: list[int] = []

    @shop.task()
    def increments(session: Session, label: str) -> None:
        row = session.get_one(Counter, 1)
        tries.append(row.n)
        if len(tries) == 1:
            shop.sql("UPDATE counter SET n = n + 1")
        row.n += 1

    shop.sql("INSERT INTO counter (id, n) VALUES (1, 0)")
    with shop.running():
        id = shop.ask(increments)
        shop.drain()
        task = shop.db.stats().tasks["increments"]

    assert (shop.sql("SELECT n FROM counter"), shop.record(id).attempt) == (2, 1)
    assert (task.conflicts, task.retried, task.done) == (1, 0, 1)
    assert (task.run.count, task.wait.count) == (1, 1)


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_row_that_two_create_at_once_shows_too(shop: Workshop) -> None:
    """Of two handlers that create the same missing row, the later one is repeated, sees it, and is counted for that."""
    both_looked = threading.Barrier(2)
    found: list[int | None] = []

    def look(session: Session) -> Counter | None:
        row = session.get(Counter, 1)
        found.append(None if row is None else row.n)
        return row

    def count(session: Session, row: Counter | None) -> None:
        if row is None:
            row = Counter(id=1, n=0)
            session.add(row)
        row.n += 1

    def meet() -> None:
        if len(found) <= 2:
            both_looked.wait(TIMEOUT)

    def plain(session: Session, event: Joined) -> None:
        row = look(session)
        meet()
        count(session, row)

    async def native(session: AsyncSession, event: Joined) -> None:
        row = await session.run_sync(look)
        await asyncio.to_thread(meet)
        await session.run_sync(count, row)

    shop.db.on(Joined, name="count")(native if shop.is_async else plain)  # type: ignore[arg-type]
    with shop.running():
        shop.commit(lambda session: [shop.db.publish(session, Joined(user=user)) for user in (1, 2)] and None)
        shop.drain()
        task = shop.db.stats().tasks["count"]

    assert (shop.sql("SELECT n FROM counter"), found) == (2, [None, None, 1])
    assert (task.done, task.retried, task.failed, task.conflicts) == (2, 0, 0, 1)
    assert [record.attempt for record in shop.records()] == [1, 1]


@pytest.mark.drivers("psycopg")
def test_a_conflict_of_a_chunk_shows_with_its_task(shop: Workshop) -> None:
    """A chunk of a batch that is repeated counts for the task that it runs in, and its session names it, too."""
    tries: list[int] = []
    seen: list[Stats] = []

    def increment(session: Session, row: Counter) -> None:
        tries.append(row.n)
        seen.append(shop.db.stats())
        if len(tries) == 1:
            shop.sql("UPDATE counter SET n = n + 1")
        row.n += 1

    @shop.db.task
    def many(session: Session) -> None:
        shop.db.run_batch(sa.select(Counter), increment)

    shop.sql("INSERT INTO counter (id, n) VALUES (1, 0)")
    with shop.running():
        id = shop.ask(many)
        shop.drain()
        task = shop.db.stats().tasks["many"]

    assert (shop.sql("SELECT n FROM counter"), tries) == (2, [0, 1])
    assert (task.conflicts, task.retried, task.done) == (1, 0, 1)
    holder = seen[0].pools["default"].longest
    assert holder is not None
    assert (holder.owner, holder.task_id, holder.attempt) == ("many", id, 1)


def test_what_a_stop_gives_back_is_counted(shop: Workshop) -> None:
    """A run that has not begun when the runner stops is queued again, and counted as given back."""
    gate, begun = threading.Event(), threading.Event()
    slow = shop.task(pool="narrow", gate=gate, begun=begun.set)(effect)
    with Heard(signals.TaskGivenBack) as heard:
        with shop.running():
            shop.ask(slow, "a")
            assert begun.wait(TIMEOUT)
            shop.ask(slow, "b")
            wait_for(shop, lambda stats: stats.tasks["effect"].queued == 1)
            threading.Thread(target=lambda: heard.wait(signals.TaskGivenBack) and gate.set()).start()

        task = shop.db.stats().tasks["effect"]

    assert (task.given_back, task.done, task.failed) == (1, 1, 0)
    assert shop.db.stats().cluster is None


def test_two_databases_do_not_mix(database: DatabaseUnderTest) -> None:
    """Two ``Database`` objects in one process count what is theirs, whatever the tasks are called."""
    one, other = Workshop(database), Workshop(database, pools={"elsewhere": PoolSettings()})
    task = one.task()(effect)
    other.task(pool="elsewhere")(effect)
    with one.running():
        one.ask(task, "a")
        one.drain()

    assert one.db.stats().tasks["effect"].done == 1
    assert other.db.stats().tasks["effect"].done == 0
    assert other.db.stats().tasks["effect"].wait == Timing()
    one.close()
    other.close()


@pytest.mark.drivers("psycopg")
def test_a_connection_taken_from_a_run_that_hangs_is_not_in_use(shop: Workshop) -> None:
    """Once a ``def`` task has been given up, its connection is the pool's no longer, and nobody is said to hold it."""
    gate = threading.Event()

    @shop.db.task(pool="narrow", timeout=0.2)
    def hangs(session: Session) -> None:
        session.execute(sa.text("SELECT 1"))
        gate.wait(TIMEOUT)

    with shop.running(), Heard(signals.TaskFailed) as heard:
        shop.commit(lambda session: shop.db.after_commit(session, hangs).id)
        heard.wait(signals.TaskFailed)
        pool = shop.db.stats().pools["narrow"]
        gate.set()

    assert (pool.in_use, pool.holders, pool.running) == (0, (), 0)


def test_a_paused_pool_says_so(shop: Workshop) -> None:
    """``is_paused`` follows the database."""
    with shop.running():
        shop.on_loop(shop.db.async_pause("narrow")) if shop.is_async else shop.db.pause("narrow")
        paused = wait_for(shop, lambda stats: stats.pools["narrow"].is_paused)
        shop.on_loop(shop.db.async_resume("narrow")) if shop.is_async else shop.db.resume("narrow")
        wait_for(shop, lambda stats: not stats.pools["narrow"].is_paused)

    assert not paused.pools["default"].is_paused


# --- all processes ------------------------------------------------------------------------------------------------


def test_the_cluster_is_counted_with_an_age(shop: Workshop) -> None:
    """What waits and runs anywhere is counted by name, by the database's clock, unknown names too."""
    gate, begun = threading.Event(), threading.Event()
    slow = shop.task(pool="narrow", gate=gate, begun=begun.set)(effect)
    minute = "datetime('now', '-60 seconds')" if shop.under_test.is_sqlite else "now() - interval '60 seconds'"
    with shop.running(runs=("narrow",)):
        shop.ask(slow, "a")
        assert begun.wait(TIMEOUT)
        shop.ask(slow.with_options(delay=3600.0), "later")
        shop.sql(
            "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at) VALUES "
            f"('01900000000070008000000000000001', 'unknown', 'default', 'queued', '{{}}', {minute}, {minute})"
        )
        look_again(shop)
        cluster = wait_for(shop, lambda stats: stats.cluster is not None and "unknown" in stats.cluster.tasks).cluster
        older = shop.db.stats().cluster
        gate.set()

    assert cluster is not None
    assert older is not None
    assert (cluster.workers, set(cluster.tasks)) == (1, {"effect", "unknown"})
    effects, unknown = cluster.tasks["effect"], cluster.tasks["unknown"]
    assert (effects.queued, effects.running, effects.oldest_due) == (1, 1, None)
    assert (unknown.queued, unknown.running) == (1, 0)
    assert unknown.oldest_due is not None
    assert 60.0 <= unknown.oldest_due < 60.0 + 2 * TIMEOUT
    assert 0.0 <= cluster.age < older.age < 2 * TIMEOUT


def look_again(shop: Workshop) -> None:
    """Have the next look at the whole queue come now, instead of in some seconds."""
    runner = shop.db.runner
    assert runner is not None
    runner.rounds._sweep_begun = float("-inf")
    runner.books.wake()


def test_reading_has_the_next_look_come_sooner(shop: Workshop) -> None:
    """Whoever reads figures that are older than some seconds has fresh ones made for the next time."""
    with shop.running():
        wait_for(shop, lambda stats: stats.cluster is not None)
        rounds = shop.db.runner.rounds  # type: ignore[union-attr]
        rounds._sweep_begun = time.monotonic() - 20.0
        before = rounds._sweep

        wait_for(shop, lambda _: rounds._sweep is not before)

    assert rounds._sweep_begun > before[1]  # type: ignore[index]


def test_without_durable_tasks_nobody_looks(postgres_url: str) -> None:
    """An application that needs no tables has no figures of others, and asking for them fails nowhere."""
    db = Database(postgres_url)

    @db.task(durable=False)
    async def cheap(session: AsyncSession) -> None:
        await session.execute(sa.text("SELECT 1"))

    async def main() -> Stats:
        async with db.running():
            with Heard(signals.TaskSucceeded) as heard:
                async with db.async_session() as session:
                    db.after_commit(session, cheap)
                await asyncio.to_thread(heard.wait, signals.TaskSucceeded)
            stats = db.stats()
        await db.async_dispose()
        return stats

    stats = asyncio.run(main())

    assert (stats.tasks["cheap"].done, stats.cluster) == (1, None)


def test_it_becomes_json(shop: Workshop) -> None:
    """Plain dataclasses and mappings all the way down: an endpoint may return them as they are."""
    task = shop.task()(effect)
    with shop.running():
        shop.ask(task, "a")
        shop.drain()
        stats = wait_for(shop, lambda stats: stats.cluster is not None)

    assert json.loads(json.dumps(dataclasses.asdict(stats), default=str))["tasks"]["effect"]["done"] == 1
