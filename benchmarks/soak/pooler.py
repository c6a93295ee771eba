"""PgBouncer in transaction mode, where it is installed."""

import os
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any, Self
from uuid import uuid4

from tests.support.pgbouncer import find
from tests.support.processes import Log, spawn


class Pooler:
    """PgBouncer before a server, started and stopped by ``with``.

    Args:
        directory: For its log.
        server: The port of the server.
    """

    def __init__(self, directory: Path, server: int) -> None:
        self._server = server
        self._directory = directory

    def __enter__(self) -> Self:
        binary = find()
        if binary is None:
            raise SystemExit("PgBouncer is missing. Install it (Debian: apt-get install pgbouncer).")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._home = Path(tempfile.mkdtemp(prefix="soak-pgbouncer-"))
        self._home.chmod(0o755)
        configuration = self._home / "pgbouncer.ini"
        (self._home / "users.txt").write_text('"postgres" ""\n')
        configuration.write_text(
            f"[databases]\n* = host=127.0.0.1 port={self._server} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"auth_file = {self._home / 'users.txt'}\npool_mode = transaction\nmax_client_conn = 300\n"
            "default_pool_size = 40\nserver_login_retry = 1\n"
        )
        self._command = [binary, str(configuration)]
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def restart(self) -> None:
        """Kill it, with everybody's connections, and start it again."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, SIGKILL)
        self._process.wait()
        self._start()

    def _start(self) -> None:
        self._process = spawn(self._command, user="nobody" if os.geteuid() == 0 else None)
        assert self._process.stdout is not None
        self._log = Log(self._process.stdout)
        self._log.wait_for("process up")


def driver_options(driver: str) -> dict[str, Any]:
    """What ``Database`` needs behind a pooler that carries no prepared statements."""
    if driver == "psycopg":
        plain: dict[str, Any] = {"connect_args": {"prepare_threshold": None}}
        return {"engine_options": plain, "async_engine_options": plain}
    arguments = {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__{uuid4()}__",
    }
    return {"async_engine_options": {"connect_args": arguments}}
