"""What happens in one process: ``python -m benchmarks.watchman.child SIDE WORK STRETCHES URL``."""

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter, process_time
from typing import Any, Final
from unittest.mock import patch

from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, select
from sqlalchemy.orm import Session

from aftercommit import Database
from aftercommit.sessions.leaks import LEASH
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


class NoLeash:
    """Stands for what knows of a session, and knows nothing."""

    entry = object()
    held = ()

    def begun(self, *_: object) -> None:
        """Nothing."""

    take_off = begun


def put_on_none(session: Session, *_: object) -> NoLeash:
    """Stand for what puts a session on its leash."""
    session.info[LEASH] = leash = NoLeash()
    return leash


def taken_out(stack: ExitStack) -> Database:
    """Take out what watches: connections, statements, open sessions, and the look for the line that opens one."""
    for name, instead in (
        ("aftercommit.pools.register.Register.attach", lambda *_: None),
        ("aftercommit.database.user_line", lambda **_: None),
        ("aftercommit.sessions.scopes.put_on_leash", put_on_none),
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


def main(side: str, work: str, stretches: str, url: str) -> None:
    """Measure one side, and print what a session cost where little disturbed it, in µs: CPU, and elapsed."""
    with ExitStack() as stack:
        db = taken_out(stack) if side == "without" else Database(url)
        found: Any
        if is_async(url):
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
