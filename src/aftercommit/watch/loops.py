"""One pool of async connections for any number of event loops: each connection is used by the loop that opened it.

An async driver's connection belongs to the event loop in which it was opened: in another one its waiting never ends, or
two loops write on one wire. A ``Database`` is used by several all the same: ``asyncio.run`` in a ``def`` task, a loop
for each test, a test client with a loop of its own. So the pool's idle connections are told apart here by their loops,
and count together against the pool's one limit:

- A loop is given a connection of its own, the one that was used last.
- One of a loop that is closed is dropped, and its place is used for a new one.
- Where no place is left, an idle one of another loop is closed there, and its place is used.
- A loop that waits is woken by whichever loop, or thread, gives a place back, in the order in which they came.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.util import await_only
from sqlalchemy.util import queue as sqlalchemy_queue

from aftercommit.watch.notes import notes_of

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = ["FirstLoop", "LoopQueue", "note_loops"]

_LOOP: Final = "event loop"
_PAUSE: Final = 0.002


def note_loops(engine: Engine) -> None:
    """Have each new connection of an async engine know the loop that it belongs to."""
    event.listen(engine, "connect", _note_loop)


def _note_loop(_connection: Any, entry: ConnectionPoolEntry) -> None:
    notes_of(entry)[_LOOP] = _running_loop()


class _Waiter:
    """A task that waits for a place, in a loop.

    Attributes:
        loop: The loop.
        woken: Done when a place was given.
        entry: The place.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.woken: asyncio.Future[None] = loop.create_future()
        self.entry: ConnectionPoolEntry | None = None

    def wake(self) -> None:
        """Let it go on; in its loop."""
        if not self.woken.done():
            self.woken.set_result(None)


class LoopQueue:
    """The idle connections of a pool; in the place of SQLAlchemy's queue, which is one loop's.

    Args:
        maxsize: How many it keeps.
        use_lifo: Of no meaning here: the one that was used last is always given first.
    """

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:  # noqa: FBT001, FBT002  # SQLAlchemy's
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        # The garbage collector gives back what was dropped, on any thread, between any two lines: also under this lock.
        self._lock = threading.RLock()
        self._idle: list[ConnectionPoolEntry] = []
        self._waiting: deque[_Waiter] = deque()

    def qsize(self) -> int:
        """How many are idle."""
        return len(self._idle)

    def empty(self) -> bool:
        """Whether none is."""
        return not self._idle

    def full(self) -> bool:
        """Whether no more are kept."""
        return 0 < self.maxsize <= len(self._idle)

    def put_nowait(self, item: ConnectionPoolEntry) -> None:
        """Take one back.

        Raises:
            Full: If as many are kept as may be.
        """
        self.put(item, block=False)

    def get_nowait(self) -> ConnectionPoolEntry:
        """Give one.

        Raises:
            Empty: If this loop has none, and there may be room for one of its own.
        """
        return self.get(block=False)

    def put(self, item: ConnectionPoolEntry, block: bool = True, timeout: float | None = None) -> None:  # noqa: ARG002, FBT001, FBT002
        """Take one back; never waits, because the pool never lets it.

        Raises:
            Full: If as many are kept as may be.
        """
        while True:
            with self._lock:
                if not self._waiting:
                    if self.full():
                        raise sqlalchemy_queue.Full
                    self._idle.append(item)
                    return
                waiter = self._waiting.popleft()
                waiter.entry = item
            if waiter.loop is _running_loop():
                waiter.wake()
                return
            try:
                waiter.loop.call_soon_threadsafe(waiter.wake)
            except RuntimeError:
                # Its loop was closed while it waited.
                continue
            return

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:  # noqa: FBT001, FBT002
        """Give one.

        Args:
            block: Whether no place is left for one more: an idle one of another loop gives up its place, or this waits.
            timeout: Seconds.

        Raises:
            Empty: If there is none for this loop, in time.
        """
        loop = _running_loop()
        waiter: _Waiter | None = None
        with self._lock:
            entry, is_stranger = self._find(loop, whole=block)
            if entry is None and block and loop is not None:
                waiter = _Waiter(loop)
                self._waiting.append(waiter)
                # One that came back since, on this very thread, found no one waiting.
                if self._idle and waiter.entry is None:
                    self._waiting.remove(waiter)
                    waiter = None
                    entry, is_stranger = self._find(loop, whole=True)
        if waiter is not None:
            entry = await_only(self._wait(waiter, timeout))
            is_stranger = loop_of(entry) is not loop
        if entry is None:
            raise sqlalchemy_queue.Empty
        if is_stranger:
            _drop(entry)
        return entry

    def _find(self, loop: asyncio.AbstractEventLoop | None, *, whole: bool) -> tuple[ConnectionPoolEntry | None, bool]:
        """Take what serves *loop* best, and say whether it is another loop's; under the lock."""
        other: int | None = None
        for place in range(len(self._idle) - 1, -1, -1):
            its = loop_of(self._idle[place])
            if its is loop or loop is None or self._idle[place].dbapi_connection is None:
                return self._idle.pop(place), False
            # The one that was idle for longest is given up first, and before all others one of a closed loop.
            if other is None or its is None or its.is_closed() or not _is_closed(self._idle[other]):
                other = place
        if other is not None and (whole or _is_closed(self._idle[other])):
            return self._idle.pop(other), True
        return None, False

    async def _wait(self, waiter: _Waiter, seconds: float | None) -> ConnectionPoolEntry:
        try:
            async with asyncio.timeout(seconds):
                await waiter.woken
        except BaseException as exc:
            with self._lock:
                entry = waiter.entry
                if entry is None:
                    self._waiting.remove(waiter)
            if entry is None:
                if isinstance(exc, TimeoutError):
                    raise sqlalchemy_queue.Empty from exc
                raise
            if isinstance(exc, TimeoutError):
                return entry  # it came at the last moment
            # Cancelled when it had just been given one: that is the next one's.
            self.put(entry, block=False)
            raise
        assert waiter.entry is not None  # noqa: S101  # it was woken
        return waiter.entry

    def give_up_strangers(self) -> None:
        """Drop the connections of other loops, where these can be closed: before the pool closes what is idle."""
        loop = _running_loop()
        with self._lock:
            idle = list(self._idle)
        for entry in idle:
            if loop is not None and entry.dbapi_connection is not None and loop_of(entry) is not loop:
                _drop(entry)


class FirstLoop:
    """Lets one loop at a time connect, until a first connection is there.

    SQLAlchemy asks the first one about the server, under a lock of asyncio's: only one loop can wait for that.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting = 0

    def enter(self) -> None:
        """Wait until the caller's loop may connect."""
        loop = _running_loop()
        while not self.is_over:
            with self._lock:
                if not self._connecting or self._loop is loop or self._loop is None or self._loop.is_closed():
                    self._loop = loop
                    self._connecting += 1
                    return
            await_only(asyncio.sleep(_PAUSE))
        with self._lock:
            self._connecting += 1

    def leave(self, *, connected: bool) -> None:
        """The caller has connected, or could not."""
        with self._lock:
            self._connecting -= 1
            self.is_over = self.is_over or connected


def loop_of(entry: ConnectionPoolEntry) -> asyncio.AbstractEventLoop | None:
    """The loop of a connection; None for one that was opened outside of any."""
    loop: asyncio.AbstractEventLoop | None = notes_of(entry).get(_LOOP)
    return loop


def _is_closed(entry: ConnectionPoolEntry) -> bool:
    loop = loop_of(entry)
    return loop is None or loop.is_closed()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    return asyncio._get_running_loop()  # noqa: SLF001  # documented, though named so


def _drop(entry: Any) -> None:
    """Take the connection from a place, which makes one anew when it is used next, and have its own loop close it."""
    loop, adapted = loop_of(entry), entry.dbapi_connection
    if adapted is None:
        return
    driver: Any = entry.driver_connection
    entry.dbapi_connection = None
    if loop is not None and not loop.is_closed():
        with suppress(RuntimeError):  # it was closed in this moment
            loop.call_soon_threadsafe(_close_here, driver, adapted)
            return
    _cut(driver)


def _close_here(driver: Any, adapted: Any) -> None:
    """Close a connection in its own loop, which is running."""
    closing = asyncio.ensure_future(driver.close())
    # The loop keeps only weak references to its tasks.
    _closing[closing] = adapted
    closing.add_done_callback(_closed)


def _closed(closing: asyncio.Future[Any]) -> None:
    del _closing[closing]
    if not closing.cancelled():
        # An error here is of no interest to any caller: the connection was given up.
        closing.exception()


_closing: Final[dict[asyncio.Future[Any], Any]] = {}


def _cut(driver: Any) -> None:
    """Let the server see that a connection has ended whose loop is closed: nothing of the driver's can run there."""
    with suppress(Exception):
        if hasattr(driver, "pgconn"):
            driver.pgconn.finish()
        elif hasattr(driver, "_transport"):
            made = driver._transport.get_extra_info("socket")  # noqa: SLF001  # no public name leads to its socket
            made.shutdown(socket.SHUT_RDWR)
        elif hasattr(driver, "stop"):
            driver.stop()
