"""What an application puts around every run with ``@db.around``: a tenant, a role, a flag of the transaction."""

from __future__ import annotations

import inspect
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.util import await_only

from aftercommit.errors import ConfigurationError, TaskDefinitionError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from aftercommit.runner.run import Run
    from aftercommit.sessions import Opened

__all__ = ["Surroundings", "async_surrounded", "surrounded", "surrounded_end"]

F = TypeVar("F", bound="Callable[..., Any]")


class Surroundings:
    """The generator functions of one database, in the order of their declaration."""

    def __init__(self) -> None:
        self.plain: tuple[Callable[..., Any], ...] = ()
        self.asynchronous: tuple[Callable[..., Any], ...] = ()

    def add(self, function: F) -> F:
        """Put *function* around every run that begins from now on, inside of those that are there.

        Raises:
            TaskDefinitionError: If it is no generator function, or cannot be called with a run and a session.
        """
        name = getattr(function, "__qualname__", repr(function))
        is_async = inspect.isasyncgenfunction(function)
        if not is_async and not inspect.isgeneratorfunction(function):
            raise TaskDefinitionError(
                f"@db.around: {name} is no generator function: the run takes place where it yields. Write "
                f"`def tenant(run, session): …; yield`, or `async def` for `async def` tasks, without @contextmanager."
            )
        try:
            inspect.signature(function).bind(None, None)
        except TypeError as exc:
            raise TaskDefinitionError(
                f"@db.around: {name} is called with two arguments, the run and its session, and cannot be: {exc}. "
                "Declare it as (run, session)."
            ) from exc
        if is_async:
            self.asynchronous = (*self.asynchronous, asynccontextmanager(function))
        else:
            self.plain = (*self.plain, contextmanager(function))
        return function

    def of(self, run: Run) -> tuple[Callable[..., Any], ...]:
        """What surrounds *run*.

        Raises:
            ConfigurationError: If only runs of the other kind are surrounded: it must not run without its tenant.
        """
        mine, other = self.plain, self.asynchronous
        if run.task.is_async:
            mine, other = other, mine
        if other and not mine:
            here, there = ("async def", "def") if run.task.is_async else ("def", "async def")
            raise ConfigurationError(
                f"Task {run.name!r} is `{here}`, and @db.around has only `{there}` functions, which cannot surround "
                f"it. It was not run, because it may need what they set. Declare a `{here}` twin; one that only "
                "yields, if there is nothing to do."
            )
        return mine


class surrounded:  # noqa: N801  # reads as an adjective where it is used: `with surrounded(run, session):`
    """Have what follows take place where the application's functions yield; an error of the run stays one."""

    __slots__ = ("_run", "_session", "_stack")

    def __init__(self, run: Run, session: Any) -> None:
        self._run = run
        self._session = session
        self._stack = ExitStack()

    def __enter__(self) -> None:
        """Run each up to its ``yield``; if one fails, those before it see the error."""
        with self._stack as stack:
            for function in _surroundings_of(self._run).of(self._run):
                stack.enter_context(function(self._run.current, self._session))
            self._stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Run them to their ends; one that swallows the run's error does not make a success of it."""
        self._stack.__exit__(kind, error, traceback)


class async_surrounded:  # noqa: N801  # as above
    """The same around an ``async def`` task."""

    __slots__ = ("_run", "_session", "_stack")

    def __init__(self, run: Run, session: Any) -> None:
        self._run = run
        self._session = session
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> None:
        """Run each up to its ``yield``; if one fails, those before it see the error."""
        async with self._stack as stack:
            for function in _surroundings_of(self._run).of(self._run):
                await stack.enter_async_context(function(self._run.current, self._session))
            self._stack = stack.pop_all()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Run them to their ends; one that swallows the run's error does not make a success of it."""
        await self._stack.__aexit__(kind, error, traceback)


@contextmanager
def surrounded_end(run: Run, opened: Opened) -> Any:
    """The same around ``on_failure``, which has a session of its own and, of async tasks, runs in a greenlet."""
    if not run.task.is_async:
        with surrounded(run, opened.plain):
            yield
        return
    around = async_surrounded(run, opened.scope.session)  # type: ignore[attr-defined]  # of an async run it has one
    await_only(around.__aenter__())
    try:
        yield
    except BaseException as exc:
        await_only(around.__aexit__(type(exc), exc, exc.__traceback__))
        raise
    await_only(around.__aexit__(None, None, None))


def _surroundings_of(run: Run) -> Surroundings:
    found: Surroundings = getattr(run.task.database, "surroundings", _NONE)
    return found


_NONE = Surroundings()
