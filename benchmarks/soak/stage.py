"""Where a soak takes place: the database, the network before it, the processes of the application, and a diary."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, Self

import psycopg

from benchmarks.soak.pooler import Pooler
from benchmarks.soak.proxy import Proxy
from tests.support.postgres import PostgresServer
from tests.support.processes import spawn
from tests.support.servers import ROOT

WORKERS = 3
SETTINGS = {"max_connections": "110", "superuser_reserved_connections": "3", "deadlock_timeout": "500ms"}


class Slot:
    """One process of the application, and whoever starts it again when it has ended.

    Args:
        stage: Where.
        number: Which.
        proxy: The network before the database, on PostgreSQL.
    """

    def __init__(self, stage: "Stage", number: int, proxy: Proxy | None) -> None:
        self._stage, self._number, self.proxy = stage, number, proxy
        self._starts = 0
        self.lock = threading.RLock()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        """Start it, anew, under a name of its own."""
        self._starts += 1
        name = f"{self._number}.{self._starts}"
        settings = {**self._stage.settings, "name": name, "url": self._stage.url(self.proxy)}
        self.process = spawn([sys.executable, "-m", "benchmarks.soak.worker", json.dumps(settings)], cwd=ROOT)
        return self.process

    def ensure(self) -> None:
        """Start it again if it has ended, as whatever supervises processes does."""
        with self.lock:
            if not self._stage.is_over and (self.process is None or self.process.poll() is not None):
                self.start()


class Stage:
    """Everything that faults are done to.

    Args:
        driver: One of ``DRIVERS`` of the command, such as "asyncpg" or "asyncpg+pgbouncer".
        seed: Of the work.
        directory: For ledgers, logs, and the file on SQLite.
        only: Kinds of requests, or None.

    Attributes:
        server: On PostgreSQL.
        path: Of the file, on SQLite.
        slots: The processes.
        done: How many faults of each kind.
        diary: When each fault began, in seconds since the epoch, and which it was.
        thawed: When a freeze of the database ended last, by the monotonic clock; infinity while one lasts.
    """

    def __init__(self, driver: str, *, seed: str, directory: Path, only: list[str] | None) -> None:
        self.driver, _, pooler = driver.partition("+")
        self._uses_pooler = bool(pooler)
        self.directory = directory
        self.settings: dict[str, Any] = {"directory": str(directory), "seed": seed, "only": only, "notify_url": None}
        self.server: PostgresServer | None = None
        self.pooler: Pooler | None = None
        self.path = directory / "data" / "soak.db"
        self.slots: list[Slot] = []
        self.done: Counter[str] = Counter()
        self.diary: list[tuple[float, str]] = []
        self.thawed = 0.0
        self.is_over = False
        self._stack = ExitStack()

    @property
    def is_sqlite(self) -> bool:
        """Whether this is about SQLite."""
        return self.driver in ("pysqlite", "aiosqlite")

    def __enter__(self) -> Self:
        self._stack.__enter__()
        if self.is_sqlite:
            self._stack.enter_context(_small_disk(self.path.parent))
            self.slots = [Slot(self, number, None) for number in range(WORKERS)]
            return self
        self.server = self._stack.enter_context(PostgresServer(SETTINGS))
        self._database = self._stack.enter_context(self.server.database())
        target = self.server.port
        if self._uses_pooler:
            self.pooler = self._stack.enter_context(Pooler(self.directory, self.server.port))
            target = self.pooler.port
            self.settings["notify_url"] = self.server.url(self._database, driver=self.driver)
        for number in range(WORKERS):
            proxy = Proxy(target)
            self._stack.callback(proxy.close)
            self.slots.append(Slot(self, number, proxy))
        return self

    def __exit__(self, *error: object) -> None:
        self.is_over = True
        for slot in self.slots:
            with slot.lock:
                if slot.process is not None:
                    slot.process.kill()
                    slot.process.wait()
        self._stack.__exit__(*error)

    def url(self, proxy: Proxy | None) -> str:
        """Where a process of the application finds the database; with no proxy, where whoever looks on finds it."""
        if self.is_sqlite:
            return f"sqlite+{self.driver}:///{self.path}"
        assert self.server is not None
        direct = self.server.url(self._database, driver=self.driver)
        return direct if proxy is None else direct.replace(f":{self.server.port}/", f":{proxy.port}/")

    @property
    def outside_url(self) -> str:
        """The same by a plain driver, past all faults of the network."""
        return self.url(None).replace("asyncpg", "psycopg").replace("aiosqlite", "pysqlite")

    def tell(self, name: str) -> None:
        """Note that a fault begins."""
        self.done[name] += 1
        self.diary.append((time.time(), name))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Note that the database stands still for the length of a ``with``."""
        self.thawed = float("inf")
        try:
            yield
        finally:
            self.thawed = time.monotonic()

    @contextmanager
    def admin(self) -> Iterator[psycopg.Connection]:
        """A connection of an administrator's, who fails for nobody's faults but his own."""
        assert self.server is not None
        url = self.server.url(self._database, driver=None)
        options = "-c statement_timeout=15000 -c default_transaction_read_only=off -c lock_timeout=0"
        with psycopg.connect(url, autocommit=True, connect_timeout=5, options=options,
                             application_name="soak-admin") as connection:  # fmt: skip
            yield connection

    def sqlite(self) -> sqlite3.Connection:
        """A connection of another program's."""
        return sqlite3.connect(self.path, isolation_level=None, timeout=2.0, check_same_thread=False)

    def pick(self, rng: Random) -> Slot:
        """One of the processes."""
        return rng.choice(self.slots)


@contextmanager
def _small_disk(directory: Path) -> Iterator[None]:
    """A disk of its own, which can be full without harm, where we may make one."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256m", "soak", str(directory)]
    is_mounted = False
    with suppress(OSError):
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(directory)], capture_output=True, check=False)
