"""What people write: a session per event, the row under ``FOR UPDATE``, a commit."""

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.events.table import OrderCreated, Waiting, new_engine
from benchmarks.events.ways import Job, for_update


async def from_memory(job: Job) -> float:
    """Handle events that are in memory: lost with the process, and with nothing but their effect in the database."""
    engine = new_engine(job.url, job.width)
    new_session = async_sessionmaker(engine)
    left = iter(job.events)

    async def work() -> None:
        for each in left:
            async with new_session() as session, session.begin():
                job.calls += 1
                await for_update(session, each)

    return await _timed(engine.dispose, [work() for _ in range(job.width)])


async def outbox(job: Job) -> float:
    """Handle events of a table: each is deleted in the transaction of its effect."""
    engine = new_engine(job.url, job.width)
    new_session = async_sessionmaker(engine)
    async with new_session() as session, session.begin():
        await session.execute(insert(Waiting), [{"payload": each.model_dump_json()} for each in job.events])
    claim = select(Waiting).order_by(Waiting.id).limit(1).with_for_update(skip_locked=True)

    async def handle_one(session: AsyncSession) -> bool:
        waiting = await session.scalar(claim)
        if waiting is None:
            return False
        job.calls += 1
        await for_update(session, OrderCreated.model_validate_json(waiting.payload))
        await session.delete(waiting)
        return True

    async def work() -> None:
        is_there = True
        while is_there:
            async with new_session() as session, session.begin():
                is_there = await handle_one(session)

    return await _timed(engine.dispose, [work() for _ in range(job.width)])


async def _timed(dispose: Callable[[], Awaitable[None]], workers: list[Awaitable[None]]) -> float:
    start = perf_counter()
    await asyncio.gather(*workers)
    seconds = perf_counter() - start
    await dispose()
    return seconds
