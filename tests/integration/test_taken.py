"""A connection of SQLite's that is taken from a run that has ended: no statement of that run reaches the file."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, Retry, signals
from aftercommit.errors import ConfigurationError, TaskTimeout
from aftercommit.pools.gate import ConnectionTaken, GatedConnection, gated
from aftercommit.runner import rounds, runner
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop

COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000)"

pytestmark = pytest.mark.drivers("pysqlite")


@pytest.fixture
def shop(database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """A workshop whose pool has room for one, and that gives a thread up soon."""
    monkeypatch.setattr(rounds, "OVERRUN_SECONDS", 0.05)
    pools = {"default": PoolSettings(pool_size=1, max_overflow=0)}
    shop = Workshop(database, heartbeat=0.2, silent_after=30.0, pools=pools)
    yield shop
    shop.close()


class Window:
    """The place between the last check of a statement and the driver's call: whoever comes there waits to be let on."""

    def __init__(self) -> None:
        self.there, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        """Stop here."""
        self.there.set()
        assert self.go_on.wait(TIMEOUT)


def raw(session: Session) -> Any:
    """The driver's connection of a plain session."""
    return session.connection().connection.driver_connection


def by_session(session: Session, window: Window) -> None:
    """SQLAlchemy's statement, held up where its cursor is about to be called."""

    def stop(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        if "late" in statement:
            window()

    event.listen(session.get_bind(), "do_execute_no_params", stop)
    event.listen(session.get_bind(), "do_execute", stop)
    session.execute(text("INSERT INTO effect (label) VALUES ('late')"))


def by_cursor(session: Session, window: Window) -> None:
    """One of the driver's own."""
    cursor = raw(session).cursor()
    window()
    cursor.execute("INSERT INTO effect (label) VALUES ('late')")


def by_connection(session: Session, window: Window) -> None:
    """The driver's connection."""
    connection = raw(session)
    window()
    connection.execute("INSERT INTO effect (label) VALUES ('late')")


def by_executemany(session: Session, window: Window) -> None:
    """Many at once, from a generator that stands still: the first is in time."""
    connection = raw(session)

    def rows() -> Iterator[tuple[str]]:
        yield ("in time",)
        window()
        yield ("late",)

    connection.executemany("INSERT INTO effect (label) VALUES (?)", rows())


def by_script(session: Session, window: Window) -> None:
    """A script."""
    connection = raw(session)
    window()
    connection.executescript("INSERT INTO effect (label) VALUES ('late'); INSERT INTO effect (label) VALUES ('later')")


def by_blob(session: Session, window: Window) -> None:
    """A value that is opened and written to, past all statements."""
    session.add(Effect(label="in time"))
    session.flush()
    with raw(session).blobopen("effect", "label", 1) as blob:
        window()
        blob.write(b"late...")


def by_commit(session: Session, window: Window) -> None:
    """The driver's COMMIT."""
    session.execute(text("INSERT INTO effect (label) VALUES ('late')"))
    connection = raw(session)
    window()
    connection.commit()


def by_raw_commit(session: Session, window: Window) -> None:
    """A COMMIT as a statement."""
    session.execute(text("INSERT INTO effect (label) VALUES ('late')"))
    connection = raw(session)
    window()
    connection.execute("COMMIT")


def by_a_cursor_of_its_own(session: Session, window: Window) -> None:
    """A cursor that was made past the connection's methods."""
    cursor = sqlite3.Cursor(raw(session))
    window()
    cursor.execute("INSERT INTO effect (label) VALUES ('late')")


WAYS = [
    by_session, by_cursor, by_connection, by_executemany, by_script, by_blob, by_commit, by_raw_commit,
    by_a_cursor_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_is_on_its_way_when_the_process_stops_does_not_arrive(
    shop: Workshop, way: Callable[[Session, Window], None]
):
    """A thread is past every check of ours when its run is given back; its statement reaches nothing."""
    window = Window()
    done = threading.Event()
    raised: list[BaseException] = []

    def body(session: Session, _label: str) -> None:
        try:
            way(session, window)
        except BaseException as exc:
            raised.append(exc)
            raise
        finally:
            done.set()

    task = shop.task()(body)
    with shop.running(grace=0.0):
        id = shop.ask(task)
        assert window.there.wait(TIMEOUT)

    assert shop.record(id).state == "queued"
    window.go_on.set()
    assert done.wait(TIMEOUT)
    join_threads()

    assert shop.effects() == []
    assert raised
    with shop.running():
        # Nothing holds the lock, and it may run again.
        shop.drain()
    assert shop.record(id).state in ("succeeded", "failed")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_on_its_way_when_its_time_is_over_does_not_arrive(
    shop: Workshop, way: Callable[[Session, Window], None]
):
    """The same for a time limit; and the pool has room for the next one, though the thread still hangs."""
    window = Window()
    done = threading.Event()

    def body(session: Session, _label: str) -> None:
        try:
            way(session, window)
        finally:
            done.set()

    task = shop.task(timeout=0.2, retry=Retry(attempts=1))(body)

    @shop.task()
    def following(session: Session, label: str) -> None:
        session.add(Effect(label="following"))

    with Heard(signals.TaskFailed, signals.TaskSucceeded) as heard, shop.running():
        shop.ask(task)
        assert window.there.wait(TIMEOUT)
        assert isinstance(heard.wait(signals.TaskFailed).error, TaskTimeout)
        shop.ask(following)
        heard.wait(signals.TaskSucceeded)
        window.go_on.set()
        assert done.wait(TIMEOUT)
        shop.ask(following)
        heard.wait(signals.TaskSucceeded, count=2)
    join_threads()

    assert shop.effects() == ["following", "following"]


@pytest.mark.parametrize("what", ["INSERT INTO effect (label) SELECT max(i) + begun() FROM n", "SELECT max(i) FROM n"])
def test_an_interrupted_statement_is_not_followed_by_another(shop: Workshop, what: str):
    """What the task does next, though it swallows every error and has rows that it has not read, is refused."""
    recorded = threading.Event()
    errors: list[type[BaseException]] = []

    @shop.task(timeout=0.2, retry=Retry(attempts=1))
    def body(session: Session, label: str) -> None:
        connection = raw(session)
        connection.create_function("begun", 0, lambda: 0)
        connection.execute(LATE)
        open_rows = connection.execute("SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3")
        open_rows.fetchone()
        for statement in (f"{COUNT} {what}", *[LATE] * 100):
            try:
                connection.execute(statement)
            except sqlite3.Error as exc:
                errors.append(type(exc))
        # It hangs here, with everything in its hands; what became of it is written all the same.
        assert recorded.wait(TIMEOUT)
        with pytest.raises(ConnectionTaken):
            open_rows.fetchone()

    with Heard(signals.TaskFailed) as heard, shop.running():
        shop.ask(body)
        assert isinstance(heard.wait(signals.TaskFailed).error, TaskTimeout)
        recorded.set()
    join_threads()

    assert errors == [sqlite3.OperationalError, *[ConnectionTaken] * 100]
    assert shop.effects() == []


LATE = "INSERT INTO effect (label) VALUES ('late')"


def test_a_run_that_finds_its_transaction_only_after_its_end_has_none(shop: Workshop):
    """It waited for the lock when it was given up, so that there was no connection to take: it ends as it begins."""
    begun, gate = threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def body(session: Session, label: str) -> None:
        try:
            raw(session).execute(LATE)
        except BaseException as exc:
            raised.append(exc)
            raise

    task = shop.task(timeout=0.2, retry=Retry(attempts=1), begun=begun.set, gate=gate)(body)
    with closing(sqlite3.connect(str(shop.under_test.path), isolation_level=None)) as other, shop.running():
        id = shop.ask(task)
        assert begun.wait(TIMEOUT)
        assert shop.db.runner is not None
        run = shop.db.runner.held[id]
        with Heard(signals.TaskFailed) as heard:
            other.execute("BEGIN IMMEDIATE")
            gate.set()
            wait_until(lambda: run.is_taken_over)
            other.execute("ROLLBACK")
            heard.wait(signals.TaskFailed)
    join_threads()

    assert [type(each) for each in raised] == [TaskTimeout]
    assert shop.effects() == []


@pytest.mark.drivers("aiosqlite")
def test_an_async_task_that_will_not_be_cancelled_writes_nothing_more(
    database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch
):
    """It swallows its cancellation and goes on writing: its lock is free for what is given back."""
    monkeypatch.setattr(runner, "_UNWINDING_SECONDS", 0.2)
    shop = Workshop(database, heartbeat=0.2, silent_after=30.0)
    begun, raised = threading.Event(), []

    @shop.db.task()
    async def stubborn(session: AsyncSession) -> None:
        session.add(Effect(label="before"))
        await session.flush()
        driver = (await (await session.connection()).get_raw_connection()).driver_connection
        begun.set()
        while len(raised) < 3:
            try:
                await driver.execute(LATE)
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                pass
            except sqlite3.Error as exc:
                raised.append(exc)
        raise raised[0]

    with shop.running(grace=0.0):
        id = shop.ask(stubborn)
        assert begun.wait(TIMEOUT)

    assert shop.record(id).state == "queued"
    assert {type(each) for each in raised} == {ConnectionTaken}
    assert shop.effects() == []
    shop.close()


def test_a_connection_of_the_applications_making_is_taken_too(database: DatabaseUnderTest, monkeypatch):
    """It has no gate: it is made one that can only read."""
    monkeypatch.setattr(rounds, "OVERRUN_SECONDS", 0.05)
    path = str(database.path)
    options = {"creator": lambda: sqlite3.connect(path, check_same_thread=False)}
    shop = Workshop(database, heartbeat=0.2, engine_options=options)
    window, raised = Window(), []

    @shop.task(timeout=0.2, retry=Retry(attempts=1))
    def body(session: Session, label: str) -> None:
        session.add(Effect(label="before"))
        session.flush()
        connection = raw(session)
        assert not isinstance(connection, GatedConnection)
        window()
        for statement in (LATE, "BEGIN IMMEDIATE", "CREATE TABLE late (id)", "DELETE FROM effect"):
            with pytest.raises(sqlite3.OperationalError, match="readonly") as caught:
                connection.execute(statement)
            raised.append(caught.value)

    with Heard(signals.TaskFailed) as heard, shop.running():
        shop.ask(body)
        assert window.there.wait(TIMEOUT)
        heard.wait(signals.TaskFailed)
        window.go_on.set()
    join_threads()

    assert len(raised) == 4
    assert shop.effects() == []
    shop.close()


class Own(sqlite3.Connection):
    """An application's own class of connections."""

    def cursor(self, factory: Any = sqlite3.Cursor) -> Any:
        """Make one, and remember."""
        self.made = getattr(self, "made", 0) + 1
        return super().cursor(factory)


def test_an_own_class_of_connections_is_respected_and_has_a_gate(database: DatabaseUnderTest):
    """What the application adds works; what it cannot be asked of is refused at construction."""
    db = Database(database.url, engine_options={"connect_args": {"factory": Own}})
    with db.session() as session:
        session.execute(text("SELECT 1"))
        driver = raw(session)
        assert isinstance(driver, Own)
        assert isinstance(driver, GatedConnection)
        assert driver.made > 0
        driver.take()
        with pytest.raises(ConnectionTaken):
            driver.execute("SELECT 1")
        with pytest.raises(ConnectionTaken):
            driver.commit()
        session.rollback()
    db.dispose()
    with pytest.raises(ConfigurationError, match="factory"):
        Database(database.url, engine_options={"connect_args": {"factory": sqlite3.connect}})
    assert gated(sqlite3.Connection) is GatedConnection


def join_threads() -> None:
    """Wait for the threads of tasks that did not end in time: a process would not."""
    for thread in threading.enumerate():
        if thread.name.startswith("aftercommit-default"):
            thread.join(TIMEOUT)


def wait_until(question: Callable[[], bool]) -> None:
    """Ask until it is so."""
    deadline = time.monotonic() + TIMEOUT
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.001)
