"""Pools: an engine per kind of work with settings of its own, on every driver; SQLite set up for several writers."""

import asyncio
import os
import sqlite3
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio as asyncio_extension
from sqlalchemy import (
    Connection,
    Engine,
    NullPool,
    QueuePool,
    StaticPool,
    create_engine,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aftercommit import Database, PoolSettings
from aftercommit.errors import ConfigurationError
from aftercommit.pools import pools as pools_module
from aftercommit.pools.gate import needs_lock
from aftercommit.pools.turns import take_turn
from tests.support.databases import DatabaseUnderTest

SQLITE = "sqlite:////tmp/never-opened.db"
POSTGRES = "postgresql://user:secret@127.0.0.1:1/never_opened"


class Base(DeclarativeBase):
    """Tables of an application."""


class Counter(Base):
    """A row that everybody wants."""

    __tablename__ = "counter"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(default=0)


class Bench:
    """A ``Database`` on the driver under test, and the way to run a body on its engine."""

    def __init__(self, database: DatabaseUnderTest, **options: Any) -> None:
        self.db = Database(database.url, **options)
        self._runner = asyncio.Runner() if database.is_async else None

    def engine(self, pool: str = "request") -> Engine:
        """The engine, an async one by its sync side."""
        return self.db.engine(pool) if self._runner is None else self.db.async_engine(pool).sync_engine

    def run(self, body: Callable[[Session], Any], pool: str = "request") -> Any:
        """Run ``body(session)`` in a session of ours, to its commit."""
        if self._runner is None:
            with self.db.session(pool) as session:
                return body(session)

        async def run() -> Any:
            async with self.db.async_session(pool) as session:
                return await session.run_sync(body)

        return self._runner.run(run())

    def dispose(self) -> None:
        """Close every pool."""
        if self._runner is None:
            self.db.dispose()
        else:
            self._runner.run(self.db.async_dispose())

    def close(self) -> None:
        """Close everything."""
        self.dispose()
        if self._runner is not None:
            self._runner.close()


@contextmanager
def opened(database: DatabaseUnderTest, **options: Any) -> Iterator[Bench]:
    """A bench for the length of a ``with``."""
    bench = Bench(database, **options)
    try:
        yield bench
    finally:
        bench.close()


# --- one engine per pool ----------------------------------------------------------------------------------------


def test_threads_that_ask_first_at_once_share_one_engine(database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch):
    """Sixteen threads ask for the same pool for the first time: one engine is made."""
    module, name = (asyncio_extension, "create_async_engine") if database.is_async else (sqlalchemy, "create_engine")
    original, made = getattr(module, name), count()
    barrier = threading.Barrier(16)

    def make(*args: Any, **kwargs: Any) -> Any:
        next(made)
        return original(*args, **kwargs)

    # As what instruments SQLAlchemy does, and after aftercommit was imported.
    monkeypatch.setattr(module, name, make)

    with opened(database) as bench:

        def ask(_: int) -> Engine:
            barrier.wait()
            return bench.engine("default")

        with ThreadPoolExecutor(16) as threads:
            engines = set(threads.map(ask, range(16)))

    assert len(engines) == 1
    assert next(made) == 1


def test_each_pool_has_an_engine_with_its_own_settings(database: DatabaseUnderTest):
    """Sizes, time limits and recycling reach the pools that they were given for; the others have the defaults."""
    settings = PoolSettings(pool_size=2, max_overflow=3, pool_timeout=4.0, pool_recycle=55)

    with opened(database, pools={"files": settings}) as bench:
        found = {name: shape(bench.engine(name)) for name in ("files", "request", "default")}

    assert found == {"files": (2, 3, 4.0, 55), "request": (5, 5, 30.0, 3600), "default": (5, 0, 30.0, 3600)}


def shape(engine: Engine) -> tuple[Any, ...]:
    """The settings of an engine's pool."""
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    return pool.size(), pool._max_overflow, pool._timeout, pool._recycle


def test_the_request_pool_can_be_set_in_two_ways_but_not_at_once():
    """``pool=`` and ``pools={"request": …}`` mean the same."""
    settings = PoolSettings(pool_size=1)

    shapes = [
        shape(Database(SQLITE, **each).engine()) for each in ({"pool": settings}, {"pools": {"request": settings}})
    ]

    assert shapes[0] == shapes[1] == (1, 0, 30.0, 3600)
    with pytest.raises(ConfigurationError, match="twice"):
        Database(SQLITE, pool=settings, pools={"request": settings})


def test_an_unknown_pool_is_refused_with_those_there_are():
    """A slip of the pen is told at once."""
    db = Database(SQLITE, pools={"files": PoolSettings()})

    with pytest.raises(ConfigurationError, match="default, files, request"), db.session("flies"):
        pass


def test_a_null_pool_keeps_nothing_open(database: DatabaseUnderTest):
    """``NullPool`` takes no sizes, and works on every driver."""
    options = {"engine_options": {"poolclass": NullPool}, "async_engine_options": {"poolclass": NullPool}}

    with opened(database, **options) as bench:
        one = bench.run(lambda session: session.scalar(select(1)))
        pool = bench.engine().pool

    assert one == 1
    assert isinstance(pool, NullPool)


def test_dispose_closes_what_comes_back_later(database: DatabaseUnderTest):
    """A connection that is in use during ``dispose`` is closed on its return; the next session opens a new pool."""
    with opened(database) as bench:
        first = bench.engine()
        closed: list[Any] = []
        event.listen(first, "close", lambda *_: closed.append(True))

        if database.is_async:
            bench._runner.run(dispose_inside(bench.db))  # type: ignore[union-attr]
        else:
            with bench.db.session() as session:
                session.execute(text("SELECT 1"))
                bench.db.dispose()

        assert closed == [True]
        assert bench.engine() is not first
        assert bench.run(lambda session: session.scalar(select(1))) == 1


async def dispose_inside(db: Database) -> None:
    """Dispose of the pools while a session is open."""
    async with db.async_session() as session:
        await session.execute(text("SELECT 1"))
        await db.async_dispose()


def test_dispose_closes_what_an_open_session_connects_later(database: DatabaseUnderTest):
    """A session opened before ``dispose`` that connects after it, as a task left behind does, leaves nothing open."""
    with opened(database) as bench:
        closed: list[Any] = []
        event.listen(bench.engine(), "close", lambda *_: closed.append(True))

        if database.is_async:
            bench._runner.run(connect_late(bench.db))  # type: ignore[union-attr]
        else:
            with bench.db.session() as session:
                bench.db.dispose()
                session.execute(text("SELECT 1"))

        assert closed == [True]


async def connect_late(db: Database) -> None:
    """Dispose of the pools while a session is open that has no connection yet."""
    async with db.async_session() as session:
        await db.async_dispose()
        await session.execute(text("SELECT 1"))


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options"),
    [
        (POSTGRES, {"engine_options": {"connect_args": {"statement_cache_size": 0}}}),
        (POSTGRES, {"async_engine_options": {"connect_args": {"statement_cache_size": 0}}}),
        ("postgresql+asyncpg://h/n", {"async_engine_options": {"connect_args": {"prepare_threshold": 0}}}),
        (SQLITE, {"engine_options": {"connect_args": {"connect_timeout": 3}}}),
        (SQLITE, {"async_engine_options": {"connect_args": {"connect_timeout": 3}}}),
        (SQLITE, {"engine_options": {"poolsize": 3}}),
        (POSTGRES, {"async_engine_options": {"poolsize": 3}}),
        (SQLITE, {"engine_options": {"pool_size": 3}}),
        (POSTGRES, {"engine_options": {"isolation_level": "AUTOCOMMIT"}}),
        (POSTGRES, {"engine_options": {"execution_options": {"isolation_level": "AUTOCOMMIT"}}}),
        (POSTGRES, {"engine_options": {"connect_args": {"autocommit": True}}}),
        (SQLITE, {"engine_options": {"connect_args": {"isolation_level": "DEFERRED"}}}),
        (SQLITE, {"engine_options": {"connect_args": {"autocommit": False}}}),
        (SQLITE, {"engine_options": {"poolclass": StaticPool}}),
        (POSTGRES, {"async_engine_options": {"poolclass": QueuePool}}),
        (SQLITE, {"engine_options": {"pool": None}}),
    ],
)
def test_options_that_cannot_be_are_refused_at_construction(url: str, options: dict[str, Any]):
    """Unknown, of another flavour, or the end of transactions: told before anything runs."""
    with pytest.raises(ConfigurationError) as caught:
        Database(url, **options)

    assert next(iter(options)) in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"heartbeat": 10.1},
        {"silent_after": 14.9},
        {"heartbeat": 0.0},
        {"heartbeat": -1.0},
        {"heartbeat": 2, "silent_after": 5},
    ],
)
def test_a_worker_must_be_able_to_miss_a_heartbeat(options: dict[str, float]):
    """A heartbeat above a third of ``silent_after`` would have tasks taken from workers that live; it is refused."""
    with pytest.raises(ConfigurationError, match="at least three times heartbeat"):
        Database(SQLITE, **options)  # type: ignore[arg-type]

    assert Database(SQLITE, heartbeat=10.0)
    assert Database(SQLITE, silent_after=15.0)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        (POSTGRES, {"engine_options": {"connect_args": {"prepare_threshold": None, "connect_timeout": 3}}}),
        (POSTGRES, {"engine_options": {"connect_args": {"options": "-c statement_timeout=5s"}, "echo": False}}),
        (
            "postgresql+asyncpg://h/n",
            {
                "async_engine_options": {
                    "connect_args": {
                        "statement_cache_size": 0,
                        "prepared_statement_name_func": str,
                        "command_timeout": 3,
                    }
                }
            },
        ),
        (SQLITE, {"engine_options": {"connect_args": {"timeout": 3, "cached_statements": 5}}}),
        (SQLITE, {"async_engine_options": {"connect_args": {"timeout": 3}}}),
        (POSTGRES, {"engine_options": {"poolclass": NullPool, "json_serializer": str}}),
    ],
)
def test_options_of_the_right_flavour_are_taken(url: str, options: dict[str, Any]):
    """What a driver knows is passed on."""
    assert repr(Database(url, **options))


def test_the_options_of_one_flavour_do_not_reach_the_other(sqlite_url: str):
    """Each engine gets its own connect arguments."""
    url = sqlite_url.replace("+pysqlite", "")
    db = Database(
        url,
        engine_options={"connect_args": {"timeout": 1.0}},
        async_engine_options={"connect_args": {"timeout": 2.0}},
    )

    async def look() -> int:
        async with db.async_session() as session:
            found = (await session.execute(text("PRAGMA busy_timeout"))).scalar_one()
        await db.async_dispose()
        return found

    with db.session() as session:
        sync = session.execute(text("PRAGMA busy_timeout")).scalar_one()

    assert (sync, asyncio.run(look())) == (1000, 2000)


# --- URLs -------------------------------------------------------------------------------------------------------


def test_a_callable_url_is_called_once_and_late(sqlite_url: str):
    """Not at construction, and once for both flavours and all threads."""
    calls = count()
    barrier = threading.Barrier(8)

    def url() -> str:
        next(calls)
        return sqlite_url.replace("+pysqlite", "")

    db = Database(url)
    assert repr(db) == "Database('<callable>')"

    def ask(number: int) -> object:
        barrier.wait()
        return db.engine() if number % 2 else db.async_engine()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))

    assert next(calls) == 1
    db.dispose()


def test_a_callable_url_is_checked_when_it_is_known():
    """What would have been refused at construction is refused at the first use."""
    db = Database(lambda: SQLITE, engine_options={"connect_args": {"connect_timeout": 3}})
    in_memory = Database(lambda: "sqlite://")

    with pytest.raises(ConfigurationError, match="connect_timeout"):
        db.engine()
    with pytest.raises(ConfigurationError, match="in memory"):
        in_memory.engine()


@pytest.mark.parametrize(
    ("url", "flavour", "words"),
    [
        ("sqlite+pysqlite:////tmp/x.db", "async", ("AsyncSession", "pysqlite", "sqlite://", "aiosqlite")),
        ("sqlite+aiosqlite:////tmp/x.db", "sync", ("Session", "aiosqlite", "sqlite://")),
        ("postgresql+asyncpg://u:secret@h/n", "sync", ("Session", "asyncpg", "postgresql://", "psycopg[binary]")),
        ("postgresql+psycopg_async://u:secret@h/n", "sync", ("Session", "psycopg[binary]")),
    ],
)
def test_a_flavour_that_the_url_does_not_serve_is_refused(url: str, flavour: str, words: tuple[str, ...]):
    """The error names the driver, what to write, and the package to install; never the password."""
    db = Database(url)

    with pytest.raises(ConfigurationError) as caught:
        db.session().__enter__() if flavour == "sync" else db.async_session()

    for word in words:
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file::memory:?cache=shared&uri=true",
        "sqlite:///file:x?mode=memory&uri=true",
    ],
)
def test_a_database_in_memory_is_refused(url: str):
    """Requests and tasks would each see an empty one of their own."""
    with pytest.raises(ConfigurationError, match="in memory"):
        Database(url)


@pytest.mark.parametrize("url", ["mysql://h/n", "postgresql+psycopg2://h/n", "postgresql+pg8000://h/n", "nonsense", ""])
def test_other_databases_and_drivers_are_refused(url: str):
    """With what to write instead."""
    with pytest.raises(ConfigurationError, match="sqlite://"):
        Database(url)


# --- PostgreSQL -------------------------------------------------------------------------------------------------

postgres_drivers = pytest.mark.drivers("psycopg", "asyncpg")


def application_name(session: Session) -> str:
    """What the server calls us."""
    return session.execute(
        text("SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()")
    ).scalar_one()


@postgres_drivers
def test_connections_carry_the_name_of_their_pool(database: DatabaseUnderTest):
    """An operator sees which pool a connection belongs to."""
    with opened(database, pools={"files": PoolSettings()}) as bench:
        names = [bench.run(application_name, pool) for pool in ("request", "files")]

    assert names == ["aftercommit:request", "aftercommit:files"]


@postgres_drivers
def test_a_name_in_the_url_or_the_options_stays(database: DatabaseUnderTest):
    """Whoever names his connections has his name."""
    named = DatabaseUnderTest(url=f"{database.url}?application_name=mine", driver=database.driver)
    settings = (
        {"server_settings": {"application_name": "asked"}} if database.is_async else {"application_name": "asked"}
    )
    option = "async_engine_options" if database.is_async else "engine_options"

    with opened(named) as by_url, opened(database, **{option: {"connect_args": settings}}) as by_option:
        names = [bench.run(application_name) for bench in (by_url, by_option)]

    assert names == ["mine", "asked"]


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


def terminate_all(database: DatabaseUnderTest) -> None:
    """Have the server throw everybody else out of the database."""
    engine = create_engine(database.sync_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    engine.dispose()


def backend(session: Session) -> int:
    """The server process that serves us."""
    return session.execute(text("SELECT pg_backend_pid()")).scalar_one()


@postgres_drivers
def test_a_connection_that_died_while_idle_is_replaced(database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch):
    """It sat idle for more than a second and was killed: the next session gets another, and sees no error."""
    clock = Clock()
    monkeypatch.setattr(pools_module, "time", clock)

    with opened(database) as bench:
        first = bench.run(backend)
        terminate_all(database)
        clock.now += 1.5
        second = bench.run(backend)

    assert first != second


@postgres_drivers
def test_a_connection_that_was_cut_off_a_moment_ago_is_replaced(
    database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch
):
    """Before it has sat idle for long, too: the server's goodbye lies there unread, and costs no round trip to see."""
    monkeypatch.setattr(pools_module, "time", Clock())

    with opened(database) as bench:
        first = bench.run(backend)
        terminate_all(database)
        second = bench.run(backend)

    assert first != second


@postgres_drivers
def test_only_what_sat_idle_is_tried(database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch):
    """Under load a checkout costs no round trip; after a second of rest it costs one."""
    clock = Clock()
    monkeypatch.setattr(pools_module, "time", clock)
    pings: list[bool] = []

    with opened(database) as bench:
        dialect = bench.engine().dialect
        original = dialect.do_ping

        def ping(connection: Any) -> bool:
            pings.append(True)
            return original(connection)

        monkeypatch.setattr(dialect, "do_ping", ping)
        for rest in (0.0, 0.5, 0.9):
            clock.now += rest
            bench.run(backend)
        busy = len(pings)
        clock.now += 1.0
        bench.run(backend)

    assert (busy, len(pings)) == (0, 1)


@postgres_drivers
def test_pre_ping_can_be_switched_off(database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch):
    """Then a connection that died while idle is the user's to see."""
    clock = Clock()
    monkeypatch.setattr(pools_module, "time", clock)

    with opened(database, pool=PoolSettings(pool_pre_ping=False)) as bench:
        bench.run(backend)
        terminate_all(database)
        clock.now += 100.0
        with pytest.raises(Exception, match=r"(?i)terminat|closed"):
            bench.run(backend)


# --- SQLite -----------------------------------------------------------------------------------------------------

sqlite_drivers = pytest.mark.drivers("pysqlite", "aiosqlite")


@sqlite_drivers
def test_sqlite_is_set_up_for_real_use(database: DatabaseUnderTest):
    """WAL, ten seconds of patience, and foreign keys that hold."""

    def look(session: Session) -> list[Any]:
        return [
            session.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "busy_timeout", "foreign_keys")
        ]

    with opened(database) as bench:
        assert bench.run(look) == ["wal", 10_000, 1]


class Sent:
    """What reaches SQLite, BEGIN and COMMIT included: by the driver's own trace."""

    def __init__(self, engine: Engine) -> None:
        self.statements: list[str] = []
        event.listen(engine, "connect", self._trace)

    def _trace(self, connection: Any, _record: Any) -> None:
        driver = getattr(connection, "driver_connection", connection)
        driver = getattr(driver, "_conn", driver)
        driver.set_trace_callback(self.statements.append)

    def words(self) -> list[str]:
        """The first two words of each, PRAGMAs of the set-up left out."""
        return [" ".join(each.split()[:2]) for each in self.statements if not each.startswith("PRAGMA")]


WRITES: dict[str, Callable[[Session], Any]] = {
    "ORM": lambda s: s.add(Counter(n=1)),
    "Core": lambda s: s.execute(update(Counter).values(n=1)),
    "raw": lambda s: s.execute(text("UPDATE counter SET n = 1")),
    "lower case": lambda s: s.execute(text("  update counter set n = 1")),
    "comments": lambda s: s.execute(text("-- SELECT\n/* SELECT\n */ DELETE FROM counter")),
    "WITH … INSERT": lambda s: s.execute(text("WITH x AS (SELECT 7 AS n) INSERT INTO counter (n) SELECT n FROM x")),
    "REPLACE": lambda s: s.execute(text("REPLACE INTO counter (id, n) VALUES (1, 1)")),
    "DDL": lambda s: s.execute(text("CREATE TABLE other (id INTEGER)")),
    "executemany": lambda s: s.execute(insert(Counter), [{"n": 1}, {"n": 2}]),
    "RETURNING": lambda s: s.execute(insert(Counter).returning(Counter.id), [{"n": 1}, {"n": 2}]).all(),
    "driver": lambda s: s.connection().exec_driver_sql("DELETE FROM counter"),
}
READS: dict[str, Callable[[Session], Any]] = {
    "ORM": lambda s: s.get(Counter, 1),
    "raw": lambda s: s.execute(text("select 1")).all(),
    "comments": lambda s: s.execute(text("/* INSERT */ -- UPDATE\n SELECT 1")).all(),
    "parenthesis": lambda s: s.execute(text("WITH x AS (SELECT 1) SELECT * FROM x")).all(),
    "VALUES": lambda s: s.execute(text("VALUES (1)")).all(),
    "EXPLAIN": lambda s: s.execute(text("EXPLAIN QUERY PLAN DELETE FROM counter")).all(),
    "PRAGMA": lambda s: s.execute(text("PRAGMA user_version")).all(),
}


@sqlite_drivers
@pytest.mark.parametrize("kind", WRITES)
def test_the_first_write_begins_immediate(database: DatabaseUnderTest, kind: str):
    """Whatever writes first comes behind BEGIN IMMEDIATE, once, and is committed or rolled back as one."""
    with opened(database) as bench:
        bench.run(lambda session: Base.metadata.create_all(session.connection()))
        bench.dispose()
        sent = Sent(bench.engine())

        def body(session: Session) -> None:
            session.execute(text("SELECT 1"))
            WRITES[kind](session)
            session.flush()
            session.execute(text("UPDATE counter SET n = 9"))

        bench.run(body)
        words = sent.words()

    assert words[:2] == ["SELECT 1", "BEGIN IMMEDIATE"]
    assert words.count("BEGIN IMMEDIATE") == 1
    assert words[-1] == "COMMIT"


@sqlite_drivers
@pytest.mark.parametrize("kind", READS)
def test_nothing_is_begun_for_reads(database: DatabaseUnderTest, kind: str):
    """A session that reads takes no lock, and waits for nobody who holds it."""
    with opened(database) as bench:
        bench.run(lambda session: Base.metadata.create_all(session.connection()))
        bench.dispose()
        sent = Sent(bench.engine())
        writer = sqlite3.connect(str(database.path), isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        bench.run(READS[kind])
        writer.close()

    assert not [word for word in sent.words() if word.startswith("BEGIN")]


@sqlite_drivers
def test_a_savepoint_begins_immediate(database: DatabaseUnderTest):
    """A savepoint before any write: it is inside the transaction, so its release commits nothing."""
    with opened(database) as bench:
        bench.run(lambda session: Base.metadata.create_all(session.connection()))
        bench.dispose()
        sent = Sent(bench.engine())

        def body(session: Session) -> None:
            with session.begin_nested():
                session.add(Counter())
            session.rollback()

        bench.run(body)
        left = bench.run(lambda session: session.execute(text("SELECT count(*) FROM counter")).scalar_one())

    assert sent.words()[:2] == ["BEGIN IMMEDIATE", "SAVEPOINT sa_savepoint_1"]
    assert left == 0


@sqlite_drivers
def test_whoever_runs_statements_himself_is_in_the_transaction(database: DatabaseUnderTest):
    """A listener that sends a statement in its own way, in place of SQLAlchemy, sends it behind BEGIN IMMEDIATE."""
    with opened(database) as bench:
        bench.run(lambda session: Base.metadata.create_all(session.connection()))

        def send(cursor: Any, statement: str, parameters: Any, _context: Any) -> bool:
            cursor.execute(statement, parameters)
            return True

        event.listen(bench.engine(), "do_execute", send)

        def body(session: Session) -> None:
            session.add(Counter())
            session.flush()
            session.rollback()

        bench.run(body)
        left = bench.run(lambda session: session.execute(text("SELECT count(*) FROM counter")).scalar_one())

    assert left == 0


@sqlite_drivers
def test_a_lock_that_does_not_come_free_is_sqlalchemys_error(database: DatabaseUnderTest):
    """``except OperationalError`` catches it, wherever the lock was asked for."""
    option = {"connect_args": {"timeout": 0.01}}

    with opened(database, engine_options=option, async_engine_options=option) as bench:
        bench.run(lambda session: Base.metadata.create_all(session.connection()))
        writer = sqlite3.connect(str(database.path), isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        for body in (WRITES["ORM"], lambda session: session.begin_nested().__enter__() and session.connection()):
            with pytest.raises(OperationalError, match="locked"):
                bench.run(body)
        writer.close()

        assert bench.engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def test_who_waits_for_the_lock_comes_before_who_had_it(sqlite_url: str):
    """One that commits and writes again at once does not keep the lock from a thread that waits for it."""
    db = Database(sqlite_url)
    with db.engine().begin() as connection:
        connection.execute(text("CREATE TABLE entry (id INTEGER PRIMARY KEY, who TEXT)"))
        connection.execute(text("CREATE TABLE work (done INTEGER)"))

    def write(who: str) -> None:
        with db.session() as session:
            session.execute(text("INSERT INTO entry (who) VALUES (:who)"), {"who": who})

    thread = threading.Thread(target=write, args=("waiting",))
    with db.engine().connect() as connection:
        connection.execute(text("INSERT INTO entry (who) VALUES ('first')"))
        thread.start()
        while not _asks_for_the_lock(thread):
            assert thread.is_alive()
        # Enough work for SQLite to have looked a few times: it looks ever more rarely.
        connection.execute(
            text(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 500000) "
                "INSERT INTO work SELECT max(i) FROM n"
            )
        )
        connection.commit()
        connection.execute(text("INSERT INTO entry (who) VALUES ('first again')"))
        connection.commit()
    thread.join()

    with db.session() as session:
        found = session.scalars(text("SELECT who FROM entry ORDER BY id")).all()
    db.dispose()
    assert found == ["first", "waiting", "first again"]


def test_a_forked_process_waits_for_no_turn_of_a_thread_that_it_has_not(tmp_path: Path):
    """Forked while a thread asks for the write lock, a process would give up its own turn at every write, for ever."""
    file = str(tmp_path / "forked.db")

    turn, _ = take_turn(file, 1.0)
    assert turn is not None
    with warnings.catch_warnings():
        # Python 3.12 and later: with threads about, whoever forks should know what he does.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            os._exit(0 if take_turn(file, 0.0)[0] is not None else 1)
        _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0


def _asks_for_the_lock(thread: threading.Thread) -> bool:
    """Whether *thread* wants SQLite's write lock and does not have it yet."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != "take_turn":
        frame = frame.f_back
    return frame is not None


@pytest.mark.drivers("pysqlite")
def test_autocommit_for_single_statements_works_and_leaves_no_trace(database: DatabaseUnderTest):
    """VACUUM wants no transaction; the next session on that connection has ours again."""
    with opened(database, pool=PoolSettings(pool_size=1)) as bench:
        bench.run(lambda session: Base.metadata.create_all(session.connection()))
        with bench.engine().execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("VACUUM"))
            connection.execute(text("INSERT INTO counter (n) VALUES (1)"))

        def body(session: Session) -> None:
            session.add(Counter())
            session.flush()
            session.rollback()

        bench.run(body)
        left = bench.run(lambda session: session.execute(text("SELECT count(*) FROM counter")).scalar_one())

    assert left == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_requests_that_read_and_then_write_all_succeed(sqlite_url: str, kind: str):
    """Three hundred side by side, as real requests do it: none fails with ``database is locked``."""
    db = Database(sqlite_url.replace("+pysqlite", ""), pool=PoolSettings(pool_size=10))
    Base.metadata.create_all(db.engine())
    with db.session() as session:
        session.add(Counter(id=1))

    def request(session: Session) -> None:
        session.execute(text("SELECT count(*) FROM counter")).scalar_one()
        session.add(Counter())
        session.flush()
        session.execute(update(Counter).where(Counter.id == 1).values(n=Counter.n + 1))

    def sync_request(_: int) -> None:
        with db.session() as session:
            request(session)

    async def async_request() -> None:
        async with db.async_session() as session:
            await session.run_sync(request)

    async def all_async() -> None:
        await asyncio.gather(*(async_request() for _ in range(300)))
        await db.async_dispose()

    if kind == "sync":
        with ThreadPoolExecutor(10) as threads:
            list(threads.map(sync_request, range(300)))
    else:
        asyncio.run(all_async())

    with db.session() as session:
        assert session.get_one(Counter, 1).n == 300
        assert session.execute(text("SELECT count(*) FROM counter")).scalar_one() == 301
    db.dispose()


@pytest.fixture
def counting(sqlite_url: str) -> Iterator[Database]:
    """A database with a counter at 0, and a pool of eight."""
    db = Database(sqlite_url.replace("+pysqlite", ""), pools={"counting": PoolSettings(pool_size=8)})
    Base.metadata.create_all(db.engine())
    with db.session() as session:
        session.add(Counter(id=1))
    yield db
    db.dispose()


def test_counters_are_exact_through_tasks(counting: Database):
    """Read, add one, write: two hundred tasks side by side end at two hundred."""
    db = counting

    @db.task(pool="counting")
    def count_up(session: Session) -> None:
        session.get_one(Counter, 1).n += 1

    with db.running():
        for _ in range(20):
            with db.session() as session:
                for _ in range(10):
                    db.after_commit(session, count_up)
        db.drain()

    with db.session() as session:
        assert session.get_one(Counter, 1).n == 200


async def test_counters_are_exact_through_async_tasks(counting: Database):
    """The same on the event loop."""
    db = counting

    @db.task(pool="counting")
    async def count_up(session: AsyncSession) -> None:
        (await session.get_one(Counter, 1)).n += 1

    async with db.running():
        for _ in range(20):
            async with db.async_session() as session:
                for _ in range(10):
                    db.after_commit(session, count_up)
        await db.async_drain()
    await db.async_dispose()

    with db.session() as session:
        assert session.get_one(Counter, 1).n == 200


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT 1", False),
        ("(SELECT 1)", False),
        ("select 'insert'", False),
        ("VALUES (1)", False),
        ("PRAGMA user_version", False),
        ("BEGIN", False),
        ("VACUUM", False),
        ("WITH a AS (SELECT 1) SELECT * FROM a", False),
        ("WITH a AS (SELECT 1) DELETE FROM b", True),
        ("INSERT INTO a VALUES (1)", True),
        ("\n\t-- a comment\n/* another\none */ insert into a values (1)", True),
        ("CREATE TABLE a (id)", True),
        ("ALTER TABLE a ADD b", True),
        ("ANALYZE", True),
        ("", True),
        ("; DELETE FROM a", True),
        ("-- nothing but a comment", True),
    ],
)
def test_in_doubt_a_statement_needs_the_lock(statement: str, *, expected: bool):
    """Only what certainly reads goes without; the cost of a mistake is a wait, never a lost update."""
    assert needs_lock(statement) is expected


@pytest.mark.drivers("pysqlite")
def test_a_creator_of_the_users_gets_our_transactions(database: DatabaseUnderTest):
    """A connection that the user opens himself is set up like any other."""
    path = Path(str(database.path))
    options = {"creator": lambda: sqlite3.connect(path, check_same_thread=False)}

    with opened(database, engine_options=options) as bench:
        sent = Sent(bench.engine())
        bench.run(lambda session: Base.metadata.create_all(session.connection()))
        bench.run(WRITES["ORM"])

    assert sent.words().count("BEGIN IMMEDIATE") == 2
    assert not [each for each in sent.statements if each.strip() == "BEGIN"]


@pytest.mark.drivers("pysqlite")
def test_a_dropped_connection_gives_the_write_lock_back(database):
    """Also while somebody still has what it was asked for: an open result, or the error that it was dropped for."""
    db = Database(database.url)
    with db.engine().connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n integer)")
        connection.commit()
        result = connection.exec_driver_sql("INSERT INTO t VALUES (1), (2) RETURNING n")
        cursor = result.cursor

        connection.invalidate()

        with closing(sqlite3.connect(database.path, timeout=0, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert other.execute("SELECT count(*) FROM t").fetchone() == (0,)
        del cursor
    db.dispose()


@pytest.mark.drivers("psycopg")
@pytest.mark.parametrize("native", [False, True], ids=["sync", "async"])
def test_psycopg_says_nothing_of_pipelines_that_end_in_an_error(
    database: DatabaseUnderTest, native: bool, caplog: pytest.LogCaptureFixture
):
    """An ``executemany`` that fails is told of by its error; psycopg's line about its pipeline is left out."""
    db = Database(database.url)
    # So many that some are still on their way when the first error comes back.
    rows = [{"id": 1}] * 5000

    def fail(connection: Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE counter (id integer PRIMARY KEY)")
        connection.execute(text("INSERT INTO counter (id) VALUES (:id)"), rows)

    async def run() -> None:
        try:
            async with db.async_engine().begin() as connection:
                await connection.run_sync(fail)
        finally:
            await db.async_dispose()

    def run_plain() -> None:
        try:
            with db.engine().begin() as connection:
                fail(connection)
        finally:
            db.dispose()

    with pytest.raises(IntegrityError):
        asyncio.run(run()) if native else run_plain()

    assert [each.getMessage() for each in caplog.records if each.name == "psycopg"] == []
    # The line of another engine is there as before, where the server's answer comes in the middle of the pipeline.
    said: list[str] = []
    other = create_engine(database.sync_url, poolclass=NullPool)
    for _ in range(100):
        with other.connect() as connection, pytest.raises(IntegrityError):
            fail(connection)
        said = [each.getMessage() for each in caplog.records if each.name == "psycopg"]
        if said:
            break
    assert said
    assert all(each.startswith("error ignored terminating") for each in said)
