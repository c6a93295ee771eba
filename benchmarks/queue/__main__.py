"""``python -m benchmarks.queue``: measure, print tables, and keep every figure if asked to."""

import argparse
import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

from benchmarks.queue.measure import Figure, database, measure, redis_server
from benchmarks.queue.peers import PEERS
from tests.support.databases import DRIVERS
from tests.support.postgres import PostgresServer

MEASUREMENTS = ("backlog", "sustained 1", "sustained 100")
STARTS = ("start, alone", "start, steady", "start elsewhere")
CALLS = "calls"
BY_HAND, OURS = "by hand", "aftercommit"


def main() -> None:
    """Run the rounds and print what came out."""
    options = arguments()
    console = Console(width=130)
    figures: list[Figure] = []
    missing: list[str] = []
    with PostgresServer(safe=not options.no_fsync) as postgres, redis_server() as redis, console.status("") as status:
        plan = planned(options, redis, missing)
        for number in range(1, options.rounds + 1):
            for contestant, driver, measurement in plan:
                if measurement in (*STARTS, CALLS) and number > 1:
                    # Hundreds of starts each, and calls are the same every time: they need no rounds.
                    continue
                status.update(f"round {number} of {options.rounds}: {contestant}, {driver}, {measurement}")
                tasks = options.starts if measurement.startswith("start") else options.tasks
                with database(driver, postgres) as target:
                    figure = measure(
                        target, contestant, measurement,
                        tasks=tasks, width=options.width, number=number, redis=redis,
                    )  # fmt: skip
                figures.append(figure)
        facts = f"PostgreSQL {postgres.version} with fsync {'off' if options.no_fsync else 'on'}"
    show(console, figures, options)
    if CALLS in options.measurements:
        show_calls(console, figures, options)
    for line in missing:
        console.print(line, markup=False)
    console.print(told(options, facts), markup=False, soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in figures]))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queue", description=__doc__)
    parser.add_argument("--rounds", type=int, help="3, or 1 with --quick")
    parser.add_argument("--tasks", type=int, help="in each measurement: 2000, or 500 with --quick")
    parser.add_argument("--starts", type=int, help="in each measurement of the start: 500, or 200 with --quick")
    parser.add_argument("--width", type=int, default=8, help="tasks at once")
    parser.add_argument("--drivers", nargs="+", choices=DRIVERS, default=DRIVERS)
    parser.add_argument(
        "--measurements", nargs="+", choices=(*MEASUREMENTS, "start", CALLS), default=(*MEASUREMENTS, "start", CALLS)
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=tuple(PEERS))
    parser.add_argument("--quick", action="store_true", help="two minutes instead of ten")
    parser.add_argument("--no-fsync", action="store_true", help="a PostgreSQL that need not wait for the disk")
    parser.add_argument("--json", type=Path, help="keep every figure in this file")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.tasks = options.tasks or (500 if options.quick else 2000)
    options.starts = options.starts or (200 if options.quick else 500)
    return options


def planned(options: argparse.Namespace, redis: str | None, missing: list[str]) -> list[tuple[str, str, str]]:
    """Return what a round measures, in turn; say in *missing* what is not there to be measured."""
    plan: list[tuple[str, str, str]] = []
    for measurement in options.measurements:
        for driver in options.drivers:
            if measurement == "start":
                is_sqlite = driver in {"pysqlite", "aiosqlite"}
                plan += [(OURS, driver, start) for start in STARTS if not (is_sqlite and start == "start elsewhere")]
            else:
                plan += [(BY_HAND, driver, measurement), (OURS, driver, measurement)]
    for name in options.peers if "backlog" in options.measurements else ():
        peer = PEERS[name]
        if not peer.is_installed:
            missing.append(f"{name} is not installed, so it was not measured: pip install --group bench")
        elif peer.needs_redis and redis is None:
            missing.append(
                f"{name} was not measured: there is no redis-server on the path (apt-get install redis-server)"
            )
        else:
            plan.append((name, "psycopg" if name in {"Celery + Redis", "DBOS"} else "asyncpg", "backlog"))
    return plan


def show(console: Console, figures: list[Figure], options: argparse.Namespace) -> None:
    """Print the tables."""
    names = {"backlog": "a backlog, run", "sustained 1": "asked for one by one, and run",
             "sustained 100": "asked for a hundred at a time, and run"}  # fmt: skip
    for measurement in (each for each in MEASUREMENTS if each in options.measurements):
        table = _table(f"{options.tasks} tasks: {names[measurement]}", "driver", "contestant")
        for heading in ("per second", "ratio", "rounds", "CPU per task, ms", "CPU ratio"):
            table.add_column(heading, justify="right")
        mine = [each for each in figures if each.measurement == measurement]
        for driver in options.drivers:
            for contestant in dict.fromkeys(each.contestant for each in mine if each.driver == driver):
                table.add_row(driver, contestant, *_row(mine, driver, contestant))
            table.add_section()
        console.print(table)
    if "start" in options.measurements:
        table = _table("From commit to start", "driver", "asked for")
        for heading in ("median, ms", "99 %, ms"):
            table.add_column(heading, justify="right")
        for driver in options.drivers:
            for start, name in zip(STARTS, ("one at a time", "100 a second", "100 a second, run by another process"),
                                   strict=True):  # fmt: skip
                waits = [
                    ms for each in figures if (each.driver, each.measurement) == (driver, start) for ms in each.waits
                ]
                if waits:
                    table.add_row(driver, name, f"{median(waits):.1f}", f"{quantiles(waits, n=100)[98]:.1f}")
            table.add_section()
        console.print(table)


def show_calls(console: Console, figures: list[Figure], options: argparse.Namespace) -> None:
    """Print how much is computed, which does not depend on who else is on the machine."""
    table = _table("Function calls for each task of a backlog, the bookkeeping included", "driver")
    for heading in (BY_HAND, OURS, "ratio"):
        table.add_column(heading, justify="right")
    for driver in options.drivers:
        calls = {each.contestant: each.calls for each in figures if (each.driver, each.measurement) == (driver, CALLS)}
        ratio = f"{calls[BY_HAND] / calls[OURS]:.2f}"
        table.add_row(driver, f"{calls[BY_HAND]:.0f}", f"{calls[OURS]:.0f}", ratio)
    console.print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading)
    return table


def _row(figures: list[Figure], driver: str, contestant: str) -> tuple[str, ...]:
    """One contestant's row: medians, and ratios within each round."""
    mine = {each.number: each for each in figures if (each.driver, each.contestant) == (driver, contestant)}
    base = {each.number: each for each in figures if (each.driver, each.contestant) == (driver, BY_HAND)}
    ratios = [mine[number].per_second / base[number].per_second for number in mine if number in base]
    cpu = [base[number].cpu / mine[number].cpu for number in mine if number in base]
    return (
        f"{median(each.per_second for each in mine.values()):.0f}",
        f"{median(ratios):.2f}" if ratios else "",
        f"{min(ratios):.2f} – {max(ratios):.2f}" if ratios else "",
        f"{median(each.cpu for each in mine.values()):.2f}",
        f"{median(cpu):.2f}" if cpu else "",
    )


def told(options: argparse.Namespace, facts: str) -> str:
    """Say what was measured with what, and what was chosen for the others."""
    packages = ["aftercommit", "sqlalchemy", "asyncpg", "psycopg", "aiosqlite"]
    peers = [PEERS[name] for name in options.peers if PEERS[name].is_installed]
    versions = ", ".join([*(f"{name} {version(name)}" for name in packages), *(peer.versions for peer in peers)])
    chosen = "; ".join(f"{name}: {PEERS[name].settings}" for name in options.peers)
    return (
        f"Medians of {options.rounds} rounds, {options.width} tasks at once, {os.cpu_count()} processors, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {facts}, "
        f"SQLite with WAL and synchronous=FULL. {versions}." + (f" Others: {chosen}." if chosen else "")
    )


if __name__ == "__main__":
    main()
