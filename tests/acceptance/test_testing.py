"""``aftercommit.testing.replace``: nothing of a test reaches the real database, and tasks run when the test says so."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, NullPool, create_engine, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from aftercommit import Database, Retry, TaskRecord, current_run
from aftercommit.errors import (
    CommitWithoutCheckpoint,
    ConfigurationError,
    HandOverError,
    RowGone,
    TasksNotCommitted,
)
from aftercommit.runner.following import Followed
from aftercommit.testing import Tasks, replace
from tests.acceptance.apps.orders import Base, Effect, Order, Shop, make
from tests.acceptance.apps.traffic import new_test_client
from tests.support.databases import DatabaseUnderTest


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Shop]:
    """A shop whose real database stays empty, whatever a test does."""
    shop = make(database.url)
    yield shop
    shop.close()
    assert (shop.skus(), shop.effects()) == ([], [])


# --- in place of a URL ------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(database: DatabaseUnderTest, tmp_path: Any) -> Iterator[str]:
    """The URL of a second database, for the same driver, with the shop's tables."""
    if database.is_sqlite:
        yield from _prepared(f"sqlite+{database.driver}:///{tmp_path / 'elsewhere.db'}", database)
        return
    url = database.url + "_elsewhere"
    name = url.rpartition("/")[2]
    admin = create_engine(database.server_url or "", isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
        try:
            yield from _prepared(url, database)
        finally:
            connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')


def _prepared(url: str, database: DatabaseUnderTest) -> Iterator[str]:
    plain = url.replace("aiosqlite", "pysqlite").replace("asyncpg", "psycopg")
    Base.metadata.create_all(create_engine(plain, poolclass=NullPool))
    yield url


def test_requests_and_their_tasks_go_elsewhere(shop: Shop, elsewhere: str):
    """With another URL, requests and the tasks they ask for use that database only, on every driver."""
    with replace(shop.db, url=elsewhere) as tasks, new_test_client(shop.app) as client:
        response = client.post("/orders", params={"sku": "a"})
        names = [pending.name for pending in tasks.pending]
        ran = tasks.run()
        count = client.get("/orders/count").json()

    assert response.status_code == 200
    assert (names, ran, count) == (["ship"], 1, 1)
    engine = create_engine(elsewhere.replace("aiosqlite", "pysqlite").replace("asyncpg", "psycopg"), poolclass=NullPool)
    with engine.connect() as connection:
        assert connection.scalars(select(Order.state)).all() == ["shipped"]
        assert connection.scalars(select(Effect.sku)).all() == ["a"]
        assert connection.scalars(select(TaskRecord.state)).all() == ["succeeded"]
    assert shop.states() == []


def test_afterwards_the_real_database_is_back(shop: Shop, elsewhere: str, database: DatabaseUnderTest):
    """After the with, sessions and tasks are the real ones again."""
    with replace(shop.db, url=elsewhere):
        pass

    with new_test_client(shop.app) as client:
        client.post("/orders", params={"sku": "a"}).raise_for_status()
        shop.db.drain()

    assert shop.effects() == ["a"]
    _empty(shop)


def _empty(shop: Shop) -> None:
    with shop.onlooker() as connection:
        for table in (Effect.__table__, Order.__table__):
            connection.execute(table.delete())  # type: ignore[attr-defined] # a Table
        connection.commit()


# --- in place of a connection: everything is rolled back --------------------------------------------------------


@pytest.fixture
def connection(shop: Shop) -> Iterator[Connection]:
    """A connection in a transaction that the test rolls back."""
    engine = create_engine(shop.url)
    with engine.connect() as connection:
        transaction = connection.begin()
        yield connection
        transaction.rollback()
    engine.dispose()


SYNC = pytest.mark.drivers("psycopg", "pysqlite")


@SYNC
def test_everything_is_on_the_tests_connection(shop: Shop, connection: Connection):
    """Requests, tasks, and code that opens a session itself see one another, and nobody else sees them."""
    with replace(shop.db, connection=connection) as tasks, new_test_client(shop.app) as client:
        client.post("/orders", params={"sku": "a"}).raise_for_status()
        before = (shop.skus(), shop.states())
        ran = tasks.run()
        with shop.db.session() as session:
            session.add(Order(sku="own"))
        with shop.db.session() as session:
            skus = session.scalars(select(Order.sku).order_by(Order.id)).all()
            states = session.scalars(select(TaskRecord.state)).all()

    assert before == ([], [])
    assert (ran, skus, states) == (1, ["a", "own"], ["succeeded"])


@SYNC
def test_a_request_that_fails_rolls_back_to_its_savepoint(shop: Shop, connection: Connection):
    """In a test, too, a request that raises leaves nothing, and what came before it stays."""
    with (
        replace(shop.db, connection=connection) as tasks,
        new_test_client(shop.app, raise_server_exceptions=False) as client,
    ):
        client.post("/unflushed", params={"sku": "a"}).raise_for_status()
        statuses = [
            client.post("/raise/value", params={"sku": "b"}).status_code,
            client.post("/unflushed", params={"sku": "a"}).status_code,
        ]
        pending = len(tasks.pending)
        count = client.get("/orders/count").json()

    assert statuses == [500, 500]
    assert (pending, count) == (1, 1)


async def _async_place(url: str) -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        transaction = await connection.begin()
        yield connection
        await transaction.rollback()
    await engine.dispose()


@pytest.mark.drivers("asyncpg", "aiosqlite")
async def test_everything_is_on_the_tests_async_connection(shop: Shop, database: DatabaseUnderTest):
    """The same with an AsyncConnection, for requests on the test's own event loop."""
    async for connection in _async_place(database.url):
        async with (
            replace(shop.db, connection=connection) as tasks,
            httpx.AsyncClient(transport=httpx.ASGITransport(shop.app), base_url="http://shop") as client,
        ):
            (await client.post("/orders", params={"sku": "a"})).raise_for_status()
            before = await asyncio.to_thread(shop.skus)
            ran = await tasks.async_run()
            async with shop.db.async_session() as session:
                states = (await session.scalars(select(Order.state))).all()
                records = (await session.scalars(select(TaskRecord.state))).all()
        await shop.db.async_dispose()

    assert (before, ran, states, records) == ([], 1, ["shipped"], ["succeeded"])


@SYNC
def test_a_plain_engines_connection_is_rolled_back_whole(shop: Shop):
    """Also over SQLAlchemy's plain engine, whose SQLite driver begins nothing for a savepoint, all is undone."""
    shop.db.create_tables()
    with create_engine(shop.url, poolclass=NullPool).connect() as connection:
        transaction = connection.begin()
        with replace(shop.db, connection=connection) as tasks, new_test_client(shop.app) as client:
            client.post("/orders", params={"sku": "a"}).raise_for_status()
            tasks.run()
        transaction.rollback()
        left = connection.scalar(select(func.count()).select_from(Order))

    assert left == 0


def test_a_session_of_an_own_engine_is_refused(tmp_path: Any):
    """A session that goes past the test's connection would write to the real database, so it is an error."""
    shop = make(f"sqlite:///{tmp_path / 'real.db'}")
    engine = create_engine(shop.url)

    with engine.connect() as connection:
        transaction = connection.begin()
        with (
            replace(shop.db, connection=connection),
            Session(shop.db.engine()) as session,
            pytest.raises(HandOverError, match="an engine of its own"),
        ):
            shop.db.after_commit(session, shop.db.tasks["note"], "a")
        transaction.rollback()


def test_a_connection_needs_a_transaction(tmp_path: Any):
    """Without a transaction there would be nothing to roll back."""
    db = Database(f"sqlite:///{tmp_path / 'real.db'}")

    with (
        create_engine("sqlite://").connect() as connection,
        pytest.raises(ConfigurationError, match=r"connection\.begin\(\) first"),
        replace(db, connection=connection),
    ):
        raise AssertionError("never reached")


@pytest.mark.parametrize("places", [{}, {"url": "sqlite://", "connection": object()}])
def test_one_place_is_needed(tmp_path: Any, places: dict[str, Any]):
    """Neither no place nor two."""
    with pytest.raises(ConfigurationError, match="either url= or connection="):
        replace(Database(f"sqlite:///{tmp_path / 'real.db'}"), **places)


def test_a_database_whose_runner_is_alive_is_not_replaced(tmp_path: Any):
    """Where tasks start by themselves, a test has come too late."""
    db = Database(f"sqlite:///{tmp_path / 'real.db'}")

    with (
        db.running(),
        pytest.raises(ConfigurationError, match="is alive"),
        replace(db, url=f"sqlite:///{tmp_path / 'b.db'}"),
    ):
        raise AssertionError("never reached")


# --- running tasks by hand --------------------------------------------------------------------------------------


@pytest.fixture
def db(tmp_path: Any) -> Database:
    """A database that is never used: tests replace it."""
    db = Database(f"sqlite:///{tmp_path / 'real.db'}")

    @db.task
    def note(session: Session, text: str) -> str:
        session.add(Effect(sku=text, pid=0))
        return text

    return db


@pytest.fixture(params=["url", "connection"])
def tasks(request: pytest.FixtureRequest, db: Database, tmp_path: Any) -> Iterator[Tasks]:
    """What was handed over, with the database replaced in one way and in the other."""
    url = f"sqlite:///{tmp_path / 'test.db'}"
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    if request.param == "url":
        with replace(db, url=url) as tasks:
            yield tasks
    else:
        with engine.connect() as connection:
            transaction = connection.begin()
            with replace(db, connection=connection) as tasks:
                yield tasks
            transaction.rollback()
    engine.dispose()
    assert not (tmp_path / "real.db").exists()


def hand_over(db: Database, task: Any, *args: Any) -> Any:
    """Hand one task over in a transaction of its own."""
    with db.session() as session:
        return db.after_commit(session, task, *args)


def record_of(db: Database, handle: Any) -> TaskRecord:
    """The record of a task."""
    with db.session() as session:
        record = session.get_one(TaskRecord, handle.id)
        session.expunge(record)
        return record


def notes(db: Database) -> list[str]:
    """What the task noted."""
    with db.session() as session:
        return list(session.scalars(select(Effect.sku).order_by(Effect.id)))


def test_nothing_starts_by_itself(db: Database, tasks: Tasks):
    """What was handed over waits, with its name, id and arguments, until the test runs it."""
    handle = hand_over(db, db.tasks["note"], "a")

    [pending] = tasks.pending
    assert (pending.name, pending.id, pending.task) == ("note", handle.id, db.tasks["note"])
    assert "a" in str(pending.arguments)
    assert notes(db) == []
    assert tasks.run() == 1
    assert (notes(db), tasks.pending) == (["a"], ())
    assert record_of(db, handle).result == "a"


def test_rolled_back_tasks_are_not_pending(db: Database, tasks: Tasks):
    """What was asked for in a transaction that was rolled back never was."""
    with db.session() as session:
        db.after_commit(session, db.tasks["note"], "a")
        session.rollback()

    assert tasks.pending == ()


def test_tasks_of_tasks_run_too(db: Database, tasks: Tasks):
    """run() goes on with what the tasks ask for, until nothing is left."""

    @db.task
    def parent(session: Session, depth: int) -> None:
        session.add(Effect(sku=str(depth), pid=0))
        if depth:
            db.after_commit(session, parent, depth - 1)

    hand_over(db, parent, 3)

    assert tasks.run() == 4
    assert notes(db) == ["3", "2", "1", "0"]


def test_a_task_that_raises_raises_out_of_run(db: Database, tasks: Tasks):
    """The test sees the task's own exception; the record says failed, and the rest stays pending."""

    @db.task(retry=Retry(on=(ValueError,)))
    def fail(session: Session) -> None:
        session.add(Effect(sku="half", pid=0))
        raise ValueError("bad")

    handle = hand_over(db, fail)
    hand_over(db, db.tasks["note"], "next")

    with pytest.raises(ValueError, match="bad"):
        tasks.run()

    record = record_of(db, handle)
    assert (record.state, record.error) == ("failed", "ValueError: bad")
    assert "in fail" in str(record.traceback)
    assert [pending.name for pending in tasks.pending] == ["note"]
    assert tasks.run() == 1
    assert notes(db) == ["next"]


def test_on_failure_is_called(db: Database, tasks: Tasks):
    """on_failure has its session, its error and the arguments, and its writes stand beside the failure."""

    def mark(session: Session, error: BaseException, text: str) -> None:
        session.add(Effect(sku=f"{text}: {error}", pid=0))

    @db.task(on_failure=mark)
    def fail(session: Session, text: str) -> None:
        raise ValueError("bad")

    handle = hand_over(db, fail, "a")

    with pytest.raises(ValueError, match="bad"):
        tasks.run()

    assert notes(db) == ["a: bad"]
    assert record_of(db, handle).state == "failed"


def test_on_failure_of_an_async_task_is_called(db: Database, tasks: Tasks, request: pytest.FixtureRequest):
    """The same for async tasks, which a Connection cannot serve: that is said, and the task stays pending."""

    async def mark(session: AsyncSession, error: BaseException) -> None:
        session.add(Effect(sku=str(error), pid=0))

    @db.task(on_failure=mark)
    async def fail(session: AsyncSession) -> None:
        raise ValueError("bad")

    hand_over_is_refused = "connection" in request.node.name
    hand_over(db, fail)

    if hand_over_is_refused:
        with pytest.raises(ConfigurationError, match="AsyncConnection"):
            tasks.run()
        assert len(tasks.pending) == 1
    else:
        with pytest.raises(ValueError, match="bad"):
            tasks.run()
        assert notes(db) == ["bad"]


def test_a_commit_without_a_checkpoint_is_found_in_a_test(db: Database, tasks: Tasks):
    """A task that commits by habit at its end fails in the test as it would in production."""

    @db.task
    def by_habit(session: Session) -> None:
        session.add(Effect(sku="half", pid=0))
        session.commit()

    handle = hand_over(db, by_habit)

    with pytest.raises(CommitWithoutCheckpoint):
        tasks.run()

    assert notes(db) == []
    assert record_of(db, handle).state == "failed"


def test_a_checkpoint_works_in_a_test(db: Database, tasks: Tasks):
    """A commit with a checkpoint in it stands, and the task goes on."""

    @db.task
    def in_steps(session: Session) -> None:
        run = current_run()
        assert run is not None
        for step in ("one", "two"):
            session.add(Effect(sku=step, pid=0))
            run.checkpoint(step)
            session.commit()

    handle = hand_over(db, in_steps)

    assert tasks.run() == 1
    assert notes(db) == ["one", "two"]
    assert record_of(db, handle).state == "succeeded"


def test_a_row_that_has_gone_raises(db: Database, tasks: Tasks):
    """A row that is deleted before its task runs is RowGone, in a test as elsewhere."""

    @db.task
    def ship(session: Session, order: Order) -> None: ...

    with db.session() as session:
        order = Order(sku="a")
        session.add(order)
        db.after_commit(session, ship, order)
    with db.session() as session:
        session.delete(session.scalars(select(Order)).one())

    with pytest.raises(RowGone):
        tasks.run()


def test_delayed_and_keyed_tasks(db: Database, tasks: Tasks):
    """A delay does not keep a test waiting, and a key still keeps out the second of its kind."""
    later = db.tasks["note"].with_options(delay=3600.0, key="k")

    first, second = hand_over(db, later, "a"), hand_over(db, later, "b")

    assert (first.created, second.created) == (True, False)
    assert len(tasks.pending) == 1
    assert tasks.run() == 1
    assert notes(db) == ["a"]
    assert hand_over(db, later, "c").created is True


def test_tasks_in_memory(db: Database, tasks: Tasks):
    """Tasks without a record wait for run() like the others, and raise what they raise."""
    ran: list[str] = []

    @db.task(durable=False)
    def cheap(text: str) -> None:
        ran.append(text)
        if text == "bad":
            raise ValueError(text)

    hand_over(db, cheap, "good")
    hand_over(db, cheap, "bad")

    with pytest.raises(ValueError, match="bad"):
        tasks.run()

    assert ran == ["good", "bad"]
    assert tasks.pending == ()


async def test_async_run_runs_both_kinds(tmp_path: Any):
    """async_run runs async tasks on the test's own loop and sync tasks on a thread."""
    db = Database(f"sqlite:///{tmp_path / 'real.db'}")
    loops: list[Any] = []

    @db.task
    async def asynchronous(session: AsyncSession) -> None:
        loops.append(asyncio.get_running_loop())
        db.after_commit(session, plain)

    @db.task
    def plain(session: Session) -> None:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()

    async with replace(db, url=f"sqlite:///{tmp_path / 'test.db'}") as tasks:
        async with db.async_session() as session:
            db.after_commit(session, asynchronous)
        with pytest.raises(ConfigurationError, match=r"await tasks\.async_run\(\)"):
            tasks.run()
        ran = await tasks.async_run()

    assert ran == 2
    assert loops == [asyncio.get_running_loop()]


async def test_a_sync_task_on_an_async_connection_is_told(tmp_path: Any):
    """A def task with a session needs a Connection; the error says so and the task stays pending."""
    db = Database(f"sqlite:///{tmp_path / 'real.db'}")

    @db.task
    def plain(session: Session) -> None: ...

    async for connection in _async_place(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"):
        async with replace(db, connection=connection) as tasks:
            async with db.async_session() as session:
                db.after_commit(session, plain)
            with pytest.raises(ConfigurationError, match="replace it with a Connection"):
                await tasks.async_run()
            left = len(tasks.pending)

    assert left == 1


def test_drain_runs_what_is_pending(db: Database, tasks: Tasks):
    """Code under test that drains does not wait for a runner that never comes."""
    hand_over(db, db.tasks["note"], "a")

    db.drain()

    assert (notes(db), tasks.pending) == (["a"], ())


def test_tasks_left_behind_fail_the_test(tmp_path: Any):
    """A hand-over after the last commit raises at the end of the with, and names the line."""
    db = Database(f"sqlite:///{tmp_path / 'real.db'}")

    @db.task
    def note() -> None: ...

    def forget() -> None:
        session = Session(db.engine())
        session.commit()
        db.after_commit(session, note)
        session.close()

    with (
        pytest.raises(TasksNotCommitted, match=r"'note' at .*test_testing\.py:\d+ in forget"),
        replace(db, url=f"sqlite:///{tmp_path / 'test.db'}"),
    ):
        forget()


def test_an_error_of_the_test_is_not_hidden(tmp_path: Any):
    """When the test has failed already, its own error is the one to see; and the database is back."""
    db = Database(f"sqlite:///{tmp_path / 'real.db'}")
    real = db.sessions

    @db.task
    def note() -> None: ...

    def fail() -> None:
        session = Session(db.engine())
        db.after_commit(session, note)
        session.close()
        raise ValueError("the test's own")

    with pytest.raises(ValueError, match="the test's own"), replace(db, url=f"sqlite:///{tmp_path / 'test.db'}"):
        fail()

    assert db.sessions is real


# --- as a user would write it -----------------------------------------------------------------------------------


@pytest.fixture
def users_shop(sqlite_url: str) -> Shop:
    """The application under test, as a user imports it."""
    return make(sqlite_url.replace("+pysqlite", ""))


@pytest.fixture
def users_tasks(users_shop: Shop) -> Iterator[Tasks]:
    """The fixture that a user writes once in conftest.py: every test in a transaction that is rolled back."""
    db = users_shop.db
    with db.engine().connect() as connection:
        transaction = connection.begin()
        with replace(db, connection=connection) as tasks:
            yield tasks
        transaction.rollback()
    db.dispose()


@pytest.fixture
def users_client(users_shop: Shop, users_tasks: Tasks) -> Iterator[Any]:
    """The client that a user writes once in conftest.py."""
    with new_test_client(users_shop.app) as client:
        yield client


@pytest.mark.parametrize("time", [1, 2])
def test_as_a_user_writes_it(users_shop: Shop, users_client: Any, users_tasks: Tasks, time: int):
    """Two tests with the same data do not see each other."""
    response = users_client.post("/orders", params={"sku": "a"})

    assert response.json() == {"sku": "a"}
    assert users_tasks.run() == 1
    with users_shop.db.session() as session:
        assert session.scalars(select(Order.state)).all() == ["shipped"]
    assert users_shop.skus() == []


def test_a_stream_follows_tasks_in_the_database_of_the_test(tmp_path: Any):
    """What looks for tasks that pages watch does not look into the real one."""
    db = Database(f"sqlite:///{tmp_path / 'real.db'}")
    db.create_tables()
    seen: list[Any] = []
    looked = threading.Event()

    def told(state: Any) -> None:
        seen.append(state)
        looked.set()

    @db.task
    def nothing(session: Session) -> None:
        pass

    with replace(db, url=f"sqlite:///{tmp_path / 'test.db'}") as tasks:
        with db.session() as session:
            asked = db.after_commit(session, nothing)
        tasks.run()
        db.following.add(Followed(asked.id, told, lambda: None, is_urgent=True))
        assert looked.wait(30.0)
    db.dispose()

    assert seen[0] is not None
    assert seen[0].state == "succeeded"
