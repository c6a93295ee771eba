"""What is sent to the database and what is not: every statement is a trip, and idle processes are many."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
import sqlalchemy as sa
from sqlalchemy.engine.base import RootTransaction
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from aftercommit import PoolSettings, signals
from aftercommit.watch import private_names
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Heard, Workshop


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database)
    yield shop
    shop.close()


def effect(session: Session, label: str) -> None:
    """What most tasks here do."""
    session.add(Effect(label=label))


# --- a hand-over ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 50])
def test_tasks_born_claimed_cost_the_asker_one_statement(shop: Workshop, count: int):
    """While they run here, whatever finds a place and whatever is queued, the asker's transaction sends one more."""
    task = shop.task()(effect)

    def ask(session: Session, labels: list[str]) -> None:
        session.add(Effect(label="asker"))
        for label in labels:
            shop.db.after_commit(session, task, label)

    with shop.running():
        shop.commit(lambda session: ask(session, []))
        plain = _sent_by(shop, lambda session: ask(session, []))
        with_tasks = _sent_by(shop, lambda session: ask(session, [str(n) for n in range(count)]))
        shop.drain()

    assert len(with_tasks) == len(plain) + 1, with_tasks
    assert len(shop.effects()) == 3 + count


def _sent_by(shop: Workshop, body) -> list[str]:
    engine = shop.db.async_engine().sync_engine if shop.is_async else shop.db.engine()
    sent: list[str] = []

    def note(_connection, _cursor, statement: str, *_) -> None:
        sent.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        shop.commit(body)
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    return sent


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_costs_one_statement_more_than_its_function(shop: Workshop):
    """What a task sends is what its function sends, and the note that it is done."""
    task = shop.task()(effect)
    sent: list[str] = []
    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        shop.ask(task, "warm")
        heard.wait(signals.TaskSucceeded)
        pool = "default"
        engine = shop.db.async_engine(pool).sync_engine if shop.is_async else shop.db.engine(pool)

        @sa.event.listens_for(engine, "before_cursor_execute")
        def note(_connection, _cursor, statement: str, *_) -> None:
            sent.append(statement.split(maxsplit=1)[0])

        shop.ask(task, "a")
        heard.wait(signals.TaskSucceeded, count=2)

    # pysqlite's BEGIN IMMEDIATE is a statement that SQLAlchemy sees; the others' BEGIN is the driver's.
    assert [each for each in sent if each != "BEGIN"] == ["INSERT", "UPDATE"]


# --- the level of a connection --------------------------------------------------------------------------------------


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_connection_begins_at_the_level_of_whoever_has_it(database: DatabaseUnderTest):
    """Tasks and other sessions take turns on the one connection of a pool: each gets its own level, whoever was before.

    Even after somebody set the level himself, which SQLAlchemy then sets back behind his session.
    """
    shop = Workshop(database, pools={"default": PoolSettings(pool_size=1, max_overflow=0)})
    levels: list[str] = []

    def look(session: Session, _label: str) -> None:
        levels.append(session.connection().exec_driver_sql("SHOW transaction_isolation").scalar_one())

    def choose(session: Session, label: str) -> None:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        look(session, label)

    task, choosing = shop.task()(look), shop.task()(choose)
    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        for count in (1, 4):
            shop.ask(task, "a")
            heard.wait(signals.TaskSucceeded, count=count)
            _in_session(shop, lambda session: look(session, ""))
            shop.ask(choosing, "a")
            heard.wait(signals.TaskSucceeded, count=count + 1)
            shop.ask(task, "a")
            heard.wait(signals.TaskSucceeded, count=count + 2)
            _in_session(shop, lambda session: choose(session, ""))
    shop.close()

    assert levels == ["repeatable read", "read committed", "serializable", "repeatable read", "serializable"] * 2


def _in_session(shop: Workshop, body) -> None:
    """Run *body* in a session on the pool of the tasks."""
    if not shop.is_async:
        with shop.db.session("default") as session:
            body(session)
        return

    async def run() -> None:
        async with shop.db.async_session("default") as session:
            await session.run_sync(body)

    shop.on_loop(run())


def _level(engine: sa.Engine) -> object:
    with engine.connect() as connection:
        return connection.exec_driver_sql("SHOW transaction_isolation").scalar_one()


def _raw_level(engine: sa.Engine) -> object:
    with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
        cursor.execute("SHOW transaction_isolation")
        (level,) = cursor.fetchone() or ("nothing",)
    return level


def _transactions(engine: sa.Engine) -> object:
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        return len({connection.scalar(sa.text("SELECT txid_current()")) for _ in range(2)})


@pytest.mark.drivers("psycopg", "asyncpg")
@pytest.mark.parametrize(
    ("take", "options", "expected"),
    [
        (_raw_level, {}, "read committed"),
        (_transactions, {}, 2),
        (_level, {"execution_options": {"isolation_level": "SERIALIZABLE"}}, "serializable"),
    ],
)
def test_whoever_takes_a_connection_from_the_engine_finds_no_level_of_a_task(
    database: DatabaseUnderTest, take: Callable[[sa.Engine], object], options: dict[str, object], expected: object
):
    """What an engine's user says of the level is true on a connection that a task has had before, however he takes it.

    With ``raw_connection()``; in autocommit, where each statement is a transaction; at the level of the engine.
    """
    shop = Workshop(
        database,
        pools={"default": PoolSettings(pool_size=1, max_overflow=0)},
        **{"async_engine_options" if database.is_async else "engine_options": options},
    )
    task = shop.task()(effect)

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        shop.ask(task, "a")
        heard.wait(signals.TaskSucceeded)
        if shop.is_async:
            found = shop.on_loop(greenlet_spawn(take, shop.db.async_engine("default").sync_engine))
        else:
            found = take(shop.db.engine("default"))
    shop.close()

    assert found == expected


@pytest.mark.drivers("psycopg", "asyncpg")
def test_whoever_listens_on_the_engine_hears_of_tasks(shop: Workshop):
    """A listener on the engine of a pool that is added late hears of what its tasks send."""
    task = shop.task()(effect)
    heard_of: list[str] = []
    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        shop.ask(task, "a")
        heard.wait(signals.TaskSucceeded)
        engine = shop.db.async_engine("default").sync_engine if shop.is_async else shop.db.engine("default")
        sa.event.listen(engine, "commit", lambda _connection: heard_of.append("commit"))
        shop.ask(task, "b")
        heard.wait(signals.TaskSucceeded, count=2)

    assert heard_of == ["commit"]


def test_connections_look_for_no_listeners_of_ours(shop: Workshop):
    """Tasks and sessions have run, and no engine has a listener for which each connection would search at each step."""
    task = shop.task()(effect)
    with shop.running():
        shop.ask(task, "a")
        shop.drain()
        engines = [
            shop.db.async_engine(pool).sync_engine if shop.is_async else shop.db.engine(pool)
            for pool in ("request", "default")
        ]

    # No public name says it (2.0 and 2.1).
    assert not any(engine._has_events for engine in engines)
    assert shop.effects() == ["a"]


def test_events_do_where_sqlalchemy_would_not_call_what_is_overridden(
    database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch
):
    """Commits, rollbacks and savepoints are seen all the same, only slower, and nothing is lost or run too often."""
    monkeypatch.setattr(private_names, "calls_overrides", lambda: False)
    shop = Workshop(database)
    task = shop.task()(effect)

    def ask(session: Session) -> None:
        session.add(Effect(label="asker"))
        session.flush()
        with suppress(ZeroDivisionError), session.begin_nested():
            shop.db.after_commit(session, task, "undone")
            raise ZeroDivisionError
        shop.db.after_commit(session, task, "kept")

    def ask_and_fail(session: Session) -> None:
        ask(session)
        raise ZeroDivisionError

    with shop.running():
        shop.commit(ask)
        with pytest.raises(ZeroDivisionError):
            shop.commit(ask_and_fail)
        shop.drain()
    effects = shop.effects()
    shop.close()

    assert effects == ["asker", "kept"]


@pytest.mark.parametrize("way", ["_connection_commit_impl", "_connection_rollback_impl"])
def test_what_sqlalchemy_does_not_call_is_noticed(monkeypatch: pytest.MonkeyPatch, way: str):
    """A release that commits or rolls back in another way than the one that is overridden is found out at the start."""
    assert private_names.calls_overrides.__wrapped__()

    monkeypatch.setattr(RootTransaction, way, lambda _transaction: None)

    assert not private_names.calls_overrides.__wrapped__()


# --- an idle process ------------------------------------------------------------------------------------------------


@pytest.mark.drivers("pysqlite", "aiosqlite")
def test_an_idle_application_is_quiet_on_sqlite(shop: Workshop):
    """With nothing to do, a process sends SQLite less than one statement per second, BEGIN and COMMIT included."""
    sent: list[str] = []

    def trace(connection, _record) -> None:
        # aiosqlite's bookkeeping is done by the driver that comes with Python; its own connections are idle.
        if isinstance(connection, sqlite3.Connection):
            connection.set_trace_callback(sent.append)

    sa.event.listen(sa.Pool, "connect", trace)
    try:
        quiet = threading.Event()
        with shop.running():
            shop.drain()
            quiet.wait(1.0)
            began = len(sent)
            quiet.wait(12.0)
            idle = sent[began:]
    finally:
        sa.event.remove(sa.Pool, "connect", trace)

    assert began > 0
    assert len(idle) < 12, idle
