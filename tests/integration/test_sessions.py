"""Sessions of ours: committed on success, rolled back on error, ended for good, their connection back in the pool."""

import asyncio
import pickle
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import create_engine, func, inspect, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session, sessionmaker
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlmodel import Session as SQLModelSession
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

import aftercommit
from aftercommit import Database
from aftercommit.errors import ConfigurationError, SessionEnded
from tests.support.databases import DatabaseUnderTest

sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")
async_drivers = pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite")


class Base(DeclarativeBase):
    """Tables of an application."""


class Item(Base):
    """A row."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(default=0)


class Outside:
    """Somebody who looks at the database from outside."""

    def __init__(self, database: DatabaseUnderTest) -> None:
        self.engine = create_engine(database.sync_url, isolation_level="AUTOCOMMIT")
        Base.metadata.create_all(self.engine)

    @property
    def rows(self) -> int:
        """How many rows are committed."""
        with self.engine.connect() as connection:
            return connection.execute(select(func.count(Item.id))).scalar_one()


@pytest.fixture
def outside(database: DatabaseUnderTest) -> Iterator[Outside]:
    """Makes the table, and looks on."""
    outside = Outside(database)
    yield outside
    outside.engine.dispose()


@pytest.fixture
def db(database: DatabaseUnderTest, outside: Outside) -> Iterator[Database]:
    """A ``Database`` for sync sessions."""
    db = Database(database.url)
    yield db
    db.dispose()


@pytest.fixture
async def adb(database: DatabaseUnderTest, outside: Outside) -> AsyncIterator[Database]:
    """A ``Database`` for async sessions."""
    db = Database(database.url)
    yield db
    await db.async_dispose()


def checked_out(db: Database) -> int:
    """Connections of the request pool in use, of both flavours."""
    return sum(engine.pool.checkedout() for engine in db._pools["request"].opened)  # type: ignore[attr-defined]


# --- commit, roll back, end -------------------------------------------------------------------------------------


@sync_drivers
def test_success_commits_and_an_error_rolls_back(db: Database, outside: Outside):
    """Leaving the ``with`` commits; an exception through it leaves nothing, and passes on as it is."""
    with db.session() as session:
        session.add(Item())
    with pytest.raises(ZeroDivisionError), db.session() as session:
        fail_after_writing(session)

    assert outside.rows == 1
    assert checked_out(db) == 0


def fail_after_writing(session: Session) -> None:
    """Write, and then fail."""
    session.add(Item())
    session.flush()
    raise ZeroDivisionError


@async_drivers
async def test_async_success_commits_and_an_error_rolls_back(adb: Database, outside: Outside):
    """The same for the async twin."""
    async with adb.async_session() as session:
        session.add(Item())
    with pytest.raises(ZeroDivisionError):
        async with adb.async_session() as session:
            await session.run_sync(fail_after_writing)

    assert outside.rows == 1
    assert checked_out(adb) == 0


@sync_drivers
def test_a_commit_that_fails_raises_and_gives_the_connection_back(db: Database, outside: Outside):
    """The error of the last flush reaches the caller; nothing is held."""
    with pytest.raises(IntegrityError), db.session() as session:
        session.add_all([Item(id=1), Item(id=1)])

    assert (outside.rows, checked_out(db)) == (0, 0)
    with pytest.raises(SessionEnded):
        session.commit()


@async_drivers
async def test_an_async_commit_that_fails_raises_and_gives_the_connection_back(adb: Database, outside: Outside):
    """The same for the async twin."""
    with pytest.raises(IntegrityError):
        async with adb.async_session() as session:
            session.add_all([Item(id=1), Item(id=1)])

    assert (outside.rows, checked_out(adb)) == (0, 0)
    with pytest.raises(SessionEnded):
        await session.commit()


@sync_drivers
def test_a_session_that_is_not_used_connects_to_nothing(db: Database):
    """Opening costs nothing, and there is nothing to commit."""
    with db.session() as session:
        pass

    assert db.engine().pool.checkedin() == 0  # type: ignore[attr-defined]
    with pytest.raises(SessionEnded):
        session.get(Item, 1)


# --- the end is the end -----------------------------------------------------------------------------------------

Use = Callable[[Any], Any]
USES: dict[str, Use] = {
    "execute": lambda s: s.execute(text("SELECT 1")),
    "get": lambda s: s.get(Item, 1),
    "get_one": lambda s: s.get_one(Item, 1),
    "add": lambda s: s.add(Item()),
    "add_all": lambda s: s.add_all([]),
    "flush": lambda s: s.flush(),
    "commit": lambda s: s.commit(),
    "begin": lambda s: s.begin(),
    "begin_nested": lambda s: s.begin_nested(),
    "refresh": lambda s: s.refresh(Item()),
    "scalars": lambda s: s.scalars(select(Item)),
    "scalar": lambda s: s.scalar(select(1)),
    "connection": lambda s: s.connection(),
    "merge": lambda s: s.merge(Item(id=1)),
    "delete": lambda s: s.delete(Item()),
    "expire_all": lambda s: s.expire_all(),
    "expunge": lambda s: s.expunge(Item()),
    "get_bind": lambda s: s.get_bind(),
    "new": lambda s: s.new,
    "dirty": lambda s: s.dirty,
    "no_autoflush": lambda s: s.no_autoflush,
    "in": lambda s: Item() in s,
    "iter()": iter,
}
SYNC_USES = {
    **USES,
    "query": lambda s: s.query(Item),
    "bulk_save_objects": lambda s: s.bulk_save_objects([]),
    "prepare": lambda s: s.prepare(),
}
ASYNC_USES = {
    **USES,
    "stream": lambda s: s.stream(select(Item)),
    "stream_scalars": lambda s: s.stream_scalars(select(Item)),
    "run_sync": lambda s: s.run_sync(lambda _: None),
}


@sync_drivers
@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("operation", SYNC_USES)
def test_using_an_ended_session_raises(db: Database, outside: Outside, operation: str, *, used_before: bool):
    """Whatever is asked of it; the error names owner, age and operation, and says what to write."""
    with db.session() as session:
        if used_before:
            session.add(Item())

    with pytest.raises(SessionEnded) as caught:
        SYNC_USES[operation](session)

    check_error(caught.value, operation, "session: Session", "with db.session() as session:")
    assert (checked_out(db), outside.rows) == (0, int(used_before))


@async_drivers
@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("operation", ASYNC_USES)
async def test_using_an_ended_async_session_raises(
    adb: Database, outside: Outside, operation: str, *, used_before: bool
):
    """The same for the async twin: at once, before anything is awaited."""
    async with adb.async_session() as session:
        if used_before:
            session.add(Item())

    with pytest.raises(SessionEnded) as caught:
        ASYNC_USES[operation](session)

    check_error(caught.value, operation, "session: AsyncSession", "async with db.async_session() as session:")
    assert (checked_out(adb), outside.rows) == (0, int(used_before))


def check_error(error: SessionEnded, operation: str, *remedies: str) -> None:
    """The facts of the error, as attributes and in its text."""
    assert error.operation == operation
    assert "code (" in error.owner
    assert "test_sessions.py" in error.owner
    assert 0 <= error.ended_for < 60
    for part in (operation, error.owner, "s ago", "AC201", *remedies):
        assert part in str(error)


@async_drivers
async def test_the_sync_side_of_an_ended_async_session_raises_too(adb: Database):
    """Who kept ``session.sync_session`` is told the same."""
    async with adb.async_session() as session:
        plain = session.sync_session

    with pytest.raises(SessionEnded):
        plain.add(Item())


@sync_drivers
def test_a_method_taken_before_the_end_raises_after_it(db: Database):
    """A bound method that somebody kept does not revive the session."""
    with db.session() as session:
        execute, add = session.execute, session.add

    with pytest.raises(SessionEnded):
        execute(text("SELECT 1"))
    with pytest.raises(SessionEnded):
        add(Item())
    assert checked_out(db) == 0


@sync_drivers
def test_closing_and_rolling_back_after_the_end_are_harmless(db: Database):
    """A ``finally`` of somebody else's does not fail, and a look at the session tells that it is over."""
    with db.session() as session:
        session.add(Item())

    for _ in range(2):
        session.rollback()
        session.close()
        session.reset()
        session.invalidate()
        session.expunge_all()

    assert not session.is_active
    assert not session.in_transaction()
    assert isinstance(session, Session)
    assert "Session" in repr(session)


@async_drivers
async def test_closing_and_rolling_back_an_async_session_after_the_end_are_harmless(adb: Database):
    """The same for the async twin, awaited."""
    async with adb.async_session() as session:
        session.add(Item())

    await session.rollback()
    await session.close()
    await session.aclose()
    await session.reset()
    await session.invalidate()

    assert not session.is_active
    assert not session.in_transaction()
    assert isinstance(session, AsyncSession)


@sync_drivers
def test_a_session_closed_inside_can_still_be_used_inside(db: Database, outside: Outside):
    """``close()`` in the block is SQLAlchemy's: only leaving the block is the end, and that commits."""
    with db.session() as session:
        session.add(Item())
        session.commit()
        session.close()
        session.add(Item())

    assert outside.rows == 2


@sync_drivers
def test_sqlmodels_session_serves_and_ends(database: DatabaseUnderTest, outside: Outside):
    """SQLModel's ``exec`` works, the rows are written, and the end is the end."""
    db = Database(database.url, session_class=SQLModelSession)

    with db.session() as session:
        session.add(Item(n=3))
        found = session.exec(select(Item.n)).all()

    assert isinstance(session, SQLModelSession)
    assert [*found] == [(3,)]
    assert outside.rows == 1
    with pytest.raises(SessionEnded):
        session.exec(select(Item))
    db.dispose()


@async_drivers
async def test_sqlmodels_async_session_serves_and_ends(database: DatabaseUnderTest, outside: Outside):
    """The same for SQLModel's ``AsyncSession``."""
    db = Database(database.url, async_session_class=SQLModelAsyncSession)

    async with db.async_session() as session:
        session.add(Item(n=3))

    assert outside.rows == 1
    with pytest.raises(SessionEnded):
        session.exec(select(Item))
    await db.async_dispose()


@sync_drivers
def test_a_subclass_with_state_of_its_own_ends_too(database: DatabaseUnderTest, outside: Outside):
    """Whatever a subclass overrides and keeps, it raises after its end."""

    class Auditing(Session):
        """Keeps count of what was added."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.added = 0

        def add(self, instance: object, **options: Any) -> None:
            """Count and add."""
            self.added += 1
            super().add(instance, **options)

    db = Database(database.url, session_class=Auditing)

    with db.session() as session:
        session.add(Item())

    for use in (lambda: session.add(Item()), lambda: session.added):  # type: ignore[attr-defined]
        with pytest.raises(SessionEnded):
            use()
    db.dispose()


# --- instances that outlive their session -----------------------------------------------------------------------


@sync_drivers
def test_the_end_of_a_session_costs_nothing_for_each_row_that_it_read(db: Database):
    """The end makes as many calls of ours with many rows in the session as with one."""
    with db.session() as session:
        session.add_all(Item(id=n, n=n) for n in range(500))

    calls = []
    for limit in (1, 500):
        with ExitStack() as stack:
            session = stack.enter_context(db.session())
            items = session.scalars(select(Item).limit(limit)).all()
            calls.append(_calls_of_ours(stack.close))
        assert len(items) == limit

    assert calls[0] == calls[1]


def _calls_of_ours(work: Callable[[], object]) -> int:
    """How many functions of the library are called in *work*."""
    ours = str(Path(aftercommit.__file__).parent)
    calls = 0

    def count(frame: FrameType, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(ours)

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@sync_drivers
def test_an_expired_instance_that_outlives_its_session_is_sqlalchemys_error(db: Database):
    """It is the error that SQLAlchemy's documentation, and a page of ours, explain."""
    with db.session() as session:
        item = Item()
        session.add(item)

    with pytest.raises(DetachedInstanceError):
        _ = item.n


@async_drivers
async def test_an_expired_instance_that_outlives_its_async_session_is_sqlalchemys_error(adb: Database):
    """The same for the async twin, instead of a riddle about greenlets."""
    async with adb.async_session() as session:
        item = Item()
        session.add(item)

    with pytest.raises(DetachedInstanceError):
        _ = item.n


@sync_drivers
def test_rows_that_were_only_read_stay_readable(db: Database):
    """A session that wrote nothing expires nothing at its end: a script may read its rows behind the ``with``."""
    with db.session() as session:
        session.add(Item(id=1, n=5))
    with db.session() as session:
        item = session.get_one(Item, 1)
        items = session.scalars(select(Item)).all()

    assert (item.n, len(items)) == (5, 1)
    assert checked_out(db) == 0


@async_drivers
async def test_rows_that_were_only_read_stay_readable_async(adb: Database):
    """The same for the async twin."""
    async with adb.async_session() as session:
        session.add(Item(id=1, n=5))
    async with adb.async_session() as session:
        item = await session.get_one(Item, 1)

    assert item.n == 5


WRITES: dict[str, Callable[[Session], object]] = {
    "flushed": lambda session: (session.add(Item(id=2)), session.flush()),
    "at the commit": lambda session: session.add(Item(id=2)),
    "changed": lambda session: setattr(session.get_one(Item, 1), "n", 6),
    "statement": lambda session: session.execute(update(Item).values(n=6)),
    "text": lambda session: session.execute(text("UPDATE item SET n = 6")),
    "connection": lambda session: session.connection().execute(text("UPDATE item SET n = 6")),
    "bulk": lambda session: session.bulk_insert_mappings(inspect(Item), [{"id": 2, "n": 0}]),
}


@sync_drivers
@pytest.mark.parametrize("write", WRITES)
def test_rows_of_a_session_that_wrote_are_expired(db: Database, write: str):
    """Where anything may have been written, by whatever way, what was loaded is expired at the commit as ever."""
    with db.session() as session:
        session.add(Item(id=1, n=5))
    with db.session() as session:
        item = session.get_one(Item, 1)
        WRITES[write](session)

    with pytest.raises(DetachedInstanceError):
        _ = item.n


@sync_drivers
def test_whoever_sets_expire_on_commit_gets_it(database: DatabaseUnderTest, outside: Outside):
    """``session_options`` that say it outright are followed, and so is a commit in the middle."""
    told = Database(database.url, session_options={"expire_on_commit": True})
    with told.session() as session:
        session.add(Item(id=1))
    with told.session() as session:
        item = session.get_one(Item, 1)
    told.dispose()
    plain = Database(database.url)
    with plain.session() as session:
        other = session.get_one(Item, 1)
        session.commit()
        is_expired = inspect(other).expired
    plain.dispose()

    assert inspect(item).expired
    assert is_expired


@sync_drivers
def test_an_instance_can_join_another_session_after_the_end(db: Database):
    """Added or merged elsewhere it works as ever, and it can be pickled."""
    with db.session() as session:
        item = Item(n=5)
        session.add(item)

    pickled = pickle.dumps(item)
    with db.session() as session:
        session.add(item)
        assert item.n == 5
        assert object_session(item) is session
        assert session.merge(pickle.loads(pickled)).n == 5


# --- cancellation -----------------------------------------------------------------------------------------------


class Gate:
    """Holds up a session's rollback or commit until it is let through: a point where a cancellation can come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        original = getattr(AsyncSession, operation)

        async def held(session: AsyncSession, *args: Any) -> Any:
            if not self.open.is_set():
                self.reached.set()
                await self.open.wait()
            return await original(session, *args)

        monkeypatch.setattr(AsyncSession, operation, held)


@async_drivers
async def test_cancelled_twice_the_connection_is_back(adb: Database, outside: Outside, monkeypatch: pytest.MonkeyPatch):
    """A second cancellation comes while the first is being rolled back: the rollback still happens."""
    gate = Gate(monkeypatch, "close")
    written = asyncio.Event()

    async def work() -> None:
        async with adb.async_session() as session:
            session.add(Item())
            await session.flush()
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await written.wait()
    task.cancel()
    await gate.reached.wait()
    task.cancel()
    # The second cancellation is delivered before anything is let through.
    await turn()
    assert not task.done()
    gate.open.set()
    with suppress(asyncio.CancelledError):
        await task

    assert task.cancelled()
    assert (checked_out(adb), outside.rows) == (0, 0)


async def turn() -> None:
    """Let the loop run everything that is ready."""
    loop = asyncio.get_running_loop()
    for _ in range(3):
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        await future


@async_drivers
async def test_a_commit_is_not_torn_by_a_cancellation(adb: Database, outside: Outside, monkeypatch: pytest.MonkeyPatch):
    """Cancelled during the COMMIT: it is finished, and then the cancellation goes on."""
    gate = Gate(monkeypatch, "commit")

    async def work() -> None:
        async with adb.async_session() as session:
            session.add(Item())

    task = asyncio.create_task(work())
    await gate.reached.wait()
    task.cancel()
    await turn()
    task.cancel()
    await turn()
    gate.open.set()
    with suppress(asyncio.CancelledError):
        await task

    assert task.cancelled()
    assert (checked_out(adb), outside.rows) == (0, 1)


@async_drivers
async def test_a_time_limit_around_a_session_still_ends_it(adb: Database, outside: Outside):
    """``asyncio.timeout`` arrives as it should, and leaves nothing behind."""
    sessions = []

    async def work() -> None:
        async with asyncio.timeout(0.05), adb.async_session() as session:
            sessions.append(session)
            session.add(Item())
            await session.flush()
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await work()

    assert (checked_out(adb), outside.rows) == (0, 0)
    with pytest.raises(SessionEnded):
        sessions[0].add(Item())


@pytest.mark.drivers("psycopg", "asyncpg")
async def test_cancelled_in_a_statement_the_connection_is_back(adb: Database, outside: Outside):
    """A cancellation that arrives while the server works leaves no connection checked out, and no lock behind."""
    started = asyncio.Event()

    async def work() -> None:
        async with adb.async_session() as session:
            await session.execute(text("SELECT pg_advisory_xact_lock(1)"))
            started.set()
            await session.execute(text("SELECT pg_advisory_xact_lock(2)"))

    with outside.engine.connect() as rival:
        rival.execute(text("SELECT pg_advisory_lock(2)"))
        task = asyncio.create_task(work())
        await started.wait()
        while not rival.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar_one():
            await turn()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        got = rival.execute(text("SELECT pg_try_advisory_lock(1)")).scalar_one()

    assert task.cancelled()
    assert got is True
    assert checked_out(adb) == 0


# --- connections that die ---------------------------------------------------------------------------------------


@pytest.mark.drivers("psycopg")
def test_a_connection_that_dies_does_not_hide_the_error(db: Database, outside: Outside):
    """The server throws us out in the middle: its error is what the caller sees, and the next session works."""
    with pytest.raises(DBAPIError), db.session() as session:
        die(session, outside)

    with db.session() as session:
        session.add(Item())
    assert (outside.rows, checked_out(db)) == (1, 0)


def die(session: Session, outside: Outside) -> None:
    """Have the session's connection closed by the server, and use it."""
    pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
    with outside.engine.connect() as rival:
        rival.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    session.execute(text("SELECT 1"))


@pytest.mark.drivers("psycopg", "asyncpg")
async def test_an_async_connection_that_dies_does_not_hide_the_error(adb: Database, outside: Outside):
    """The same for the async twin."""
    with pytest.raises(DBAPIError):
        async with adb.async_session() as session:
            await session.run_sync(die, outside)

    async with adb.async_session() as session:
        session.add(Item())
    assert (outside.rows, checked_out(adb)) == (1, 0)


# --- options ----------------------------------------------------------------------------------------------------


@sync_drivers
def test_session_options_reach_every_session(database: DatabaseUnderTest, outside: Outside):
    """``expire_on_commit``, ``autoflush`` and ``info`` are the user's."""
    db = Database(
        database.url, session_options={"expire_on_commit": False, "autoflush": False, "info": {"tenant": "a"}}
    )

    with db.session() as session:
        item = Item(n=4)
        session.add(item)
        autoflush, tenant = session.autoflush, session.info["tenant"]

    assert (autoflush, tenant) == (False, "a")
    assert item.n == 4
    db.dispose()


@pytest.mark.parametrize("option", ["bind", "binds", "twophase", "autobegin"])
def test_session_options_that_cannot_be_are_refused(sqlite_url: str, option: str):
    """What would take a session away from its pool, or from its commit, fails at construction."""
    with pytest.raises(ConfigurationError, match=option):
        Database(sqlite_url, session_options={option: None})


def test_an_unknown_session_option_is_refused(sqlite_url: str):
    """A slip of the pen fails at construction, not at the first request."""
    with pytest.raises(ConfigurationError, match="expire_on_comit"):
        Database(sqlite_url, session_options={"expire_on_comit": False})


@pytest.mark.parametrize("given", [sessionmaker(), AsyncSession])
def test_a_session_class_that_is_none_is_refused(sqlite_url: str, given: Any):
    """A maker, or the other flavour's class, fails at construction."""
    with pytest.raises(ConfigurationError, match="session_class"):
        Database(sqlite_url, session_class=given)
