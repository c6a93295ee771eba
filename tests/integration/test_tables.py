"""Tables made by whoever comes first, however many come at once."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aftercommit import Database, TaskRecord
from aftercommit.fastapi import install
from tests.support.databases import DatabaseUnderTest


class Base(DeclarativeBase):
    """Base of an application's own tables."""


class Shelf(Base):
    """One of them."""

    __tablename__ = "shelf"
    id: Mapped[int] = mapped_column(primary_key=True)


def names_in(database: DatabaseUnderTest) -> set[str]:
    """Which tables there are, seen by another engine."""
    url = database.url.replace("+aiosqlite", "").replace("+asyncpg", "+psycopg")
    engine: Engine = create_engine(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


async def make(database: DatabaseUnderTest) -> None:
    """Start and stop an application that makes its tables at start-up."""
    db = Database(database.url)
    app = FastAPI()
    install(app, db, create_tables=Base.metadata)
    async with app.router.lifespan_context(app):
        pass


def test_applications_that_start_together_make_all_tables_once(database: DatabaseUnderTest) -> None:
    """Eight applications starting at the same moment make ours and their own tables, and none of them fails."""
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        asyncio.run(make(database))

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(start) for _ in range(8)]:
            future.result()

    assert names_in(database) >= {"shelf", *TaskRecord.metadata.tables}


@pytest.mark.drivers("pysqlite", "psycopg")
def test_tables_of_the_application_are_made_along_with_ours(database: DatabaseUnderTest) -> None:
    """``also=Base.metadata`` makes the application's own tables under the same lock."""
    db = Database(database.url)

    db.create_tables(also=Base.metadata)
    db.dispose()

    assert "shelf" in names_in(database)


@pytest.mark.drivers("psycopg", "asyncpg")
def test_postgresql_is_told_how_to_vacuum_the_queue(database: DatabaseUnderTest) -> None:
    """The table of tasks is made with room on its pages, and is vacuumed long before a fifth of it is dead."""
    asyncio.run(make(database))

    engine = create_engine(database.sync_url)
    with engine.connect() as connection:
        options = connection.scalar(text("SELECT reloptions FROM pg_class WHERE relname = 'aftercommit_task'"))
    engine.dispose()
    assert sorted(options) == [
        "autovacuum_analyze_scale_factor=0.02",
        "autovacuum_vacuum_scale_factor=0.02",
        "autovacuum_vacuum_threshold=1000",
        "fillfactor=80",
    ]
