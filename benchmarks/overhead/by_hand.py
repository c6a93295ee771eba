"""The careful author's application: ``scope="function"``, ``BackgroundTasks``, a session of its own in the task."""

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.overhead.job import Job, note_start, router, url

# As many connections as the other side has in its two pools. On neither side any beyond pool_size: those are opened
# and closed over and over under load, and that would be what is measured.
POOL = {"pool_size": 16, "max_overflow": 0}


def application() -> FastAPI:
    """Make the application of the flavour that the URL's driver asks for."""
    app = make_async() if make_url(url()).get_dialect().is_async else make_sync()
    app.include_router(router)
    return app


def make_sync() -> FastAPI:
    """Write it with ``def``."""
    engine = create_engine(url(), **POOL)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", set_up_sqlite)
    new_session = sessionmaker(engine)
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    def work(job_id: int) -> None:
        note_start(job_id)
        with new_session() as session, session.begin():
            session.get_one(Job, job_id).is_done = True

    @app.post("/jobs", status_code=202)
    def ask(
        session: Annotated[Session, Depends(get_session, scope="function")], tasks: BackgroundTasks
    ) -> dict[str, int]:
        job = Job()
        session.add(job)
        session.flush()
        session.info["job"] = job.id
        tasks.add_task(work, job.id)
        return {"job": job.id}

    return app


def make_async() -> FastAPI:
    """Write it with ``async def``."""
    engine = create_async_engine(url(), **POOL)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", set_up_sqlite)
    new_session = async_sessionmaker(engine)
    app = FastAPI()

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with new_session() as session, session.begin():
            yield session

    async def work(job_id: int) -> None:
        note_start(job_id)
        async with new_session() as session, session.begin():
            (await session.get_one(Job, job_id)).is_done = True

    @app.post("/jobs", status_code=202)
    async def ask(
        session: Annotated[AsyncSession, Depends(get_session, scope="function")], tasks: BackgroundTasks
    ) -> dict[str, int]:
        job = Job()
        session.add(job)
        await session.flush()
        session.info["job"] = job.id
        tasks.add_task(work, job.id)
        return {"job": job.id}

    return app


def set_up_sqlite(connection: Any, record: Any) -> None:
    """Make SQLite fit for more than one writer, as every guide says."""
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "busy_timeout = 30000", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
