"""One soak: the schedule of faults, the quiet after them, and the report."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import TaskRecord
from benchmarks.soak import faults_postgres, faults_process, faults_sqlite, tables
from benchmarks.soak.application import Shop
from benchmarks.soak.askers import PAUSE, STOP
from benchmarks.soak.balance import findings as findings_of
from benchmarks.soak.books import OPEN, Books
from benchmarks.soak.report import Found, report
from benchmarks.soak.stage import Stage
from benchmarks.soak.watch import Watch

QUIET_WITHIN = 60.0
"""Seconds after the last fault within which everything must have ended."""
STARTS_WITHIN = 30.0
"""Seconds for the processes to start; faults begin then in any case."""
_MOST_OPEN, _ENOUGH_ASKED = 150, 20

Fault = Callable[[Stage, Random], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is to be soaked.

    Attributes:
        driver: Such as "asyncpg", "asyncpg+pgbouncer".
        seconds: For how long faults go on.
        seed: Of the schedule and the work.
        only: Names of faults, or None for all.
        work: Kinds of requests, or None for all.
    """

    driver: str
    seconds: float
    seed: int
    only: list[str] | None = None
    work: list[str] | None = None


def faults_of(driver: str) -> tuple[dict[str, Fault], dict[str, Fault]]:
    """The faults that a driver knows, those that come one after the other and those that go on beside them."""
    if driver in ("pysqlite", "aiosqlite"):
        processes = {name: fault for name, fault in faults_process.FAULTS.items() if name != "vanish"}
        return {**processes, **faults_sqlite.FAULTS}, {}
    heavy: dict[str, Fault] = {**faults_process.FAULTS, **faults_postgres.FAULTS}
    if driver.endswith("+pgbouncer"):
        # Behind a pooler nobody can tell whose a backend is.
        del heavy["vanish"]
        heavy["restart pooler"] = faults_postgres.restart_pooler
    return heavy, dict(faults_postgres.LIGHT)


def schedule(
    faults: Mapping[str, Fault], rng: Random, *, pause: tuple[float, float]
) -> Iterator[tuple[float, str, Random]]:
    """Faults without end, each kind as often as the others: seconds to wait first, which, and its own randomness."""
    while faults:
        names = sorted(faults)
        rng.shuffle(names)
        for name in names:
            yield rng.uniform(*pause), name, Random(rng.random())


def soak(options: Options) -> bool:
    """Do it, tell of it, and say whether the books balance."""
    directory = Path(tempfile.mkdtemp(prefix="aftercommit-soak-"))
    directory.chmod(0o755)
    seed = f"{options.seed}/{options.driver}"
    with Stage(options.driver, seed=seed, directory=directory, only=options.work) as stage:
        _prepare(stage)
        watch = Watch(stage)
        started = time.monotonic()
        with watch:
            supervisor = threading.Thread(target=_supervise, args=(stage,), name="supervisor", daemon=True)
            supervisor.start()
            _strike(stage, options, seed)
            faults_ended = time.time()
            (directory / STOP).touch()
            quiet_after = _wait_until_quiet(stage)
        seconds = time.monotonic() - started
        books = Books.read(sa.create_engine(stage.outside_url), directory)
        for slot in stage.slots:
            if slot.proxy is not None:
                stage.done.update(slot.proxy.done)
        stage.diary.append((faults_ended, "(the last fault has ended)"))
        found = Found([*watch.findings, *findings_of(books)], books, seconds=seconds, quiet_after=quiet_after)
        report(options.driver, stage, found)
    if found.findings:
        return False
    shutil.rmtree(directory, ignore_errors=True)
    return True


def _prepare(stage: Stage) -> None:
    """Make the tables, start the processes, and wait until requests are answered."""
    engine = sa.create_engine(stage.outside_url)
    with engine.connect() as connection:
        if stage.is_sqlite:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    tables.Base.metadata.create_all(engine)
    shop = Shop(stage.outside_url)
    shop.db.create_tables()
    shop.db.dispose()
    with Session(engine) as session:
        session.add_all(tables.Counter(name=name, n=0) for name in tables.COUNTERS)
        session.commit()
    for slot in stage.slots:
        slot.ensure()
    until = time.monotonic() + STARTS_WITHIN
    while _count_asked(engine) < _ENOUGH_ASKED and time.monotonic() < until:
        time.sleep(0.1)
    engine.dispose()


def _count_asked(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(tables.Asked)) or 0


def _supervise(stage: Stage) -> None:
    """Start what has ended, and let nobody ask for more than can be done."""
    engine = sa.create_engine(stage.outside_url, connect_args={} if stage.is_sqlite else {"connect_timeout": 3})
    pause = stage.directory / PAUSE
    while not stage.is_over:
        for slot in stage.slots:
            if slot.lock.acquire(blocking=False):
                try:
                    slot.ensure()
                finally:
                    slot.lock.release()
        try:
            too_many = _count_open(engine) > _MOST_OPEN
        except sa.exc.SQLAlchemyError:
            too_many = False
        if too_many:
            pause.touch()
        else:
            pause.unlink(missing_ok=True)
        time.sleep(0.2)


def _count_open(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        counted = sa.select(sa.func.count()).select_from(TaskRecord).where(TaskRecord.state.in_(OPEN))
        return connection.scalar(counted) or 0


def _strike(stage: Stage, options: Options, seed: str) -> None:
    until = time.monotonic() + options.seconds
    heavy, light = faults_of(options.driver)
    if options.only is not None:
        heavy = {name: fault for name, fault in heavy.items() if name in options.only}
        light = {name: fault for name, fault in light.items() if name in options.only and name not in heavy}

    def go(faults: dict[str, Fault], name: str, pause: tuple[float, float]) -> None:
        for wait, which, rng in schedule(faults, Random(f"{seed}/{name}"), pause=pause):
            time.sleep(max(0.0, min(wait, until - time.monotonic())))
            if time.monotonic() >= until:
                return
            stage.tell(which)
            try:
                faults[which](stage, rng)
            except Exception as exc:  # noqa: BLE001  # an administrator is hit by faults as others are
                stage.done[f"({which}: {type(exc).__name__})"] += 1

    threads = [
        threading.Thread(target=go, args=(heavy, "heavy", (0.1, 1.2))),
        threading.Thread(target=go, args=(light, "light", (0.05, 0.6))),
    ]
    for thread in threads:
        thread.start()
    time.sleep(options.seconds)
    for thread in threads:
        thread.join()
    if not stage.is_sqlite:
        faults_postgres.calm(stage)


def _wait_until_quiet(stage: Stage) -> float | None:
    """Wait until nothing is open; return how many seconds it took, or None if it is not to be."""
    engine = sa.create_engine(stage.outside_url)
    began = time.monotonic()
    calm = 0
    while time.monotonic() < began + QUIET_WITHIN:
        try:
            calm = calm + 1 if _count_open(engine) == 0 else 0
        except sa.exc.SQLAlchemyError:
            calm = 0
        # Whoever asked at the very end has committed by then.
        if calm >= 10:
            return time.monotonic() - began
        time.sleep(0.2)
    return None
