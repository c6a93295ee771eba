"""``python -m benchmarks.watchman``: measure, and print a table."""

import argparse
import asyncio
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from time import perf_counter, process_time
from unittest.mock import patch

from rich.console import Console
from rich.table import Table
from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, make_url

from aftercommit import Database
from benchmarks.overhead.__main__ import database
from benchmarks.overhead.job import Job
from tests.support.databases import DRIVERS
from tests.support.postgres import PostgresServer

STRETCH = 10
"""Sessions in one stretch: long enough for the clock, short enough that both sides meet the same weather."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the watch costs one session, in µs.

    Attributes:
        cost: The CPU time that is added to each.
        life: How long a session lives without it, where little disturbs it.
    """

    cost: float
    life: float

    @property
    def share(self) -> float:
        """The cost in per cent of the life."""
        return 100 * self.cost / self.life


def main() -> None:
    """Measure on each driver and print what came out."""
    options = arguments()
    console = Console()
    table = Table(title="What the watch adds to the life of a session")
    table.add_column("driver")
    table.add_column("session")
    for heading in ("life, µs", "watch, µs", "share"):
        table.add_column(heading, justify="right")
    with PostgresServer(safe=True) as postgres:
        for driver in options.drivers:
            for writes in (False, True):
                with database(driver, postgres) as target:
                    found = measure(target.url, writes=writes, stretches=options.stretches)
                what = "loads a row and changes it" if writes else "loads a row"
                table.add_row(driver, what, f"{found.life:.0f}", f"{found.cost:.1f}", f"{found.share:.1f} %")
    console.print(table)
    console.print(
        f"The lower fifth of {options.stretches} stretches of {STRETCH} sessions on each side; "
        f"Python {platform.python_version()}, sqlalchemy {version('sqlalchemy')}, fsync on"
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watchman", description=__doc__)
    parser.add_argument("--stretches", type=int, default=500, help="for each side")
    parser.add_argument("--drivers", nargs="+", choices=DRIVERS, default=DRIVERS)
    return parser.parse_args()


def measure(url: str, *, writes: bool, stretches: int) -> Figures:
    """Let both sides take turns.

    Args:
        url: A database with the table in it.
        writes: Whether a session changes the row that it has loaded.
        stretches: How many of each side.
    """
    watched = Database(url)
    bare = Database(
        url, engine_options={"poolclass": QueuePool}, async_engine_options={"poolclass": AsyncAdaptedQueuePool}
    )
    if is_async(url):
        return asyncio.run(_measure_async(watched, bare, writes=writes, stretches=stretches))
    return _measure_sync(watched, bare, writes=writes, stretches=stretches)


def is_async(url: str) -> bool:
    """Whether the URL's driver serves async sessions."""
    return bool(make_url(url).get_dialect().is_async)


@contextmanager
def unwatched() -> Iterator[None]:
    """Take out what watches: the listeners on new engines, and the look for the line that opens a session."""
    with (
        patch("aftercommit.pools.register.Register.attach", lambda *_: None),
        patch("aftercommit.database.user_line", lambda: None),
        patch("aftercommit.sessions.waiting.name_holder", lambda *_: None),
    ):
        yield


def _measure_sync(watched: Database, bare: Database, *, writes: bool, stretches: int) -> Figures:
    with watched.session() as session:
        session.add(Job())

    def work(db: Database) -> tuple[float, float]:
        computed, begun = process_time(), perf_counter()
        for _ in range(STRETCH):
            with db.session() as session:
                _change(session.get_one(Job, 1), writes=writes)
        return process_time() - computed, perf_counter() - begun

    def work_unwatched() -> tuple[float, float]:
        with unwatched():
            return work(bare)

    work_unwatched(), work(watched)
    pairs = [(work(watched), work_unwatched()) for _ in range(stretches)]
    watched.dispose()
    bare.dispose()
    return _figures(pairs)


async def _measure_async(watched: Database, bare: Database, *, writes: bool, stretches: int) -> Figures:
    async with watched.async_session() as session:
        session.add(Job())

    async def work(db: Database) -> tuple[float, float]:
        computed, begun = process_time(), perf_counter()
        for _ in range(STRETCH):
            async with db.async_session() as session:
                _change(await session.get_one(Job, 1), writes=writes)
        return process_time() - computed, perf_counter() - begun

    async def work_unwatched() -> tuple[float, float]:
        with unwatched():
            return await work(bare)

    await work_unwatched()
    await work(watched)
    pairs = [(await work(watched), await work_unwatched()) for _ in range(stretches)]
    await watched.async_dispose()
    await bare.async_dispose()
    return _figures(pairs)


def _change(job: Job, *, writes: bool) -> None:
    if writes:
        job.is_done = not job.is_done


def _figures(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> Figures:
    # The less disturbed stretches of each side: whatever else runs on the machine only ever adds. Not the least
    # disturbed one, which is a matter of luck.
    watched, bare = (_low(stretch[0] for stretch in side) for side in zip(*pairs, strict=True))
    life = _low(stretch[1] for _watched, stretch in pairs)
    return Figures(cost=(watched - bare) / STRETCH * 1e6, life=life / STRETCH * 1e6)


def _low(values: Iterable[float]) -> float:
    """The value that a fifth of *values* are below."""
    ordered = sorted(values)
    return ordered[len(ordered) // 5]


if __name__ == "__main__":
    main()
