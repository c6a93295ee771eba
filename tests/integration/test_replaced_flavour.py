"""While a test's connection replaces the database, nothing goes past it to the real one."""

from pathlib import Path
from uuid import UUID

import pytest

from aftercommit import Database, TaskRecord
from aftercommit.errors import ConfigurationError
from aftercommit.testing import replace

SOME_ID = UUID(int=1)


async def test_async_tasks_run_on_the_connection_of_the_test(tmp_path: Path) -> None:
    """With both flavours to be had, an async test's bookkeeping goes over its AsyncConnection, too."""
    db = Database(f"sqlite:///{tmp_path / 'a.db'}")
    await db.async_create_tables()

    @db.task
    async def nothing() -> None: ...

    async with db.async_engine().connect() as connection:
        transaction = await connection.begin()
        async with replace(db, connection=connection) as tasks:
            async with db.async_session() as session:
                handle = db.after_commit(session, nothing)
            ran = await tasks.async_run()
            async with db.async_session() as session:
                state = (await session.get_one(TaskRecord, handle.id)).state
        await transaction.rollback()
    await db.async_dispose()

    assert (ran, state) == (1, "succeeded")


async def test_wrong_flavour_is_refused(tmp_path: Path) -> None:
    """A call that the test's connection cannot serve raises, rather than reach the real database."""
    db = Database(f"sqlite:///{tmp_path / 'a.db'}")

    async with db.async_engine().connect() as connection:
        transaction = await connection.begin()
        async with replace(db, connection=connection):
            with pytest.raises(ConfigurationError, match="replaced by an AsyncConnection"):
                db.cancel(SOME_ID)
        await transaction.rollback()
    with db.engine().connect() as connection:
        transaction = connection.begin()
        with replace(db, connection=connection), pytest.raises(ConfigurationError, match="replaced by a Connection"):
            await db.async_cancel(SOME_ID)
        transaction.rollback()
    await db.async_dispose()
