"""A request adds three tasks, and the second fails."""

from collections.abc import Iterator
from typing import Annotated

import httpx
from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from aftercommit import Database
from aftercommit.fastapi import AfterCommitDep, SessionDep, install
from hazards.measure import Outcome, Scenario, ask, engine_of, log_kept, running
from hazards.models import File, create_tables
from tests.support.servers import serve

LINES = ("1", "oops", "3")


def app_today(engine: Engine) -> FastAPI:
    """Do everything else right: scope="function", a session of its own in the task."""
    new_session = sessionmaker(engine)
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    def process(file_id: int, line: str) -> None:
        with new_session() as session, session.begin():
            file = session.get_one(File, file_id)
            file.total = int(line)
            file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(session: Annotated[Session, Depends(get_session, scope="function")], tasks: BackgroundTasks) -> None:
        files = [File() for _ in LINES]
        session.add_all(files)
        session.flush()
        for file, line in zip(files, LINES, strict=True):
            tasks.add_task(process, file.id, line)

    return app


def app_better(url: str) -> tuple[FastAPI, Database]:
    """Write the same, without the plumbing."""
    db = Database(url)
    app = FastAPI()
    install(app, db, create_tables=True)

    @db.task
    def process(session: Session, file: File, line: str) -> None:
        file.total = int(line)
        file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(session: SessionDep, after_commit: AfterCommitDep) -> None:
        files = [File() for _ in LINES]
        session.add_all(files)
        for file, line in zip(files, LINES, strict=True):
            after_commit(process, file, line)

    return app, db


def today(url: str) -> Outcome:
    """Starlette runs tasks in a plain loop: the first error ends it."""
    create_tables(url)

    with engine_of(url) as engine, log_kept(), serve(app_today(engine)) as base:
        answer = httpx.post(f"{base}/files").status_code
    completed = ask(url, "SELECT count(*) FROM file WHERE status = 'completed'")

    return Outcome(
        said=f"answered {answer}; {completed} of the 2 good ones done; recorded nowhere: only a traceback in the log",
        is_right=completed == 2,
        facts={"answer": answer, "completed": completed, "recorded": 0},
    )


def better(url: str) -> Outcome:
    """Each task stands alone, and the failure is on record."""
    create_tables(url)
    app, db = app_better(url)

    with log_kept(), running(app, db) as base:
        answer = httpx.post(f"{base}/files").status_code
    completed = ask(url, "SELECT count(*) FROM file WHERE status = 'completed'")
    recorded = ask(url, "SELECT count(*) FROM aftercommit_task WHERE state = 'failed' AND traceback LIKE '%oops%'")

    return Outcome(
        said=f"answered {answer}; {completed} of the 2 good ones done; failures on record, with traceback: {recorded}",
        is_right=(completed, recorded) == (2, 1),
        facts={"answer": answer, "completed": completed, "recorded": recorded},
    )


SCENARIOS = (Scenario(title="three tasks, and the second fails", today=today, better=better),)
