"""Which of a PostgreSQL server's processes ("backends") serve the connections of one ``Database`` in this process.

A driver is told the number of its backend when it connects, so noting it costs no round trip. A number alone is not
enough to end a backend by: numbers are used again. Together with the moment at which the backend began it belongs to
one connection for good, and that moment is asked of the server later, for many at once.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import Engine

__all__ = ["Backends", "Noted", "Seen", "identify", "pid_told_to"]

_SLACK: Final = 0.1
"""Seconds by which a backend may seem to have begun after its client was connected, because a thread was held up."""

_LOGIN: Final = 60.0
"""Seconds that a login may take: a backend begins before it, its client is connected after it."""

_TRIES: Final = 5


def pid_told_to(driver: Any) -> int:
    """Return the number of the server process that *driver*, a driver's own connection, was told when it connected.

    A pooler answers for the server there, and makes up a number of its own; statements are then answered by a process
    with another. Neither ports nor addresses tell as much: containers map those, too.
    """
    return int(driver.info.backend_pid if hasattr(driver, "info") else driver.get_server_pid())


@dataclass(slots=True, kw_only=True)
class Noted:
    """One connection of ours.

    Attributes:
        pid: Its backend's number, as the driver was told.
        since: When it was connected, by the monotonic clock.
        began: When the backend began, in microseconds since 1970 by the server's clock; None until that is known.
        tries: How often the server has been asked for it.
        process: Which of our processes connected: a fork has its parent's connections in memory, and must not use them.
    """

    pid: int
    since: float
    began: int | None = None
    tries: int = 0
    process: int = field(default_factory=os.getpid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the server says of one backend.

    Attributes:
        pid: Its number.
        began: When it began, in microseconds since 1970 by the server's clock.
        age: Seconds since then.
        role: Whom it is logged in as.
    """

    pid: int
    began: int
    age: float
    role: str


class Backends:
    """Notes each connection that the pools of one ``Database`` make, in both flavours."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By the driver's own connection: whatever becomes of it, nothing is left here.
        self._noted: weakref.WeakKeyDictionary[Any, Noted] = weakref.WeakKeyDictionary()
        self.on_connect: Callable[[], object] | None = None
        """Called after each new one, on the thread that has connected."""

    def attach(self, engine: Engine) -> None:
        """Note the connections of *engine*."""
        event.listen(engine, "connect", self._note)

    def _note(self, _connection: object, record: Any) -> None:
        # A driver that a test has put in place of the real one may know no number.
        with suppress(AttributeError, TypeError):
            driver = record.driver_connection
            noted = Noted(pid=pid_told_to(driver), since=time.monotonic())
            with self._lock:
                self._noted[driver] = noted
        if self.on_connect is not None:
            self.on_connect()

    def noted(self) -> list[Noted]:
        """Those that this process has made, and whose connection is still there."""
        with self._lock:
            return [each for each in self._noted.values() if each.process == os.getpid()]


def identify(noted: Iterable[Noted], seen: Iterable[Seen], *, until: float) -> tuple[list[Seen], bool]:
    """Find out which of the backends that the server has are surely ours.

    One whose number we were told, and which began before we were connected, was there when we were told: two do not
    have the same number at the same time. One that began later has taken the number over.

    Args:
        noted: What we have; those that are recognised for the first time are given their ``began``.
        seen: What the server has under these numbers.
        until: When its answer had arrived, by the monotonic clock: each began at *until* - ``age`` at the latest.

    Returns:
        Those that are ours, and whether it is worth asking again: an answer that took long proves nothing.
    """
    by_pid = {each.pid: each for each in seen}
    ours: dict[int, Seen] = {}
    again = False
    for each in noted:
        there = by_pid.get(each.pid)
        if there is None:
            continue
        if each.began is None:
            each.tries += 1
            late = until - there.age - each.since
            if -_LOGIN <= late <= _SLACK:
                each.began = there.began
            else:
                again = again or each.tries < _TRIES
        if each.began == there.began:
            ours[each.pid] = there
    return [ours[pid] for pid in sorted(ours)], again
