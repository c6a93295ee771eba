"""One measurement: a contestant in a process of its own, on a database of its own."""

import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from signal import SIGUSR1
from subprocess import Popen
from threading import Event
from time import perf_counter_ns

import psutil
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.orm import Session

from benchmarks.queue.child import CALLS
from benchmarks.queue.peers import REDIS
from benchmarks.queue.work import KEYS, URL, WIDTH, Item, changed, changed_wrongly, prepare
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.processes import Log, spawn
from tests.support.servers import ROOT

POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one measurement gave.

    Attributes:
        contestant: Who.
        driver: By which driver.
        measurement: What was measured.
        number: The round.
        per_second: Tasks.
        cpu: What the contestant's processes computed for each task, in ms; the database server's part is not in it.
        waits: Milliseconds from commit to start, of each task.
        calls: Function calls for each task, of Python's and of C's; 0.0 where they were not counted, which is slow.
    """

    contestant: str
    driver: str
    measurement: str
    number: int
    per_second: float
    cpu: float
    waits: list[float] = field(default_factory=list)
    calls: float = 0.0


@contextmanager
def database(driver: str, postgres: PostgresServer | None) -> Iterator[DatabaseUnderTest]:
    """Give an empty database."""
    if driver in {"psycopg", "asyncpg"}:
        assert postgres is not None
        with postgres.database() as name:
            yield DatabaseUnderTest(url=postgres.url(name, driver=driver), driver=driver)
    else:
        with tempfile.TemporaryDirectory(prefix="aftercommit-bench-") as directory:
            yield DatabaseUnderTest(url=f"sqlite+{driver}:///{directory}/bench.db", driver=driver)


@contextmanager
def redis_server() -> Iterator[str | None]:
    """Start a Redis of our own; give its URL, or None where there is none to start."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As Debian and Redis set it up: snapshots now and then, no append-only file.
    with tempfile.TemporaryDirectory(prefix="aftercommit-redis-") as directory:
        process = spawn([program, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory])
        assert process.stdout is not None
        log = Log(process.stdout)
        try:
            log.wait_for("Ready to accept connections")
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()
            process.wait()


def measure(
    target: DatabaseUnderTest,
    contestant: str,
    measurement: str,
    *,
    tasks: int,
    width: int,
    number: int = 1,
    redis: str | None = None,
) -> Figure:
    """Run one measurement.

    Raises:
        RuntimeError: If a row was changed more often than once.
        TimeoutError: If it does not come to its end.
    """
    onlooker = create_engine(target.sync_url)
    prepare(onlooker, 0 if measurement.startswith("sustained") else tasks)
    environment = {**os.environ, URL: target.url, KEYS: str(tasks), WIDTH: str(width), REDIS: redis or ""}
    environment[CALLS] = "yes" if measurement == "calls" else ""
    with ExitStack() as stack:
        if measurement == "start elsewhere":
            server = stack.enter_context(_child("aftercommit", "serve", environment))
            server.log.wait_for("serving")
        child = stack.enter_context(_child(contestant, measurement, environment))
        begun = int(child.log.wait_for("begun", timeout=300.0).split()[1])
        computed = child.cpu_seconds()
        ended = _wait(onlooker, tasks, child.log)
        computed = child.cpu_seconds() - computed
        calls = child.calls() if measurement == "calls" else 0
        waits = _waits(onlooker, child.log) if measurement.startswith("start") else []
    doubled = changed_wrongly(onlooker)
    onlooker.dispose()
    if doubled:
        raise RuntimeError(f"{contestant}, {measurement}: {doubled} of {tasks} rows were changed more than once.")
    return Figure(
        contestant=contestant,
        driver=target.driver,
        measurement=measurement,
        number=number,
        per_second=tasks / (ended - begun) * 1e9,
        cpu=computed / tasks * 1000,
        waits=waits,
        calls=calls / tasks,
    )


class _Child:
    def __init__(self, process: Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self.log = Log(process.stdout)

    def cpu_seconds(self) -> float:
        """The CPU time that it and its children used so far."""
        root = psutil.Process(self._process.pid)
        times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
        return sum(float(each.user + each.system) for each in times)

    def calls(self) -> int:
        """The function calls that it counted so far."""
        self._process.send_signal(SIGUSR1)
        return int(self.log.wait_for("calls ").split()[1])

    def stop(self) -> None:
        """End it and its children, which have nothing more to do."""
        if self._process.poll() is None:
            for each in psutil.Process(self._process.pid).children(recursive=True):
                each.kill()
            self._process.kill()
        self._process.wait()


@contextmanager
def _child(contestant: str, measurement: str, environment: dict[str, str]) -> Iterator[_Child]:
    command = [sys.executable, "-m", "benchmarks.queue.child", contestant, measurement]
    child = _Child(spawn(command, cwd=ROOT, env=environment))
    try:
        yield child
    finally:
        child.stop()


def _wait(onlooker: Engine, number: int, log: Log) -> int:
    pause, done = Event(), 0
    for _ in range(60_000):
        done = changed(onlooker)
        if done == number:
            return perf_counter_ns()
        pause.wait(POLL_SECONDS)
    raise TimeoutError(f"{done} of {number} tasks were done after ten minutes:\n{log.text}")


def _waits(onlooker: Engine, log: Log) -> list[float]:
    committed = json.loads(log.wait_for("committed").partition(" ")[2])
    with Session(onlooker) as session:
        begun = {row.id: row.begun for row in session.execute(select(Item.id, Item.begun))}
    # A task on a thread may begin before the answer to COMMIT has been looked at.
    return [max(0.0, ((begun[int(key)] or 0) - at) / 1e6) for key, at in committed.items()]
