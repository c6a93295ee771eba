"""``python -m benchmarks.bulkhead``: measure, print a table, and keep every figure if asked to."""

import argparse
import asyncio
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from threading import Event
from time import perf_counter

import httpx
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, create_engine, text

from benchmarks.bulkhead.apps import PLACES, URL
from tests.support.postgres import PostgresServer
from tests.support.servers import Server

SIDES = {"by hand": "benchmarks.bulkhead.apps:by_hand", "aftercommit": "benchmarks.bulkhead.apps:with_aftercommit"}
TASKS = 40
"""Of two seconds each: by hand, with ten connections, they last for eight, so measure for four at most."""
TIMEOUT = 60.0
HOLDING = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' "
    "AND query LIKE 'SELECT pg_sleep%'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round on one application gave.

    Attributes:
        driver: SQLAlchemy's name of the driver.
        side: Which application.
        idle: How long each request took while no task was about, in ms.
        saturated: The same while tasks held every connection that they could get.
        failed: How many requests were answered with an error then, or not within a minute.
        holding: How many tasks held a connection, at the most.
    """

    driver: str
    side: str
    idle: list[float]
    saturated: list[float]
    failed: int
    holding: int


def main() -> None:
    """Run the rounds and print what came out."""
    options = arguments()
    console = Console()
    rounds: list[Round] = []
    with PostgresServer() as postgres, console.status("") as status:
        for driver in options.drivers:
            for number in range(1, options.rounds + 1):
                for side in SIDES:
                    status.update(f"{driver}, round {number} of {options.rounds}, {side}")
                    with postgres.database() as name:
                        url = postgres.url(name, driver=driver)
                        rounds.append(run(url, driver, side, options.seconds, options.width))
        server = postgres.version
    console.print(table_of(rounds, options))
    packages = ", ".join(f"{name} {version(name)}" for name in ("fastapi", "sqlalchemy", "uvicorn"))
    console.print(
        f"{options.rounds} rounds of {options.seconds:g} s, {options.width} requests at once; "
        f"Python {platform.python_version()}, {packages}, PostgreSQL {server}"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in rounds]))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulkhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="per measurement")
    parser.add_argument("--width", type=int, default=4, help="requests at once")
    parser.add_argument("--drivers", nargs="+", choices=("psycopg", "asyncpg"), default=("psycopg", "asyncpg"))
    parser.add_argument("--json", type=Path, help="keep every figure in this file")
    return parser.parse_args()


def run(url: str, driver: str, side: str, seconds: float, width: int) -> Round:
    """Run one round on a fresh server."""
    onlooker = create_engine(url.replace(f"+{driver}", "+psycopg"), isolation_level="AUTOCOMMIT")
    arguments = ("--factory", "--no-access-log")
    # What is left of the tasks at the end is killed with the server.
    with Server(SIDES[side], env={URL: url}, arguments=arguments) as server, onlooker.connect() as connection:
        asyncio.run(send(server.url, seconds / 2, width))
        idle, _ = asyncio.run(send(server.url, seconds, width))
        saturated, failed, holding = asyncio.run(send_saturated(server.url, connection, seconds, width))
    onlooker.dispose()
    return Round(driver=driver, side=side, idle=idle, saturated=saturated, failed=failed, holding=holding)


async def send_saturated(url: str, connection: Connection, seconds: float, width: int) -> tuple[list[float], int, int]:
    """Hand over tasks, wait until they hold all that they can get, and measure requests then."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        numbers = iter(range(TASKS))

        async def hand_over() -> None:
            for _ in numbers:
                await client.post("/task")

        # Few at once: by hand, many would lock each other out of the threads before a task has begun.
        asking = [asyncio.create_task(hand_over()) for _ in range(PLACES)]
        try:
            holding = await asyncio.to_thread(wait_until_held, connection)
            # By hand these wait for connections, too: nobody waits for them all.
            await asyncio.wait(asking, timeout=3.0)
            took, failed = await send(url, seconds, width)
        finally:
            for each in asking:
                each.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
    return took, failed, holding


def wait_until_held(connection: Connection) -> int:
    """Wait until tasks hold at least as many connections as there are places for; return how many."""
    pause, holding = Event(), 0
    for _ in range(3000):
        holding = max(holding, connection.scalar(HOLDING) or 0)
        if holding >= PLACES:
            pause.wait(0.1)
            return max(holding, connection.scalar(HOLDING) or 0)
        pause.wait(0.01)
    raise TimeoutError(f"Only {holding} tasks held a connection after half a minute.")


async def send(url: str, seconds: float, width: int) -> tuple[list[float], int]:
    """Send requests for a while, *width* at once; return how long each took, in ms, and how many failed."""
    took: list[float] = []
    failed = 0

    async def one_after_the_other(client: httpx.AsyncClient) -> None:
        nonlocal failed
        while (begun := perf_counter()) < end:
            try:
                answer = await client.post("/read")
                answer.raise_for_status()
            except httpx.HTTPError:
                failed += 1
            else:
                took.append((perf_counter() - begun) * 1000)

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client, asyncio.TaskGroup() as group:
        end = perf_counter() + seconds
        for _ in range(width):
            group.create_task(one_after_the_other(client))
    return took, failed


def table_of(rounds: list[Round], options: argparse.Namespace) -> Table:
    """Draw the table: one row for each application on each driver."""
    table = Table(title=f"A request, with no task about and with {TASKS} handed over")
    for heading in ("driver", "application"):
        table.add_column(heading)
    for heading in ("idle, ms", "p99", "busy, ms", "p99", "ratio", "of p99", "rounds", "failed", "held"):
        table.add_column(heading, justify="right")
    for driver in options.drivers:
        for side in SIDES:
            mine = [one for one in rounds if (one.driver, one.side) == (driver, side)]
            ratios = [median(one.saturated) / median(one.idle) for one in mine]
            tails = [p99(one.saturated) / p99(one.idle) for one in mine]
            columns = [(median(one.idle), p99(one.idle), median(one.saturated), p99(one.saturated)) for one in mine]
            table.add_row(
                driver,
                side,
                *(f"{median(each):.1f}" for each in zip(*columns, strict=True)),
                *(f"{median(each):.2f}" for each in (ratios, tails)),
                f"{min(ratios):.2f} – {max(ratios):.2f}",
                str(sum(one.failed for one in mine)),
                f"{median(one.holding for one in mine):.0f}",
            )
        table.add_section()
    return table


def p99(figures: list[float]) -> float:
    """Return the 99th percentile; of very few figures, the largest."""
    return min(max(figures), quantiles(figures, n=100)[98])


if __name__ == "__main__":
    main()
