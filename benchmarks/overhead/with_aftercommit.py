"""The same application with aftercommit, its tasks in memory or durable."""

from fastapi import FastAPI
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings
from aftercommit.fastapi import AfterCommitDep, AsyncSessionDep, SessionDep, install
from benchmarks.overhead.job import Job, note_start, router, url

POOL = PoolSettings(pool_size=8, max_overflow=0)


def in_memory() -> FastAPI:
    """Make the application with tasks that may be lost with the process."""
    return application(durable=False)


def durable() -> FastAPI:
    """Make the application with tasks that stand in the database."""
    return application(durable=True)


def application(*, durable: bool) -> FastAPI:
    """Make the application of the flavour that the URL's driver asks for."""
    db = Database(url(), pool=POOL, pools={"default": POOL})
    app = FastAPI()
    install(app, db, create_tables=True)
    app.include_router(router)
    if make_url(url()).get_dialect().is_async:
        add_async(app, db, durable=durable)
    else:
        add_sync(app, db, durable=durable)
    return app


def add_sync(app: FastAPI, db: Database, *, durable: bool) -> None:
    """Write it with ``def``."""

    @db.task(durable=durable)
    def work(session: Session, job_id: int) -> None:
        note_start(job_id)
        session.get_one(Job, job_id).is_done = True

    @app.post("/jobs", status_code=202)
    def ask(session: SessionDep, after_commit: AfterCommitDep) -> dict[str, int]:
        job = Job()
        session.add(job)
        session.flush()
        session.info["job"] = job.id
        after_commit(work, job.id)
        return {"job": job.id}


def add_async(app: FastAPI, db: Database, *, durable: bool) -> None:
    """Write it with ``async def``."""

    @db.task(durable=durable)
    async def work(session: AsyncSession, job_id: int) -> None:
        note_start(job_id)
        (await session.get_one(Job, job_id)).is_done = True

    @app.post("/jobs", status_code=202)
    async def ask(session: AsyncSessionDep, after_commit: AfterCommitDep) -> dict[str, int]:
        job = Job()
        session.add(job)
        await session.flush()
        session.info["job"] = job.id
        after_commit(work, job.id)
        return {"job": job.id}
