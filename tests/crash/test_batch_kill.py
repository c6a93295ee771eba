"""A batch in a process that is killed (SIGKILL), again and again, anywhere: nothing twice, nothing left out."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from aftercommit import TaskRecord
from tests.crash.batch_child import BAD, COUNT, Base, Record, async_main, make
from tests.crash.proxy import ARM, Proxy
from tests.support.databases import DatabaseUnderTest
from tests.support.processes import Log, spawn

ROOT = Path(__file__).parents[2]


class Child:
    """One life of the worker process."""

    def __init__(self, database: DatabaseUnderTest, workers: int, point: str) -> None:
        command = [sys.executable, "-m", "tests.crash.batch_child", database.url, database.driver, str(workers), point]
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
    # Any flavour writes the same record.
    db = make(database.sync_url, is_async=False, workers=1)
    db.create_tables()
    with db.session() as session:
        session.add_all(Record(id=number) for number in range(1, COUNT + 1))
        db.after_commit(session, db.tasks["work"])
    db.dispose()
    yield engine
    engine.dispose()


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_anywhere_a_batch_goes_on_from_its_last_commit(
    database: DatabaseUnderTest, engine: sa.Engine, workers: int
) -> None:
    """Killed in a handler, and before COMMITs, five times over: every good record once, every bad one marked once."""
    points = ["commit:1", "handler:12", "commit:3", "handler:40", "commit:4"]

    for point in points:
        child = Child(database, workers, point)
        try:
            child.log.wait_for("AT ")
        except RuntimeError:
            # A wide batch may have passed the point by the time that it was rescued.
            assert workers > 1, child.log.text
        finally:
            child.kill()
        with Session(engine) as session, session.begin():
            # Five lives for five deaths, and one to finish.
            session.execute(sa.update(TaskRecord).values(max_attempts=20))
    last = Child(database, workers, "")
    try:
        last.log.wait_for("DRAINED", timeout=60.0)
    finally:
        last.kill()

    assert_exact(engine)


def assert_exact(engine: sa.Engine) -> None:
    """Every good record once, every bad one marked once, and the task says so."""
    with Session(engine) as session:
        record = session.scalars(sa.select(TaskRecord)).one()
        assert (record.state, record.result) == ("succeeded", COUNT), record.traceback
        rows = {row.id: (row.n, row.marks) for row in session.scalars(sa.select(Record))}
    assert rows == {number: (0, 1) if number in BAD else (1, 0) for number in range(1, COUNT + 1)}


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
