"""Real uvicorn servers: in a process of its own, to be stopped and killed, or on a thread of this one."""

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import uvicorn

from tests.support.processes import Log, spawn

ROOT = Path(__file__).parents[2]


class Server:
    """``uvicorn`` in a process of its own, as people start it, on a free port of 127.0.0.1.

    ``with`` starts it and waits until the application has started; at the end it is killed if it still runs.
    After ``stop`` or ``kill``, ``start`` starts it again, on another port.

    Args:
        app: ``"module:app"``, importable from the root of the project, or the path of a file that has an ``app``.
        env: Environment variables, beside those of this process.
        workers: Processes; with more than one, ``process`` is the one above them.
        arguments: More of uvicorn's command line.
    """

    def __init__(
        self,
        app: str | Path,
        *,
        env: Mapping[str, str] | None = None,
        workers: int = 1,
        arguments: Sequence[str] = (),
    ) -> None:
        if isinstance(app, Path):
            arguments = ("--app-dir", str(app.resolve().parent), *arguments)
            app = f"{app.stem}:app"
        self._command = [
            *(sys.executable, "-m", "uvicorn", app, "--port", "0", "--no-use-colors"),
            *(("--workers", str(workers)) if workers > 1 else ()),
            *arguments,
        ]
        self._env = {**os.environ, **(env or {}), "PYTHONUNBUFFERED": "1"}
        self._workers = workers

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self, *, timeout: float = 30.0) -> None:
        """Start it and wait until every worker says that the application has started.

        Args:
            timeout: Seconds.

        Raises:
            RuntimeError: If it ends instead. The message holds what it wrote.
            TimeoutError: If it takes longer. The message holds what it wrote.
        """
        self.process = spawn(self._command, env=self._env, cwd=ROOT)
        assert self.process.stdout is not None
        self.log = Log(self.process.stdout)
        try:
            self.log.wait_for("Application startup complete.", count=self._workers, timeout=timeout)
            line = self.log.wait_for("Uvicorn running on", timeout=timeout)
        except BaseException:
            self.kill()
            raise
        self.url = re.search(r"http://[\d.]+:\d+", line)[0]  # type: ignore[index] # uvicorn's own line has it

    @property
    def worker_pids(self) -> list[int]:
        """The processes that serve, for a test that kills one of several."""
        if self._workers == 1:
            return [self.process.pid]
        # spawn's resource tracker is a child, too.
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]

    def stop(self, *, timeout: float = 30.0) -> int:
        """Ask it to stop (SIGTERM), wait, and return its exit code: -15 after an orderly stop.

        Args:
            timeout: Seconds; when they are over it is killed.

        Raises:
            subprocess.TimeoutExpired: If it had to be killed.
        """
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill it with all its workers (SIGKILL) and wait until they are gone. Harmless when it has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.join()


@contextmanager
def serve(app: Any, **options: Any) -> Iterator[str]:
    """Run *app* under uvicorn on a thread of this process; give its base URL once it has started.

    Args:
        app: The ASGI application itself.
        options: More for ``uvicorn.Config``.

    Raises:
        RuntimeError: If the application does not start; uvicorn has logged why.
    """
    config = uvicorn.Config(app, **{"log_config": None, **options})
    ready = threading.Event()
    server = _Announcing(config, ready)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run_here, args=(listener,), name="uvicorn")
        thread.start()
        try:
            ready.wait()
            if not server.started:
                raise RuntimeError("The application did not start. uvicorn's log above says why.")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


class _Announcing(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: threading.Event) -> None:
        super().__init__(config)
        self._ready = ready

    def run_here(self, listener: socket.socket) -> None:
        try:
            # A start that fails ends in SystemExit.
            with suppress(SystemExit):
                self.run(sockets=[listener])
        finally:
            self._ready.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set()
