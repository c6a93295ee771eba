"""Other queues, with the same work in a task of theirs, each by what its own documentation says of being fast.

Each has the same number of tasks at once, each task with a connection of a pool of that size. Nobody but DBOS and
aftercommit says that a task is done in a way that survives a crash without the work being done again or lost; DBOS does
it at the price of a step, which it is spared here.
"""

import asyncio
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session

from benchmarks.queue.child import begin, wait_to_be_stopped
from benchmarks.queue.work import async_change, async_engine, change, engine, keys, url, width

REDIS = "BENCHMARK_REDIS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another queue.

    Attributes:
        module: What is imported.
        distributions: Whose versions are told.
        settings: What was chosen, in words.
        backlog: Queues a task for each row, then runs them.
        needs_redis: Whether it needs a Redis.
    """

    module: str
    distributions: tuple[str, ...]
    settings: str
    backlog: Callable[[], None]
    needs_redis: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether it can be measured, but for Redis."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def versions(self) -> str:
        """Its name and version, as it is installed."""
        return ", ".join(f"{name} {version(name)}" for name in self.distributions)


def pgqueuer() -> None:
    """PgQueuer on a pool of asyncpg's."""
    asyncio.run(_pgqueuer())


async def _pgqueuer() -> None:
    import asyncpg
    from pgqueuer.db import AsyncpgPoolDriver
    from pgqueuer.models import Job
    from pgqueuer.qm import QueueManager
    from pgqueuer.queries import Queries

    new_session = async_sessionmaker(async_engine("asyncpg"))
    async with asyncpg.create_pool(url(""), min_size=2, max_size=width()) as pool:
        driver = AsyncpgPoolDriver(pool)
        queries = Queries(driver)
        await queries.install()
        manager = QueueManager(queries)

        @manager.entrypoint("change")
        async def task(job: Job) -> None:
            async with new_session() as session, session.begin():
                await async_change(session, int(job.payload or b""))

        payloads: list[bytes | None] = [str(key).encode() for key in range(1, keys() + 1)]
        await queries.enqueue(["change"] * len(payloads), payloads, [0] * len(payloads))
        begin()
        await manager.run(batch_size=10 * width())


def procrastinate() -> None:
    """Procrastinate on its psycopg connector, work by asyncpg."""
    asyncio.run(_procrastinate())


async def _procrastinate() -> None:
    from procrastinate import App, PsycopgConnector

    new_session = async_sessionmaker(async_engine("asyncpg"))
    app = App(connector=PsycopgConnector(conninfo=url(""), min_size=width(), max_size=width() + 2))

    @app.task(name="change")
    async def task(key: int) -> None:
        async with new_session() as session, session.begin():
            await async_change(session, key)

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        await task.batch_defer_async(*({"key": key} for key in range(1, keys() + 1)))
        begin()
        await app.run_worker_async(concurrency=width(), install_signal_handlers=False)


def dbos() -> None:
    """DBOS with workflows in a queue, work by psycopg on its threads."""
    from dbos import DBOS, DBOSConfig

    workers = engine("psycopg")
    config: DBOSConfig = {"name": "benchmark", "system_database_url": url("psycopg"), "log_level": "WARNING"}
    logging.getLogger("dbos").setLevel(logging.WARNING)
    DBOS(config=config)

    @DBOS.workflow()
    def work(key: int) -> None:
        with Session(workers) as session, session.begin():
            change(session, key)

    DBOS.launch()
    # Each poll takes as many as there is room for, so room for a task at once only would be one poll for each.
    DBOS.register_queue("later", worker_concurrency=0, polling_interval_sec=0.01)
    queue = DBOS.retrieve_queue("later")
    assert queue is not None
    for key in range(1, keys() + 1):
        queue.enqueue(work, key)
    begin()
    queue.set_worker_concurrency(10 * width())
    asyncio.run(wait_to_be_stopped())


def celery() -> None:
    """Celery with a worker process for each task at once, by Redis."""
    from celery import group

    from benchmarks.queue.celery_app import app, task

    app.control.purge()
    group(task.s(key) for key in range(1, keys() + 1)).apply_async()
    command = [sys.executable, "-m", "celery", "--app", "benchmarks.queue.celery_app", "worker"]
    options = ["--concurrency", str(width()), "--loglevel", "INFO", "--without-gossip", "--without-mingle"]
    worker = subprocess.Popen(
        [*command, *options, "--without-heartbeat", "--prefetch-multiplier", "64"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
    )
    assert worker.stdout is not None
    for line in worker.stdout:
        if " ready." in line:
            break
    begin()
    threading.Thread(target=lambda: [None for _ in worker.stdout or ()], daemon=True).start()
    worker.wait()


PEERS = {
    "PgQueuer": Peer(
        module="pgqueuer",
        distributions=("pgqueuer",),
        settings="asyncpg pool, batches of 10 for each task at once",
        backlog=pgqueuer,
    ),
    "Celery + Redis": Peer(
        module="celery",
        distributions=("celery", "redis"),
        settings="prefork, results ignored, prefetch 64, no gossip, mingle or heartbeat",
        backlog=celery,
        needs_redis=True,
    ),
    "Procrastinate": Peer(
        module="procrastinate",
        distributions=("procrastinate",),
        settings="async tasks, LISTEN/NOTIFY, work by asyncpg",
        backlog=procrastinate,
    ),
    "DBOS": Peer(
        module="dbos",
        distributions=("dbos",),
        settings="workflows without a step in a queue, polled every 10 ms, 10 claimed for each task at once",
        backlog=dbos,
    ),
}
