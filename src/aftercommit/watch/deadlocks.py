"""Those who hold a connection and wait for another: whether anything can still move.

Somebody who has a connection and opens a second session waits, if the pool is empty, for the others; and if each of
the others does the same, all wait until their time is up, and then all fail. So whoever would close such a ring is
refused at once, as databases do with deadlocks: the connection he has comes back, and the others get on.

Nobody else is refused: as long as one holder can go on, to wait is right. Rings through several pools are seen, too.

What is told apart are *flows*: threads, and asyncio tasks. A coroutine that merely awaits others, which wait for
connections, cannot be told from one that goes on by itself, and counts as one that can. So does whoever took his
connection from the engine by hand: those are taken in one place, and given back in another.
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import ref

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Flow", "Takers", "stop_waiting", "this_flow", "wait_for", "waiting_among"]


class Flow:
    """A thread, or an asyncio task, for as long as its context lasts.

    A thread that serves one request after another is another flow for each: who took a connection there for the last
    request, and has left the thread since, does not wait with the next.
    """

    __slots__ = ("task", "thread")

    def __init__(self, thread: int, task: asyncio.Task[Any] | None) -> None:
        self.thread = thread
        # Weakly: an event loop keeps the contexts in which connections were opened.
        self.task = None if task is None else ref(task)


class Takers(Protocol):
    """A pool, as far as it matters here."""

    def takers(self) -> list[Flow] | None:
        """Who has its connections; None while it may still have one to give."""
        ...


_flow: ContextVar[Flow | None] = ContextVar("aftercommit_flow", default=None)
_lock: Final = threading.Lock()
_waiting: Final[dict[Flow, Takers]] = {}


def this_flow() -> Flow:
    """The flow of the caller."""
    thread = threading.get_ident()
    # current_task() alone would raise where no loop runs, and that is slow: every connection that is taken comes here.
    loop = asyncio._get_running_loop()  # noqa: SLF001  # documented, though named so
    task = None if loop is None else asyncio.current_task(loop)
    flow = _flow.get()
    # Not that of where the context was copied from.
    if flow is None or flow.thread != thread or (None if flow.task is None else flow.task()) is not task:
        flow = Flow(thread, task)
        _flow.set(flow)
    return flow


def wait_for(pool: Takers) -> Flow | None:
    """Note that the caller may have to wait for a connection of *pool*, until ``stop_waiting``.

    Everybody notes it, also where a connection seems to be free: somebody else may be quicker. So whoever comes last
    to a standstill sees all the others, and only he has to look.

    Returns:
        The caller's flow; None, and nothing is noted, if that would be a standstill: everybody who could give back
        what he waits for waits himself, directly or through others, for what he holds.
    """
    me = this_flow()
    _waiting[me] = pool
    if pool.takers() is not None:
        # Of two who close a ring in the same moment only one is refused.
        with _lock:
            if me in _stuck():
                del _waiting[me]
                return None
    return me


def stop_waiting(flow: Flow) -> None:
    """The caller waits no longer."""
    _waiting.pop(flow, None)


def waiting_among(flows: Iterable[Flow]) -> int:
    """How many of *flows* wait for a connection."""
    return sum(flow in _waiting for flow in set(flows))


def _stuck() -> set[Flow]:
    """Of those who wait, all who will wait for ever: what is left when those who may be served are taken out."""
    waiting = dict(_waiting)  # in one step: others come and go meanwhile
    stuck = set(waiting)
    while True:
        served = {flow for flow in stuck if not _is_held_by(waiting[flow], stuck)}
        if not served:
            return stuck
        stuck -= served


def _is_held_by(pool: Takers, stuck: set[Flow]) -> bool:
    takers = pool.takers()
    return takers is not None and stuck.issuperset(takers)
