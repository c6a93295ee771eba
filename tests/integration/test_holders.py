"""Who holds which connection: what a pool says that has none left, and what is said of one held too long."""

import asyncio
import logging
import queue
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import sqlalchemy.exc
from fastapi import FastAPI, WebSocket
from fastapi.responses import PlainTextResponse
from sqlalchemy import NullPool, event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from aftercommit import Database, PoolSettings, signals
from aftercommit.errors import PoolExhausted
from aftercommit.fastapi import AsyncSessionDep, SessionDep, install
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import serve
from tests.support.workshop import Base, Effect, Workshop

sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")
Told = queue.SimpleQueue[signals.Signal]


@dataclass(frozen=True)
class Arrived:
    """An event."""

    number: int


@pytest.fixture
def told() -> Iterator[Told]:
    """What is said of connections, in order."""
    said: Told = queue.SimpleQueue()

    @signals.subscribe(signals.ConnectionHeld, signals.ConnectionReturned)
    def listen(signal: signals.Signal) -> None:
        said.put(signal)

    yield said
    signals.unsubscribe(listen)


@pytest.fixture
def unanswering() -> Iterator[str]:
    """The URL of a server that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        yield f"postgresql+psycopg://nobody@127.0.0.1:{port}/nothing?connect_timeout=2"


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_pool_that_runs_dry_names_the_holders(database: DatabaseUnderTest) -> None:
    """``PoolExhausted`` says how large the pool is, who holds its connections, where from and since when."""
    db = Database(database.url, pool=PoolSettings(1, 1, pool_timeout=0.05))

    with db.session() as first, db.session() as second, db.session() as third:
        first.execute(text("SELECT 1"))
        second.execute(text("SELECT 2"))
        with pytest.raises(PoolExhausted) as caught:
            third.execute(text("SELECT 3"))

    message = str(caught.value)
    assert isinstance(caught.value, sqlalchemy.exc.TimeoutError)
    assert caught.value.pool == "request"
    assert "size 1, overflow 1" in message
    assert message.count("test_holders.py:") == 2
    assert "in test_a_pool_that_runs_dry_names_the_holders" in message
    assert "'SELECT 1'" in message
    assert message.endswith("[AC203]")
    # SQLAlchemy's page of that code does not exist.
    assert "sqlalche.me" not in message
    db.dispose()


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_an_async_pool_that_runs_dry_names_the_holders(database: DatabaseUnderTest) -> None:
    """The async flavour says the same."""

    async def exhaust() -> str:
        db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=0.05))
        async with db.async_session() as first, db.async_session() as second:
            await first.execute(text("SELECT 1"))
            with pytest.raises(PoolExhausted) as caught:
                await second.execute(text("SELECT 2"))
        await db.async_dispose()
        return str(caught.value)

    message = asyncio.run(exhaust())

    assert "test_holders.py:" in message
    assert "'SELECT 1'" in message


def test_connections_that_are_being_made_are_told_of(unanswering: str) -> None:
    """Of a pool whose server does not answer it is said that its connections are being made."""
    db = Database(unanswering, pool=PoolSettings(1, 0, pool_timeout=0.05))
    outcome: list[BaseException] = []

    def connect_in_vain() -> None:
        try:
            with db.session() as session:
                session.execute(text("SELECT 1"))
        except sqlalchemy.exc.SQLAlchemyError as exc:
            outcome.append(exc)

    first = threading.Thread(target=connect_in_vain)
    first.start()
    while not db.engine().pool.checkedout():  # type: ignore[attr-defined]
        assert first.is_alive()
    with db.session() as session, pytest.raises(PoolExhausted, match="Held by:\n  1 being connected\n"):
        session.execute(text("SELECT 1"))
    first.join(30)

    assert len(outcome) == 1
    assert db.engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


@pytest.mark.drivers("psycopg")
def test_those_who_wait_are_counted_and_served(database: DatabaseUnderTest) -> None:
    """Whoever waits is counted while he does, and goes on when a connection comes back."""
    db = Database(database.url, pool=PoolSettings(1, 0))
    register = db.sessions.pools["request"].register
    served = threading.Event()

    def wait() -> None:
        with db.session() as session:
            session.execute(text("SELECT 2"))
            served.set()

    with db.session() as session:
        session.execute(text("SELECT 1"))
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not register.waiting:
            assert not served.is_set()
        counted = register.waiting
    waiting.join(30)

    assert counted == 1
    assert served.is_set()
    assert register.waiting == 0
    assert register.holds() == []
    db.dispose()


def test_a_connection_held_too_long_is_reported_once_and_when_it_returns(
    database: DatabaseUnderTest, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    """Owner, line, statement and idleness are told once while it is held, and its return after that."""
    db = Database(database.url, pools={"request": PoolSettings(warn_after=0.01)})

    async def hold() -> None:
        async with db.running(runs=()):
            if database.is_async:
                async with db.async_session() as session:
                    await session.execute(text("SELECT 42"))
                    held.append(await asyncio.to_thread(told.get, timeout=30))
            else:
                held.append(await asyncio.to_thread(hold_sync))
            returned.append(await asyncio.to_thread(told.get, timeout=30))
        await db.async_dispose()

    def hold_sync() -> signals.Signal:
        with db.session() as session:
            session.execute(text("SELECT 42"))
            return told.get(timeout=30)

    held: list[signals.Signal] = []
    returned: list[signals.Signal] = []
    with caplog.at_level(logging.WARNING, "aftercommit.pools"):
        asyncio.run(hold())

    assert isinstance(held[0], signals.ConnectionHeld)
    assert held[0].pool == "request"
    assert "test_holders.py:" in held[0].owner
    assert held[0].statement == "SELECT 42"
    assert held[0].idle is not None
    assert isinstance(returned[0], signals.ConnectionReturned)
    assert told.empty()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "Commit before slow work" in caplog.text


@pytest.mark.drivers("pysqlite", "aiosqlite")
def test_the_write_lock_of_sqlite_is_reported_after_a_second(database: DatabaseUnderTest, told: Told) -> None:
    """SQLite's one write lock stops every writer, so it is reported long before a mere connection is."""
    db = Database(database.url)

    async def hold() -> signals.Signal:
        async with db.running(runs=()):
            if not database.is_async:
                return await asyncio.to_thread(hold_sync)
            async with db.async_session() as session:
                await session.execute(text("CREATE TABLE held (id INTEGER)"))
                return await asyncio.to_thread(told.get, timeout=30)

    def hold_sync() -> signals.Signal:
        with db.session() as session:
            session.execute(text("CREATE TABLE held (id INTEGER)"))
            return told.get(timeout=30)

    async def main() -> signals.Signal:
        try:
            return await hold()
        finally:
            await db.async_dispose()

    signal = asyncio.run(main())

    assert isinstance(signal, signals.ConnectionHeld)
    assert signal.locked
    assert signal.seconds >= 1.0


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_task_may_hold_its_connection_for_its_timeout(database: DatabaseUnderTest, told: Told) -> None:
    """A task is named with its attempt; one that has declared a longer ``timeout`` is let alone until then."""
    db = Database(database.url, pools={"slow": PoolSettings(pool_size=2, warn_after=0.01)})
    go_on = threading.Event()
    begun = threading.Barrier(3)

    @db.task(pool="slow")
    def plain(session: Session) -> None:
        session.execute(text("SELECT 1"))
        session.commit()  # SQLite's lock is not what this is about
        session.execute(text("SELECT 2")) if not database.is_sqlite else session.connection()
        begun.wait(30)
        go_on.wait(30)

    @db.task(pool="slow", timeout=60)
    def patient(session: Session) -> None:
        if not database.is_sqlite:  # where two tasks cannot hold their connections at once
            session.execute(text("SELECT 1"))
        begun.wait(30)
        go_on.wait(30)

    with db.running(create_tables=True):
        with db.session() as session:
            db.after_commit(session, plain)
            db.after_commit(session, patient)
        begun.wait(30)
        signal = told.get(timeout=30)
        go_on.set()
        db.drain()

    assert isinstance(signal, signals.ConnectionHeld)
    assert signal.owner.startswith("task 'plain', attempt 1, id ")
    assert signal.pool == "slow"
    rest = [told.get() for _ in range(told.qsize())]
    assert not any("patient" in each.owner for each in rest if isinstance(each, signals.ConnectionHeld))
    db.dispose()


# --- how long is too long -----------------------------------------------------------------------------------------


class Clock:
    """The clock by which holds are measured, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still until it is moved."""
    made = Clock()
    for module in ("watch.holders", "watch.register", "watch.leaks", "pools.steps"):
        monkeypatch.setattr(f"aftercommit.{module}.time", made)
    return made


def kinds_after(db: Database, told: Told, clock: Clock, seconds: float) -> list[str]:
    """What a round tells that comes so many seconds later."""
    clock.now += seconds
    db.sessions.pools.report_late()
    return [type(told.get_nowait()).__name__ for _ in range(told.qsize())]


@sync_drivers
def test_ten_seconds_are_too_long_unless_the_pool_says_otherwise(
    database: DatabaseUnderTest, told: Told, clock: Clock
) -> None:
    """By default a connection may be held for ten seconds; ``warn_after`` is another figure for one pool."""
    db = Database(database.url, pools={"files": PoolSettings(warn_after=60.0)})

    with db.session() as session, db.session("files") as patient:
        session.execute(text("SELECT 1"))
        patient.execute(text("SELECT 1"))
        assert kinds_after(db, told, clock, 9.9) == []
        assert kinds_after(db, told, clock, 0.2) == ["ConnectionHeld"]
        assert kinds_after(db, told, clock, 49.8) == []
        assert kinds_after(db, told, clock, 0.2) == ["ConnectionHeld"]
    db.dispose()


@pytest.mark.drivers("pysqlite")
def test_one_second_is_too_long_for_the_write_lock(database: DatabaseUnderTest, told: Told, clock: Clock) -> None:
    """A connection that has SQLite's write lock is reported after one second with it, however old it is."""
    db = Database(database.url, pool=PoolSettings(warn_after=60.0))

    with db.session() as session:
        session.execute(text("SELECT 1"))
        assert kinds_after(db, told, clock, 5.0) == []
        session.execute(text("CREATE TABLE held (id INTEGER)"))
        assert kinds_after(db, told, clock, 0.9) == []
        assert kinds_after(db, told, clock, 0.2) == ["ConnectionHeld"]
    db.dispose()


@pytest.mark.drivers("pysqlite")
def test_a_lock_is_reported_also_of_whoever_was_reported_before(
    database: DatabaseUnderTest, told: Told, clock: Clock
) -> None:
    """A session that read for long was reported; that it then keeps all others from writing is news."""
    db = Database(database.url)

    with db.session() as session:
        session.execute(text("SELECT 1"))
        assert kinds_after(db, told, clock, 11.0) == ["ConnectionHeld"]
        session.execute(text("CREATE TABLE held (id INTEGER)"))
        clock.now += 1.1
        held = report(db, told)
        assert kinds_after(db, told, clock, 60.0) == []

    assert held.locked
    db.dispose()


@pytest.mark.drivers("pysqlite")
def test_a_lock_that_was_young_when_its_holder_was_reported_is_told_later(
    database: DatabaseUnderTest, told: Told, clock: Clock
) -> None:
    """The first report of a holder that has just taken the lock says nothing of the lock."""
    db = Database(database.url)

    with db.session() as session:
        session.execute(text("SELECT 1"))
        clock.now += 10.5
        session.execute(text("CREATE TABLE held (id INTEGER)"))
        clock.now += 0.5
        first = report(db, told)
        clock.now += 0.6
        second = report(db, told)

    assert (first.locked, second.locked) == (False, True)
    db.dispose()


@pytest.mark.drivers("pysqlite")
def test_a_lock_is_as_old_as_its_holder_at_the_most(database: DatabaseUnderTest, told: Told, clock: Clock) -> None:
    """What an earlier holder of the connection did is not held against the next, who begins by hand."""
    db = Database(database.url, pool=PoolSettings(1, 0, warn_after=60.0))

    with db.session() as session:
        session.execute(text("CREATE TABLE held (id INTEGER)"))
    clock.now += 5.0
    with db.engine().connect() as connection:
        connection.exec_driver_sql("BEGIN")
        kinds = kinds_after(db, told, clock, 0.1)

    assert kinds == []
    db.dispose()


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_task_that_exceeds_its_own_timeout_is_reported(database: DatabaseUnderTest, told: Told, clock: Clock) -> None:
    """A task's ``timeout`` stands in for ``warn_after``: beyond that it is let alone, beyond its own it is not."""
    shop = Workshop(database)
    rounds: list[list[str]] = []

    @shop.task(timeout=60.0)
    def long(session: Session, label: str) -> None:
        session.execute(text("SELECT 1"))
        rounds.extend(kinds_after(shop.db, told, clock, seconds) for seconds in (11.0, 48.9))
        # The watchman makes his own rounds, too: whoever comes first tells of it.
        clock.now += 0.2
        shop.db.sessions.pools.report_late()
        held.append(told.get(timeout=30))

    held: list[signals.Signal] = []
    with shop.running():
        id = shop.ask(long)
        shop.drain()
    shop.close()

    assert rounds == [[], []]
    assert isinstance(held[0], signals.ConnectionHeld)
    assert held[0].owner.startswith(f"task 'long', attempt 1, id {id}")
    assert 60.0 < held[0].seconds < 61.0


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_batch_in_a_task_may_hold_its_connection_for_the_tasks_timeout(
    database: DatabaseUnderTest, told: Told, clock: Clock
) -> None:
    """Chunks run in their task's place, and a connection of theirs is one of the task's own."""
    shop = Workshop(database)
    rounds: list[list[str]] = []

    def handle(session: Session, _item: int) -> None:
        session.execute(text("SELECT 1"))
        rounds.append(kinds_after(shop.db, told, clock, 59.9))

    if database.is_async:

        @shop.db.task(timeout=60.0)
        async def whole(session: AsyncSession) -> None:
            async def handle_async(session: AsyncSession, item: int) -> None:
                await session.run_sync(handle, item)

            await shop.db.async_run_batch([1], handle_async)
    else:

        @shop.db.task(timeout=60.0)
        def whole(session: Session) -> None:
            shop.db.run_batch([1], handle)

    with shop.running():
        shop.ask(whole)
        shop.drain()
    shop.close()

    assert rounds == [[]]


# --- by whom, and where ------------------------------------------------------------------------------------------


def report(db: Database, told: Told) -> signals.ConnectionHeld:
    """What a round of the watchman says now, of the one connection that is held."""
    db.sessions.pools.report_late()
    signal = told.get_nowait()
    assert isinstance(signal, signals.ConnectionHeld)
    assert told.empty()
    return signal


@sync_drivers
def test_it_is_told_once_and_once_more_when_it_comes_back(database: DatabaseUnderTest, told: Told) -> None:
    """However many rounds pass, one report is made of one hold; the next hold of the connection is a new one."""
    db = Database(database.url, pool=PoolSettings(1, 0, warn_after=1e-9))

    for _ in range(2):
        with db.session() as session:
            session.execute(text("SELECT 1"))
            held = report(db, told)
            for _ in range(3):
                db.sessions.pools.report_late()
            assert told.empty()
        returned = told.get_nowait()

        assert isinstance(returned, signals.ConnectionReturned)
        assert (returned.pool, returned.owner) == (held.pool, held.owner)
        assert returned.seconds >= held.seconds
        db.sessions.pools.report_late()
        assert told.empty()
    db.dispose()


@sync_drivers
def test_what_is_returned_in_time_is_not_spoken_of(database: DatabaseUnderTest, told: Told) -> None:
    """A connection that is held for less than ``warn_after`` is reported neither then nor when it comes back."""
    db = Database(database.url)

    with db.session() as session:
        session.execute(text("SELECT 1"))
        db.sessions.pools.report_late()
    db.sessions.pools.report_late()

    assert told.empty()
    db.dispose()


@sync_drivers
def test_after_a_statement_that_failed_the_holder_is_idle(database: DatabaseUnderTest, told: Told) -> None:
    """A statement that has failed runs no longer: what is held meanwhile is an idle transaction."""
    db = Database(database.url, pool=PoolSettings(1, 0, warn_after=1e-9))

    with db.session() as session:
        with pytest.raises(sqlalchemy.exc.DBAPIError):
            session.execute(text("SELECT * FROM nowhere"))
        held = report(db, told)
        session.rollback()

    assert held.statement == "SELECT * FROM nowhere"
    assert held.idle is not None
    db.dispose()


@sync_drivers
def test_each_transaction_of_a_session_is_a_hold_of_its_own(database: DatabaseUnderTest, told: Told) -> None:
    """After a commit the connection is back, and the next transaction is timed, and reported, anew."""
    db = Database(database.url, pool=PoolSettings(1, 0, warn_after=1e-9))

    with db.session() as session:
        session.execute(text("SELECT 1"))
        first = report(db, told)
        session.commit()
        returned = told.get_nowait()
        between = db.sessions.pools["request"].register.holds()
        session.connection()
        second = report(db, told)

    assert isinstance(returned, signals.ConnectionReturned)
    assert between == []
    assert (first.statement, second.statement) == ("SELECT 1", None)
    assert second.seconds < returned.seconds
    db.dispose()


@sync_drivers
def test_the_second_connection_of_a_transaction_is_told_too(database: DatabaseUnderTest, told: Told) -> None:
    """A session that works on two pools at once holds a connection of each."""
    db = Database(database.url, pools={"request": PoolSettings(1, 0), "files": PoolSettings(1, 0)})
    registers = [db.sessions.pools[name].register for name in ("request", "files")]

    with db.session() as session:
        session.execute(text("SELECT 1"))
        session.execute(text("SELECT 2"), bind_arguments={"bind": db.engine("files")})
        holds = [[hold.statement for hold in each.holds()] for each in registers]
        owners = [hold.owner for each in registers for hold in each.holds()]
    after = [each.holds() for each in registers]

    assert holds == [["SELECT 1"], ["SELECT 2"]]
    assert owners[0] == owners[1]
    assert after == [[], []]
    db.dispose()


@sync_drivers
def test_a_connection_taken_by_hand_is_idle_only_until_it_commits(database: DatabaseUnderTest, told: Told) -> None:
    """After the commit it is held, but in no transaction, though nothing else may have been done since."""
    db = Database(database.url)
    register = db.sessions.pools["request"].register

    with db.engine().connect() as connection:
        connection.execute(text("SELECT 1"))
        during = [hold.idle(hold.since + 60) is None for hold in register.holds()]
        connection.commit()
        after = [hold.idle(hold.since + 60) is None for hold in register.holds()]

    assert (during, after) == ([False], [True])
    db.dispose()


@pytest.mark.drivers("psycopg")
async def test_the_holders_of_the_other_flavour_are_left_out(database: DatabaseUnderTest) -> None:
    """Each flavour has connections of its own, and whoever has those of the other is in nobody's way."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=0.05))

    def run_dry() -> str:
        with db.session() as third, pytest.raises(PoolExhausted) as caught:
            third.execute(text("SELECT 3"))
        return str(caught.value)

    async with db.async_session() as other:
        await other.execute(text("SELECT 1"))
        with db.session() as session:
            session.execute(text("SELECT 2"))
            said = await asyncio.to_thread(run_dry)
    await db.async_dispose()

    assert "'SELECT 2'" in said
    assert "'SELECT 1'" not in said


@pytest.mark.drivers("asyncpg")
async def test_a_stream_that_waits_for_its_next_rows_is_not_idle(database: DatabaseUnderTest) -> None:
    """The server works on them, and asyncpg's connection says "in a transaction" all the same."""
    db = Database(database.url)
    register = db.sessions.pools["request"].register
    # More than asyncpg fetches at once.
    slow = "SELECT i FROM generate_series(1, 70) AS i UNION ALL SELECT 0 FROM pg_advisory_xact_lock(7)"

    async with db.async_session() as first, db.async_session() as session:
        await first.execute(text("SELECT pg_advisory_lock(7)"))
        rows = await session.stream(text(slow).execution_options(yield_per=10))
        await rows.fetchone()
        (streaming,) = [hold for hold in register.holds() if "generate_series" in str(hold.statement)]
        before = streaming.idle(streaming.since + 60)
        fetching = asyncio.create_task(rows.fetchall())
        while not await first.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")):
            assert not fetching.done()
        during = streaming.idle(streaming.since + 60)
        await first.execute(text("SELECT pg_advisory_unlock(7)"))
        await fetching
        await rows.close()
    await db.async_dispose()

    assert before is not None
    assert during is None


@pytest.mark.drivers("pysqlite")
def test_a_task_that_waits_for_the_write_lock_has_a_name(database: DatabaseUnderTest) -> None:
    """A task begins with the lock. While it waits for that, it has a connection, and is named with it."""
    db = Database(database.url, pools={"slow": PoolSettings(pool_size=1)})
    register = db.sessions.pools["slow"].register

    @db.task(pool="slow", durable=False)
    def second(session: Session) -> None:
        session.execute(text("SELECT 1"))

    with db.running(create_tables=True):
        with db.session() as locker:
            locker.execute(text("CREATE TABLE held (id INTEGER)"))  # and takes the lock
            with db.session() as session:
                db.after_commit(session, second)
            while not (waiting := [hold for hold in register.holds() if not hold.is_begun]):
                pass
            said = waiting[0].describe(waiting[0].since + 3)
        db.drain()
    db.dispose()

    assert said.startswith("task 'second', attempt 1, id ")
    assert said.endswith("for 3.0 s, beginning a transaction")


@sync_drivers
def test_what_a_listener_takes_is_not_the_session_s(database: DatabaseUnderTest) -> None:
    """A connection that is taken by hand in a listener, before the session has one, is named by the listener's line."""
    db = Database(database.url, pool=PoolSettings(2, 0))
    Base.metadata.create_all(db.engine())
    seen: list[list[str]] = []

    with db.session() as session:

        @event.listens_for(session, "before_flush")
        def audit(*_: object) -> None:
            with db.engine().connect() as connection:
                connection.execute(text("SELECT 1"))
                seen.append([str(hold.holder) for hold in db.sessions.pools["request"].register.holds()])

        session.add(Effect(label="flushed"))
        session.flush()
        seen.append([str(hold.holder) for hold in db.sessions.pools["request"].register.holds()])

    assert [len(each) for each in seen] == [1, 1]
    assert seen[0][0].startswith("code that took it from the engine (")
    assert seen[0][0].endswith(" in audit)")
    assert seen[1][0].endswith(" in test_what_a_listener_takes_is_not_the_session_s)")
    db.dispose()


@pytest.mark.drivers("psycopg")
async def test_a_session_within_another_s_block_has_a_hold_of_its_own(database: DatabaseUnderTest) -> None:
    """A sync session that is opened in the ``run_sync`` of an async one takes nothing of its."""
    db = Database(database.url)
    register = db.sessions.pools["request"].register
    seen: list[tuple[str, str | None]] = []

    async with db.async_session() as outer:

        def work(session: Session) -> None:
            with db.session() as inner:
                inner.execute(text("SELECT 'inner'"))
                session.execute(text("SELECT 'outer'"))
                seen.extend((hold.owner.line.function, hold.statement) for hold in register.holds())

        await outer.run_sync(work)
    await db.async_dispose()

    outside = "test_a_session_within_another_s_block_has_a_hold_of_its_own"
    assert seen == [("work", "SELECT 'inner'"), (outside, "SELECT 'outer'")]


@sync_drivers
def test_a_connection_that_is_given_twice_is_still_the_session_s(database: DatabaseUnderTest) -> None:
    """SQLAlchemy tells a pool's listeners again of a connection that one of them has refused."""
    db = Database(database.url, engine_options={"poolclass": NullPool})
    refusals = [sqlalchemy.exc.DisconnectionError()]

    @event.listens_for(db.engine(), "checkout")
    def refuse(*_: object) -> None:
        if refusals:
            raise refusals.pop()

    with db.session() as session:
        session.execute(text("SELECT 7"))
        during = [(hold.owner.name, hold.statement) for hold in db.sessions.pools["request"].register.holds()]

    assert during == [("code", "SELECT 7")]
    assert db.sessions.pools["request"].register.holds() == []
    db.dispose()


@pytest.mark.drivers("psycopg")
def test_a_connection_that_was_lost_is_held_by_nobody(database: DatabaseUnderTest) -> None:
    """A connection that has broken is its pool's no longer, though the session has not ended yet."""
    db = Database(database.url, pool=PoolSettings(1, 0))

    with db.session() as session:
        session.connection().invalidate()
        holds, checked_out = db.sessions.pools["request"].register.holds(), db.stats().pools["request"].in_use
        session.rollback()

    assert (holds, checked_out) == ([], 0)
    db.dispose()


@sync_drivers
def test_a_connection_taken_from_the_engine_names_its_line(database: DatabaseUnderTest, told: Told) -> None:
    """Whoever takes a connection by hand is named by the line that did it."""
    db = Database(database.url, pool=PoolSettings(1, 0, warn_after=1e-9))

    with db.engine().connect():
        held = report(db, told)
        (holder,) = db.stats().pools["request"].holders

    line = test_a_connection_taken_from_the_engine_names_its_line.__name__
    assert held.owner.startswith("code that took it from the engine (")
    assert f" in {line})" in held.owner
    assert "test_holders.py:" in held.owner
    assert (holder.kind, holder.owner) == ("code", "code that took it from the engine")
    assert str(holder.line).endswith(f" in {line}")
    db.dispose()


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_an_async_connection_taken_from_the_engine_names_its_line(database: DatabaseUnderTest, told: Told) -> None:
    """The line is found from behind SQLAlchemy's greenlet, too."""
    db = Database(database.url, pool=PoolSettings(1, 0, warn_after=1e-9))

    async def take_it() -> signals.ConnectionHeld:
        async with db.async_engine().connect():
            held = report(db, told)
        await db.async_dispose()
        return held

    assert " in take_it)" in asyncio.run(take_it()).owner


@sync_drivers
def test_a_session_of_the_application_s_own_names_its_line(database: DatabaseUnderTest, told: Told) -> None:
    """A session that was made by hand on one of our engines is named by the line that first used it."""
    db = Database(database.url, pool=PoolSettings(1, 0, warn_after=1e-9))

    with Session(db.engine()) as session:
        session.execute(text("SELECT 1"))
        held = report(db, told)

    assert held.owner.startswith("a session of the application's own (")
    assert "in test_a_session_of_the_application_s_own_names_its_line)" in held.owner
    db.dispose()


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_an_async_session_of_the_application_s_own_names_its_line(database: DatabaseUnderTest, told: Told) -> None:
    """The same for an ``AsyncSession``."""
    db = Database(database.url, pool=PoolSettings(1, 0, warn_after=1e-9))

    async def use_it() -> signals.ConnectionHeld:
        async with AsyncSession(db.async_engine()) as session:
            await session.execute(text("SELECT 1"))
            held = report(db, told)
        await db.async_dispose()
        return held

    assert " in use_it)" in asyncio.run(use_it()).owner


def test_a_request_is_named_with_its_endpoint(database: DatabaseUnderTest, told: Told) -> None:
    """A request that holds a connection is named by its line and by the endpoint's place in the source."""
    db = Database(database.url, pool=PoolSettings(1, 0, warn_after=1e-9))
    app = FastAPI()
    install(app, db, runs=(), create_tables=True)

    def slow_report(session: SessionDep) -> str:
        session.execute(text("SELECT 1"))
        return held_owner()

    async def slow_async_report(session: AsyncSessionDep) -> str:
        await session.execute(text("SELECT 1"))
        return held_owner()

    def held_owner() -> str:
        # The watchman makes his own rounds, too: whoever comes first tells of it.
        db.sessions.pools.report_late()
        signal = told.get(timeout=30)
        assert isinstance(signal, signals.ConnectionHeld)
        return signal.owner

    app.get("/report")(slow_async_report if database.is_async else slow_report)
    with serve(app) as url:
        owner = httpx.get(f"{url}/report").json()

    name = "slow_async_report" if database.is_async else "slow_report"
    assert owner.startswith("GET /report (")
    assert owner.endswith(f" in {name})")
    assert "test_holders.py:" in owner


def test_a_task_that_waits_with_its_connection_is_told_to_commit(
    database: DatabaseUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names task, attempt, id and the function's place, the last statement, and says to commit first."""
    shop = Workshop(database, pools={"slow": PoolSettings(pool_size=1, warn_after=1e-9)})

    @shop.task(pool="slow")
    def calls_somebody(session: Session, label: str) -> None:
        session.execute(text("SELECT 42"))
        # What follows stands for a call over the network.
        with caplog.at_level(logging.WARNING, "aftercommit.pools"):
            shop.db.sessions.pools.report_late()

    with shop.running():
        id = shop.ask(calls_somebody)
        shop.drain()
    shop.close()

    (line,) = [each.getMessage() for each in caplog.records if "has been held" in each.getMessage()]
    assert f"task 'calls_somebody', attempt 1, id {id} (" in line
    assert "workshop.py:" in line
    assert "its last statement is 'SELECT 42'" in line
    assert "the transaction is idle. Commit before slow work outside the database" in line


def test_a_handler_of_events_is_named_with_its_own_line(database: DatabaseUnderTest, told: Told) -> None:
    """The line is that of the function that the application wrote, not of what the library put around it."""
    shop = Workshop(database, pools={"default": PoolSettings(warn_after=1e-9)})
    held: list[signals.Signal] = []

    def look(session: Session) -> None:
        session.execute(text("SELECT 1"))
        # The watchman makes his own rounds, too: whoever comes first tells of it.
        shop.db.sessions.pools.report_late()
        held.append(told.get(timeout=30))

    if database.is_async:

        @shop.db.on(Arrived)
        async def on_arrival(session: AsyncSession, event: Arrived) -> None:
            await session.run_sync(look)
    else:

        @shop.db.on(Arrived)
        def on_arrival(session: Session, event: Arrived) -> None:
            look(session)

    with shop.running():
        shop.commit(lambda session: shop.db.publish(session, Arrived(number=1)))
        shop.drain()
    shop.close()

    assert isinstance(held[0], signals.ConnectionHeld)
    assert held[0].owner.startswith("task 'on_arrival', attempt 1, id ")
    assert "test_holders.py:" in held[0].owner
    assert held[0].owner.endswith(" in on_arrival)")


@pytest.mark.drivers("psycopg")
def test_a_statement_that_takes_long_is_not_called_idle(database: DatabaseUnderTest, told: Told) -> None:
    """While a statement runs, here waiting for a lock, it is named, and nobody is told to commit."""
    db = Database(database.url, pool=PoolSettings(2, 0, warn_after=1e-9))
    waiting = "SELECT pg_advisory_xact_lock(7)"

    def wait() -> None:
        with db.session() as session:
            session.execute(text(waiting))

    with db.session() as first:
        first.execute(text(waiting))
        thread = threading.Thread(target=wait)
        thread.start()
        while not first.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")):
            assert thread.is_alive()
        db.sessions.pools.report_late()
        both = [told.get_nowait(), told.get_nowait()]
    thread.join(30)

    (busy,) = [each for each in both if isinstance(each, signals.ConnectionHeld) and each.idle is None]
    assert busy.statement == waiting
    db.dispose()


# --- in FastAPI ---------------------------------------------------------------------------------------------------


def application(db: Database) -> FastAPI:
    """An endpoint that needs a connection."""
    app = FastAPI()
    install(app, db, runs=(), create_tables=True)
    app.get("/")(look)
    return app


def look(session: SessionDep) -> int:
    """What it does."""
    return session.execute(text("SELECT 1")).scalar_one()


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_request_that_gets_no_connection_is_answered_503(database: DatabaseUnderTest) -> None:
    """The client is told to come back, and the log says who holds the connections."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=0.05))

    with serve(application(db)) as url, db.session() as session:
        session.execute(text("SELECT 1"))
        answer = httpx.get(url)

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


@pytest.mark.drivers("pysqlite")
def test_an_application_answers_exhaustion_itself(database: DatabaseUnderTest) -> None:
    """An application that handles SQLAlchemy's ``TimeoutError`` goes on doing so."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=0.05))
    app = application(db)

    @app.exception_handler(sqlalchemy.exc.TimeoutError)
    def busy(_request: object, _error: Exception) -> PlainTextResponse:
        return PlainTextResponse("busy", status_code=429)

    with serve(app) as url, db.session() as session:
        session.execute(text("SELECT 1"))
        answer = httpx.get(url)

    assert (answer.status_code, answer.text) == (429, "busy")


@pytest.mark.drivers("pysqlite")
def test_an_error_that_only_the_last_resort_handles_is_seen_by_the_server(
    database: DatabaseUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler of ``Exception`` answers what nobody handles, and the server still hears of it, with its traceback."""
    app = application(Database(database.url))

    @app.exception_handler(Exception)
    def apologise(_request: object, _error: Exception) -> PlainTextResponse:
        return PlainTextResponse("sorry", status_code=500)

    @app.get("/broken")
    def ask_for_nothing(session: SessionDep) -> None:
        session.execute(text("SELECT * FROM there_is_no_such_table"))

    with serve(app) as url, caplog.at_level(logging.ERROR, "uvicorn.error"):
        answer = httpx.get(url + "/broken")

    assert (answer.status_code, answer.text) == (500, "sorry")
    raised = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [type(error) for error in raised] == [sqlalchemy.exc.OperationalError]


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_mounted_application_answers_503_as_well(database: DatabaseUnderTest) -> None:
    """Its errors end in itself, and never reach the application that it is mounted in."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=0.05))
    outer, below, theirs = FastAPI(), FastAPI(), FastAPI()
    install(outer, db, runs=(), create_tables=True)
    for app in (below, theirs):
        app.get("/")(look)
    theirs.add_exception_handler(PoolExhausted, lambda *_: PlainTextResponse("full", status_code=429))
    below.mount("/theirs", theirs)
    outer.mount("/below", below)

    with serve(outer) as url, db.session() as session:
        session.execute(text("SELECT 1"))
        ours, other = httpx.get(f"{url}/below/"), httpx.get(f"{url}/below/theirs/")

    assert (ours.status_code, ours.headers.get("Retry-After")) == (503, "1")
    assert (other.status_code, other.text) == (429, "full")


@pytest.mark.drivers("pysqlite")
def test_a_busy_pool_ends_a_websocket_with_its_own_error(
    database: DatabaseUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    """A WebSocket cannot be answered 503: it is closed, and what the server logs is that the pool had run dry."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=0.05))
    app = application(db)

    @app.websocket("/socket")
    async def look_once(websocket: WebSocket) -> None:
        await websocket.accept()
        with db.session() as session:
            session.execute(text("SELECT 1"))

    with serve(app) as url, db.session() as holding, caplog.at_level(logging.ERROR, "uvicorn.error"):
        holding.execute(text("SELECT 1"))
        with connect(url.replace("http", "ws") + "/socket") as client, pytest.raises(ConnectionClosed):
            client.recv()

    raised = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [type(error) for error in raised] == [PoolExhausted]
