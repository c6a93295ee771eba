"""Every commit on a run's connection is the run's: whatever else works on that connection, and whoever commits it."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlmodel import Session as SQLModelSession

from aftercommit import Retry, current_run, signals
from aftercommit.errors import CommitWithoutCheckpoint, LostClaim
from tests.integration.test_claims import cancel
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn, whose heartbeats are too rare to mend anything."""
    shop = Workshop(database, heartbeat=2 * TIMEOUT, silent_after=6 * TIMEOUT)
    yield shop
    shop.close()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What the library says."""
    with Heard(signals.Signal) as heard:
        yield heard


def this_run() -> Any:
    """The run at hand."""
    run = current_run()
    assert run is not None
    return run


# --- second users of a run's connection -------------------------------------------------------------------------------


def read(session: Session) -> None:
    """Read something."""
    session.execute(sa.select(Effect)).all()


def plain(session: Session) -> None:
    """A helper that only reads, in a session of its own."""
    with Session(bind=session.connection()) as second:
        read(second)


def unused(session: Session) -> None:
    """A session that is opened and closed, and has begun without a connection."""
    second = Session(bind=session.connection())
    second.begin()
    second.close()


def committed(session: Session) -> None:
    """A second session that writes and commits, which is the run's to do."""
    with Session(bind=session.connection()) as second, second.begin():
        second.add(Effect(label="second"))


def under_a_savepoint(session: Session) -> None:
    """A second session inside of the first one's savepoint."""
    with session.begin_nested():
        read(session)
        committed(session)


def with_a_savepoint(session: Session) -> None:
    """A savepoint of a second session's, rolled back."""
    with Session(bind=session.connection()) as second:
        savepoint = second.begin_nested()
        second.add(Effect(label="never"))
        second.flush()
        savepoint.rollback()


def scoped(session: Session) -> None:
    """A registry on the connection."""
    registry = scoped_session(sessionmaker(session.connection()))
    registry.execute(sa.select(Effect)).all()
    registry.commit()
    registry.remove()


def sqlmodel(session: Session) -> None:
    """SQLModel's session."""
    with SQLModelSession(bind=session.connection()) as second:
        read(second)


def by_table(session: Session) -> None:
    """A session that goes to the connection for one of its tables."""
    with Session(binds={Effect: session.connection()}) as second:
        read(second)


def dropped(session: Session) -> None:
    """A second session that nobody closes."""
    second = Session(bind=session.connection(), join_transaction_mode="rollback_only")
    read(second)
    del second
    gc.collect()


def nested_seconds(session: Session) -> None:
    """A third session on the connection of the second."""
    with Session(bind=session.connection()) as second, Session(bind=second.connection()) as third:
        read(third)
        third.commit()


def savepoint_of_core(session: Session) -> None:
    """A savepoint made past the session."""
    savepoint = session.connection().begin_nested()
    committed(session)
    savepoint.commit()


def mode(name: str) -> Callable[[Session], None]:
    """A second session of one way to join, which reads and commits where that is not the run's commit."""

    def body(session: Session) -> None:
        second = Session(bind=session.connection(), join_transaction_mode=name)  # type: ignore[arg-type]
        read(second)
        second.commit()
        second.close()

    body.__name__ = name
    return body


SECONDS = [
    *(plain, unused, committed, under_a_savepoint, with_a_savepoint, scoped, sqlmodel, by_table, dropped),
    *(nested_seconds, savepoint_of_core, mode("rollback_only"), mode("create_savepoint")),
]
every_second = pytest.mark.parametrize("second", SECONDS, ids=lambda second: second.__name__)
some_seconds = pytest.mark.parametrize("second", [plain, committed, scoped], ids=lambda second: second.__name__)


@every_second
def test_a_second_session_on_the_connection_leaves_the_end_to_the_run(
    shop: Workshop, heard: Heard, second: Callable[[Session], None]
) -> None:
    """The effect and the note that the task is done commit together, whatever else was on the connection before."""

    @shop.task()
    def works(session: Session, label: str) -> None:
        session.add(Effect(label=label))
        second(session)

    with shop.running():
        id = shop.ask(works, "once")
        heard.wait(signals.TaskSucceeded)

    assert (shop.record(id).state, shop.record(id).attempt) == ("succeeded", 1)
    assert shop.effects().count("once") == 1


@some_seconds
def test_a_commit_in_the_middle_saves_its_checkpoint_behind_a_second_session(
    shop: Workshop, heard: Heard, second: Callable[[Session], None]
) -> None:
    """What is committed with a checkpoint is committed with it."""
    saved: list[Any] = []

    @shop.task()
    def steps(session: Session, label: str) -> None:
        session.add(Effect(label=label))
        second(session)
        this_run().checkpoint({"step": 1})
        session.commit()
        saved.append(shop.record(this_run().id).checkpoint)

    with shop.running():
        shop.ask(steps, "once")
        heard.wait(signals.TaskSucceeded)

    assert saved == [{"step": 1}]


@some_seconds
def test_a_commit_without_a_checkpoint_is_refused_behind_a_second_session(
    shop: Workshop, heard: Heard, second: Callable[[Session], None]
) -> None:
    """The rule is the same."""

    @shop.task()
    def commits(session: Session, label: str) -> None:
        session.add(Effect(label="never"))
        second(session)
        session.commit()

    with shop.running():
        id = shop.ask(commits)
        error = heard.wait(signals.TaskFailed).error

    assert isinstance(error, CommitWithoutCheckpoint)
    assert (shop.record(id).state, shop.effects()) == ("failed", [])


@some_seconds
def test_a_cancelled_run_commits_nothing_behind_a_second_session(
    shop: Workshop, heard: Heard, second: Callable[[Session], None]
) -> None:
    """Its last commit fails, as without one."""

    @shop.task()
    def works(session: Session, label: str) -> None:
        cancel(shop, this_run().id)
        session.add(Effect(label="never"))
        second(session)

    with shop.running():
        id = shop.ask(works)
        heard.wait(signals.ClaimLost)

    assert (shop.record(id).state, shop.effects()) == ("cancelled", [])


def test_a_second_session_s_tasks_follow_the_run_s_commit(shop: Workshop, heard: Heard) -> None:
    """What is handed over on a joined session is written with the end of the run, and with nothing else."""

    @shop.task()
    def note(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    @shop.task()
    def asks(session: Session, label: str) -> None:
        with Session(bind=session.connection()) as second:
            shop.db.after_commit(second, note, "asked")
            second.commit()
        with Session(bind=session.connection()) as second:
            shop.db.after_commit(second, note, "taken back")
            with second.begin_nested() as savepoint:
                shop.db.after_commit(second, note, "undone")
                savepoint.rollback()
            assert shop.sql("SELECT count(*) FROM aftercommit_task WHERE task = 'note'") == 0
            second.commit()
        session.add(Effect(label=label))

    with shop.running():
        id = shop.ask(asks, "once")
        shop.drain()

    assert shop.record(id).state == "succeeded"
    assert shop.effects() == ["asked", "once", "taken back"]


def test_a_second_session_that_outlives_the_run_can_do_no_harm(shop: Workshop, heard: Heard) -> None:
    """The connection went back with the run's end: whoever kept a session on it cannot use it any more."""
    kept: list[Session] = []

    @shop.task()
    def works(session: Session, label: str) -> None:
        second = Session(bind=session.connection())
        second.add(Effect(label="with the run"))
        second.flush()
        kept.append(second)
        session.add(Effect(label=label))

    with shop.running():
        id = shop.ask(works, "once")
        heard.wait(signals.TaskSucceeded)
        (second,) = kept
        with pytest.raises(ResourceClosedError):
            second.execute(sa.select(1))
        kept.clear()

    assert shop.record(id).state == "succeeded"
    assert shop.effects() == ["once", "with the run"]


@pytest.mark.drivers("asyncpg", "aiosqlite", "psycopg")
def test_an_async_second_session_leaves_the_end_to_the_run(database: DatabaseUnderTest, heard: Heard) -> None:
    """The same for ``AsyncSession`` on the connection of an ``async def`` task, closed and committed."""
    shop = Workshop(database, heartbeat=2 * TIMEOUT, silent_after=6 * TIMEOUT)
    saved: list[Any] = []

    @shop.db.task
    async def works(session: AsyncSession) -> None:
        async with AsyncSession(bind=await session.connection()) as second:
            await second.execute(sa.select(Effect))
        async with AsyncSession(bind=await session.connection()) as second, second.begin():
            second.add(Effect(label="second"))
        session.add(Effect(label="middle"))
        this_run().checkpoint(1)
        await session.commit()
        saved.append(shop.record(this_run().id).checkpoint)
        async with AsyncSession(bind=await session.connection()) as second:
            await second.execute(sa.select(Effect))
        session.add(Effect(label="end"))

    with shop.running():
        id = shop.ask(works)
        heard.wait(signals.TaskSucceeded)
        if not shop.is_async:
            shop.on_loop(shop.db.async_dispose())
    state, effects = shop.record(id).state, shop.effects()
    shop.close()

    assert (state, effects, saved) == ("succeeded", ["end", "middle", "second"], [1])


# --- commits and rollbacks past the run's session ---------------------------------------------------------------------


def commit_by_joining(session: Session) -> None:
    """Commit the run's transaction by a session that controls it fully."""
    with Session(bind=session.connection(), join_transaction_mode="control_fully") as second:
        read(second)
        second.commit()


def commit_by_core(session: Session) -> None:
    """Commit it through its connection."""
    session.connection().commit()


def commit_after_a_rollback(session: Session) -> None:
    """Roll it back past the session, begin another one, and commit that."""
    connection = session.connection()
    with Session(bind=connection) as second:
        read(second)
        second.rollback()
    connection.execute(sa.insert(Effect).values(label="never"))
    connection.commit()


past_the_session = pytest.mark.parametrize(
    "commit", [commit_by_joining, commit_by_core, commit_after_a_rollback], ids=lambda commit: commit.__name__
)


# SQLAlchemy's word to whoever closes a session whose transaction was ended past it.
ended_past_it = pytest.mark.filterwarnings("ignore:transaction already deassociated")


@ended_past_it
@past_the_session
def test_a_commit_past_the_session_of_a_cancelled_run_is_refused(
    shop: Workshop, heard: Heard, commit: Callable[[Session], None]
) -> None:
    """Whoever commits a run's transaction meets its fence."""
    told: list[BaseException] = []

    @shop.task(repeatable=True)
    def works(session: Session, label: str) -> None:
        cancel(shop, this_run().id)
        session.add(Effect(label="never"))
        session.flush()
        try:
            commit(session)
        except BaseException as error:
            told.append(error)
            raise

    with shop.running():
        id = shop.ask(works)
        heard.wait(signals.ClaimLost)

    assert [type(error) for error in told] == [LostClaim]
    assert (shop.record(id).state, shop.effects()) == ("cancelled", [])


@ended_past_it
@past_the_session
def test_a_commit_past_the_session_needs_a_checkpoint(
    shop: Workshop, heard: Heard, commit: Callable[[Session], None]
) -> None:
    """It is one in the middle of the task, and would be repeated with it."""

    @shop.task()
    def works(session: Session, label: str) -> None:
        session.add(Effect(label="never"))
        session.flush()
        commit(session)

    with shop.running():
        id = shop.ask(works)
        error = heard.wait(signals.TaskFailed).error

    assert isinstance(error, CommitWithoutCheckpoint)
    assert (shop.record(id).state, shop.effects()) == ("failed", [])


@ended_past_it
@pytest.mark.parametrize("commit", [commit_by_joining, commit_by_core], ids=lambda commit: commit.__name__)
def test_a_commit_past_the_session_saves_its_checkpoint(
    shop: Workshop, heard: Heard, commit: Callable[[Session], None]
) -> None:
    """With one it is as good as the session's own; what the session does behind it has no transaction any more."""

    @shop.task()
    def works(session: Session, label: str) -> None:
        session.add(Effect(label="step 1"))
        session.flush()
        this_run().checkpoint(1)
        commit(session)
        session.add(Effect(label="never"))

    with shop.running():
        id = shop.ask(works)
        heard.wait(signals.TaskFailed)

    assert (shop.record(id).state, shop.record(id).checkpoint) == ("failed", 1)
    assert shop.effects() == ["step 1"]


@ended_past_it
def test_a_rollback_past_the_session_fails_the_run_loudly(shop: Workshop, heard: Heard) -> None:
    """What a joined session has rolled back is not taken for done."""

    @shop.task()
    def works(session: Session, label: str) -> None:
        session.add(Effect(label="never"))
        session.flush()
        with Session(bind=session.connection()) as second:
            read(second)
            second.rollback()

    with shop.running():
        id = shop.ask(works)
        heard.wait(signals.TaskFailed)

    assert (shop.record(id).state, shop.effects()) == ("failed", [])


# --- commits before which nothing was sent ----------------------------------------------------------------------------


def test_a_checkpoint_is_saved_by_a_commit_before_which_nothing_was_sent(shop: Workshop, heard: Heard) -> None:
    """A task that first pays, outside, and then saves that it has, does not lose that."""
    saved: list[Any] = []

    @shop.task()
    def pays(session: Session, label: str) -> None:
        this_run().checkpoint("paid")
        session.commit()
        saved.append(shop.record(this_run().id).checkpoint)
        this_run().checkpoint("sent")
        session.commit()
        saved.append(shop.record(this_run().id).checkpoint)

    with shop.running():
        shop.ask(pays)
        heard.wait(signals.TaskSucceeded)

    assert saved == ["paid", "sent"]


def test_a_cancelled_run_learns_of_it_by_a_commit_before_which_nothing_was_sent(shop: Workshop, heard: Heard) -> None:
    """Every commit of a task's session is fenced."""
    told: list[BaseException] = []

    @shop.task()
    def works(session: Session, label: str) -> None:
        cancel(shop, this_run().id)
        try:
            session.commit()
        except BaseException as error:
            told.append(error)
            raise

    with shop.running():
        id = shop.ask(works)
        heard.wait(signals.ClaimLost)

    assert [type(error) for error in told] == [LostClaim]
    assert shop.record(id).state == "cancelled"


# --- session classes of the application's own -------------------------------------------------------------------------


def test_a_session_class_that_listens_to_itself_is_fenced(database: DatabaseUnderTest, heard: Heard) -> None:
    """A class whose instances have listeners from their first moment on has ours all the same."""
    begun = threading.Event()

    class Listening(Session):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            sa.event.listen(self, "after_begin", lambda *_: begun.set())

    class AsyncListening(AsyncSession):
        sync_session_class = Listening

    shop = Workshop(database, session_class=Listening, async_session_class=AsyncListening)

    @shop.task()
    def works(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    with shop.running():
        id = shop.ask(works, "once")
        heard.wait(signals.TaskSucceeded)
    state, effects = shop.record(id).state, shop.effects()
    shop.close()

    assert begun.is_set()
    assert (state, effects) == ("succeeded", ["once"])


@pytest.mark.drivers("psycopg", "asyncpg")
def test_autocommit_behind_the_sessions_back_is_refused(shop: Workshop):
    """A connection that is put into AUTOCOMMIT once its transaction was ended takes no further statement of the run."""

    def sneak(session: Session, label: str) -> None:
        connection = session.connection()
        connection.rollback()
        connection.execution_options(isolation_level="AUTOCOMMIT")
        session.add(Effect(label="never"))
        session.flush()

    task = shop.task(retry=Retry(attempts=1))(sneak)
    with shop.running():
        id = shop.ask(task, "x")
        shop.drain()

    assert (shop.record(id).state, shop.effects()) == ("failed", [])


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_session_of_the_same_class_is_one_like_any_other(shop: Workshop):
    """``type(session)(bind=session.connection())`` works, and leaves fence and end to the run."""

    def copy(session: Session, label: str) -> None:
        session.add(Effect(label="mine"))
        session.flush()
        with type(session)(bind=session.connection()) as other:
            assert other.scalar(sa.select(sa.func.count()).select_from(Effect)) == 1

    task = shop.task()(copy)
    with shop.running():
        id = shop.ask(task, "x")
        shop.drain()

    assert (shop.record(id).state, shop.effects()) == ("succeeded", ["mine"])


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_task_in_memory_does_not_start_by_a_commit_that_was_refused(shop: Workshop):
    """The commit past the session is refused by its run's fence, and what waited for it is dropped."""
    ran: list[str] = []

    def child(session: Session, label: str) -> None:
        ran.append(label)

    def work(session: Session, label: str) -> None:
        session.add(Effect(label=label))
        session.flush()
        shop.db.after_commit(session, memory, label)
        with pytest.raises(CommitWithoutCheckpoint):
            session.connection().commit()
        raise ValueError("the end")

    memory = shop.task(durable=False)(child)
    task = shop.task(retry=Retry(attempts=1))(work)
    with shop.running():
        id = shop.ask(task, "x")
        shop.drain()

    assert shop.record(id).state == "failed"
    assert (ran, shop.effects()) == ([], [])
