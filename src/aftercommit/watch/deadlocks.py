"""Work that holds a connection and waits for another: whether anything can still move.

Work that has a connection and opens a second session waits, if the pool is empty, for the others; and if each of the
others does the same, all wait until their time is up, and then all fail. So whoever would close such a ring is refused
at once, as databases do with deadlocks: its connection comes back, and the others get on.

Nothing else is refused: as long as one holder can go on, to wait is right. Rings through several pools are seen, too.

What is told apart are *execution contexts*: threads, and asyncio tasks. A coroutine that merely awaits others, which
wait for connections, cannot be told from one that goes on by itself, and counts as one that can. So does code that took
its connection from the engine by hand: those are taken in one place, and given back in another.
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import ref

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aftercommit.watch.leaks import SessionWatch

__all__ = ["ExecutionContext", "Takers", "deadlocks", "start_waiting", "stop_waiting", "this_context", "waiting_among"]


class ExecutionContext:
    """A thread, or an asyncio task, for as long as its context lasts.

    A thread that serves one request after another is another context for each: work that took a connection there for
    the last request, and has left the thread since, does not wait with the next.

    Attributes:
        taking: The session of ours that takes a connection here at this moment.
    """

    __slots__ = ("taking", "task", "thread")

    def __init__(self, thread: int, task: asyncio.Task[Any] | None) -> None:
        self.thread = thread
        # Weakly: an event loop keeps the contexts in which connections were opened.
        self.task = None if task is None else ref(task)
        self.taking: SessionWatch | None = None


class Takers(Protocol):
    """A pool of connections, or SQLite's write lock, as far as it matters here."""

    def takers(self) -> list[ExecutionContext] | None:
        """The contexts that have what it gives; None while it may still have one to give."""
        ...


_context: Final[ContextVar[ExecutionContext | None]] = ContextVar("aftercommit_context", default=None)
_lock: Final = threading.Lock()
_waiting: Final[dict[ExecutionContext, Takers]] = {}


def this_context() -> ExecutionContext:
    """The execution context of the caller."""
    thread = threading.get_ident()
    # current_task() alone would raise where no loop runs, and that is slow: every connection that is taken comes here.
    loop = asyncio._get_running_loop()  # noqa: SLF001  # documented, though named so
    task = None if loop is None else asyncio.current_task(loop)
    context = _context.get()
    # Not that of where the context was copied from.
    if context is None or context.thread != thread or (None if context.task is None else context.task()) is not task:
        context = ExecutionContext(thread, task)
        _context.set(context)
    return context


def start_waiting(pool: Takers, context: ExecutionContext | None = None) -> ExecutionContext:
    """Note that the caller may have to wait for something of *pool*'s, until ``stop_waiting``; return its context.

    Args:
        pool: A pool of connections, or of one lock.
        context: Of the work that waits, where that is not the caller's.

    All note it, also where a connection seems to be free: another may be quicker. So whoever comes last to a deadlock
    sees all the others, and only that one has to look.
    """
    context = context or this_context()
    _waiting[context] = pool
    return context


def stop_waiting(context: ExecutionContext) -> Takers | None:
    """The caller waits no longer; return the pool that it waited for."""
    return _waiting.pop(context, None)


def deadlocks(context: ExecutionContext) -> bool:
    """Whether *context*, which waits, would wait for ever; then it does no longer.

    All that could give back what it waits for wait themselves, directly or through others, for what it holds.
    """
    # Of two that close a ring in the same moment only one is refused.
    with _lock:
        is_stuck = context in _stuck()
        if is_stuck:
            del _waiting[context]
    return is_stuck


def waiting_among(contexts: Iterable[ExecutionContext]) -> int:
    """How many of *contexts* wait for a connection."""
    return sum(context in _waiting for context in set(contexts))


def _stuck() -> set[ExecutionContext]:
    """Of those that wait, all that will wait for ever: what is left when those that may be served are taken out."""
    waiting = dict(_waiting)  # in one step: others come and go meanwhile
    stuck = set(waiting)
    while True:
        served = {context for context in stuck if not _is_held_by(waiting[context], stuck)}
        if not served:
            return stuck
        stuck -= served


def _is_held_by(pool: Takers, stuck: set[ExecutionContext]) -> bool:
    takers = pool.takers()
    return takers is not None and stuck.issuperset(takers)
