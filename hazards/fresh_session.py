"""The advice found everywhere: open a fresh session in the task. The dependency commits after the tasks."""

from collections.abc import Iterator
from typing import Annotated

import httpx
from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from aftercommit import Database
from aftercommit.fastapi import AfterCommitDep, SessionDep, install
from hazards.measure import Outcome, Scenario, ask, engine_of, errors_in, log_kept, running
from hazards.models import File, create_tables
from tests.support.servers import serve


def app_today(engine: Engine) -> FastAPI:
    """Commit in the dependency, open a session in the task."""
    new_session = sessionmaker(engine)
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    def process(file_id: int) -> None:
        with new_session() as session, session.begin():
            file = session.get(File, file_id)
            if file is None:
                return  # deleted meanwhile, the author thinks
            file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(session: Annotated[Session, Depends(get_session)], tasks: BackgroundTasks) -> dict[str, int]:
        file = File()
        session.add(file)
        session.flush()
        tasks.add_task(process, file.id)
        return {"id": file.id}

    return app


def app_better(url: str) -> tuple[FastAPI, Database]:
    """Hand the file over; it is loaded in the task's session, after the commit."""
    db = Database(url)
    app = FastAPI()
    install(app, db, create_tables=True)

    @db.task
    def process(session: Session, file: File) -> None:
        file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(session: SessionDep, after_commit: AfterCommitDep) -> None:
        file = File()
        session.add(file)
        after_commit(process, file)

    return app, db


def today(url: str) -> Outcome:
    """The task looks for a row that is not committed yet."""
    create_tables(url)

    with engine_of(url) as engine, log_kept() as log, serve(app_today(engine)) as base:
        answer = httpx.post(f"{base}/files").status_code

    return outcome(url, answer, errors_in(log))


def better(url: str) -> Outcome:
    """The task starts after the commit."""
    create_tables(url)
    app, db = app_better(url)

    with log_kept() as log, running(app, db) as base:
        answer = httpx.post(f"{base}/files").status_code

    return outcome(url, answer, errors_in(log))


def outcome(url: str, answer: int, errors: list[str]) -> Outcome:
    """Look at what became of the file."""
    status = ask(url, "SELECT status FROM file")
    found = "found" if status == "completed" else "did not find"
    return Outcome(
        said=f"answered {answer}; the task {found} the row, {len(errors)} errors; the file is {status}",
        is_right=status == "completed",
        facts={"answer": answer, "status": status, "errors": errors},
    )


SCENARIOS = (
    Scenario(
        title="a fresh session in the task, the commit in the dependency",
        today=today,
        better=better,
    ),
)
