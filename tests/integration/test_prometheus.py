"""What a scrape of ``/metrics`` shows: the pools, tasks and queue of a real application, by names and never by ids."""

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, Every, PoolSettings, Retry, current_run, signals
from aftercommit.fastapi import AfterCommitDep, AsyncSessionDep, SessionDep, install
from aftercommit.monitoring.prometheus import instrument, metrics_router, uninstrument
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import serve
from tests.support.workshop import TIMEOUT, Heard, Workshop


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float | None:
        """The value of the only sample of this name that has these labels; None if there is none."""
        found = [each for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        assert len(found) < 2, found
        return found[0].value if found else None


@pytest.fixture
def registry() -> Iterator[CollectorRegistry]:
    """A registry of the test's own."""
    registry = CollectorRegistry()
    yield registry
    uninstrument(registry=registry)


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database, heartbeat=0.2, pools={"narrow": PoolSettings(pool_size=1)})
    yield shop
    shop.close()


def scrape(registry: CollectorRegistry) -> Scrape:
    """What is in a registry now."""
    return Scrape(generate_latest(registry).decode())


def application(database: DatabaseUnderTest, registry: CollectorRegistry) -> tuple[FastAPI, Database]:
    """An application with a task that may fail, in the flavour under test, and ``/metrics``."""
    db = Database(database.url)
    app = FastAPI()
    install(app, db, create_tables=True)
    app.include_router(metrics_router(db, registry=registry))

    def body(outcome: str) -> None:
        run = current_run()
        assert run is not None
        if outcome == "fail":
            raise ValueError("no use")
        if outcome == "retry" and run.attempt == 1:
            raise KeyError("not yet")

    retry = Retry(base=0.01, on=(KeyError,))
    if database.is_async:

        @db.task(retry=retry)
        async def work(session: AsyncSession, outcome: str) -> None:
            await session.connection()
            body(outcome)

        @app.post("/{outcome}")
        async def ask_async(outcome: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> str:
            return str(after_commit(work, outcome).id)

    else:

        @db.task(name="work", retry=retry)
        def plain(session: Session, outcome: str) -> None:
            session.connection()
            body(outcome)

        @app.post("/{outcome}")
        def ask(outcome: str, session: SessionDep, after_commit: AfterCommitDep) -> str:
            return str(after_commit(plain, outcome).id)

    return app, db


def test_a_scrape_shows_pools_and_tasks(database: DatabaseUnderTest, registry: CollectorRegistry):
    """Over a real server: tasks by what became of them, with their times, and connections by their state."""
    app, _ = application(database, registry)
    with serve(app) as url, Heard(signals.Signal) as heard:
        ids = [httpx.post(f"{url}/{outcome}").json() for outcome in ("succeed", "fail", "retry")]
        heard.wait(signals.TaskSucceeded, count=2)
        heard.wait(signals.TaskFailed)
        answer = httpx.get(f"{url}/metrics")

    seen = Scrape(answer.text)
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/plain")
    name = database.url.rpartition("/")[2]
    task = {"task": "work", "pool": "default"}
    counted = {outcome: seen(f"aftercommit_tasks_{outcome}_total", database=name, **task)
               for outcome in ("done", "failed", "retried", "conflicts", "given_back")}  # fmt: skip
    assert counted == {"done": 2, "failed": 1, "retried": 1, "conflicts": 0, "given_back": 0}
    assert seen("aftercommit_tasks_handed_over_total", **task) == 3
    assert seen("aftercommit_task_run_seconds_count", outcome="done", **task) == 2
    assert seen("aftercommit_task_run_seconds_count", outcome="failed", **task) == 1
    assert seen("aftercommit_task_wait_seconds_count", **task) == 4
    pool = {"database": name, "pool": "default"}
    assert seen("aftercommit_pool_connections", state="used", **pool) is not None
    assert (seen("aftercommit_pool_connections_max", **pool), seen("aftercommit_pool_places", **pool)) == (5, 5)
    assert (seen("aftercommit_pool_waiting", **pool), seen("aftercommit_pool_exhausted_total", **pool)) == (0, 0)
    assert (seen("aftercommit_pool_wait_seconds_count", **pool), seen("aftercommit_pool_paused", **pool)) == (0, 0)
    assert not any(id in seen.text for id in ids)


def test_what_runs_and_waits_shows(shop: Workshop, registry: CollectorRegistry):
    """A task that runs, one behind it, and a pool that is paused can be seen while it lasts."""
    instrument(shop.db, registry=registry)
    gate, begun = threading.Event(), threading.Event()

    @shop.task(pool="narrow", gate=gate, begun=begun.set)
    def slow(session: Session, label: str) -> None: ...

    with shop.running(), Heard(signals.PoolPaused) as heard:
        shop.commit(lambda session: [shop.db.after_commit(session, slow) for _ in range(2)])
        assert begun.wait(TIMEOUT)
        deadline = time.monotonic() + TIMEOUT
        # The second one may be claimed a moment later than the first.
        while not (busy := scrape(registry))("aftercommit_pool_backlog", pool="narrow"):
            assert time.monotonic() < deadline
        shop.on_loop(shop.db.async_pause("default")) if shop.is_async else shop.db.pause("default")
        heard.wait(signals.PoolPaused)
        paused = scrape(registry)
        gate.set()
        shop.drain()

    assert (busy("aftercommit_pool_running", pool="narrow"), busy("aftercommit_pool_backlog", pool="narrow")) == (1, 1)
    assert busy("aftercommit_pool_paused", pool="default") == 0
    assert paused("aftercommit_pool_paused", pool="default") == 1


@pytest.mark.drivers("psycopg", "pysqlite")
def test_the_queue_of_all_processes_shows(shop: Workshop, registry: CollectorRegistry):
    """What is queued, and who runs tasks, is shown for all processes, with the age of that look."""
    instrument(shop.db, registry=registry)

    @shop.task()
    def work(session: Session, label: str) -> None: ...

    shop.db.create_tables()
    shop.commit(lambda session: shop.db.after_commit(session, work.with_options(delay=3600.0)))
    before = scrape(registry)
    deadline = time.monotonic() + TIMEOUT
    with shop.running():
        while (seen := scrape(registry))("aftercommit_cluster_queued", task="work") is None:
            assert time.monotonic() < deadline

    assert before("aftercommit_cluster_workers") is None
    assert (seen("aftercommit_cluster_queued", task="work"), seen("aftercommit_cluster_running", task="work")) == (1, 0)
    assert (seen("aftercommit_cluster_workers"), seen("aftercommit_cluster_oldest_due_seconds", task="work")) == (1, 0)
    assert seen("aftercommit_cluster_age_seconds") is not None


def test_troubles_are_counted(registry: CollectorRegistry):
    """Lost claims and work, rescues, connections held for too long, blocked loops, and a database that went away."""
    run: dict[str, Any] = {"task": "t", "id": None, "pool": "p", "attempt": 1}
    instrument(registry=registry)

    for signal in (
        signals.ClaimLost(**run, seconds=1.0),
        signals.TasksLost(tasks=("t", "t"), lines=("", "")),
        signals.TasksRescued(requeued=(None, None), failed=(None,)),  # type: ignore[arg-type]
        signals.ConnectionHeld(pool="p", owner="x", seconds=1.0, idle=None, locked=False, statement=None),
        signals.LoopBlocked(seconds=1.0, tasks=(), line=None),
        signals.DatabaseDown(error=OSError()),
    ):
        signals.emit(signal)

    seen = scrape(registry)
    assert seen("aftercommit_claims_lost_total", task="t", pool="p") == 1
    assert seen("aftercommit_tasks_lost_total", task="t") == 2
    assert seen("aftercommit_tasks_rescued_total") == 3
    assert seen("aftercommit_connections_held_total", pool="p") == 1
    assert (seen("aftercommit_loop_blocked_total"), seen("aftercommit_database_down_total")) == (1, 1)


def test_two_databases_are_told_apart(tmp_path: Any, registry: CollectorRegistry):
    """Each has its name as a label; those of one name a number, and one that is gone is shown no more."""
    (tmp_path / "other").mkdir()
    one, two = Database(f"sqlite:///{tmp_path}/shop.db"), Database(f"sqlite:///{tmp_path}/other/shop.db")
    instrument(one, registry=registry)
    instrument(one, two, registry=registry)

    both = scrape(registry)
    del two
    gc.collect()
    left = scrape(registry)

    maximum = "aftercommit_pool_connections_max"
    assert [both(maximum, database=name, pool="request") for name in ("shop.db", "shop.db#2")] == [10, 10]
    assert [left(maximum, database=name, pool="request") for name in ("shop.db", "shop.db#2")] == [10, None]


def test_the_router_answers_as_it_is_asked(sqlite_url: str, registry: CollectorRegistry):
    """OpenMetrics for whoever accepts it, all of the registry, behind the application's own guard, in no schema."""
    Gauge("somebody_elses", "Of another library.", registry=registry).set(7)
    app = FastAPI()

    def guard(secret: str) -> None:
        if secret != "s":
            raise HTTPException(403)

    router = metrics_router(Database(sqlite_url), path="/internal/metrics", registry=registry)
    app.include_router(router, dependencies=[Depends(guard)])

    with serve(app) as url:
        accepted = {"accept": "application/openmetrics-text; version=1.0.0"}
        refused = httpx.get(f"{url}/internal/metrics?secret=x")
        answer = httpx.get(f"{url}/internal/metrics?secret=s", headers=accepted)

    assert refused.status_code == 403
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    assert "somebody_elses 7.0" in answer.text
    assert app.openapi()["paths"] == {}


def test_uninstrumented_a_registry_is_empty(registry: CollectorRegistry, sqlite_url: str):
    """After ``uninstrument`` nothing of ours is in the registry, and it may be instrumented anew."""
    instrument(Database(sqlite_url), registry=registry)
    uninstrument(registry=registry)
    uninstrument(registry=registry)
    assert scrape(registry).samples == []

    db = Database(sqlite_url)
    instrument(db, registry=registry)

    assert scrape(registry)("aftercommit_pool_connections_max", pool="request") == 10


@pytest.mark.drivers("psycopg", "pysqlite")
def test_schedules_show(shop: Workshop, registry: CollectorRegistry):
    """By the name of what the code declares; what was made as data by its task, so that no customer is a label."""
    instrument(shop.db, registry=registry)

    @shop.task()
    def bill(session: Session, label: str) -> None: ...

    shop.db.schedule(Every(3600.0, name="of the code", immediately=True), bill, "x")
    with shop.running(), Heard(signals.ScheduleFired) as heard:
        for number in range(2):
            every = Every(3600.0, name=f"customer {number}", immediately=True)
            shop.commit(lambda session, every=every: shop.db.create_schedule(session, every, bill, "x"))
        heard.wait(signals.ScheduleFired, count=3)
        seen = scrape(registry)

    assert seen("aftercommit_schedules_fired_total", schedule="of the code") == 1
    assert seen("aftercommit_schedules_fired_total", schedule="bill") == 2
    assert seen("aftercommit_schedule_lag_seconds_count") == 3
    assert "customer" not in seen.text
