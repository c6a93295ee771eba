"""The threads of this process ask SQLite for a file's write lock one after the other, as they came.

SQLite itself knows no queue: who waits looks again after up to a tenth of a second, and one that commits and begins
anew in the meantime never lets anybody in. So whoever wants the lock waits for his turn here, keeps it for as long as
he has the lock, and gives it to who has waited longest.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict, deque
from typing import Final

__all__ = ["Held", "take_turn"]

_SHORT: Final = 0.1
"""Seconds of waiting that are not taken off the patience for the lock itself: telling SQLite costs two statements."""


class Turns:
    """Who has the turn on one file, and who waits for it."""

    def __init__(self) -> None:
        # What a dropped connection held is given back by the garbage collector, in any thread, between any two lines.
        self._lock = threading.RLock()
        self._is_held = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout: float) -> bool:
        """Wait for the turn; whether it came in *timeout* seconds."""
        with self._lock:
            if not self._is_held:
                self._is_held = True
                return True
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        if mine.acquire(timeout=timeout):
            return True
        with self._lock:
            if mine in self._waiting:
                self._waiting.remove(mine)
                return False
            return True  # it came at the last moment

    def release(self) -> None:
        """Give it to who has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_held = False


class Held:
    """A turn that is held: given back when nobody refers to it, however its connection ended."""

    __slots__ = ("_turns",)

    def __init__(self, turns: Turns) -> None:
        self._turns: Turns | None = turns

    def __del__(self) -> None:
        """Give it back."""
        if self._turns is not None:
            self._turns.release()


_turns: defaultdict[str, Turns] = defaultdict(Turns)


def take_turn(file: str, patience: float) -> tuple[Held | None, float]:
    """Wait for the turn to ask for the write lock of *file*.

    Args:
        file: The file.
        patience: Seconds for the turn and the lock.

    Returns:
        The turn, or None if it did not come in time: SQLite itself says then whether the lock is taken. And the seconds
        that are left for the lock.
    """
    turns = _turns[file]
    since = time.monotonic()
    held = Held(turns) if turns.acquire(max(0.0, patience)) else None
    waited = time.monotonic() - since
    return held, patience if waited < _SHORT else max(0.0, patience - waited)


def _forget() -> None:
    # A forked process has none of the threads that hold them: nobody there would ever give a turn back, or a lock.
    for turns in list(_turns.values()):
        turns.__init__()  # type: ignore[misc]  # connections that came along refer to it
    _turns.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
