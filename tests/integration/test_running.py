"""A runner outside FastAPI: what it leaves behind, and who commits past a session."""

import gc
import threading
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database
from aftercommit.testing import replace
from tests.support.databases import DatabaseUnderTest


@pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite")
def test_a_runner_of_a_script_closes_what_its_own_loop_opened(database: DatabaseUnderTest) -> None:
    """``with db.running()`` runs async tasks on a loop of its own; their connections are closed before it ends."""
    db = Database(database.url.replace("sqlite+aiosqlite", "sqlite"))
    ran = threading.Event()

    @db.task
    async def work(session: AsyncSession) -> None:
        await session.connection()
        ran.set()

    @db.task
    def begin() -> None: ...

    with db.running(create_tables=True):
        runner = db.runner
        assert runner is not None
        runner.books.call(lambda _connection: None)
        if db.sessions.is_async_only:
            import asyncio

            async def ask() -> None:
                async with db.async_session() as session:
                    db.after_commit(session, work)
                await db.async_dispose()

            asyncio.run(ask())
        else:
            with db.session() as session:
                db.after_commit(session, work)
        assert ran.wait(30)
        db.drain()
    db.dispose()

    # Whatever was left open would be a ResourceWarning here, and with it an error.
    gc.collect()
    assert [thread.name for thread in threading.enumerate() if "aftercommit" in thread.name] == []


def test_a_commit_past_a_joined_session_is_seen_by_a_test(tmp_path: Path) -> None:
    """A session joined to a connection waits for that one's commit, and the test's list then has its task."""
    db = Database(f"sqlite:///{tmp_path / 'real.db'}")

    @db.task
    def work() -> None: ...

    with replace(db, url=f"sqlite:///{tmp_path / 'other.db'}") as tasks:
        with db.engine().connect() as connection, connection.begin() as outer:
            with Session(connection, join_transaction_mode="create_savepoint") as session:
                handle = db.after_commit(session, work)
                session.commit()
            before = tasks.pending
            outer.commit()
        after = tasks.pending
        ran = tasks.run()

    assert before == ()
    assert [task.id for task in after] == [handle.id]
    assert handle.created
    assert ran == 1


def test_a_parameter_may_have_any_name(tmp_path: Path) -> None:
    """A task's own parameters called ``task`` and ``session`` are passed by keyword like all others."""
    db = Database(f"sqlite:///{tmp_path / 'a.db'}")
    seen: list[tuple[str, str]] = []

    @db.task
    def assign(task: str, session: str) -> None:
        seen.append((task, session))

    with db.running():
        with db.session() as own:
            db.after_commit(own, assign, task="paint", session="morning")
        db.drain()
    db.dispose()

    assert seen == [("paint", "morning")]
