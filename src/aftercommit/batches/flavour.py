"""The few things that differ between a sync batch and an async one.

A batch is written once, as plain functions over ``Session``. An async batch runs them in a greenlet, as SQLAlchemy
runs its own: what awaits is awaited from there, cancellation comes in as an exception, context variables carry over.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy.util import await_only, greenlet_spawn

from aftercommit.sessions import AsyncOpened, SyncOpened

if TYPE_CHECKING:
    from aftercommit.sessions import Opened, Owner, SessionFactory

__all__ = ["AsyncFlavour", "Flavour", "SyncFlavour"]


class Flavour(Protocol):
    """How a batch opens sessions, calls what it was given, waits, and runs lanes."""

    def open(self, sessions: SessionFactory, pool: str, owner: Owner, level: str | None, *, reads: bool) -> Opened:
        """Open a session: a task's, whose chunk can be repeated, or one for a look."""
        ...

    def call(self, function: Callable[..., Any], opened: Opened, *args: Any) -> Any:
        """Call what the user gave, with the session that it expects."""
        ...

    def following(self, source: Iterator[Any] | AsyncIterator[Any]) -> Any:
        """The next value; raises ``StopIteration`` at the end."""
        ...

    def wait(self, seconds: float) -> None:
        """Let time pass; less of it when the batch ends."""

    def locked(self) -> Any:
        """A ``with`` that one lane at a time is in."""
        ...

    def spawn(self, lane: Callable[[], None]) -> None:
        """Run a lane beside this one."""

    def join(self) -> None:
        """Wait for the lanes that were spawned."""

    def hurry(self, *, abort: bool) -> None:
        """Let nobody wait any longer, because the batch is ending; *abort*: cancel the lanes that can be."""


class SyncFlavour:
    """Threads and plain sessions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def open(self, sessions: SessionFactory, pool: str, owner: Owner, level: str | None, *, reads: bool) -> Opened:
        """Open a plain session."""
        return SyncOpened(sessions.scope(pool, owner) if reads else sessions.task_scope(pool, owner, level))

    def call(self, function: Callable[..., Any], opened: Opened, *args: Any) -> Any:
        """Call it."""
        return opened.call(function, *args)

    def following(self, source: Any) -> Any:
        """The next value."""
        return next(source)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self._ending.wait(seconds)

    def locked(self) -> Any:
        """A thread lock."""
        return self._lock

    def spawn(self, lane: Callable[[], None]) -> None:
        """Start a thread with this context: the run at hand is known in it, too."""
        context = contextvars.copy_context()
        number = len(self._threads) + 1
        thread = threading.Thread(target=context.run, args=(lane,), name=f"aftercommit-batch-{number}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        """Wait for the threads."""
        for thread in self._threads:
            thread.join()

    def hurry(self, *, abort: bool) -> None:  # noqa: ARG002  # a thread cannot be cancelled
        """End every wait."""
        self._ending.set()


class AsyncFlavour:
    """Greenlets of asyncio tasks, and async sessions."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._ending = asyncio.Event()
        self._lanes: list[asyncio.Task[None]] = []

    def open(self, sessions: SessionFactory, pool: str, owner: Owner, level: str | None, *, reads: bool) -> Opened:
        """Open an async session."""
        return AsyncOpened(
            sessions.async_scope(pool, owner) if reads else sessions.async_task_scope(pool, owner, level)
        )

    def call(self, function: Callable[..., Any], opened: Opened, *args: Any) -> Any:
        """Await an ``async def`` with the ``AsyncSession``; a ``def`` is given the plain one behind it."""
        return opened.call(function, *args)

    def following(self, source: Any) -> Any:
        """The next value."""
        if not isinstance(source, AsyncIterator):
            return next(source)
        try:
            return await_only(anext(source))
        except StopAsyncIteration:
            raise StopIteration from None

    def wait(self, seconds: float) -> None:
        """Let time pass."""

        async def pause() -> None:
            try:
                await asyncio.wait_for(self._ending.wait(), seconds)
            except TimeoutError:
                return

        await_only(pause())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A lock of the loop's: what is done under it may await."""
        await_only(self._lock.acquire())
        try:
            yield
        finally:
            self._lock.release()

    def spawn(self, lane: Callable[[], None]) -> None:
        """Start an asyncio task."""
        self._lanes.append(asyncio.get_running_loop().create_task(greenlet_spawn(lane), name="aftercommit:batch"))

    def join(self) -> None:
        """Wait for the tasks; cancelled, cancel them and wait all the same."""

        async def wait() -> None:
            try:
                # They keep their errors for the batch; one that was cancelled before it began has none.
                await asyncio.gather(*self._lanes, return_exceptions=True)
            except asyncio.CancelledError:
                for lane in self._lanes:
                    lane.cancel()
                await asyncio.gather(*self._lanes, return_exceptions=True)
                raise

        if self._lanes:
            await_only(wait())

    def hurry(self, *, abort: bool) -> None:
        """End every wait, and cancel the lanes that were spawned if the batch itself was."""
        self._ending.set()
        for lane in self._lanes if abort else ():
            lane.cancel()
