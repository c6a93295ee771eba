"""``python -m benchmarks.batch``: measure, print two tables, and keep every figure if asked to."""

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
from sqlalchemy import create_engine, make_url

from benchmarks.batch.child import SIDES
from benchmarks.batch.table import check, fill, tune
from tests.support.postgres import PostgresServer

ROOT = Path(__file__).parents[2]
DRIVERS = ("psycopg", "pysqlite")
MEMORY_SIDES = ("loop", "run_batch", "run_batch in a task", "per_chunk, keys")
MEASURES = {
    "run_batch": "loop",
    "run_batch, 1 % bad": "run_batch",
    "run_batch in a task": "run_batch",
    "per_chunk, rows": "one UPDATE",
    "per_chunk, keys": "one UPDATE",
}
"""What a side is measured by, where that is not the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round of one side gave.

    Attributes:
        driver: SQLAlchemy's name of the driver.
        side: Which side.
        rows: How many records there were.
        rate: Records per second.
        computed: What its process computed for a record, in µs. It depends less than the rate on who else is on the
            machine; what the server computes is not in it.
        peak: The most memory that its process had, in MiB: Python and all that is imported are in it.
    """

    driver: str
    side: str
    rows: int
    rate: float
    computed: float
    peak: float


def main() -> None:
    """Run the rounds and print what came out."""
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    rounds: list[Round] = []
    peaks: list[Round] = []
    with PostgresServer(safe=not options.no_fsync) as postgres, console.status("") as status:
        for driver in options.drivers:
            for number in range(1, options.rounds + 1):
                for side in options.sides:
                    status.update(f"{driver}, round {number} of {options.rounds}, {side}")
                    with database(driver, postgres) as url:
                        rounds.append(run(url, side, options.rows))
                    console.print(f"{driver}, round {number}, {side}: {rounds[-1].rate:.0f} per second", style="dim")
            for side in MEMORY_SIDES:
                for rows in options.memory:
                    status.update(f"{driver}, memory of {side}, {rows} rows")
                    with database(driver, postgres) as url:
                        peaks.append(run(url, side, rows))
                    console.print(f"{driver}, {rows} rows, {side}: {peaks[-1].peak:.0f} MiB", style="dim")
        versions = f"PostgreSQL {postgres.version}"
    if rounds:
        console.print(speed_of(rounds, options))
    if peaks:
        console.print(memory_of(peaks, options))
    console.print(
        f"Medians of {options.rounds} rounds of {options.rows} rows; Python {platform.python_version()}, "
        f"sqlalchemy {version('sqlalchemy')}, {versions}, fsync {'off' if options.no_fsync else 'on'}"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in (*rounds, *peaks)]))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument(
        "--memory", type=int, nargs="*", help="numbers of rows, to compare the peak; none: leave it out"
    )
    parser.add_argument("--drivers", nargs="+", choices=DRIVERS, default=DRIVERS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=tuple(SIDES), help="the first is the measure")
    parser.add_argument("--quick", action="store_true", help="a look: one round of 5000 rows, memory of 1000 and 10000")
    parser.add_argument("--no-fsync", action="store_true", help="a PostgreSQL that need not wait for the disk")
    parser.add_argument("--json", type=Path, help="keep every figure in this file")
    options = parser.parse_args()
    defaults = (1, 5000, [1000, 10_000]) if options.quick else (3, 100_000, [10_000, 1_000_000])
    for name, default in zip(("rounds", "rows", "memory"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


@contextmanager
def database(driver: str, postgres: PostgresServer) -> Iterator[str]:
    """Give the URL of an empty database."""
    if driver == "psycopg":
        with postgres.database() as name:
            yield postgres.url(name)
    else:
        with tempfile.TemporaryDirectory(prefix="aftercommit-bench-") as directory:
            yield f"sqlite+pysqlite:///{directory}/bench.db"


def run(url: str, name: str, rows: int) -> Round:
    """Run one round of one side, in a process of its own, and see that it did all that it was to do.

    Raises:
        RuntimeError: If the process failed.
        AssertionError: If it left something out.
    """
    side = SIDES[name]
    rows = max(1, round(rows * side.share))
    engine = tune(create_engine(url))
    try:
        fill(engine, rows, bad=side.bad)
        engine.dispose()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.batch.child", url, name],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stdout}{done.stderr}")
        check(engine, rows, bad=side.bad)
    finally:
        engine.dispose()
    took = json.loads(done.stdout.splitlines()[-1])
    return Round(
        driver=make_url(url).get_driver_name(),
        side=name,
        rows=rows,
        rate=rows / took["seconds"],
        computed=took["computed"] / rows * 1e6,
        peak=took["peak"],
    )


def speed_of(rounds: list[Round], options: argparse.Namespace) -> Table:
    """Draw the table of speed: one row for each side on each driver, each beside what it is measured by."""
    table = Table(title="Records, until the last is committed")
    for heading in ("driver", "side"):
        table.add_column(heading)
    for heading in ("per second", "CPU, µs", "beside", "ratio", "rounds"):
        table.add_column(heading, justify="right")
    for driver in options.drivers:
        for side in options.sides:
            ours, theirs = (
                [one for one in rounds if (one.driver, one.side) == (driver, name)]
                for name in (side, MEASURES.get(side, options.sides[0]))
            )
            ratios = [one.rate / other.rate for one, other in zip(ours, theirs, strict=False)]
            table.add_row(
                driver,
                side,
                f"{median(one.rate for one in ours):.0f}",
                f"{median(one.computed for one in ours):.1f}",
                *(
                    (theirs[0].side, f"{median(ratios):.2f}", f"{min(ratios):.2f} – {max(ratios):.2f}")
                    if ratios
                    else ()
                ),
            )
        table.add_section()
    return table


def spread(ratios: list[float]) -> tuple[str, str]:
    """Return the median, and the lowest and the highest."""
    return f"{median(ratios):.2f}", f"{min(ratios):.2f} – {max(ratios):.2f}"


def memory_of(peaks: list[Round], options: argparse.Namespace) -> Table:
    """Draw the table of memory: one row for each side on each driver."""
    table = Table(title="The most memory that the process had, in MiB")
    for heading in ("driver", "side"):
        table.add_column(heading)
    for rows in options.memory:
        table.add_column(f"{rows} rows", justify="right")
    for driver in options.drivers:
        for side in MEMORY_SIDES:
            ours = [one for one in peaks if (one.driver, one.side) == (driver, side)]
            table.add_row(driver, side, *(f"{one.peak:.0f}" for one in ours))
        table.add_section()
    return table


if __name__ == "__main__":
    main()
