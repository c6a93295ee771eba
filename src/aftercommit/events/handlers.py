"""A handler of an event is a task of one argument, which is always stored under the same name."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_type_hints, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit.errors import HandOverError, TaskDefinitionError

if TYPE_CHECKING:
    from aftercommit.tasks import Task

__all__ = ["Handlers", "Handles", "as_task_function", "check_event_type"]

_SESSIONS = (Session, AsyncSession)

S = TypeVar("S", bound=Session)
A = TypeVar("A", bound=AsyncSession)
E = TypeVar("E")
R = TypeVar("R")


class Handles(Protocol[E]):
    """What ``@db.on(E)`` returns, for type checkers: it takes a handler of ``(session, event)`` or ``(event)``."""

    @overload
    def __call__(self, function: Callable[[A, E], Coroutine[Any, Any, R]], /) -> Task[[E], R]: ...
    @overload
    def __call__(self, function: Callable[[S, E], R], /) -> Task[[E], R]: ...
    @overload
    def __call__(self, function: Callable[[E], Coroutine[Any, Any, R]], /) -> Task[[E], R]: ...
    @overload
    def __call__(self, function: Callable[[E], R], /) -> Task[[E], R]: ...


class Handlers:
    """Who handles what, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_type: dict[type, tuple[Task[Any, Any], ...]] = {}

    def add(self, event_type: type, task: Task[Any, Any]) -> None:
        """Remember one."""
        with self._lock:
            self._by_type[event_type] = (*self._by_type.get(event_type, ()), task)

    def of(self, event: object) -> tuple[Task[Any, Any], ...]:
        """The handlers of an event, in the order of their declaration.

        Raises:
            HandOverError: If this is no event: a class, plain data, or an instance of a subclass of an event.
        """
        kind = type(event)
        found = self._by_type.get(kind)
        if found is not None:
            return found
        if isinstance(event, type) or not _is_event_type(kind):
            what = f"the class {event.__name__}" if isinstance(event, type) else f"{kind.__name__}"
            raise HandOverError(f"publish takes an event, an instance of a Pydantic model or a dataclass, not {what}.")
        for base in kind.__mro__[1:]:
            if base in self._by_type:
                raise HandOverError(
                    f"{kind.__name__} is a subclass of the event {base.__name__}, whose handlers would lose what it "
                    f"adds. Declare handlers for {kind.__name__} itself, or publish a {base.__name__}."
                )
        return ()


def check_event_type(event_type: Any) -> None:
    """Refuse what cannot be an event.

    Raises:
        TaskDefinitionError: If it is neither a Pydantic model nor a dataclass.
    """
    if not isinstance(event_type, type) or not _is_event_type(event_type):
        shown = getattr(event_type, "__name__", repr(event_type))
        raise TaskDefinitionError(
            f"@db.on({shown}): an event is a Pydantic model or a dataclass. Write @db.on(OrderCreated) over a function "
            "that takes (session, event)."
        )


def _is_event_type(kind: type) -> bool:
    # By its mark, so that an application of dataclasses does not import Pydantic for this.
    return dataclasses.is_dataclass(kind) or hasattr(kind, "__pydantic_validator__")


def as_task_function(function: Callable[..., Any], event_type: type) -> Callable[..., Any]:
    """Return *function* as a task of ``(session, event)`` or ``(event)``, whatever it calls its parameters.

    Stored events outlive a release: neither a parameter that is renamed nor a forgotten annotation may matter.

    Raises:
        TaskDefinitionError: If it takes anything else.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not inspect.isfunction(function):
        # The definition of the task says what is wrong with it.
        return function
    parameters = list(inspect.signature(function).parameters.values())
    plain = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    session = _session_of(function, plain[0]) if plain else None
    wanted = 1 if session is None else 2
    required = [each for each in parameters if each.default is each.empty and each.kind not in _VARIADIC]
    if len(plain) < wanted or len(required) > wanted or any(each.kind is each.KEYWORD_ONLY for each in required):
        raise TaskDefinitionError(
            f"Handler {name!r} is called with its session and the event: write `def {name}(session: Session, event: "
            f"{event_type.__name__})`, or with the event alone. Everything else it needs stands in the event."
        )
    annotation = _annotation(function, plain[wanted - 1])
    # On Python 3.11 and later, Any is a class.
    if annotation is not Any and isinstance(annotation, type) and not issubclass(event_type, annotation):
        raise TaskDefinitionError(
            f"Handler {name!r} is declared for {event_type.__name__}, and its parameter `{plain[wanted - 1].name}` is "
            f"annotated {annotation.__name__}. Let the two agree."
        )
    return _wrapped(function, session, event_type)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _wrapped(function: Callable[..., Any], session: Any, event_type: type) -> Callable[..., Any]:
    async def handle_async(*args: Any) -> Any:
        return await function(*args)

    def handle_sync(*args: Any) -> Any:
        return function(*args)

    handle: Callable[..., Any] = handle_async if inspect.iscoroutinefunction(function) else handle_sync
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [] if session is None else [inspect.Parameter("session", kind, annotation=session)]
    signature = inspect.Signature([*first, inspect.Parameter("event", kind, annotation=event_type)])
    for each in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(handle, each, getattr(function, each))
    # What `inspect` and the plan of a task's arguments look at; and where the function is that the application wrote.
    vars(handle).update(__signature__=signature, __wrapped__=function)
    handle.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    return handle


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    if not isinstance(parameter.annotation, str):
        return parameter.annotation if parameter.annotation is not parameter.empty else None
    try:
        return get_type_hints(function).get(parameter.name)
    except Exception:  # noqa: BLE001  # a name for type checkers only: the decorator says the type
        return parameter.annotation


def _session_of(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    found = _annotation(function, parameter)
    if isinstance(found, str):
        return {"Session": Session, "AsyncSession": AsyncSession}.get(found.strip().rpartition(".")[2])
    found = getattr(found, "__origin__", found) if hasattr(found, "__metadata__") else found
    return found if isinstance(found, type) and issubclass(found, _SESSIONS) else None
