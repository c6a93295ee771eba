"""An engine whose ``connect`` is wrapped, as monitoring agents do, keeps holders, deadlocks and reports as without."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, signals
from aftercommit.errors import PoolExhausted
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Heard, Workshop

ONE = sa.text("SELECT 1")
TIMEOUT = 10.0
sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")
async_drivers = pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite")
OWN_SESSION = "a session of the application's own"

Wrap = Callable[[Engine, pytest.MonkeyPatch], None]


def _wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
    """As a library for monitoring does it."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext():
            return call(*args, **kwargs)

    return traced


def not_wrapped(_engine: Engine, _patch: pytest.MonkeyPatch) -> None:
    """As it comes."""


def on_the_engine(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """The method of this one engine is replaced."""
    patch.setattr(engine, "connect", _wrapped(engine.connect))


def on_the_class(_engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """The method of every engine is replaced, by several at once."""
    for _ in range(3):
        patch.setattr(Engine, "connect", _wrapped(Engine.connect))


def by_a_subclass(engine: Engine, _patch: pytest.MonkeyPatch) -> None:
    """The engine is one of a class made by hand."""

    class Traced(Engine):
        def connect(self) -> sa.Connection:
            return super().connect()

        def raw_connection(self) -> sa.PoolProxiedConnection:
            return super().raw_connection()

    engine.__class__ = Traced


def on_the_pool(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """The pool's own method is replaced."""
    patch.setattr(engine.pool, "connect", _wrapped(engine.pool.connect))


@pytest.fixture(params=[not_wrapped, on_the_engine, on_the_class, by_a_subclass, on_the_pool])
def wrap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Wrap an engine in one way or another."""

    def apply(engine: Engine | AsyncEngine) -> None:
        request.param(engine.sync_engine if isinstance(engine, AsyncEngine) else engine, monkeypatch)

    return apply


@sync_drivers
def test_a_deadlock_is_seen_on_a_wrapped_engine(database: DatabaseUnderTest, wrap: Callable[[Any], None]) -> None:
    """Whoever would wait for himself is refused at once, and both his sessions are named by their lines."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT))
    wrap(db.engine())

    def take_two() -> PoolExhausted:
        with db.session() as session:
            session.execute(ONE)
            with db.session() as second, pytest.raises(PoolExhausted) as caught:
                second.execute(ONE)
        return caught.value

    error = _in_time(take_two)

    assert (error.is_standstill, error.is_alone) == (True, True)
    assert str(error).startswith("Deadlock in pool 'request': ")
    assert "in take_two)" in str(error)
    db.dispose()


@async_drivers
async def test_a_deadlock_is_seen_on_a_wrapped_async_engine(
    database: DatabaseUnderTest, wrap: Callable[[Any], None]
) -> None:
    """The same for asyncio tasks."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT))
    wrap(db.async_engine())

    async with asyncio.timeout(TIMEOUT), db.async_session() as session:
        await session.execute(ONE)
        with pytest.raises(PoolExhausted) as caught:
            async with db.async_session() as second:
                await second.execute(ONE)
    await db.async_dispose()

    assert (caught.value.is_standstill, caught.value.is_alone) == (True, True)


@sync_drivers
def test_sessions_of_the_application_s_own_may_deadlock_too(
    database: DatabaseUnderTest, wrap: Callable[[Any], None]
) -> None:
    """A plain ``Session`` on an engine of ours counts as what it is, and is named by its line."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT))
    wrap(db.engine())

    def take_two() -> PoolExhausted:
        with Session(db.engine()) as session:
            session.execute(ONE)
            with Session(db.engine()) as second, pytest.raises(PoolExhausted) as caught:
                second.execute(ONE)
        return caught.value

    error = _in_time(take_two)

    assert (error.is_standstill, error.is_alone) == (True, True)
    assert f"{OWN_SESSION} ({__file__}:" in str(error)
    assert "in take_two)" in str(error)
    db.dispose()


@async_drivers
async def test_async_sessions_of_the_application_s_own_may_deadlock_too(
    database: DatabaseUnderTest, wrap: Callable[[Any], None]
) -> None:
    """The same for asyncio tasks."""
    db = Database(database.url, pool=PoolSettings(1, 0, pool_timeout=TIMEOUT))
    wrap(db.async_engine())

    async with asyncio.timeout(TIMEOUT), AsyncSession(db.async_engine()) as session:
        await session.execute(ONE)
        (holder,) = db.stats().pools["request"].holders
        with pytest.raises(PoolExhausted) as caught:
            async with AsyncSession(db.async_engine()) as second:
                await second.execute(ONE)
    await db.async_dispose()

    assert caught.value.is_alone
    assert holder.owner == OWN_SESSION
    assert str(holder.line).endswith("in test_async_sessions_of_the_application_s_own_may_deadlock_too")


def test_holders_of_a_wrapped_engine_are_named_and_told_of(
    database: DatabaseUnderTest, wrap: Callable[[Any], None]
) -> None:
    """Owner, line and statement of a task's session, of code's and of a connection taken by hand; then the report."""
    workshop = Workshop(database, pools={"slow": PoolSettings(2, 1, warn_after=0.01)})
    db = workshop.db
    holders: list[tuple[str, str | None]] = []

    def look() -> None:
        (holder,) = db.stats().pools["slow"].holders
        holders.append((holder.owner, holder.statement))

    def plain(session: Session) -> None:
        session.execute(ONE)
        look()
        heard.wait(signals.ConnectionHeld)

    async def native(session: AsyncSession) -> None:
        await session.execute(ONE)
        look()
        await asyncio.to_thread(heard.wait, signals.ConnectionHeld)

    task = db.task(name="slow", pool="slow")(native if workshop.is_async else plain)  # type: ignore[arg-type]
    with Heard(signals.ConnectionHeld) as heard, workshop.running():
        wrap(db.async_engine("slow") if workshop.is_async else db.engine("slow"))
        workshop.ask(task)
        workshop.drain()
    held = heard.of(signals.ConnectionHeld)
    workshop.close()

    assert holders == [("slow", "SELECT 1")]
    assert [each.owner.startswith("task 'slow', attempt 1, id ") for each in held] == [True]
    assert held[0].statement == "SELECT 1"


@sync_drivers
def test_a_connection_taken_by_hand_has_no_session(database: DatabaseUnderTest, wrap: Callable[[Any], None]) -> None:
    """What a listener takes in the middle of a session's work, before that has one, is the listener's."""
    db = Database(database.url, pool=PoolSettings(2, 0))
    wrap(db.engine())
    seen: list[list[tuple[str, str]]] = []

    def look() -> None:
        seen.append([(each.kind, each.owner) for each in db.stats().pools["request"].holders])

    with Session(db.engine()) as session:

        @sa.event.listens_for(session, "do_orm_execute")
        def audit(_state: object) -> None:
            with db.engine().connect():
                look()

        session.execute(ONE)
        look()

    assert seen == [[("code", "code that took it from the engine")], [("code", OWN_SESSION)]]
    db.dispose()


def _in_time(work: Callable[[], PoolExhausted]) -> PoolExhausted:
    """What *work* returns, which waits for itself if the test fails."""
    executor = ThreadPoolExecutor(1)
    try:
        return executor.submit(work).result(TIMEOUT)
    finally:
        executor.shutdown(wait=False)
