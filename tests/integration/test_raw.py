"""What is sent past SQLAlchemy, on the driver's own connection, is in the session's transaction."""

from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import signals
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Heard, Workshop


@pytest.fixture
def shop(database: DatabaseUnderTest):
    """A workshop on each driver in turn."""
    shop = Workshop(database)
    yield shop
    shop.close()


INSERT = "INSERT INTO effect (label) VALUES ('raw')"


async def psycopg(driver: Any) -> None:
    """COPY, before anything else."""
    with driver.cursor() as cursor, cursor.copy("COPY effect (label) FROM STDIN") as copy:
        copy.write_row(("raw",))


async def asyncpg(driver: Any) -> None:
    """COPY, before anything else."""
    await driver.copy_records_to_table("effect", records=[("raw",)], columns=["label"])


async def cursor(driver: Any) -> None:
    """A cursor of the driver's."""
    if hasattr(driver, "pgconn"):
        driver.cursor().execute(INSERT)
    elif hasattr(driver, "copy_records_to_table"):
        await driver.execute(INSERT)
    else:
        await _done((await _done(driver.cursor())).execute(INSERT))


async def executemany(driver: Any) -> None:
    """Many at once."""
    if hasattr(driver, "pgconn"):
        driver.cursor().executemany("INSERT INTO effect (label) VALUES (%s)", [("raw",), ("raw",)])
    elif hasattr(driver, "copy_records_to_table"):
        await driver.executemany("INSERT INTO effect (label) VALUES ($1)", [("raw",), ("raw",)])
    else:
        await _done(driver.executemany("INSERT INTO effect (label) VALUES (?)", iter([("raw",), ("raw",)])))


async def script(driver: Any) -> None:
    """Several statements: SQLite's driver would commit what came before."""
    text = f"{INSERT}; -- one; and\n{INSERT}"
    if hasattr(driver, "pgconn") or hasattr(driver, "copy_records_to_table"):
        await _done(driver.execute(text))
    else:
        await _done(driver.executescript(text))


async def _done(result: Any) -> Any:
    return await result if hasattr(result, "__await__") else result


WAYS = [cursor, executemany, script]


@pytest.mark.parametrize("way", ["copy", *WAYS])
@pytest.mark.parametrize("commits", [False, True])
def test_the_driver_comes_first(shop: Workshop, way: Any, *, commits: bool):
    """A session whose first statement is the driver's: rolled back with it, committed with it."""
    send = way if way != "copy" else {"psycopg": psycopg, "asyncpg": asyncpg}.get(shop.under_test.driver, cursor)
    _run(shop, send, fails=not commits, outside=False)

    assert set(shop.effects()) == ({"raw", "after"} if commits else set())


@pytest.mark.parametrize("way", ["copy", *WAYS])
@pytest.mark.parametrize("commits", [False, True])
def test_the_driver_comes_first_in_a_task(shop: Workshop, way: Any, *, commits: bool):
    """The same in a task, whose commit holds its own finish."""
    send = way if way != "copy" else {"psycopg": psycopg, "asyncpg": asyncpg}.get(shop.under_test.driver, cursor)

    def plain(session: Session) -> None:
        _drive(send(session.connection().connection.driver_connection))
        _fail_unless(commits)

    async def native(session: AsyncSession) -> None:
        await send((await (await session.connection()).get_raw_connection()).driver_connection)
        _fail_unless(commits)

    task = shop.db.task(name="raw")(native if shop.is_async else plain)
    with Heard(signals.TaskFailed, signals.TaskSucceeded) as heard, shop.running():
        shop.ask(task)
        heard.wait(signals.TaskSucceeded if commits else signals.TaskFailed)

    assert set(shop.effects()) == ({"raw"} if commits else set())


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_the_driver_comes_first_and_is_got_without_waiting(shop: Workshop):
    """``sync_connection`` has it without an await; it has begun all the same."""
    _run(shop, cursor, fails=True, outside=True)

    assert shop.effects() == []


def _run(shop: Workshop, send: Any, *, fails: bool, outside: bool) -> None:
    def body(session: Session) -> None:
        _drive(send(session.connection().connection.driver_connection))
        session.add(Effect(label="after"))
        session.flush()
        _fail_unless(not fails)

    async def native() -> None:
        async with shop.db.async_session() as session:
            connection = await session.connection()
            pooled = connection.sync_connection.connection if outside else await connection.get_raw_connection()
            await send(pooled.driver_connection)
            session.add(Effect(label="after"))
            await session.flush()
            _fail_unless(not fails)

    def run() -> None:
        if shop.is_async:
            with shop.running():
                shop.on_loop(native())
        else:
            with shop.db.session() as session:
                body(session)

    if fails:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()


def _drive(coroutine: Any) -> None:
    """Run what waits for nothing."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def _fail_unless(well: bool) -> None:  # a question
    if not well:
        raise ZeroDivisionError
