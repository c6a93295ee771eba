"""What is measured against: a session for each task, and no record of anything. It is lost with its process."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.queue.child import begin, wait_to_be_stopped
from benchmarks.queue.work import Item, async_change, async_engine, change, engine, keys, url, width


def backlog() -> None:
    """Change every row that is there."""
    if url().partition("://")[0].endswith(("asyncpg", "aiosqlite")):
        asyncio.run(_async_backlog())
        return
    new_session = sessionmaker(engine())
    with ThreadPoolExecutor(width()) as threads:
        begin()
        list(threads.map(lambda key: _work(new_session, key), range(1, keys() + 1)))
    asyncio.run(wait_to_be_stopped())


async def _async_backlog() -> None:
    new_session = async_sessionmaker(async_engine())
    waiting = iter(range(1, keys() + 1))

    async def work_on() -> None:
        for key in waiting:
            await _async_work(new_session, key)

    begin()
    async with asyncio.TaskGroup() as group:
        for _ in range(width()):
            group.create_task(work_on())
    await wait_to_be_stopped()


def sustained(per_transaction: int) -> None:
    """Insert rows, commit, and change each of them behind the commit."""
    if url().partition("://")[0].endswith(("asyncpg", "aiosqlite")):
        asyncio.run(_async_sustained(per_transaction))
        return
    asking, working = sessionmaker(engine()), sessionmaker(engine())
    with ThreadPoolExecutor(width()) as threads, ThreadPoolExecutor(width()) as askers:

        def ask(_number: int) -> None:
            with asking() as session, session.begin():
                items = [Item() for _ in range(per_transaction)]
                session.add_all(items)
                session.flush()
                asked = [item.id for item in items]
            for key in asked:
                threads.submit(_work, working, key)

        begin()
        list(askers.map(ask, range(keys() // per_transaction)))
    asyncio.run(wait_to_be_stopped())


async def _async_sustained(per_transaction: int) -> None:
    asking, working = async_sessionmaker(async_engine()), async_sessionmaker(async_engine())
    places = asyncio.Semaphore(width())
    waiting = iter(range(keys() // per_transaction))

    async def work(key: int) -> None:
        async with places:
            await _async_work(working, key)

    begin()
    async with asyncio.TaskGroup() as tasks:

        async def ask() -> None:
            for _ in waiting:
                async with asking() as session, session.begin():
                    items = [Item() for _ in range(per_transaction)]
                    session.add_all(items)
                    await session.flush()
                    asked = [item.id for item in items]
                for key in asked:
                    tasks.create_task(work(key))

        async with asyncio.TaskGroup() as askers:
            for _ in range(width()):
                askers.create_task(ask())
    await wait_to_be_stopped()


def _work(new_session: sessionmaker[Session], key: int) -> None:
    with new_session() as session, session.begin():
        change(session, key)


async def _async_work(new_session: async_sessionmaker[AsyncSession], key: int) -> None:
    async with new_session() as session, session.begin():
        await async_change(session, key)
