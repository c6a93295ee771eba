"""The server is killed while tasks that were promised to clients are under way."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker

from aftercommit import Database
from aftercommit.fastapi import AfterCommitDep, SessionDep, install
from hazards.measure import Outcome, Scenario, ask, onlooker, post, statuses
from hazards.models import File, create_tables
from tests.support.servers import Server

REQUESTS = 5
SECONDS = 120.0
# The tasks wait for a lock that the driver holds, so that all of them are under way when the server is killed.
GATE = text("SELECT pg_advisory_xact_lock_shared(1)")


def app_today() -> FastAPI:
    """Do everything else right: scope="function", a session of its own in the task."""
    new_session = sessionmaker(create_engine(os.environ["HAZARD_URL"]))
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    def process(file_id: int) -> None:
        with new_session() as session, session.begin():
            session.execute(GATE)
            file = session.get_one(File, file_id)
            file.total += 1
            file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(session: Annotated[Session, Depends(get_session, scope="function")], tasks: BackgroundTasks) -> None:
        file = File()
        session.add(file)
        session.flush()
        tasks.add_task(process, file.id)

    return app


def app_better() -> FastAPI:
    """Write the same; the tasks stand in the database."""
    # By default a process is given up after 30 seconds of silence; nobody wants to watch that.
    db = Database(os.environ["HAZARD_URL"], heartbeat=1.0, silent_after=4.0)
    app = FastAPI()
    install(app, db, create_tables=True)

    @db.task
    def process(session: Session, file: File) -> None:
        session.execute(GATE)
        file.total += 1
        file.status = "completed"

    @app.post("/files", status_code=202)
    def upload(session: SessionDep, after_commit: AfterCommitDep) -> None:
        file = File()
        session.add(file)
        after_commit(process, file)

    return app


def today(url: str) -> Outcome:
    """What waits in memory dies with the process."""
    return measure(url, "app_today")


def better(url: str) -> Outcome:
    """What waits in the database is taken up by the next process."""
    return measure(url, "app_better", wait_for=REQUESTS)


def measure(url: str, app: str, *, wait_for: int = 0) -> Outcome:
    """Upload, kill the server with every task under way, start it again, and look, once *wait_for* are done."""
    create_tables(url)
    server = Server(f"hazards.restart:{app}", env={"HAZARD_URL": url}, arguments=["--factory"])

    with server:
        with gate_shut(url):
            answered = statuses(post(f"{server.url}/files", times=REQUESTS, width=REQUESTS))[202]
            wait_until(url, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted", REQUESTS)
            server.kill()
        server.start()
        wait_until(url, "SELECT count(*) FROM file WHERE status = 'completed'", wait_for)
        # Asked to stop, it lets everything end that it is about to do.
        server.stop()
    done = ask(url, "SELECT count(*) FROM file WHERE status = 'completed'")
    twice = ask(url, "SELECT count(*) FROM file WHERE total > 1")

    return Outcome(
        said=f"{answered} × 202; after the restart {done} of {answered} were done, {twice} twice",
        is_right=(answered, done, twice) == (REQUESTS, REQUESTS, 0),
        facts={"answered": answered, "done": done, "twice": twice},
    )


@contextmanager
def gate_shut(url: str) -> Iterator[None]:
    """Hold the lock that the tasks wait for."""
    with onlooker(url) as engine, engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(1)"))
        yield


def wait_until(url: str, question: str, number: int) -> None:
    """Ask again and again until the answer is *number* at least."""
    pause = Event()
    with onlooker(url) as engine:
        for _ in range(int(SECONDS / 0.02)):
            with engine.connect() as connection:
                if connection.scalar(text(question)) >= number:
                    return
            pause.wait(0.02)
    raise TimeoutError(f"{question!r} did not reach {number} in {SECONDS} s.")


SCENARIOS = (Scenario(title=f"a SIGKILL and a restart with {REQUESTS} tasks under way", today=today, better=better),)
