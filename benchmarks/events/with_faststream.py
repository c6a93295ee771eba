"""``faststream-outbox``: at least once, the handler's transaction is its own."""

import asyncio
from time import perf_counter

from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks.events.table import OrderCreated, new_engine
from benchmarks.events.ways import Job, for_update


async def run(job: Job) -> float:
    """Handle events by a subscriber with *width* workers, which fetches and clears by the hundred."""
    # Its own loops want connections beside those of the handlers.
    engine = new_engine(job.url, 2 * job.width)
    new_session = async_sessionmaker(engine)
    metadata = MetaData()
    table = make_outbox_table(metadata)
    broker = OutboxBroker(engine, outbox_table=table)
    done = asyncio.Event()

    @broker.subscriber(
        "orders", max_workers=job.width, fetch_batch_size=100, terminal_flush_batch_size=100, min_fetch_interval=0.01
    )
    async def count(event: OrderCreated) -> None:
        job.calls += 1
        async with new_session() as session, session.begin():
            await for_update(session, event)
        nonlocal left
        left -= 1
        if left == 0:
            done.set()

    left = len(job.events)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    async with new_session() as session, session.begin():
        await broker.publish_batch(*job.events, queue="orders", session=session)
    started = perf_counter()
    await broker.start()
    async with asyncio.timeout(600.0):
        await done.wait()
    seconds = perf_counter() - started
    await broker.stop()
    await engine.dispose()
    return seconds
