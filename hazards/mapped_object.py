"""A mapped object of the request is passed to a task."""

from collections.abc import Iterator
from functools import partial
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


def app_today(engine: Engine, *, expire_on_commit: bool) -> FastAPI:
    """Pass the object; open a session in the task, as advised, to commit in."""
    new_session = sessionmaker(engine, expire_on_commit=expire_on_commit)
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    def process(file: File) -> None:
        with new_session() as session, session.begin():
            if file.status == "uploaded":
                file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(session: Annotated[Session, Depends(get_session, scope="function")], tasks: BackgroundTasks) -> None:
        file = File()
        session.add(file)
        tasks.add_task(process, file)

    return app


def app_better(url: str) -> tuple[FastAPI, Database]:
    """Pass the object: its identity crosses, and the task gets one of its own session."""
    db = Database(url)
    app = FastAPI()
    install(app, db, create_tables=True)

    @db.task
    def process(session: Session, file: File) -> None:
        if file.status == "uploaded":
            file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(session: SessionDep, after_commit: AfterCommitDep) -> None:
        file = File()
        session.add(file)
        after_commit(process, file)

    return app, db


def today(url: str, *, expire_on_commit: bool) -> Outcome:
    """The object belongs to a session that has ended; the task's own session knows nothing of it."""
    create_tables(url)

    with (
        engine_of(url) as engine,
        log_kept() as log,
        serve(app_today(engine, expire_on_commit=expire_on_commit)) as base,
    ):
        answer = httpx.post(f"{base}/files").status_code

    return outcome(url, answer, errors_in(log))


def better(url: str) -> Outcome:
    """The object in the task belongs to the task's session."""
    create_tables(url)
    app, db = app_better(url)

    with log_kept() as log, running(app, db) as base:
        answer = httpx.post(f"{base}/files").status_code

    return outcome(url, answer, errors_in(log))


def outcome(url: str, answer: int, errors: list[str]) -> Outcome:
    """Look at what became of the file."""
    status = ask(url, "SELECT status FROM file")
    written = "there" if status == "completed" else "lost"
    return Outcome(
        said=f"answered {answer}; {', '.join(errors) or 'no error'} in the task; its write is {written}",
        is_right=status == "completed",
        facts={"answer": answer, "status": status, "errors": errors},
    )


SCENARIOS = (
    Scenario(
        title="a mapped object passed to a task",
        today=partial(today, expire_on_commit=True),
        better=better,
    ),
    Scenario(
        title="the same with expire_on_commit=False",
        today=partial(today, expire_on_commit=False),
        better=better,
    ),
)
