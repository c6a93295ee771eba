"""``python -m benchmarks.overhead``: measure, print a table, and keep every figure if asked to."""

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from threading import Event
from time import perf_counter

import httpx
import psutil
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, create_engine, make_url, text

from benchmarks.overhead.job import URL, Base
from benchmarks.overhead.load import send
from tests.support.databases import DRIVERS, DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.servers import Server

SIDES = {
    "by hand": "benchmarks.overhead.by_hand:application",
    "durable=False": "benchmarks.overhead.with_aftercommit:in_memory",
    "durable": "benchmarks.overhead.with_aftercommit:durable",
}
WARM_UP = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round on one application gave.

    Attributes:
        driver: SQLAlchemy's name of the driver.
        side: Which application.
        answered: Requests per second, from the first request to the last answer.
        done: Requests per second, from the first request until the last task had taken effect.
        cpu: What the server computed for each request and its task, in ms. It depends less than the others on who
            else is on the machine.
        waited: How long each task waited between the commit and its start, in ms, with *width* requests at once.
        waited_alone: The same with one request at a time.
    """

    driver: str
    side: str
    answered: float
    done: float
    cpu: float
    waited: list[float]
    waited_alone: list[float]


def main() -> None:
    """Run the rounds and print what came out."""
    options = arguments()
    console = Console()
    rounds: list[Round] = []
    with PostgresServer(safe=not options.no_fsync) as postgres, console.status("") as status:
        for driver in options.drivers:
            for number in range(1, options.rounds + 1):
                for side in options.sides:
                    status.update(f"{driver}, round {number} of {options.rounds}, {side}")
                    with database(driver, postgres) as target:
                        rounds.append(run(target, side, options.requests, options.width))
        versions = f"PostgreSQL {postgres.version}"
    console.print(table_of(rounds, options))
    packages = ", ".join(f"{name} {version(name)}" for name in ("fastapi", "sqlalchemy", "uvicorn"))
    console.print(
        f"Medians of {options.rounds} rounds of {options.requests} requests, {options.width} at once (busy); "
        f"Python {platform.python_version()}, {packages}, {versions}, fsync {'off' if options.no_fsync else 'on'}"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in rounds]))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="per round and application")
    parser.add_argument("--width", type=int, default=8, help="requests at once")
    parser.add_argument("--drivers", nargs="+", choices=DRIVERS, default=DRIVERS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=tuple(SIDES), help="the first is the measure")
    parser.add_argument("--no-fsync", action="store_true", help="a PostgreSQL that need not wait for the disk")
    parser.add_argument("--json", type=Path, help="keep every figure in this file")
    return parser.parse_args()


@contextmanager
def database(driver: str, postgres: PostgresServer) -> Iterator[DatabaseUnderTest]:
    """Give a database with the applications' table in it."""
    if driver in {"psycopg", "asyncpg"}:
        with postgres.database() as name:
            yield prepared(DatabaseUnderTest(url=postgres.url(name, driver=driver), driver=driver))
    else:
        with tempfile.TemporaryDirectory(prefix="aftercommit-bench-") as directory:
            yield prepared(DatabaseUnderTest(url=f"sqlite+{driver}:///{directory}/bench.db", driver=driver))


def prepared(target: DatabaseUnderTest) -> DatabaseUnderTest:
    """Make the table."""
    engine = create_engine(target.sync_url)
    Base.metadata.create_all(engine)
    engine.dispose()
    return target


def run(target: DatabaseUnderTest, side: str, requests: int, width: int, *, warm_up: int = WARM_UP) -> Round:
    """Run one round on a fresh server."""
    onlooker = create_engine(target.sync_url)
    arguments = ("--factory", "--no-access-log")
    with Server(SIDES[side], env={URL: target.url}, arguments=arguments) as server:
        jobs = f"{server.url}/jobs"
        send(jobs, times=warm_up, width=width)
        wait(onlooker, warm_up)
        httpx.get(f"{server.url}/waited")

        computed, start = cpu_seconds(server.process.pid), perf_counter()
        send(jobs, times=requests, width=width)
        answered = perf_counter() - start
        wait(onlooker, warm_up + requests)
        done = perf_counter() - start
        computed = cpu_seconds(server.process.pid) - computed
        waited = httpx.get(f"{server.url}/waited").json()

        send(jobs, times=warm_up, width=1)
        wait(onlooker, warm_up + requests + warm_up)
        waited_alone = httpx.get(f"{server.url}/waited").json()
        server.stop()
    onlooker.dispose()
    return Round(
        driver=make_url(target.url).get_driver_name(),
        side=side,
        answered=requests / answered,
        done=requests / done,
        cpu=computed / requests * 1000,
        waited=waited,
        waited_alone=waited_alone,
    )


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def wait(onlooker: Engine, number: int) -> None:
    """Wait until the database says that *number* jobs are done."""
    pause, done = Event(), 0
    for _ in range(30_000):
        with onlooker.connect() as connection:
            done = connection.scalar(text("SELECT count(*) FROM job WHERE is_done"))
        if done == number:
            return
        pause.wait(0.002)
    raise TimeoutError(f"{done} of {number} jobs were done after a minute.")


def table_of(rounds: list[Round], options: argparse.Namespace) -> Table:
    """Draw the table: one row for each application on each driver, ratios to the first application."""
    table = Table(title="A request with one task, until the task took effect; then the wait from commit to start")
    for heading in ("driver", "application"):
        table.add_column(heading)
    for heading in ("per second", "ratio", "rounds", "CPU, ms", "start, ms", "p99", "start, busy", "p99"):
        table.add_column(heading, justify="right")
    for driver in options.drivers:
        base = [one.done for one in rounds if (one.driver, one.side) == (driver, options.sides[0])]
        for side in options.sides:
            ours = [one for one in rounds if (one.driver, one.side) == (driver, side)]
            ratios = [one.done / figure for one, figure in zip(ours, base, strict=True)]
            alone = [ms for one in ours for ms in one.waited_alone]
            busy = [ms for one in ours for ms in one.waited]
            table.add_row(
                driver,
                side,
                f"{median(one.done for one in ours):.0f}",
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f} – {max(ratios):.2f}",
                f"{median(one.cpu for one in ours):.2f}",
                *(f"{figure:.1f}" for waits in (alone, busy) for figure in (median(waits), p99(waits))),
            )
        table.add_section()
    return table


def p99(waits: list[float]) -> float:
    """Return the 99th percentile."""
    return quantiles(waits, n=100)[98]


if __name__ == "__main__":
    main()
