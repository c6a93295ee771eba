"""The session of the request is passed to a task."""

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

import httpx
from fastapi import BackgroundTasks, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from aftercommit import Database
from aftercommit.errors import AfterCommitError
from aftercommit.fastapi import AfterCommitDep, SessionDep, install
from hazards.measure import Outcome, Scenario, ask, engine_of, errors_in, idle_in_transaction, log_kept, running
from hazards.models import File, create_tables
from tests.support.servers import serve


def app_today(engine: Engine, scope: Literal["function", "request"]) -> FastAPI:
    """Pass it on, as 20 of 51 public code bases pass it or a mapped instance of it."""
    new_session = sessionmaker(engine)
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    def process(session: Session, file_id: int, line: str) -> None:
        file = session.get_one(File, file_id)
        file.total += int(line)
        file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(
        session: Annotated[Session, Depends(get_session, scope=scope)], tasks: BackgroundTasks, line: str
    ) -> dict[str, int]:
        file = File()
        session.add(file)
        session.flush()
        tasks.add_task(process, session, file.id, line)
        return {"id": file.id}

    return app


def app_better(url: str) -> tuple[FastAPI, Database]:
    """Hand over data; the session is the task's own."""
    db = Database(url)
    app = FastAPI()
    install(app, db, create_tables=True)

    @db.task
    def process(session: Session, file_id: int, line: str) -> None:
        file = session.get_one(File, file_id)
        file.total += int(line)
        file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(session: SessionDep, after_commit: AfterCommitDep, line: str) -> dict[str, int]:
        file = File()
        session.add(file)
        session.flush()
        after_commit(process, file.id, line)
        return {"id": file.id}

    @app.post("/out-of-habit")
    def upload_out_of_habit(session: SessionDep, after_commit: AfterCommitDep, line: str) -> None:
        after_commit(process, session, 1, line)  # type: ignore[arg-type, call-arg] # a type checker says so, too

    @app.exception_handler(AfterCommitError)
    def explain(request: Request, error: AfterCommitError) -> JSONResponse:
        return JSONResponse({"error": type(error).__name__}, status_code=500)

    return app, db


def today_default_scope(url: str) -> Outcome:
    """The task runs inside the transaction of the request, after the answer: its error takes the file with it."""
    create_tables(url)

    with engine_of(url) as engine, log_kept(), serve(app_today(engine, "request")) as base:
        answer = httpx.post(f"{base}/files", params={"line": "oops"}).status_code
    files = ask(url, "SELECT count(*) FROM file")

    return Outcome(
        said=f"answered {answer}; then the task failed, and the file that the client was promised is "
        + ("there" if files else "gone"),
        is_right=files == 1,
        facts={"answer": answer, "files": files},
    )


def today_function_scope(url: str) -> Outcome:
    """SQLAlchemy revives the closed session without a word, and nobody will ever commit it."""
    create_tables(url)

    with engine_of(url) as engine, log_kept() as log:
        with serve(app_today(engine, "function")) as base:
            answer = httpx.post(f"{base}/files", params={"line": "7"}).status_code
        idle = idle_in_transaction(url)
    status = ask(url, "SELECT status FROM file")

    return Outcome(
        said=f"answered {answer}; the task ran, {len(errors_in(log))} errors, its write is "
        + ("there" if status == "completed" else "lost")
        + f"; connections left idle in transaction: {idle}",
        is_right=status == "completed",
        facts={"answer": answer, "status": status, "errors": len(errors_in(log)), "idle": idle},
    )


def better(url: str, *, line: str) -> Outcome:
    """A session is refused at hand-over; one of the task's own does what was meant, and fails alone."""
    create_tables(url)
    app, db = app_better(url)

    with log_kept(), running(app, db) as base:
        answer = httpx.post(f"{base}/files", params={"line": line}).status_code
        refusal = httpx.post(f"{base}/out-of-habit", params={"line": line}).json()["error"]
        db.drain(timeout=30)
        idle = idle_in_transaction(url)
    status = ask(url, "SELECT status FROM file")
    state = ask(url, "SELECT state FROM aftercommit_task")
    expected = ("uploaded", "failed") if line == "oops" else ("completed", "succeeded")

    return Outcome(
        said=f"passing it is refused ({refusal}); with one of its own: answered {answer}, the file is {status}, "
        f"the task recorded as {state}; connections left idle in transaction: {idle}",
        is_right=(status, state) == expected and not idle,
        facts={"answer": answer, "status": status, "state": state, "refusal": refusal, "idle": idle},
    )


SCENARIOS = (
    Scenario(
        title="the session of the request passed to a task, default scope",
        today=today_default_scope,
        better=partial(better, line="oops"),
    ),
    Scenario(
        title="the same under scope='function'",
        today=today_function_scope,
        better=partial(better, line="7"),
    ),
)
