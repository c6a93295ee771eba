"""The threads of this process ask SQLite for a file's write lock one after the other, as they came.

SQLite itself knows no queue: who waits looks again after up to a tenth of a second, and one that commits and begins
anew in the meantime never lets anybody in. So a thread that wants the lock waits for its turn here, keeps it for as
long as it has the lock, and gives it to the one that has waited longest.

The turn knows which connection has it. So work that asks for the lock while it holds it itself, on another connection,
is refused at once: it would wait for its whole patience, and so would everything behind it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Final

from aftercommit.errors import LockDeadlock
from aftercommit.watch.deadlocks import ExecutionContext, deadlocks, start_waiting, stop_waiting
from aftercommit.watch.owners import user_line

if TYPE_CHECKING:
    from aftercommit.watch.holders import HeldConnection

__all__ = ["Held", "refuse_own", "take_turn"]

_SHORT: Final = 0.1
"""Seconds of waiting that are not taken off the patience for the lock itself: telling SQLite costs two statements."""


class Turns:
    """Which connection has the turn on one file, and which threads wait for it."""

    def __init__(self) -> None:
        # What a dropped connection held is given back by the garbage collector, in any thread, between any two lines.
        self._lock = threading.RLock()
        self._is_held = False
        self._waiting: deque[tuple[threading.Lock, HeldConnection | None]] = deque()
        self.holder: HeldConnection | None = None

    def acquire(self, timeout: float, who: HeldConnection | None = None) -> bool:
        """Wait for the turn, on behalf of *who*; whether it came in *timeout* seconds."""
        with self._lock:
            if not self._is_held:
                self._is_held, self.holder = True, who
                return True
            if timeout <= 0:
                return False
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append((mine, who))
        if mine.acquire(timeout=timeout):
            return True
        with self._lock:
            if (mine, who) in self._waiting:
                self._waiting.remove((mine, who))
                return False
            return True  # it came at the last moment

    def release(self) -> None:
        """Give it to the thread that has waited longest."""
        with self._lock:
            if self._waiting:
                following, who = self._waiting.popleft()
                if who is not None and who.context is not None:
                    # It waits no longer, though its thread has not heard of it: a holder that still seemed to wait for
                    # what it has would look like a deadlock.
                    stop_waiting(who.context)
                self.holder = who
                following.release()
            else:
                self._is_held, self.holder = False, None

    def takers(self) -> list[ExecutionContext] | None:
        """The execution context that has it; None where it is free, or may be given back in another."""
        holder = self.holder
        context = None if holder is None else holder.context
        if holder is None or context is None or holder.opened_by not in {None, context.thread}:
            return None
        return [context]


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


def take_turn(file: str, patience: float, who: HeldConnection | None = None) -> tuple[Held | None, float]:
    """Wait for the turn to ask for the write lock of *file*.

    Args:
        file: The file.
        patience: Seconds for the turn and the lock.
        who: The connection that asks, where it is from a pool of ours.

    Returns:
        The turn, or None if it did not come in time: SQLite itself says then whether the lock is taken. And the seconds
        that are left for the lock.

    Raises:
        LockDeadlock: If it could never come, because the work that asks has the lock itself.
    """
    turns = _turns[file]
    if turns.acquire(0.0, who):
        return Held(turns), patience
    since = time.monotonic()
    context = start_waiting(turns, None if who is None else who.context)
    try:
        _refuse(turns, context, file)
        held = Held(turns) if turns.acquire(patience, who) else None
    finally:
        stop_waiting(context)
    waited = time.monotonic() - since
    return held, patience if waited < _SHORT else max(0.0, patience - waited)


def refuse_own(file: str, who: HeldConnection | None) -> None:
    """Refuse to wait for the lock past the turns, where the work that asks has it itself.

    Raises:
        LockDeadlock: If it has.
    """
    turns = _turns[file]
    if turns.holder is None or turns.holder is who:
        return
    context = start_waiting(turns, None if who is None else who.context)
    try:
        _refuse(turns, context, file)
    finally:
        stop_waiting(context)


def _refuse(turns: Turns, context: ExecutionContext, file: str) -> None:
    if not deadlocks(context):
        return
    holder = turns.holder
    if holder is None or holder.locked_since() is None:
        # Its transaction has ended, though the turn has not come back: then SQLite itself gives the lock.
        return
    described = holder.describe(time.monotonic())
    is_alone = holder.context is context
    line = user_line(1)
    place = "one place" if line is None else str(line)
    relation = (
        "who asked is the holder itself, on another connection"
        if is_alone
        else "the holder waits, directly or through others, for the work that asked"
    )
    raise LockDeadlock(
        f"Deadlock on SQLite's write lock: {place} asked for it, while it is held by {described}, and {relation}. It "
        f"could never come free, so the request was refused at once (file: {file}).\n"
        "Use the session that is open already: pass it on to what you call. Or commit it before another one writes.",
        holder=described,
        is_alone=is_alone,
    )


def _forget() -> None:
    # A forked process has none of the threads that hold them: nobody there would ever give a turn back, or a lock.
    for turns in list(_turns.values()):
        turns.__init__()  # type: ignore[misc]  # connections that came along refer to it
    _turns.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
