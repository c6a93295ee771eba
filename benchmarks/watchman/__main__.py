"""``python -m benchmarks.watchman``: measure, and print a table."""

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median

from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine, insert

from benchmarks.overhead.__main__ import database
from benchmarks.overhead.job import Job
from benchmarks.watchman.child import LISTED, REQUEST, WORK
from tests.support.databases import DRIVERS, DatabaseUnderTest
from tests.support.postgres import PostgresServer

SIDES = ("with", "without")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the watch costs one session, in µs.

    Attributes:
        cost: The CPU time that is added to each: the median of the rounds.
        spread: The lower and the upper quarter of the rounds.
        life: How long a session lives, where little disturbs it.
    """

    cost: float
    spread: tuple[float, float]
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
    for heading in ("life, µs", "watch, µs", "half of the rounds", "share"):
        table.add_column(heading, justify="right")
    with PostgresServer(safe=True) as postgres, console.status("") as status:
        for driver in options.drivers:
            for work in (*WORK, REQUEST):
                status.update(f"{driver}: {work}")
                with database(driver, postgres) as target:
                    found = measure(target, work, rounds=options.rounds, stretches=options.stretches)
                table.add_row(
                    driver,
                    work,
                    f"{found.life:.0f}",
                    f"{found.cost:.1f}",
                    "{:.1f} – {:.1f}".format(*found.spread),
                    f"{found.share:.1f} %",
                )
    console.print(table)
    console.print(
        f"{options.rounds} rounds of two processes, in each {options.stretches} stretches of sessions, of which the "
        f"lower fifth counts; Python {platform.python_version()}, sqlalchemy {version('sqlalchemy')}, fsync on"
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watchman", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--stretches", type=int, default=100, help="in each process")
    parser.add_argument("--drivers", nargs="+", choices=DRIVERS, default=DRIVERS)
    return parser.parse_args()


def measure(target: DatabaseUnderTest, work: str, *, rounds: int, stretches: int) -> Figures:
    """Let both sides take turns.

    Args:
        target: A database with the table in it.
        work: What each session does.
        rounds: How many processes of each side.
        stretches: How many in each.
    """
    engine = create_engine(target.sync_url)
    with engine.begin() as connection:
        connection.execute(insert(Job), [{"is_done": False} for _ in range(LISTED + 1)])
    engine.dispose()
    found = [{side: _run(side, work, stretches, target.url) for side in SIDES} for _ in range(rounds)]
    costs = sorted(each["with"][0] - each["without"][0] for each in found)
    return Figures(
        cost=median(costs),
        spread=(costs[len(costs) // 4], costs[-1 - len(costs) // 4]),
        life=median(each["with"][1] for each in found),
    )


def _run(side: str, work: str, stretches: int, url: str) -> tuple[float, float]:
    command = (sys.executable, "-m", "benchmarks.watchman.child", side, work, str(stretches), url)
    computed, elapsed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return computed, elapsed


if __name__ == "__main__":
    main()
