"""aftercommit, with durable tasks: each takes effect exactly once."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, perf_counter_ns
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, signals
from benchmarks.queue.child import begin, say, wait_to_be_stopped
from benchmarks.queue.work import Item, async_change, change, keys, url, width

PER_SECOND = 100.0
"""At the steady rate."""


def database() -> tuple[Database, Any]:
    """Make the database with its one task, of the flavour that the URL's driver asks for."""
    pool = PoolSettings(pool_size=width(), max_overflow=0)
    db = Database(url(), pool=pool, pools={"default": pool})
    if db.sessions.is_async_only or url().startswith("sqlite+aiosqlite"):

        @db.task(name="change")
        async def async_task(session: AsyncSession, key: int) -> None:
            await async_change(session, key)

        return db, async_task

    @db.task(name="change")
    def task(session: Session, key: int) -> None:
        change(session, key)

    return db, task


def _is_async(task: Any) -> bool:
    return bool(task.is_async)


def backlog(per_transaction: int) -> None:
    """Queue a task for each row, then start to run them.

    Args:
        per_transaction: How many are asked for in each transaction.
    """
    db, task = database()
    asyncio.run(
        _async_backlog(db, task, per_transaction) if _is_async(task) else _sync_backlog(db, task, per_transaction)
    )


async def _sync_backlog(db: Database, task: Any, per_transaction: int) -> None:
    db.create_tables()
    for first in range(1, keys() + 1, per_transaction):
        with db.session() as session:
            for key in range(first, min(first + per_transaction, keys() + 1)):
                db.after_commit(session, task, key)
    begin()
    async with db.running():
        await wait_to_be_stopped()


async def _async_backlog(db: Database, task: Any, per_transaction: int) -> None:
    await db.async_create_tables()
    for first in range(1, keys() + 1, per_transaction):
        async with db.async_session() as session:
            for key in range(first, min(first + per_transaction, keys() + 1)):
                db.after_commit(session, task, key)
    begin()
    async with db.running():
        await wait_to_be_stopped()


def sustained(per_transaction: int) -> None:
    """Insert rows and ask for a task for each, in one transaction, while the tasks run here."""
    db, task = database()
    asyncio.run(
        _async_sustained(db, task, per_transaction) if _is_async(task) else _sync_sustained(db, task, per_transaction)
    )


async def _sync_sustained(db: Database, task: Any, per_transaction: int) -> None:
    db.create_tables()

    def ask(_number: int) -> None:
        with db.session() as session:
            items = [Item() for _ in range(per_transaction)]
            session.add_all(items)
            session.flush()
            for item in items:
                db.after_commit(session, task, item.id)

    def ask_all() -> None:
        with ThreadPoolExecutor(width()) as askers:
            list(askers.map(ask, range(keys() // per_transaction)))

    async with db.running():
        begin()
        await asyncio.to_thread(ask_all)
        await wait_to_be_stopped()


async def _async_sustained(db: Database, task: Any, per_transaction: int) -> None:
    await db.async_create_tables()
    waiting = iter(range(keys() // per_transaction))

    async def ask() -> None:
        for _ in waiting:
            async with db.async_session() as session:
                items = [Item() for _ in range(per_transaction)]
                session.add_all(items)
                await session.flush()
                for item in items:
                    db.after_commit(session, task, item.id)

    async with db.running():
        begin()
        async with asyncio.TaskGroup() as askers:
            for _ in range(width()):
                askers.create_task(ask())
        await wait_to_be_stopped()


# --- how long until it starts -----------------------------------------------------------------------------------


def ask_at(per_second: float) -> None:
    """Ask for a task for each row, one transaction after the other, and run them here.

    Args:
        per_second: How many; 0 for one at a time, each when the last has been done.
    """
    asyncio.run(_ask_at(per_second, runs=None))


def ask_elsewhere_at(per_second: float) -> None:
    """The same, for tasks that another process runs."""
    asyncio.run(_ask_at(per_second, runs=()))


def serve() -> None:
    """Be that other process."""
    db, task = database()

    async def run() -> None:
        await (db.async_create_tables() if _is_async(task) else asyncio.to_thread(db.create_tables))
        async with db.running():
            say("serving")
            await wait_to_be_stopped()

    asyncio.run(run())


async def _ask_at(per_second: float, *, runs: tuple[str, ...] | None) -> None:
    db, task = database()
    committed: dict[int, int] = {}

    @event.listens_for(Session, "after_commit")
    def note(session: Session) -> None:
        # Fires when the answer to COMMIT is there; a task on a thread may have begun by then.
        if (key := session.info.get("key")) is not None:
            committed[key] = perf_counter_ns()

    def ask(key: int) -> None:
        with db.session() as session:
            session.info["key"] = key
            db.after_commit(session, task, key)

    async def async_ask(key: int) -> None:
        async with db.async_session() as session:
            session.sync_session.info["key"] = key
            db.after_commit(session, task, key)

    loop, done = asyncio.get_running_loop(), asyncio.Semaphore(0)

    @signals.subscribe(signals.TaskSucceeded)
    def note_end(_signal: signals.TaskSucceeded) -> None:
        loop.call_soon_threadsafe(done.release)

    await (db.async_create_tables() if _is_async(task) else asyncio.to_thread(db.create_tables))
    async with db.running(runs=runs):
        begin()
        start = perf_counter()
        for key in range(1, keys() + 1):
            await (async_ask(key) if _is_async(task) else asyncio.to_thread(ask, key))
            if per_second:
                await asyncio.sleep(max(0.0, start + key / per_second - perf_counter()))
            else:
                await done.acquire()
        # The commit's own listener may be behind the last task.
        await asyncio.sleep(0.1)
        say(f"committed {json.dumps(committed)}")
        await wait_to_be_stopped()
