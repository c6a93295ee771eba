"""The two applications: requests that read, and tasks that hold a connection for two seconds."""

import os
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Final

from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from aftercommit import Database, PoolSettings
from aftercommit.fastapi import AfterCommitDep, AsyncSessionDep, SessionDep, install

URL: Final = "BENCHMARK_URL"
PLACES: Final = 5
"""Connections for requests, and as many for tasks; by hand they are one pool of twice the size."""

READ = text("SELECT 1")
HOLD = text("SELECT pg_sleep(2)")


def url() -> str:
    """Return the URL that the application is to use."""
    return os.environ[URL]


def is_async() -> bool:
    """Whether its driver serves async sessions."""
    return bool(make_url(url()).get_dialect().is_async)


def by_hand() -> FastAPI:
    """Make the application as people write it."""
    return _by_hand_async() if is_async() else _by_hand_sync()


def _by_hand_sync() -> FastAPI:
    engine = create_engine(url(), pool_size=2 * PLACES, max_overflow=0)
    new_session = sessionmaker(engine)
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    given = Depends(get_session, scope="function")

    def work() -> None:
        with new_session() as session, session.begin():
            session.execute(HOLD)

    @app.post("/read", status_code=202)
    def read(session: Annotated[Session, given]) -> int:
        return session.scalar(READ) or 0

    @app.post("/task", status_code=202)
    def ask(session: Annotated[Session, given], tasks: BackgroundTasks) -> int:
        tasks.add_task(work)
        return session.scalar(READ) or 0

    return app


def _by_hand_async() -> FastAPI:
    engine = create_async_engine(url(), pool_size=2 * PLACES, max_overflow=0)
    new_session = async_sessionmaker(engine)
    app = FastAPI()

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with new_session() as session, session.begin():
            yield session

    given = Depends(get_session, scope="function")

    async def work() -> None:
        async with new_session() as session, session.begin():
            await session.execute(HOLD)

    @app.post("/read", status_code=202)
    async def read(session: Annotated[AsyncSession, given]) -> int:
        return await session.scalar(READ) or 0

    @app.post("/task", status_code=202)
    async def ask(session: Annotated[AsyncSession, given], tasks: BackgroundTasks) -> int:
        tasks.add_task(work)
        return await session.scalar(READ) or 0

    return app


def with_aftercommit() -> FastAPI:
    """Make the application with a pool for its tasks."""
    places = PoolSettings(pool_size=PLACES, max_overflow=0)
    db = Database(url(), pool=places, pools={"default": places})
    app = FastAPI()
    install(app, db, create_tables=True)
    if is_async():
        _add_async(app, db)
    else:
        _add_sync(app, db)
    return app


def _add_sync(app: FastAPI, db: Database) -> None:
    @db.task
    def work(session: Session) -> None:
        session.execute(HOLD)

    @app.post("/read", status_code=202)
    def read(session: SessionDep) -> int:
        return session.scalar(READ) or 0

    @app.post("/task", status_code=202)
    def ask(session: SessionDep, after_commit: AfterCommitDep) -> int:
        after_commit(work)
        return session.scalar(READ) or 0


def _add_async(app: FastAPI, db: Database) -> None:
    @db.task
    async def work(session: AsyncSession) -> None:
        await session.execute(HOLD)

    @app.post("/read", status_code=202)
    async def read(session: AsyncSessionDep) -> int:
        return await session.scalar(READ) or 0

    @app.post("/task", status_code=202)
    async def ask(session: AsyncSessionDep, after_commit: AfterCommitDep) -> int:
        after_commit(work)
        return await session.scalar(READ) or 0
