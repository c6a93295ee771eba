"""Tasks follow the commit of async sessions, too: of every kind, and however they are closed."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

from tests.contract.stand import Row, Stand

pytestmark = pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite")


def test_a_commit_starts_and_a_rollback_does_not(async_stand: Stand):
    """The hand-over is not awaited; the session's own commit decides."""
    stand = async_stand

    async def body() -> None:
        async with AsyncSession(stand.async_engine) as session:
            session.add(Row())
            stand.db.after_commit(session, stand.note, "x")
            assert stand.written == []
            await session.commit()
            stand.db.after_commit(session, stand.note, "y")
            await session.rollback()

    stand.run_async(body())

    assert (stand.rows, stand.written, stand.lost) == (1, ["x"], [])


@pytest.mark.parametrize(
    "kind", ["AsyncSession", "SQLModel", "maker", "maker.begin()", "begin()", "scoped", "run_sync"]
)
def test_every_kind_of_async_session_can_be_asked(async_stand: Stand, kind: str):
    """Whatever made the session, its commit starts the task."""
    stand = async_stand
    maker = async_sessionmaker(stand.async_engine)

    async def body() -> None:
        if kind == "scoped":
            registry = async_scoped_session(maker, scopefunc=asyncio.current_task)
            stand.db.after_commit(registry, stand.note, "x")
            await registry.commit()
            await registry.remove()
        elif kind == "maker.begin()":
            async with maker.begin() as session:
                stand.db.after_commit(session, stand.note, "x")
        elif kind == "begin()":
            async with AsyncSession(stand.async_engine) as session, session.begin():
                stand.db.after_commit(session, stand.note, "x")
        else:
            made = {"AsyncSession": AsyncSession, "SQLModel": SQLModelAsyncSession}.get(kind)
            async with maker() if made is None else made(stand.async_engine) as session:
                if kind == "run_sync":
                    await session.run_sync(lambda plain: stand.hand_over(plain, "x"))
                else:
                    stand.db.after_commit(session, stand.note, "x")
                await session.commit()

    stand.run_async(body())

    assert (stand.written, stand.lost) == (["x"], [])


def test_an_async_savepoint_takes_its_own_with_it(async_stand: Stand):
    """Inside the savepoint that failed: gone; outside: stays."""
    stand = async_stand

    async def body() -> None:
        async with AsyncSession(stand.async_engine) as session, session.begin():
            stand.db.after_commit(session, stand.note, "outside")
            with suppress(ZeroDivisionError):
                async with session.begin_nested():
                    session.add(Row())
                    await session.flush()
                    stand.db.after_commit(session, stand.note, "inside")
                    raise ZeroDivisionError

    stand.run_async(body())

    assert (stand.rows, stand.written) == (0, ["outside"])


@pytest.mark.parametrize("commit", [True, False])
def test_a_session_joined_to_an_async_connection_waits_for_it(async_stand: Stand, *, commit: bool):
    """The rollback-per-test fixture of async projects: the connection's end decides."""
    stand = async_stand

    async def body() -> list[str]:
        assert stand.async_engine is not None
        async with stand.async_engine.connect() as connection:
            outer = await connection.begin()
            async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
                session.add(Row())
                stand.db.after_commit(session, stand.note, "x")
                await session.commit()
            before = stand.written
            await (outer.commit() if commit else outer.rollback())
            return before

    before = stand.run_async(body())

    assert before == []
    assert stand.written == (["x"] if commit else [])
    assert stand.lost == []


@pytest.mark.parametrize("sql", ["before", "after", "none"])
@pytest.mark.parametrize("how", ["async with", "close", "aclose", "reset"])
def test_closing_without_a_commit_is_reported(async_stand: Stand, sql: str, how: str):
    """Asked for after the last commit: the signal names the task and the line."""
    stand = async_stand

    async def body() -> None:
        session = AsyncSession(stand.async_engine)
        if sql == "before":
            await session.execute(text("SELECT 1"))
        stand.db.after_commit(session, stand.note, "x")
        if sql == "after":
            await session.execute(text("SELECT 1"))
        if how == "async with":
            async with session:
                pass
        else:
            await getattr(session, how)()

    stand.run_async(body())

    (lost,) = stand.lost
    assert lost.tasks == ("note",)
    assert f"{__file__}:" in lost.lines[0]
    assert "close" not in vars(AsyncSession(stand.async_engine))


Asking = Callable[[AsyncSession], Coroutine[Any, Any, None]]


async def with_async_with(engine: AsyncEngine, ask: Asking) -> None:
    """As the documentation writes it."""
    async with AsyncSession(engine) as session:
        await ask(session)


async def with_finally(engine: AsyncEngine, ask: Asking) -> None:
    """As many dependencies write it."""
    session = AsyncSession(engine)
    try:
        await ask(session)
    finally:
        await session.close()


async def with_except(engine: AsyncEngine, ask: Asking) -> None:
    """The error is handled, and the session closed there."""
    session = AsyncSession(engine)
    try:
        await ask(session)
    except ZeroDivisionError:
        await session.close()


async def with_generator(engine: AsyncEngine, ask: Asking) -> None:
    """The error is thrown into a dependency, as FastAPI does."""

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as session:
            yield session

    dependency = asynccontextmanager(get_db)
    async with dependency() as session:
        await ask(session)


@pytest.mark.parametrize("sql", ["before", "after", "none"])
@pytest.mark.parametrize("how", [with_async_with, with_finally, with_except, with_generator])
def test_an_exception_that_unwinds_is_silent(async_stand: Stand, sql: str, how: Any):
    """However the session is closed while an error passes through, that was meant to leave nothing."""
    stand = async_stand

    async def ask(session: AsyncSession) -> None:
        if sql == "before":
            await session.execute(text("SELECT 1"))
        stand.db.after_commit(session, stand.note, "x")
        if sql == "after":
            await session.execute(text("SELECT 1"))
        raise ZeroDivisionError

    async def body() -> None:
        with suppress(ZeroDivisionError):
            await how(stand.async_engine, ask)

    stand.run_async(body())

    assert (stand.written, stand.lost) == ([], [])


@pytest.mark.parametrize("how", [with_async_with, with_finally, with_generator])
def test_a_cancellation_that_unwinds_is_silent(async_stand: Stand, how: Any):
    """A task of the event loop that is cancelled takes back what it asked for, without a word."""
    stand = async_stand

    async def body() -> None:
        asked = asyncio.Event()

        async def ask(session: AsyncSession) -> None:
            await session.execute(text("SELECT 1"))
            stand.db.after_commit(session, stand.note, "x")
            asked.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(how(stand.async_engine, ask))
        await asked.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    stand.run_async(body())

    assert (stand.written, stand.lost) == ([], [])


def test_a_session_is_as_it_was_after_its_commit(async_stand: Stand):
    """What is attached to an ``AsyncSession`` for the length of its transaction is gone with it."""
    stand = async_stand

    async def body() -> dict[str, object]:
        async with AsyncSession(stand.async_engine) as session:
            before = dict(vars(session))
            stand.db.after_commit(session, stand.note, "x")
            await session.commit()
            assert vars(session) == before
            return dict(session.info)

    assert stand.run_async(body()) == {}


def test_a_thousand_async_sessions_leave_nothing(async_stand: Stand):
    """Neither sessions nor what waited in them are kept."""
    stand = async_stand

    async def body() -> None:
        for number in range(1000):
            async with AsyncSession(stand.async_engine) as session:
                stand.db.after_commit(session, stand.note, "x")
                if number % 10 == 0:
                    await session.commit()
                else:
                    await session.rollback()

    stand.run_async(body())
    gc.collect()

    kept = [each for each in gc.get_objects() if isinstance(each, (Session, AsyncSession))]
    assert kept == []
    assert len(stand.written) == 100
