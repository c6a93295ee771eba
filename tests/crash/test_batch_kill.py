"""A batch in a process that is killed (SIGKILL), again and again, anywhere: nothing twice, nothing left out."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from aftercommit import TaskRecord
from tests.crash.batch_child import BAD, COUNT, SIZE, Base, Record, async_main, make
from tests.crash.proxy import ARM, Proxy
from tests.support.databases import DatabaseUnderTest
from tests.support.processes import Log, spawn

ROOT = Path(__file__).parents[2]


class Child:
    """One life of the worker process."""

    def __init__(
        self, database: DatabaseUnderTest, workers: int, point: str, *, size: int = SIZE, bad: AbstractSet[int] = BAD
    ) -> None:
        arguments = [database.url, database.driver, str(workers), point, str(size), ",".join(map(str, bad))]
        command = [sys.executable, "-m", "tests.crash.batch_child", *arguments]
        self.process = spawn(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        assert self.process.stdout is not None
        self.log = Log(self.process.stdout)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.join()


@pytest.fixture
def engine(database: DatabaseUnderTest) -> Iterator[sa.Engine]:
    """Somebody else's engine on a database with records, and a task that waits."""
    engine = sa.create_engine(database.sync_url)
    Base.metadata.create_all(engine)
    ask(database)
    yield engine
    engine.dispose()


def ask(database: DatabaseUnderTest) -> None:
    """Make records, and ask for the task; whatever there was before is gone."""
    # Any flavour writes the same record.
    db = make(database.sync_url, is_async=False, workers=1)
    db.create_tables()
    with db.session() as session:
        session.execute(sa.delete(Record))
        session.execute(sa.delete(TaskRecord))
        session.add_all(Record(id=number) for number in range(1, COUNT + 1))
        db.after_commit(session, db.tasks["work"])
    db.dispose()


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_anywhere_a_batch_goes_on_from_its_last_commit(
    database: DatabaseUnderTest, engine: sa.Engine, workers: int
) -> None:
    """Killed in a handler, and before COMMITs, five times over: every good record once, every bad one marked once."""
    die_and_finish(database, engine, workers, ["commit:1", "handler:12", "commit:3", "handler:40", "commit:4"])

    assert_exact(engine)


points = st.one_of(
    st.integers(1, COUNT).map(lambda record: f"handler:{record}"), st.integers(1, 12).map(lambda n: f"commit:{n}")
)


@pytest.mark.drivers("psycopg", "pysqlite")
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bad=st.sets(st.integers(1, COUNT), max_size=8),
    size=st.integers(1, 25),
    workers=st.integers(1, 3),
    deaths=st.lists(points, min_size=1, max_size=3),
)
def test_killed_wherever_it_may_be(  # noqa: PLR0917  # hypothesis passes by name
    database: DatabaseUnderTest, engine: sa.Engine, bad: set[int], size: int, workers: int, deaths: list[str]
) -> None:
    """For any bad records, chunk size, width and points of a SIGKILL, good ones are done, bad ones marked, once."""
    ask(database)

    die_and_finish(database, engine, workers, deaths, size=size, bad=bad)

    assert_exact(engine, bad)


def die_and_finish(
    database: DatabaseUnderTest,
    engine: sa.Engine,
    workers: int,
    deaths: Sequence[str],
    *,
    size: int = SIZE,
    bad: AbstractSet[int] = BAD,
) -> None:
    """Let a process live until each point in turn, and one more until all is done."""
    for point in deaths:
        child = Child(database, workers, point, size=size, bad=bad)
        try:
            child.log.wait_for("AT ", timeout=60.0)
        except RuntimeError:
            # It had passed the point by the time that it was rescued, or there are fewer commits, and it is done.
            assert "DRAINED" in child.log.text, child.log.text
        finally:
            child.kill()
        with Session(engine) as session, session.begin():
            # A life for each death, and one to finish.
            session.execute(sa.update(TaskRecord).values(max_attempts=20))
    last = Child(database, workers, "", size=size, bad=bad)
    try:
        last.log.wait_for("DRAINED", timeout=60.0)
    finally:
        last.kill()


def assert_exact(engine: sa.Engine, bad: AbstractSet[int] = BAD) -> None:
    """Every good record once, every bad one marked once, and the task says so."""
    with Session(engine) as session:
        record = session.scalars(sa.select(TaskRecord)).one()
        assert (record.state, record.result) == ("succeeded", COUNT), record.traceback
        rows = {row.id: (row.n, row.marks) for row in session.scalars(sa.select(Record))}
    assert rows == {number: (0, 1) if number in bad else (1, 0) for number in range(1, COUNT + 1)}


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_chunks_commit_loses_its_answer(database: DatabaseUnderTest, engine: sa.Engine) -> None:
    """A chunk whose COMMIT is in doubt is looked up by its position: it was done, and nothing of it is run again."""
    url = make_url(database.url)
    assert url.port is not None
    proxy = Proxy(url.port)
    through = url.set(port=proxy.port).render_as_string(hide_password=False)
    is_async = database.driver == "asyncpg"
    armed: list[int] = []

    def arm(session: Session, record: Record) -> None:
        if record.id == 10 and not armed:
            armed.append(record.id)
            session.execute(sa.text(f"SELECT '{ARM.decode()}'"))

    db = make(through, is_async=is_async, workers=1, before=arm)

    async def serve() -> None:
        try:
            await async_main(db)
        finally:
            await db.async_dispose()

    try:
        if is_async:
            asyncio.run(serve())
        else:
            with db.running():
                db.drain(60.0)
    finally:
        if not is_async:
            db.dispose()
        proxy.close()

    assert proxy.swallowed.acquire(timeout=30)
    assert_exact(engine)
    with Session(engine) as session:
        record = session.scalars(sa.select(TaskRecord)).one()
        assert (record.attempt, record.claims) == (1, 1)
