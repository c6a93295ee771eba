"""Where an event loop stands, in the application's own code."""

import asyncio
import os
import sysconfig
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from aftercommit.watch.loop_monitor import line_on_loop

TIMEOUT = 30.0


class Gate:
    """Where code stands still."""

    def __init__(self) -> None:
        self.begun, self._open = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Stand still."""
        self.begun.set()
        self._open.wait(TIMEOUT)

    def open(self) -> None:
        """Let it go on."""
        self._open.set()


@contextmanager
def on_a_loop(work: Callable[[Gate], Coroutine[Any, Any, None]]) -> Iterator[int]:
    """Run *work* on a loop in a thread of its own, and give that thread while it stands still."""
    gate = Gate()
    thread = threading.Thread(target=lambda: asyncio.run(work(gate)))
    thread.start()
    try:
        assert gate.begun.wait(TIMEOUT)
        assert thread.ident is not None
        yield thread.ident
    finally:
        gate.open()
        thread.join(TIMEOUT)


def installed(source: str) -> dict[str, Any]:
    """Code as if it had been installed."""
    file = os.path.join(sysconfig.get_path("purelib"), "somebodys", "client.py")  # noqa: PTH118  # compared as text
    names: dict[str, Any] = {}
    exec(compile(source, file, "exec"), names)  # the only way to give it a file
    return names


def test_the_innermost_line_of_the_application_is_named() -> None:
    """What it calls in the standard library, where the thread really is, is left out."""

    async def resize(gate: Gate) -> None:
        gate.wait()

    with on_a_loop(resize) as thread:
        line = line_on_loop(thread)

    assert line is not None
    assert "test_loop_monitor.py:" in line
    assert line.endswith(" in wait")


def test_the_line_that_called_a_library_is_named() -> None:
    """Most of what blocks is a library's, and what can be mended is the line that calls it."""
    client = installed("def fetch(begun, open):\n    begun.set()\n    open.wait(30)\n")

    async def report(gate: Gate) -> None:
        client["fetch"](gate.begun, gate._open)

    with on_a_loop(report) as thread:
        line = line_on_loop(thread)

    assert line is not None
    assert line.endswith(" in report")


def test_an_application_that_is_installed_itself_is_named_all_the_same() -> None:
    """Where everything is installed, the innermost line is the best there is."""
    shop = installed("async def report(gate):\n    gate.begun.set()\n    gate._open.wait(30)\n")

    with on_a_loop(shop["report"]) as thread:
        line = line_on_loop(thread)

    assert line is not None
    assert "client.py:3 in report" in line


def test_who_started_the_loop_is_not_to_blame() -> None:
    """Whoever called ``asyncio.run`` only waits for the loop, which turns."""
    turning, stop = threading.Event(), asyncio.Event()

    async def turn(loops: list[asyncio.AbstractEventLoop]) -> None:
        loops.append(asyncio.get_running_loop())
        turning.set()
        await stop.wait()

    loops: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=lambda: asyncio.run(turn(loops)))
    thread.start()
    assert turning.wait(TIMEOUT)
    assert thread.ident is not None
    # It may be anywhere in asyncio now; only `turn` itself may be met on the way there.
    found = line_on_loop(thread.ident)
    loops[0].call_soon_threadsafe(stop.set)
    thread.join(TIMEOUT)

    assert found is None or found.endswith(" in turn")


def test_a_thread_that_has_ended_is_nowhere() -> None:
    """Neither an error nor a line."""
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert thread.ident is not None

    assert line_on_loop(thread.ident) is None
