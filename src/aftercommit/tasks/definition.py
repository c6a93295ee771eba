"""What a task is: a function, how it gets its session, and how it is to be run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, ParamSpec, TypeVar, get_args, get_origin

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit.errors import ConfigurationError, HandOverError, TaskDefinitionError
from aftercommit.tasks.figures import TaskFigures
from aftercommit.tasks.options import Options
from aftercommit.watch.call_sites import line_of

if TYPE_CHECKING:
    from datetime import datetime

    from aftercommit.tasks.arguments import ArgumentPlan
    from aftercommit.tasks.results import ResultPlan
    from aftercommit.tasks.retry import Retry

__all__ = ["Task", "TaskSettings", "define"]

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


_PLAIN: Final = frozenset({"builtins", "datetime", "decimal", "uuid"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """How a task is to be run; the arguments of ``@db.task``.

    Attributes:
        name: What records call it.
        aliases: Former names, under which records may still wait.
        pool: The pool it runs in.
        retry: How often, and for what.
        timeout: Seconds for one attempt, or None.
        durable: Whether it is kept as a row; else in memory.
        repeatable: Whether it may run again from the top after a commit of its own.
        isolation_level: Of its transactions, or None for the pool's.
        on_failure: Called when it has failed for good.
        expected: Errors of the application that are outcomes it knows, and no alarm.
    """

    name: str
    aliases: tuple[str, ...]
    pool: str
    retry: Retry
    timeout: float | None
    durable: bool
    repeatable: bool
    isolation_level: str | None
    on_failure: Callable[..., Any] | None
    expected: tuple[type[Exception], ...] = ()


class _CalledWithoutSession(HandOverError, TypeError):
    """What Python says itself of an argument that is missing, and what to write."""


def _is_no_session(given: object) -> bool:
    """Whether it is a row or plain data; whatever else a test has made may stand for a session."""
    return hasattr(given, "_sa_instance_state") or (given is not None and type(given).__module__ in _PLAIN)


class Task(Generic[P, R_co]):
    """A function that can be handed over. Calling it calls the function, for unit tests.

    Attributes:
        function: The function itself.
        settings: How it is run.
        options: How this hand-over is to be run; see ``with_options``.
        takes: The session class that it is given as first argument, or None.
        is_async: Whether it runs on the event loop.
        database: The ``Database`` that it belongs to.
        figures: What became of its runs in this process; ``db.stats()`` shows it.
        line: Where the function is defined.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        settings: TaskSettings,
        *,
        database: object,
        takes: type[Session | AsyncSession] | None,
        options: Options | None = None,
    ) -> None:
        self.function = function
        self.settings = settings
        self.database = database
        self.takes = takes
        self.options = options or Options()
        self.is_async = inspect.iscoroutinefunction(function)
        self.figures = TaskFigures()
        self.line = line_of(function)
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, session and all, here and now."""
        if self.takes is not None and args and _is_no_session(args[0]):
            raise self._called_without_session()
        try:
            return self.function(*args, **kwargs)
        except TypeError as exc:
            # Raised by the call itself, before the function began: it has no frame of its own.
            at = exc.__traceback__
            is_given = bool(args) and hasattr(args[0], "execute")
            if self.takes is None or is_given or at is None or at.tb_next is not None:
                raise
            raise self._called_without_session() from exc

    def _called_without_session(self) -> TypeError:
        taken = "None" if self.takes is None else self.takes.__name__
        return _CalledWithoutSession(
            f"Task {self.name!r} was called as a function, which runs it here and now, and its first argument must be "
            f"the {taken} then: {self.__name__}(session, …). To have it run after the commit, hand it over: "
            f"after_commit({self.__name__}, …), or db.after_commit(session, {self.__name__}, …)."
        )

    def __repr__(self) -> str:
        """Name and where it is defined."""
        return f"<task {self.name!r}: {self.__module__}.{self.__qualname__}>"

    @property
    def name(self) -> str:
        """What records call it."""
        return self.settings.name

    @cached_property
    def arguments(self) -> ArgumentPlan:
        """How its arguments cross."""
        # Pydantic takes as long to import as everything else here: whoever only declares tasks does without.
        from aftercommit.tasks import arguments as crossing

        return crossing.ArgumentPlan(self.function, task=self.name, skip_first=self.takes is not None)

    @cached_property
    def results(self) -> ResultPlan:
        """How its result is kept."""
        from aftercommit.tasks import results as keeping

        return keeping.ResultPlan(self.function)

    def with_options(
        self,
        *,
        delay: float = 0.0,
        at: datetime | None = None,
        key: str | None = None,
        priority: int = 0,
    ) -> Task[P, R_co]:
        """Return the task as it is to be handed over this once.

        Args:
            delay: Seconds to wait after the commit, by the database's clock.
            at: The moment it is due, instead; aware.
            key: Makes the hand-over a no-op while a task of this name and key is *queued*. One that runs may have
                read old data already, so it does not count.
            priority: Higher runs first.

        Raises:
            ConfigurationError: For values that cannot be meant, and for tasks in memory, which take none of these.
        """
        options = Options(delay=delay, at=at, key=key, priority=priority)
        if not self.settings.durable and not options.is_plain:
            raise ConfigurationError(
                f"Task {self.name!r} is kept in memory (durable=False): it starts right after the commit, so it takes "
                "no delay, time, key or priority. Declare it durable, which is the default."
            )
        other = copy(self)
        other.options = options
        return other


def define(function: Callable[..., Any], settings: TaskSettings, *, database: object) -> Task[Any, Any]:
    """Make a task of *function*, after looking at how it wants its session.

    Raises:
        TaskDefinitionError: If it cannot be one.
    """
    _check_function(function, settings.name)
    if settings.timeout is not None and settings.timeout <= 0:
        raise TaskDefinitionError(
            f"Task {settings.name!r}: timeout={settings.timeout}: give a positive number of seconds."
        )
    for kind in settings.expected:
        given: object = kind
        if not (isinstance(given, type) and issubclass(given, Exception)):
            raise TaskDefinitionError(
                f"Task {settings.name!r}: expected=… names {kind!r}, which is not a subclass of Exception. Name the "
                "classes of errors that the application knows as outcomes: expected=(PaymentDeclined,)."
            )
    takes = _first_parameter(function, settings.name)
    if settings.on_failure is not None:
        settings = replace(settings, on_failure=_check_on_failure(function, settings.on_failure, settings.name))
    return Task(function, settings, database=database, takes=takes)


def _check_function(function: Callable[..., Any], name: str) -> None:
    if isinstance(function, Task):
        raise TaskDefinitionError(f"Task {name!r}: the function is a task already. Decorate it once.")
    if not inspect.isfunction(function):
        raise TaskDefinitionError(
            f"Task {name!r}: {type(function).__name__} is not a plain function. A bound method or a partial brings "
            "along "
            "an object that cannot cross to another process; write a function, and pass what it needs as arguments."
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TaskDefinitionError(
            f"Task {name!r} is a generator: nobody would iterate over it. Write a function that does the whole work; "
            "for "
            "many records in short transactions there is db.run_batch."
        )
    if not name or name == "<lambda>":
        raise TaskDefinitionError("A lambda has no name for its records. Write @db.task(name='…') or a function.")


_SESSIONS: Final = {"Session": Session, "AsyncSession": AsyncSession}


def _first_parameter(function: Callable[..., Any], name: str) -> type[Session | AsyncSession] | None:
    parameters = list(inspect.signature(function).parameters.values())
    is_async = inspect.iscoroutinefunction(function)
    classes = [_session_class(function, parameter) for parameter in parameters]
    for parameter, kind in zip(parameters[1:], classes[1:], strict=True):
        if kind is not None:
            raise TaskDefinitionError(
                f"Task {name!r}: the session comes as the first parameter, and {parameter.name!r} is another. "
                f"Write `def {function.__name__}({parameter.name}: {kind.__name__}, …)`."
            )
    if not parameters:
        return None
    first, kind = parameters[0], classes[0]
    if first.annotation is inspect.Parameter.empty and first.kind in (
        first.POSITIONAL_ONLY,
        first.POSITIONAL_OR_KEYWORD,
    ):
        wanted = "AsyncSession" if is_async else "Session"
        raise TaskDefinitionError(
            f"Task {name!r}: the first parameter {first.name!r} has no annotation, so nobody can say whether it is the "
            f"session. Write `{first.name}: {wanted}` to be given one, or annotate it with its own type."
        )
    if kind is None:
        return None
    if issubclass(kind, AsyncSession) != is_async:
        right, wrong = ("AsyncSession", "Session") if is_async else ("Session", "AsyncSession")
        how = "async def" if is_async else "def"
        raise TaskDefinitionError(
            f"Task {name!r} is declared with `{how}` and asks for {wrong}. "
            f"Write `{first.name}: {right}`, or declare it with `{'def' if is_async else 'async def'}`."
        )
    return kind


def _session_class(function: Callable[..., Any], parameter: inspect.Parameter) -> type[Session | AsyncSession] | None:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        # A name that is imported for type checkers only cannot be evaluated; the two we look for are known by name.
        space = {**vars(sys.modules.get(function.__module__, sys)), **getattr(function, "__globals__", {})}
        bare = annotation.strip().rpartition(".")[2]
        try:
            annotation = eval(annotation, space)  # noqa: S307  # the user's own annotation, in his own module
        except Exception:  # noqa: BLE001  # whatever it is: arguments.py says so, with its name, when it is needed
            return _SESSIONS.get(bare)
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if isinstance(annotation, type) and issubclass(annotation, (Session, AsyncSession)):
        return annotation
    return None


def _check_on_failure(function: Callable[..., Any], on_failure: Callable[..., Any], name: str) -> Callable[..., Any]:
    if isinstance(on_failure, Task):
        on_failure = on_failure.function
    if inspect.iscoroutinefunction(on_failure) and not inspect.iscoroutinefunction(function):
        raise TaskDefinitionError(
            f"Task {name!r} is a plain function and its on_failure is async: there is no AsyncSession to give it. "
            f"Declare {on_failure.__name__} with `def`, taking (session: Session, error, …)."
        )
    try:
        signature = inspect.signature(on_failure)
    except (TypeError, ValueError):
        return on_failure
    takes_more = any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values())
    positional = [
        each
        for each in signature.parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if len(positional) < 2 and not takes_more:  # noqa: PLR2004  # session and error
        raise TaskDefinitionError(
            f"Task {name!r}: on_failure is called as {getattr(on_failure, '__name__', 'on_failure')}"
            "(session, error, *args, **kwargs) with the task's own arguments. Give it these parameters."
        )
    return on_failure


def task_name(function: Callable[..., Any], name: str | None) -> str:
    """The name of a task: as given, or the function's bare name, so that moving the function orphans nothing."""
    found = name if name is not None else getattr(function, "__name__", "")
    if len(found) > 255:  # noqa: PLR2004  # the column's width
        raise ConfigurationError(f"The task name {found[:40]!r}… is longer than 255 characters.")
    if "\0" in found or any("\ud800" <= each <= "\udfff" for each in found):
        raise ConfigurationError(f"The task name {found!r} holds a NUL or half a surrogate pair: no database holds it.")
    return found
