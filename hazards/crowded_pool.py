"""Twenty requests at once on a pool of five, each adding a task that opens a session of its own."""

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from aftercommit import Database, PoolSettings
from aftercommit.fastapi import AfterCommitDep, SessionDep, install
from hazards.measure import Outcome, Scenario, ask, engine_of, log_kept, post, running, statuses
from hazards.models import File, create_tables
from tests.support.servers import serve

REQUESTS = 20
POOL: dict[str, Any] = {
    "pool_size": 5,
    "max_overflow": 0,
    "pool_timeout": 2.0,
}  # 30 seconds by default: the same, later


def app_today(engine: Engine) -> FastAPI:
    """Share one pool; the request keeps its connection until its task has run."""
    new_session = sessionmaker(engine)
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    def process() -> None:
        with new_session() as session, session.begin():
            session.add(File(status="completed"))

    @app.post("/files", status_code=202)
    def upload(session: Annotated[Session, Depends(get_session)], tasks: BackgroundTasks) -> None:
        session.add(File())
        session.flush()
        tasks.add_task(process)

    return app


def app_better(url: str) -> tuple[FastAPI, Database]:
    """Have a pool for requests and one for tasks; nobody holds a connection while waiting for another."""
    db = Database(url, pool=PoolSettings(**POOL), pools={"files": PoolSettings(**POOL)})
    app = FastAPI()
    install(app, db, create_tables=True)

    @db.task(pool="files")
    def process(session: Session) -> None:
        session.add(File(status="completed"))

    @app.post("/files", status_code=202)
    def upload(session: SessionDep, after_commit: AfterCommitDep) -> None:
        session.add(File())
        after_commit(process)

    return app, db


def today(url: str) -> Outcome:
    """Requests hold what their tasks wait for."""
    create_tables(url)

    with engine_of(url, **POOL) as engine, log_kept(), serve(app_today(engine)) as base:
        answers = statuses(post(f"{base}/files", times=REQUESTS, width=REQUESTS))

    return outcome(url, answers)


def better(url: str) -> Outcome:
    """Requests never wait for tasks."""
    create_tables(url)
    app, db = app_better(url)

    with log_kept(), running(app, db) as base:
        answers = statuses(post(f"{base}/files", times=REQUESTS, width=REQUESTS))

    return outcome(url, answers)


def outcome(url: str, answers: dict[int, int]) -> Outcome:
    """Count the answers, and what was done."""
    files = ask(url, "SELECT count(*) FROM file WHERE status = 'uploaded'")
    done = ask(url, "SELECT count(*) FROM file WHERE status = 'completed'")
    counted = ", ".join(f"{count} × {status}" for status, count in sorted(answers.items()))
    return Outcome(
        said=f"{counted}; files kept: {files}; tasks done: {done}",
        is_right=answers.get(202) == files == done == REQUESTS,
        facts={"answered": answers.get(202, 0), "errors": answers.get(500, 0), "files": files, "done": done},
    )


SCENARIOS = (
    Scenario(
        title=f"{REQUESTS} requests at once on a pool of 5, each with a task that opens a session",
        today=today,
        better=better,
    ),
)
