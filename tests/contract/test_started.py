"""What was committed is run, at once, by the runner of this process, and nothing else is."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from aftercommit import TaskHandle, TaskRecord
from aftercommit.errors import ConfigurationError, RunnerNotRunning
from tests.contract.stand import Row, Stand


@pytest.fixture
def running(stand: Stand) -> Iterator[Stand]:
    """The stand, with a runner."""
    with stand.running():
        # The runner has had its first look, which on SQLite wants the write lock: tests may hold that from here on.
        stand.drain()
        yield stand


@pytest.fixture(params=["durable", "in memory"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both kinds of tasks."""
    return request.param


def ask(stand: Stand, session: Session, kind: str, label: str) -> TaskHandle:
    """Hand a task of one kind over."""
    return stand.db.after_commit(session, stand.note if kind == "durable" else stand.remember, label)


def test_nothing_starts_before_the_commit(running: Stand, kind: str):
    """While the transaction is open nothing can run; its commit starts the task."""

    def body() -> None:
        with Session(running.engine) as session:
            session.add(Row())
            handle = ask(running, session, kind, "x")
            session.flush()
            running.drain()
            assert (running.ran, handle.created) == ([], None)
            session.commit()
            assert handle.created is True

    running.run(body)

    assert running.drain() == ["x"]
    assert running.rows == 1


def test_what_is_rolled_back_never_starts(running: Stand, kind: str):
    """Rollback, error, savepoint, and a session closed without a commit: none of them starts anything."""

    def body() -> None:
        with Session(running.engine) as session:
            ask(running, session, kind, "rolled back")
            session.rollback()
            with suppress(ZeroDivisionError), session.begin_nested():
                ask(running, session, kind, "savepoint")
                raise ZeroDivisionError
            ask(running, session, kind, "kept")
            session.commit()
            ask(running, session, kind, "forgotten")

    running.run(body)

    assert running.drain() == ["kept"]
    assert [each.tasks for each in running.lost] == [("note",) if kind == "durable" else ("remember",)]


@pytest.mark.parametrize("commit", [True, False])
def test_a_joined_sessions_task_starts_after_the_outer_commit(running: Stand, kind: str, *, commit: bool):
    """Its own commit starts nothing; the outer one does, its rollback does not."""

    def body() -> None:
        with running.engine.connect() as connection:
            outer = connection.begin()
            connection.execute(sa.insert(Row))
            with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
                ask(running, session, kind, "x")
                session.commit()
            running.drain()
            assert running.ran == []
            outer.commit() if commit else outer.rollback()

    running.run(body)

    assert running.drain() == (["x"] if commit else [])


def test_many_at_once_all_run(running: Stand, kind: str):
    """More tasks than places, from one commit: each runs once."""

    def body() -> None:
        with Session(running.engine) as session:
            for number in range(60):
                ask(running, session, kind, f"{number:02}")
            session.commit()

    running.run(body)

    assert running.drain() == [f"{number:02}" for number in range(60)]


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_failing_commit_gives_the_places_back(running: Stand, kind: str):
    """A COMMIT that fails starts nothing, and holds no place of the pool."""
    with running.outside.connect() as outside:
        outside.execute(text("CREATE TABLE child (id int PRIMARY KEY, row_id int)"))
        outside.execute(
            text("ALTER TABLE child ADD FOREIGN KEY (row_id) REFERENCES row (id) DEFERRABLE INITIALLY DEFERRED")
        )

    def body() -> None:
        for number in range(20):
            with suppress(sa.exc.DBAPIError), Session(running.engine) as session:
                session.execute(text("INSERT INTO child VALUES (:id, 99)"), {"id": number})
                ask(running, session, kind, "lost")
                session.commit()
        with Session(running.engine) as session:
            ask(running, session, kind, "kept")
            session.commit()

    running.run(body)

    assert running.drain() == ["kept"]


def test_in_memory_needs_a_runner(stand: Stand):
    """Without a runner a task in memory could never start, and that is said at the hand-over."""
    with Session(stand.engine) as session, pytest.raises(RunnerNotRunning, match="durable=False"):
        stand.db.after_commit(session, stand.remember, "x")


@pytest.fixture(params=["ours", "anybody's"])
def engine(request: pytest.FixtureRequest, stand: Stand) -> Engine:
    """The engine of a pool of ours, and one that the application made."""
    return stand.our_engine if request.param == "ours" else stand.engine


def test_a_key_is_written_once_while_it_is_queued(stand: Stand, engine: Engine):
    """Twice in one transaction, and again in the next: one record, and each handle knows."""
    keyed = stand.note.with_options(key="k")

    def body() -> list[bool | None]:
        handles = []
        for _ in range(2):
            with Session(engine) as session:
                handles += [stand.db.after_commit(session, keyed, str(number)) for number in range(2)]
                handles.append(stand.db.after_commit(session, stand.note, "plain"))
                session.commit()
        return [handle.created for handle in handles]

    created = stand.run(body)

    assert created == [True, False, True, False, False, True]
    assert sorted(stand.written) == ["0", "plain", "plain"]


def test_a_key_is_free_again_after_a_rollback(stand: Stand, engine: Engine):
    """The transaction that took the key was rolled back: the next one gets it."""
    keyed = stand.note.with_options(key="k")

    def body() -> bool | None:
        with Session(engine) as session:
            stand.db.after_commit(session, keyed, "x")
            session.rollback()
            handle = stand.db.after_commit(session, keyed, "y")
            session.commit()
            return handle.created

    assert stand.run(body) is True
    assert stand.written == ["y"]


def test_delay_time_and_priority_are_written(stand: Stand, engine: Engine):
    """A delay counts from the database's now, a time is the moment that was meant, in any zone."""
    at = datetime(2031, 5, 6, 7, 8, 9, 123000, tzinfo=UTC)
    there = at.astimezone(ZoneInfo("Asia/Kathmandu"))

    def body() -> None:
        with Session(engine) as session:
            stand.db.after_commit(session, stand.note.with_options(delay=3600.0), "delay")
            stand.db.after_commit(session, stand.note.with_options(at=there), "at")
            stand.db.after_commit(session, stand.note.with_options(priority=7), "priority")
            session.commit()

    stand.run(body)

    with Session(stand.outside) as session:
        records = {each.arguments["label"]: each for each in session.scalars(select(TaskRecord))}
    delay = records["delay"].run_at - records["delay"].enqueued_at
    assert abs(delay - timedelta(hours=1)) < timedelta(seconds=1)
    assert records["at"].run_at == at
    assert [records[label].priority for label in ("delay", "at", "priority")] == [0, 0, 7]
    assert {each.state for each in records.values()} == {"queued"}


@pytest.mark.drivers("pysqlite")
@pytest.mark.parametrize(
    "options",
    [
        {"at": datetime(2031, 5, 6)},  # noqa: DTZ001  # naive is the point
        {"at": datetime.min.replace(tzinfo=UTC)}, {"at": datetime(999, 12, 31, tzinfo=UTC)}, {"at": "2031-05-06"},
        {"at": datetime.max.replace(tzinfo=UTC)}, {"at": datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))},
        {"delay": -1.0}, {"delay": 1.0, "at": datetime.now(UTC)}, {"delay": 1e12}, {"delay": float("inf")},
        {"delay": float("nan")}, {"delay": "1"},
        {"key": ""}, {"key": "a" * 256}, {"key": "a\0b"}, {"key": "\ud800"}, {"key": 1},
        {"priority": 1.5}, {"priority": 2**31}, {"priority": -(2**40)}, {"priority": "high"}, {"priority": True},
    ],
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(stand: Stand, options: dict[str, Any]):
    """Naive times, negative delays, two times at once, and what one of the databases could not hold and give back."""
    with pytest.raises(ConfigurationError):
        stand.note.with_options(**options)


@pytest.mark.drivers("pysqlite")
def test_tasks_in_memory_take_no_options(stand: Stand):
    """There is no record that could wait."""
    with pytest.raises(ConfigurationError, match="in memory"):
        stand.remember.with_options(delay=1.0)
