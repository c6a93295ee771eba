"""A session that plain code uses the same way, whether there is a ``Session`` or an ``AsyncSession`` behind it.

The async one works inside a greenlet (``sqlalchemy.util.greenlet_spawn``): what awaits is awaited from there, a
cancellation comes in as an exception, context variables carry over.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sqlalchemy.util import await_only

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy.orm import Session

    from aftercommit.sessions.scopes import AsyncScope, Scope

__all__ = ["AsyncOpened", "Opened", "SyncOpened", "is_async_callable", "to_the_end"]

T = TypeVar("T")


def is_async_callable(function: object) -> bool:
    """Whether calling *function* gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # not whether it is callable: what is called
    )


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await *work* to its end, however often the caller is cancelled meanwhile, and keep the cancellation to itself.

    Only for the innermost of what a run does: what it is part of asks whether it was cancelled, and ends the run.
    """
    task = asyncio.ensure_future(work)
    while not task.done():
        # The task's own error is raised below.
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.shield(task)
    return task.result()


class Opened(Protocol):
    """A session that is open for one piece of work."""

    @property
    def plain(self) -> Session:
        """The ``Session``, or what is behind the ``AsyncSession``."""
        ...

    @property
    def given(self) -> Any:
        """What the user's function is given."""
        ...

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call what the user gave, with the session that it expects."""
        ...

    def commit(self) -> None:
        """Commit, whatever is cancelled meanwhile."""

    def end(self) -> None:
        """Roll back what was not committed, and end it for good."""


class SyncOpened:
    """A ``Session``."""

    __slots__ = ("given", "plain", "scope")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.plain: Session = scope.session
        self.given: Any = scope.session

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return function(self.given, *args, **kwargs)

    def commit(self) -> None:
        """Commit."""
        self.scope.session.commit()

    def end(self) -> None:
        """End it."""
        self.scope.end()


class AsyncOpened:
    """An ``AsyncSession``."""

    __slots__ = ("given", "plain", "scope")

    def __init__(self, scope: AsyncScope) -> None:
        self.scope = scope
        self.plain: Session = scope.session.sync_session
        self.given: Any = scope.session

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Await an ``async def`` with the ``AsyncSession``; a ``def`` is given the plain one behind it."""
        if is_async_callable(function):
            return await_only(function(self.given, *args, **kwargs))
        return function(self.plain, *args, **kwargs)

    def commit(self) -> None:
        """Commit; a cancellation that came meanwhile is raised after it."""
        await_only(self.scope.commit())

    def end(self) -> None:
        """End it; a cancellation that came meanwhile is raised after it."""
        await_only(self.scope.end())
