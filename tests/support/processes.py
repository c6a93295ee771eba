"""Child processes that never outlive the tests."""

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from signal import SIGKILL
from typing import IO, Any

# Runs in the child: become the user, ask the kernel for a signal when the parent dies (changing the user would
# forget that wish, hence the order), then become the program. Imports come first: the user may not see our Python.
# Ctrl-C is heard again, though a shell that put the tests into the background has them ignore it.
_TETHER = """
import ctypes, os, signal, sys
user, orphaned, *argv = sys.argv[1:]
signal.signal(signal.SIGINT, signal.SIG_DFL)
if user:
    import pwd
    entry = pwd.getpwnam(user)
    os.initgroups(user, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(orphaned))
os.execvp(argv[0], argv)
"""

# To the kernel the parent is the *thread* that started a child. This one lives as long as the tests do.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def spawn(
    argv: Sequence[str], *, user: str | None = None, orphaned: int = SIGKILL, **options: Any
) -> subprocess.Popen[str]:
    """Start *argv* in a process group of its own; its output is text, in one pipe.

    Promise: on Linux the child gets the signal *orphaned* when this process dies, however that happens.

    Args:
        argv: The program and its arguments.
        user: The name of the user to run as; None stays the same.
        orphaned: The signal to send when this process dies.
        options: More for ``subprocess.Popen``.
    """
    command = [sys.executable, "-S", "-E", "-c", _TETHER, user or "", str(int(orphaned)), *argv]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            **options,
        )

    return _spawner.submit(start).result()


class Log:
    """What a child wrote so far, line by line, and a way to wait for what it has yet to write."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, args=(stream,), name="log reader", daemon=True)
        self._reader.start()

    @property
    def lines(self) -> list[str]:
        """The lines so far, without their ends."""
        with self._changed:
            return list(self._lines)

    @property
    def text(self) -> str:
        """The lines so far, as one string."""
        return "\n".join(self.lines)

    def wait_for(self, part: str, *, count: int = 1, timeout: float = 30.0) -> str:
        """Wait until *count* lines contain *part*; return the last of them.

        Args:
            part: What to look for, as it is.
            count: How many lines must contain it, from the beginning of the log.
            timeout: Seconds.

        Raises:
            RuntimeError: If the child closed its output first. The message holds the log.
            TimeoutError: If it took longer. The message holds the log.
        """

        def found() -> list[str]:
            return [line for line in self._lines if part in line]

        with self._changed:
            self._changed.wait_for(lambda: len(found()) >= count or self._ended, timeout)
            lines, ended = found(), self._ended
        if len(lines) >= count:
            return lines[count - 1]
        if ended:
            raise RuntimeError(f"The process ended without writing {part!r} {count} times. It wrote:\n{self.text}")
        raise TimeoutError(f"The process did not write {part!r} {count} times in {timeout} s. It wrote:\n{self.text}")

    def join(self) -> None:
        """Wait until the child has closed its output and all of it has been read."""
        self._reader.join()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
