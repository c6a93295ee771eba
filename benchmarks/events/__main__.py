"""``python -m benchmarks.events``: measure, print a table, and keep every figure if asked to."""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine

from benchmarks.events.child import SIDES
from benchmarks.events.table import check, fill
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer

ROOT = Path(__file__).parents[2]
DRIVERS = ("asyncpg", "aiosqlite")
KINDS = ("cold", "hot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round of one side gave.

    Attributes:
        driver: SQLAlchemy's name of the driver.
        side: Which side.
        kind: ``cold``: a row for each event; ``hot``: one row for all.
        rate: Events per second, from the start of the handlers until the last has taken effect.
        calls: How often a handler was called for each event: what a hot row costs.
    """

    driver: str
    side: str
    kind: str
    rate: float
    calls: float


def main() -> None:
    """Run the rounds and print what came out."""
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    rounds: list[Round] = []
    with PostgresServer(safe=not options.no_fsync) as postgres, console.status("") as status:
        for driver in options.drivers:
            for number in range(1, options.rounds + 1):
                for kind in KINDS:
                    for side in sides_of(driver, options.sides):
                        status.update(f"{driver}, round {number} of {options.rounds}, {kind}, {side}")
                        with database(driver, postgres) as target:
                            rounds.append(run(target, side, kind, options.events, options.width))
                        console.print(
                            f"{driver}, {number}, {kind}, {side}: {rounds[-1].rate:.0f} per second", style="dim"
                        )
        versions = f"PostgreSQL {postgres.version}"
    console.print(table_of(rounds, options))
    packages = ", ".join(f"{name} {version(name)}" for name in ("sqlalchemy", "faststream-outbox"))
    console.print(
        f"Medians of {options.rounds} rounds of {options.events} events, {options.width} at once; RC: READ COMMITTED, "
        f"else REPEATABLE READ; Python {platform.python_version()}, {packages}, {versions}, "
        f"fsync {'off' if options.no_fsync else 'on'}"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in rounds]))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.events", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=2000, help="per round and side")
    parser.add_argument("--width", type=int, default=8, help="handlers at once")
    parser.add_argument("--drivers", nargs="+", choices=DRIVERS, default=DRIVERS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=tuple(SIDES), help="the first is the measure")
    parser.add_argument("--quick", action="store_true", help="a look: one round of 200 events")
    parser.add_argument("--no-fsync", action="store_true", help="a PostgreSQL that need not wait for the disk")
    parser.add_argument("--json", type=Path, help="keep every figure in this file")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.events = 1, 200
    return options


def sides_of(driver: str, wanted: tuple[str, ...]) -> list[str]:
    """Return those of *wanted* that there are on *driver*."""
    return [side for side in wanted if driver == "asyncpg" or not SIDES[side].postgresql_only]


@contextmanager
def database(driver: str, postgres: PostgresServer) -> Iterator[DatabaseUnderTest]:
    """Give an empty database."""
    if driver == "asyncpg":
        with postgres.database() as name:
            yield DatabaseUnderTest(url=postgres.url(name, driver=driver), driver=driver)
    else:
        with tempfile.TemporaryDirectory(prefix="aftercommit-bench-") as directory:
            yield DatabaseUnderTest(url=f"sqlite+aiosqlite:///{directory}/bench.db", driver=driver)


def run(target: DatabaseUnderTest, side: str, kind: str, events: int, width: int) -> Round:
    """Run one round of one side, in a process of its own, and see that every event took effect once.

    Raises:
        RuntimeError: If the process failed.
        AssertionError: If the rows say otherwise.
    """
    engine = create_engine(target.sync_url)
    try:
        fill(engine, events)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.events.child", target.url, side, str(events), str(width), kind],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{side} failed:\n{done.stdout}{done.stderr}")
        check(engine, events, hot=kind == "hot")
    finally:
        engine.dispose()
    took = json.loads(done.stdout.splitlines()[-1])
    return Round(
        driver=target.driver, side=side, kind=kind, rate=events / took["seconds"], calls=took["calls"] / events
    )


def table_of(rounds: list[Round], options: argparse.Namespace) -> Table:
    """Draw the table: one row for each side on each driver and kind of row, ratios to the first side."""
    table = Table(title="Events, until the last has taken effect")
    for heading in ("driver", "row", "side"):
        table.add_column(heading)
    for heading in ("per second", "ratio", "rounds", "calls"):
        table.add_column(heading, justify="right")
    for driver in options.drivers:
        for kind in KINDS:
            by_side = {
                side: [one for one in rounds if (one.driver, one.kind, one.side) == (driver, kind, side)]
                for side in sides_of(driver, options.sides)
            }
            base = by_side[options.sides[0]]
            for side, ours in by_side.items():
                ratios = [one.rate / other.rate for one, other in zip(ours, base, strict=True)]
                table.add_row(
                    driver,
                    kind,
                    side,
                    f"{median(one.rate for one in ours):.0f}",
                    f"{median(ratios):.2f}",
                    f"{min(ratios):.2f} – {max(ratios):.2f}",
                    f"{median(one.calls for one in ours):.2f}",
                )
            table.add_section()
    return table


if __name__ == "__main__":
    main()
