"""One session, one user at a time: who comes second is refused, every time, and the first goes on unharmed."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, object_session
from sqlalchemy.util import await_only
from sqlmodel import Session as SQLModelSession
from sqlmodel import select as sqlmodel_select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

from aftercommit import Database, signals
from aftercommit.errors import SessionEnded, SessionShared
from aftercommit.sessions import Owner
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Base, Effect, Heard, Workshop

sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")
async_drivers = pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite")
TIMEOUT = 30.0


class Gate:
    """A statement that stands still in the database until it is let through.

    On PostgreSQL it waits for a lock that is held outside; on SQLite it calls a function of ours.

    Attributes:
        statement: The statement.
    """

    def __init__(self, database: DatabaseUnderTest, db: Database) -> None:
        self.is_sqlite = database.is_sqlite
        self._outside = sa.create_engine(database.sync_url, isolation_level="AUTOCOMMIT")
        Base.metadata.create_all(self._outside)
        self._reached, self._open = threading.Event(), threading.Event()
        self.statement = sa.text("SELECT stand_still()" if self.is_sqlite else "SELECT pg_advisory_xact_lock(7)")
        self._holder = self._outside.connect()
        if self.is_sqlite:
            engine = db.engine() if not database.is_async else db.async_engine().sync_engine
            event.listen(engine, "connect", self._teach)
        else:
            self._holder.execute(sa.text("SELECT pg_advisory_lock(7)"))

    def _teach(self, connection: Any, _record: object) -> None:
        if hasattr(connection, "run_async"):
            connection.run_async(lambda real: real.create_function("stand_still", 0, self._stand_still))
        else:
            connection.create_function("stand_still", 0, self._stand_still)

    def _stand_still(self) -> int:
        self._reached.set()
        assert self._open.wait(TIMEOUT)
        return 1

    def wait_until_reached(self) -> None:
        """Return once the statement stands still."""
        if self.is_sqlite:
            assert self._reached.wait(TIMEOUT)
            return
        waiting = sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        while not self._holder.execute(waiting).scalar_one():
            pass

    def open(self) -> None:
        """Let it through, now and in future."""
        self._open.set()
        if not self.is_sqlite:
            self._holder.execute(sa.text("SELECT pg_advisory_unlock_all()"))

    def effects(self) -> list[str]:
        """What is committed."""
        with Session(self._outside) as session:
            return sorted(session.scalars(sa.select(Effect.label)))

    def close(self) -> None:
        """Give everything back."""
        self.open()
        self._holder.close()
        self._outside.dispose()


@pytest.fixture
def db(database: DatabaseUnderTest) -> Iterator[Database]:
    """A ``Database`` for sync sessions."""
    db = Database(database.url)
    yield db
    db.dispose()


@pytest.fixture
async def adb(database: DatabaseUnderTest) -> AsyncIterator[Database]:
    """A ``Database`` for async sessions."""
    db = Database(database.url)
    if database.driver == "psycopg":
        db.async_engine()
    yield db
    await db.async_dispose()


@pytest.fixture
def gate(request: pytest.FixtureRequest, database: DatabaseUnderTest) -> Iterator[Gate]:
    """A statement that stands still."""
    name = "adb" if "adb" in request.fixturenames else "db"
    gate = Gate(database, request.getfixturevalue(name))
    yield gate
    gate.close()


@pytest.fixture
def stand_still_in() -> Callable[..., AbstractContextManager[tuple[threading.Event, threading.Event]]]:
    """Have a listener of SQLAlchemy's stand still: between two statements, in the middle of what the ORM does."""

    @contextmanager
    def listen(target: Any, name: str) -> Iterator[tuple[threading.Event, threading.Event]]:
        reached, opened = threading.Event(), threading.Event()

        def stand_still(*_: Any) -> None:
            if reached.is_set():
                return
            reached.set()
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                assert opened.wait(TIMEOUT)
            else:
                await_only(asyncio.to_thread(opened.wait, TIMEOUT))

        event.listen(target, name, stand_still)
        try:
            yield reached, opened
        finally:
            opened.set()
            event.remove(target, name, stand_still)

    return listen


def in_thread(work: Callable[[], object], name: str = "first") -> tuple[threading.Thread, list[object]]:
    """Start *work* in a thread; what it returns or raises is the one item of the list, once the thread has ended."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as exc:  # noqa: BLE001  # it is what is looked at
            outcome.append(exc)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    return thread, outcome


# --- refused ----------------------------------------------------------------------------------------------------

SYNC_USES: dict[str, Callable[[Session], object]] = {
    "execute": lambda session: session.execute(sa.select(Effect)),
    "scalar": lambda session: session.scalar(sa.select(sa.func.count(Effect.id))),
    "scalars": lambda session: session.scalars(sa.select(Effect)),
    "query": lambda session: session.query(Effect).all(),
    "get": lambda session: session.get(Effect, 1),
    "flush": lambda session: session.flush(),
    "connection": lambda session: session.connection(),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "begin_nested": lambda session: session.begin_nested(),
    "merge": lambda session: session.merge(Effect(id=1, label="merged")),
    "add": lambda session: session.add(Effect(label="added")),
    "expire_all": lambda session: session.expire_all(),
    "bulk": lambda session: session.bulk_save_objects([Effect(label="bulk")]),
}


@sync_drivers
def test_a_second_thread_is_refused_whatever_it_does(db: Database, gate: Gate) -> None:
    """While one thread's statement runs, every call of another is refused, and the first is unharmed by it."""
    with db.session() as session:
        session.add(Effect(label="first"))
        thread, outcome = in_thread(lambda: session.execute(gate.statement).scalar())
        gate.wait_until_reached()

        refused = {}
        for name, use in SYNC_USES.items():
            with pytest.raises(SessionShared) as caught:
                use(session)
            refused[name] = caught.value
        gate.open()
        thread.join(TIMEOUT)

    assert not isinstance(outcome[0], BaseException)
    assert gate.effects() == ["first"]
    error = refused["scalars"]
    assert (error.code, error.operation, error.doing) == ("AC103", "execute", "execute")
    assert "test_sharing.py:" in str(error.line)
    assert "thread 'first' is in its execute()" in str(error)
    assert "in test_a_second_thread_is_refused_whatever_it_does)" in error.owner
    assert refused["commit"].operation == "commit"


ASYNC_USES: dict[str, Callable[[AsyncSession], Awaitable[object]]] = {
    "execute": lambda session: session.execute(sa.select(Effect)),
    "scalar": lambda session: session.scalar(sa.select(sa.func.count(Effect.id))),
    "scalars": lambda session: session.scalars(sa.select(Effect)),
    "stream": lambda session: session.stream(sa.select(Effect)),
    "get": lambda session: session.get(Effect, 1),
    "flush": lambda session: session.flush(),
    "connection": lambda session: session.connection(),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "merge": lambda session: session.merge(Effect(id=1, label="merged")),
    "run_sync": lambda session: session.run_sync(lambda _: None),
}


@async_drivers
async def test_a_second_coroutine_is_refused_whatever_it_does(adb: Database, gate: Gate) -> None:
    """While one coroutine's statement runs, every call of another is refused, and the first is unharmed by it."""

    async def first() -> None:
        session.add(Effect(label="first"))
        await session.execute(gate.statement)

    async with adb.async_session() as session:
        running = asyncio.create_task(first(), name="the first")
        await asyncio.to_thread(gate.wait_until_reached)

        refused = {}
        for name, use in ASYNC_USES.items():
            with pytest.raises(SessionShared) as caught:
                await use(session)
            refused[name] = caught.value
        with pytest.raises(SessionShared):
            session.add(Effect(label="added"))
        with pytest.raises(SessionShared):
            async with session.begin_nested():
                pytest.fail("a savepoint in the middle of somebody's statement")
        gate.open()
        await running

    assert gate.effects() == ["first"]
    error = refused["scalars"]
    assert (error.code, error.operation, error.doing) == ("AC103", "execute", "execute")
    assert "in first" in str(error.line)
    assert "asyncio task 'the first' is in its execute()" in str(error)
    assert "async with db.async_session()" in str(error)


@async_drivers
async def test_gathered_statements_are_refused(adb: Database, gate: Gate) -> None:
    """Of statements that are gathered on one session the first is answered; all others are refused."""
    gate.open()
    async with adb.async_session() as session:
        await session.execute(sa.text("SELECT 1"))

        answers = await asyncio.gather(
            *(session.execute(sa.text("SELECT 1")) for _ in range(5)), return_exceptions=True
        )

        assert [type(each) is SessionShared for each in answers] == [False, True, True, True, True]
        assert (await session.execute(sa.text("SELECT 2"))).scalar() == 2


@async_drivers
async def test_a_task_group_on_one_session_ends_with_the_error(adb: Database, gate: Gate) -> None:
    """A task group is ended by the refusal, and everything is rolled back."""
    gate.open()
    # A connection that is there already: aiosqlite does not close one during whose making it is cancelled.
    async with adb.async_session() as session:
        await session.connection()
    with pytest.RaisesGroup(SessionShared):
        async with adb.async_session() as session:
            session.add(Effect(label="never"))
            async with asyncio.TaskGroup() as group:
                for _ in range(2):
                    group.create_task(session.execute(sa.text("SELECT 1")))

    assert gate.effects() == []


@async_drivers
async def test_the_first_use_of_all_is_watched_too(adb: Database, gate: Gate) -> None:
    """Two that use a session for the first time hear our error, not SQLAlchemy's about fetching a connection."""
    gate.open()
    async with adb.async_session() as session:
        answers = await asyncio.gather(
            session.execute(sa.text("SELECT 1")), session.execute(sa.text("SELECT 1")), return_exceptions=True
        )

    assert [type(each) is SessionShared for each in answers] == [False, True]


@sync_drivers
@pytest.mark.parametrize("use", ["execute", "add", "commit"])
def test_a_flush_between_two_statements_is_a_use(
    db: Database, gate: Gate, use: str, stand_still_in: Callable[..., Any]
) -> None:
    """A thread that is inside a flush, but in no statement, has the session all the same."""
    gate.open()
    with db.session() as session, stand_still_in(session, "before_flush") as (reached, opened):
        session.add(Effect(label="first"))
        thread, outcome = in_thread(session.flush)
        assert reached.wait(TIMEOUT)

        with pytest.raises(SessionShared) as caught:
            SYNC_USES[use](session)
        opened.set()
        thread.join(TIMEOUT)

    assert outcome == [None]
    assert caught.value.doing == "flush"
    assert gate.effects() == ["first"]


@async_drivers
@pytest.mark.parametrize("use", ["execute", "commit", "run_sync"])
async def test_an_async_flush_between_two_statements_is_a_use(
    adb: Database, gate: Gate, use: str, stand_still_in: Callable[..., Any]
) -> None:
    """The same for a coroutine."""
    gate.open()
    async with adb.async_session() as session:
        with stand_still_in(session.sync_session, "before_flush") as (reached, opened):
            session.add(Effect(label="first"))
            running = asyncio.create_task(session.flush())
            assert await asyncio.to_thread(reached.wait, TIMEOUT)

            with pytest.raises(SessionShared) as caught:
                await ASYNC_USES[use](session)
            opened.set()
            await running

    assert caught.value.doing == "flush"
    assert gate.effects() == ["first"]


@sync_drivers
def test_the_commit_of_a_begun_block_is_a_use(db: Database, gate: Gate, stand_still_in: Callable[..., Any]) -> None:
    """``with session.begin():`` commits past the session, and has it all the same."""
    gate.open()
    with db.session() as session, stand_still_in(session, "before_commit") as (reached, opened):
        transaction = session.begin()
        session.add(Effect(label="first"))
        thread, outcome = in_thread(transaction.commit)
        assert reached.wait(TIMEOUT)

        with pytest.raises(SessionShared) as caught:
            session.execute(sa.text("SELECT 1"))
        opened.set()
        thread.join(TIMEOUT)

    assert outcome == [None]
    assert caught.value.doing == "commit"
    assert gate.effects() == ["first"]


@sync_drivers
def test_rows_that_are_being_loaded_are_a_use(db: Database, gate: Gate, stand_still_in: Callable[..., Any]) -> None:
    """Between a statement and the instances that are made of its rows nobody else may come."""
    gate.open()
    with db.session() as session:
        session.add(Effect(label="first"))
    with db.session() as session, stand_still_in(Effect, "load") as (reached, opened):
        result = session.execute(sa.select(Effect))
        thread, outcome = in_thread(lambda: len(result.all()))
        assert reached.wait(TIMEOUT)

        with pytest.raises(SessionShared) as caught:
            session.execute(sa.text("SELECT 1"))
        opened.set()
        thread.join(TIMEOUT)

    assert outcome == [1]
    assert caught.value.doing == "fetch"


@async_drivers
async def test_the_next_page_of_a_stream_is_a_use(
    adb: Database, gate: Gate, stand_still_in: Callable[..., Any]
) -> None:
    """While the next page of a stream is fetched nobody else may come; between two pages its reader may."""
    gate.open()
    async with adb.async_session() as session:
        session.add_all([Effect(label="a"), Effect(label="b")])
    async with adb.async_session() as session:
        with stand_still_in(Effect, "load") as (reached, opened):
            by_one = sa.select(Effect).order_by(Effect.id).execution_options(yield_per=1)
            stream = await session.stream_scalars(by_one)
            running = asyncio.create_task(anext(stream))
            assert await asyncio.to_thread(reached.wait, TIMEOUT)
            with pytest.raises(SessionShared) as caught:
                await session.execute(sa.text("SELECT 1"))
            opened.set()
            first = await running
        between = await session.scalar(sa.select(sa.func.count(Effect.id)))
        rest = [each.label async for each in stream]

    assert caught.value.doing == "fetch"
    assert (first.label, between, rest) == ("a", 2, ["b"])


@pytest.mark.drivers("psycopg")
def test_rows_of_no_class_that_are_streamed_are_a_use(db: Database, gate: Gate) -> None:
    """What is streamed past the ORM has the connection, too, while the next rows are fetched; not in between."""
    rest = "SELECT i FROM generate_series(1, 3) AS i UNION ALL SELECT 4 FROM pg_advisory_xact_lock(7)"
    streamed = sa.text(rest).execution_options(stream_results=True, yield_per=2)

    with db.session() as session:
        rows = session.execute(streamed)
        first = rows.fetchmany(1)
        between = session.scalar(sa.text("SELECT 7"))
        thread, outcome = in_thread(rows.fetchall)
        gate.wait_until_reached()
        with pytest.raises(SessionShared) as caught:
            session.execute(sa.text("SELECT 1"))
        gate.open()
        thread.join(TIMEOUT)
        rows.close()

    assert caught.value.doing == "fetch"
    assert ([*map(tuple, first)], between) == ([(1,)], 7)
    assert len(outcome[0]) == 3  # type: ignore[arg-type]


@sync_drivers
def test_the_transaction_that_a_session_began_by_itself_is_a_use(db: Database, gate: Gate) -> None:
    """Whoever asks the session for its transaction cannot roll it back in the middle of somebody's statement."""
    with db.session() as session:
        session.execute(sa.text("SELECT 1"))
        transaction = session.get_transaction()
        assert transaction is not None
        thread, outcome = in_thread(lambda: session.execute(gate.statement).scalar())
        gate.wait_until_reached()
        with pytest.raises(SessionShared):
            transaction.rollback()
        gate.open()
        thread.join(TIMEOUT)
        transaction.rollback()
        after = session.in_transaction()

    assert not isinstance(outcome[0], BaseException)
    assert not after


@async_drivers
async def test_an_attribute_that_loads_is_a_use(adb: Database, gate: Gate) -> None:
    """An expired attribute that is read in the middle of somebody's statement is refused, not loaded in between."""
    async with adb.async_session() as session:
        effect = Effect(label="first")
        session.add(effect)
        await session.flush()
        session.expire(effect)
        running = asyncio.create_task(session.execute(gate.statement))
        await asyncio.to_thread(gate.wait_until_reached)

        with pytest.raises(SessionShared):
            _ = effect.label
        gate.open()
        await running
        await session.refresh(effect)
        label = effect.label

    assert label == "first"


@async_drivers
async def test_a_block_of_sync_code_is_one_use(adb: Database, gate: Gate, stand_still_in: Callable[..., Any]) -> None:
    """``run_sync`` has the session from its first line to its last, also between its statements."""
    gate.open()
    reached, opened = asyncio.Event(), asyncio.Event()

    def body(sync: Session) -> int:
        sync.execute(sa.text("SELECT 1"))
        reached.set()
        await_only(opened.wait())
        return sync.execute(sa.text("SELECT 2")).scalar_one()

    async with adb.async_session() as session:
        running = asyncio.create_task(session.run_sync(body))
        await reached.wait()

        with pytest.raises(SessionShared) as caught:
            await session.execute(sa.text("SELECT 1"))
        opened.set()

        assert await running == 2
    assert caught.value.doing == "run_sync"


# --- the end ----------------------------------------------------------------------------------------------------


@async_drivers
async def test_the_end_waits_for_a_statement_that_nobody_awaits(adb: Database, gate: Gate) -> None:
    """A refusal that ends the session lets the first finish its statement; nothing is committed, nothing is held."""
    with pytest.raises(SessionShared):  # noqa: PT012  # the end of the session is what is tried
        async with adb.async_session() as session:
            session.add(Effect(label="never"))
            await session.flush()
            first = asyncio.create_task(session.execute(gate.statement))
            await asyncio.to_thread(gate.wait_until_reached)
            try:
                await session.execute(sa.text("SELECT 1"))
            finally:
                opening = asyncio.create_task(asyncio.to_thread(gate.open))

    await opening
    assert (await first).rowcount is not None
    with pytest.raises(SessionEnded):
        await session.execute(sa.text("SELECT 1"))
    assert gate.effects() == []
    assert adb.async_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


@async_drivers
async def test_a_commit_in_the_middle_of_somebodys_statement_is_refused(adb: Database, gate: Gate) -> None:
    """The commit at the end is a second use; it is refused, and all is rolled back."""
    scope = adb.sessions.async_scope("request", Owner("code"))
    session = await scope.__aenter__()
    session.add(Effect(label="never"))
    first = asyncio.create_task(session.execute(gate.statement))
    await asyncio.to_thread(gate.wait_until_reached)

    with pytest.raises(SessionShared) as caught:
        await scope.commit()
    ending = asyncio.create_task(scope.end())
    gate.open()
    await ending

    assert caught.value.operation == "commit"
    assert (await first).rowcount is not None
    assert gate.effects() == []
    assert adb.async_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


@sync_drivers
def test_a_commit_in_the_middle_of_a_threads_statement_is_refused(db: Database, gate: Gate) -> None:
    """The same for threads."""
    scope = db.sessions.scope("request", Owner("code"))
    session = scope.__enter__()
    session.add(Effect(label="never"))
    first, answer = in_thread(lambda: session.execute(gate.statement).rowcount)
    gate.wait_until_reached()

    with pytest.raises(SessionShared) as caught:
        scope.commit()
    ending, ended = in_thread(scope.end)
    gate.open()
    first.join(TIMEOUT)
    ending.join(TIMEOUT)

    assert caught.value.operation == "commit"
    assert isinstance(answer[0], int)
    assert ended == [None]
    assert gate.effects() == []
    assert db.engine().pool.checkedout() == 0  # type: ignore[attr-defined]


# --- taking turns -----------------------------------------------------------------------------------------------


@sync_drivers
def test_threads_may_take_turns(db: Database, gate: Gate) -> None:
    """Opened in one thread, used in two others, one after the other, and ended in a fourth."""
    gate.open()
    manager = db.session()
    session = manager.__enter__()

    for number in range(2):
        thread, outcome = in_thread(lambda number=number: (session.add(Effect(label=str(number))), session.flush()))
        thread.join(TIMEOUT)
        assert not isinstance(outcome[0], BaseException)
    thread, _ = in_thread(lambda: manager.__exit__(None, None, None))
    thread.join(TIMEOUT)

    assert gate.effects() == ["0", "1"]


@async_drivers
@pytest.mark.parametrize("limit", ["wait_for", "timeout", "anyio"])
async def test_a_cancelled_statement_gives_the_session_back(adb: Database, gate: Gate, limit: str) -> None:
    """``asyncio.wait_for``, ``asyncio.timeout`` and anyio's scopes end a use; the session goes on after a rollback."""

    async def cut_off(session: AsyncSession) -> None:
        if limit == "wait_for":
            await asyncio.wait_for(session.execute(gate.statement), None)
        elif limit == "timeout":
            async with asyncio.timeout(None) as running:
                limits.append(lambda: running.reschedule(0))
                await session.execute(gate.statement)
        else:
            with anyio.CancelScope() as scope:
                limits.append(scope.cancel)
                await session.execute(gate.statement)
            raise TimeoutError

    limits: list[Callable[[], None]] = []
    async with adb.async_session() as session:
        cut = asyncio.create_task(cut_off(session))
        await asyncio.to_thread(gate.wait_until_reached)
        for cancel in limits or [cut.cancel]:
            cancel()
        with pytest.raises((TimeoutError, asyncio.CancelledError)):
            await cut
        gate.open()
        await session.rollback()
        session.add(Effect(label="after"))
        in_time = await asyncio.wait_for(session.execute(sa.text("SELECT 1")), TIMEOUT)

    assert in_time.scalar() == 1
    assert gate.effects() == ["after"]


@sync_drivers
def test_calls_inside_calls_are_one_use(db: Database, gate: Gate) -> None:
    """Listeners that use the session in the middle of a commit, savepoints and queries in a loop are no second user."""
    gate.open()

    def add_another(session: Session, *_: object) -> None:
        if not session.info.get("added"):
            session.info["added"] = True
            session.execute(sa.text("SELECT 1"))
            session.add(Effect(label="by a listener"))

    with db.session() as session:
        event.listen(session, "before_flush", add_another)
        with session.begin_nested():
            session.add(Effect(label="nested"))
        undone = session.begin_nested()
        session.add(Effect(label="never"))
        undone.rollback()
        for effect in session.scalars(sa.select(Effect), execution_options={"yield_per": 1}):
            same = object_session(effect)
            assert same is session
            assert session.get(Effect, effect.id) is effect
        session.commit()
        with session.begin():
            session.add(Effect(label="begun"))

    assert gate.effects() == ["begun", "by a listener", "nested"]


@async_drivers
async def test_async_calls_inside_calls_are_one_use(adb: Database, gate: Gate) -> None:
    """The same, by way of ``run_sync``, savepoints and transactions of an ``AsyncSession``."""
    gate.open()

    def body(sync: Session) -> None:
        sync.add(Effect(label="in run_sync"))
        sync.flush()
        with sync.begin_nested():
            sync.add(Effect(label="nested in run_sync"))

    async with adb.async_session() as session:
        await session.run_sync(body)
        async with session.begin_nested():
            session.add(Effect(label="nested"))
            await session.run_sync(lambda sync: sync.flush())
        await session.commit()
        async with session.begin():
            session.add(Effect(label="begun"))

    assert gate.effects() == ["begun", "in run_sync", "nested", "nested in run_sync"]


# --- whose ------------------------------------------------------------------------------------------------------


class OwnSession(Session):
    """A user's class."""

    def count(self) -> int:
        """Count."""
        return self.scalar(sa.select(sa.func.count(Effect.id))) or 0


@sync_drivers
@pytest.mark.parametrize("kind", [OwnSession, SQLModelSession])
def test_users_classes_are_guarded_and_keep_their_names(database: DatabaseUnderTest, kind: type[Session]) -> None:
    """``session_class=`` makes no difference, also for methods that the class adds, such as SQLModel's ``exec``."""
    db = Database(database.url, session_class=kind)
    gate = Gate(database, db)
    try:
        with db.session() as session:
            thread, _ = in_thread(lambda: session.execute(gate.statement))
            gate.wait_until_reached()
            with pytest.raises(SessionShared):
                session.count() if kind is OwnSession else session.exec(sqlmodel_select(Effect))  # type: ignore[attr-defined]
            gate.open()
            thread.join(TIMEOUT)

            assert isinstance(session, kind)
            assert type(session).__name__ == kind.__name__
    finally:
        gate.close()
        db.dispose()


@async_drivers
async def test_users_async_classes_are_guarded(database: DatabaseUnderTest) -> None:
    """The same for ``async_session_class=``."""
    db = Database(database.url, async_session_class=SQLModelAsyncSession)
    gate = Gate(database, db)
    gate.open()
    async with db.async_session() as session:
        calls = [session.exec(sqlmodel_select(sa.literal(1))) for _ in range(2)]  # type: ignore[attr-defined]
        answers = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(each) is SessionShared for each in answers] == [False, True]
    gate.close()
    await db.async_dispose()


def test_a_tasks_session_names_the_task(database: DatabaseUnderTest) -> None:
    """In a task the error says which one, and it is an error of the task like any other."""
    workshop = Workshop(database)

    def share(session: Session) -> None:
        if workshop.is_async:
            raise AssertionError
        with session.no_autoflush:
            thread, outcome = in_thread(lambda: session.execute(sa.text("SELECT 1")))
            thread.join(TIMEOUT)
            assert not isinstance(outcome[0], BaseException)
        event.listen(session, "before_flush", lambda *_: from_another_thread(session))
        session.add(Effect(label="never"))
        session.flush()

    def from_another_thread(session: Session) -> None:
        thread, outcome = in_thread(lambda: session.execute(sa.text("SELECT 1")))
        thread.join(TIMEOUT)
        assert isinstance(outcome[0], BaseException)
        raise outcome[0]

    async def share_async(session: AsyncSession) -> None:
        # The first is under way for so long that the task has failed by then.
        slow = "SELECT 1" if database.is_sqlite else "SELECT pg_sleep(0.3)"
        await session.connection()
        await asyncio.gather(session.execute(sa.text(slow)), session.execute(sa.text("SELECT 1")))

    left: list[int] = []
    task = workshop.db.task(name="share")(share_async if workshop.is_async else share)  # type: ignore[arg-type]
    with Heard(signals.TaskFailed) as heard, workshop.running():
        workshop.ask(task)
        error = heard.wait(signals.TaskFailed).error
        left.append(workshop.db.stats().pools["default"].in_use)
    workshop.close()

    assert isinstance(error, SessionShared)
    assert "task 'share', attempt 1" in error.owner
    assert left == [0]
