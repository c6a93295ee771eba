"""Handlers of ``@db.on``."""

from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter

from sqlalchemy.ext.asyncio import AsyncSession

from aftercommit import Database, PoolSettings
from benchmarks.events.table import OrderCreated
from benchmarks.events.ways import Job

Way = Callable[[AsyncSession, OrderCreated], Awaitable[None]]
AT_ONCE = 50
"""Events that one transaction publishes."""


def on(way: Way, level: str | None = None) -> "partial[Awaitable[float]]":
    """Return the side that handles its events by *way*."""
    return partial(_run, way, level)


async def _run(way: Way, level: str | None, job: Job) -> float:
    db = Database(job.url, pools={"default": PoolSettings(pool_size=job.width)})

    @db.on(OrderCreated, isolation_level=level)
    async def count(session: AsyncSession, event: OrderCreated) -> None:
        job.calls += 1
        await way(session, event)

    await db.async_create_tables()
    for start in range(0, len(job.events), AT_ONCE):
        async with db.async_session() as session:
            for event in job.events[start : start + AT_ONCE]:
                db.publish(session, event)
    started = perf_counter()
    async with db.running():
        await db.async_drain(600.0)
        seconds = perf_counter() - started
    await db.async_dispose()
    return seconds
