"""A counter is read, counted up and written, by many tasks at a time."""

from collections.abc import Iterator
from functools import partial
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from aftercommit import Database, PoolSettings
from aftercommit.fastapi import AfterCommitDep, SessionDep, install
from hazards.measure import Outcome, Scenario, ask, engine_of, log_kept, onlooker, post, running
from hazards.models import Stats, create_tables
from tests.support.servers import serve

INCREMENTS = 400
WIDTH = 10


def app_today(engine: Engine) -> FastAPI:
    """Do everything else right: scope="function", a session of its own in the task."""
    new_session = sessionmaker(engine)
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    def count() -> None:
        with new_session() as session, session.begin():
            stats = session.get_one(Stats, 1)
            stats.user_count += 1

    @app.post("/users", status_code=202)
    def register(session: Annotated[Session, Depends(get_session, scope="function")], tasks: BackgroundTasks) -> None:
        tasks.add_task(count)

    return app


def app_better(url: str) -> tuple[FastAPI, Database]:
    """Write the same; a run that met another is repeated as a whole."""
    db = Database(url, pools={"stats": PoolSettings(pool_size=WIDTH, max_overflow=0)})
    app = FastAPI()
    install(app, db, create_tables=True)

    @db.task(pool="stats")
    def count(session: Session) -> None:
        stats = session.get_one(Stats, 1)
        stats.user_count += 1

    @app.post("/users", status_code=202)
    def register(session: SessionDep, after_commit: AfterCommitDep) -> None:
        after_commit(count)

    return app, db


def today(url: str, *, increments: int = INCREMENTS) -> Outcome:
    """At READ COMMITTED two tasks read the same figure, and the later write wins."""
    prepare(url)

    with engine_of(url, pool_size=2 * WIDTH) as engine, log_kept(), serve(app_today(engine)) as base:
        post(f"{base}/users", times=increments, width=WIDTH)

    return outcome(url, increments)


def better(url: str, *, increments: int = INCREMENTS) -> Outcome:
    """At REPEATABLE READ the later one fails, and is run again."""
    prepare(url)
    app, db = app_better(url)

    with log_kept(), running(app, db) as base:
        post(f"{base}/users", times=increments, width=WIDTH)

    return outcome(url, increments)


def prepare(url: str) -> None:
    """Make the table and its one row."""
    create_tables(url)
    with onlooker(url) as engine, Session(engine) as session, session.begin():
        session.add(Stats(id=1))


def outcome(url: str, increments: int) -> Outcome:
    """Read the counter."""
    left = ask(url, "SELECT user_count FROM stats")
    return Outcome(
        said=f"the counter stands at {left} of {increments}",
        is_right=left == increments,
        facts={"left": left, "increments": increments},
    )


def scenario(increments: int) -> Scenario:
    """Return the scenario with that many increments."""
    return Scenario(
        title=f"{increments} × `stats.user_count += 1`, {WIDTH} at a time",
        today=partial(today, increments=increments),
        better=partial(better, increments=increments),
    )


SCENARIOS = (scenario(INCREMENTS),)
