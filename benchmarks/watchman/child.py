"""What happens in one process: ``python -m benchmarks.watchman.child SIDE WORK STRETCHES URL``."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter, process_time
from typing import Any, Final
from unittest.mock import patch

import httpx
from fastapi import FastAPI
from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, event, select
from sqlalchemy.orm import Session

from aftercommit import Database
from aftercommit.fastapi import AsyncSessionDep, SessionDep, install
from aftercommit.sessions.ended import end_for_good
from aftercommit.watch.sharing import _after_flush, guard_session
from benchmarks.overhead.job import Job

STRETCH: Final = 10
"""Sessions in one stretch: long enough for the clock, short enough for some to be disturbed by nothing."""
WARM_UP: Final = 5
LISTED: Final = 20


def load(session: Session) -> None:
    """Load one row."""
    session.get_one(Job, 1)


def change(session: Session) -> None:
    """Load one row, and change it."""
    job = session.get_one(Job, 1)
    job.is_done = not job.is_done


def serve(session: Session) -> None:
    """Do what a request does: look somebody up, list what there is, change something, add something."""
    job = session.get_one(Job, 1)
    session.scalars(select(Job).where(Job.id > 1).limit(LISTED)).all()
    job.is_done = not job.is_done
    session.add(Job())


WORK: Final[dict[str, Callable[[Session], None]]] = {
    "loads a row": load,
    "loads a row and changes it": change,
    "loads, lists, changes and adds": serve,
}


REQUEST: Final = "loads a row in a request"
"""Measured in an application, from where the request gets its session to where that ends."""


class NoWatch:
    """Stands for what watches a session, and sees nothing."""

    def close(self) -> None:
        """Nothing."""


def _listen_without_watch(target: Any, others: Any) -> None:
    """All that listens to sessions of ours but what watches them."""
    event.listen(target, "after_flush", _after_flush)
    if others is not None:
        others(target)


def taken_out(stack: ExitStack) -> Database:
    """Take out what watches: connections, statements, open sessions, and the look for the line that opens one."""
    for name, instead in (
        ("aftercommit.watch.register.Register.attach", lambda *_: None),
        ("aftercommit.pools.steps.hold_of", lambda _: None),
        ("aftercommit.pools.steps.note_begin", lambda _: None),
        ("aftercommit.database.user_line", lambda **_: None),
        ("aftercommit.sessions.scopes.watch_session", lambda *_: NoWatch()),
        ("aftercommit.watch.sharing._get_bind", lambda kind: kind.get_bind),
        ("aftercommit.watch.sharing._listen", _listen_without_watch),
    ):
        stack.enter_context(patch(name, instead))
    return Database(
        sys.argv[4], engine_options={"poolclass": QueuePool}, async_engine_options={"poolclass": AsyncAdaptedQueuePool}
    )


def measure(db: Database, work: Callable[[Session], None], stretches: int) -> list[tuple[float, float]]:
    """Return CPU and elapsed seconds of each stretch."""
    found = []
    for _ in range(WARM_UP + stretches):
        computed, begun = process_time(), perf_counter()
        for _ in range(STRETCH):
            with db.session() as session:
                work(session)
        found.append((process_time() - computed, perf_counter() - begun))
    db.dispose()
    return found[WARM_UP:]


async def async_measure(db: Database, work: Callable[[Session], None], stretches: int) -> list[tuple[float, float]]:
    """Return CPU and elapsed seconds of each stretch."""
    found = []
    for _ in range(WARM_UP + stretches):
        computed, begun = process_time(), perf_counter()
        for _ in range(STRETCH):
            async with db.async_session() as session:
                await session.run_sync(work)
        found.append((process_time() - computed, perf_counter() - begun))
    await db.async_dispose()
    return found[WARM_UP:]


async def measure_requests(db: Database, stretches: int, *, asynchronous: bool) -> list[tuple[float, float]]:
    """Return CPU seconds of each stretch of requests, and how long their sessions lived."""
    app = FastAPI()
    install(app, db, runs=())

    async def read_async(session: AsyncSessionDep) -> int:
        return (await session.get_one(Job, 1)).id

    def read(session: SessionDep) -> int:
        return session.get_one(Job, 1).id

    app.get("/")(read_async if asynchronous else read)
    found = []
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        with timed() as lives:
            for _ in range(WARM_UP + stretches):
                lives.clear()
                computed = process_time()
                for _ in range(STRETCH):
                    (await client.get("/")).raise_for_status()
                found.append((process_time() - computed, sum(lives)))
    return found[WARM_UP:]


@contextmanager
def timed() -> Iterator[list[float]]:
    """Take the time from where a session is opened to where it has ended."""
    opened: dict[int, float] = {}
    lives: list[float] = []

    def open_one(session: Any, *rest: Any) -> Any:
        opened[id(session)] = perf_counter()
        return guard_session(session, *rest)

    def end_one(session: Any, owner: Any) -> None:
        end_for_good(session, owner)
        lives.append(perf_counter() - opened.pop(id(session)))

    with (
        patch("aftercommit.sessions.scopes.guard_session", open_one),
        patch("aftercommit.sessions.scopes.end_for_good", end_one),
    ):
        yield lives


def main(side: str, work: str, stretches: str, url: str) -> None:
    """Measure one side, and print what a session cost where little disturbed it, in µs: CPU, and elapsed."""
    with ExitStack() as stack:
        db = taken_out(stack) if side == "without" else Database(url)
        found: Any
        if work == REQUEST:
            found = asyncio.run(measure_requests(db, int(stretches), asynchronous=is_async(url)))
        elif is_async(url):
            found = asyncio.run(async_measure(db, WORK[work], int(stretches)))
        else:
            found = measure(db, WORK[work], int(stretches))
    print(json.dumps([low(each) / STRETCH * 1e6 for each in zip(*found, strict=True)]))


def is_async(url: str) -> bool:
    """Whether the URL's driver serves async sessions."""
    return url.startswith(("postgresql+asyncpg", "sqlite+aiosqlite"))


def low(values: Any) -> float:
    """The value that a fifth of *values* are below: whatever else runs on the machine only ever adds.

    Not the least of them, which is a matter of luck.
    """
    ordered = sorted(values)
    return float(ordered[len(ordered) // 5])


if __name__ == "__main__":
    main(*sys.argv[1:])
