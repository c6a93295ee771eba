"""What follows a task across the hand-over besides its arguments: trace headers and the log's context.

Plain text, kept on the record, so that a link survives a restart and a rescue. The request's other context
variables stay behind, unless the application names them: they may hold a session, a user, a whole request.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Final

from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from contextvars import ContextVar
    from uuid import UUID

    from aftercommit.tasks.current import CurrentRun

__all__ = ["capture", "carry", "hand_over_in", "logged", "restored"]

logger = logging.getLogger(__name__)

_PLAIN: Final = (str, int, float, bool, type(None))
_MAX_BYTES: Final = 4096
_OWN: Final = frozenset({"task", "task_id", "attempt"})
"""What ``logged`` binds: a task that asks for another one does not pass its own on."""
_NOTHING: Final[AbstractContextManager[object]] = nullcontext()

_variables: dict[str, ContextVar[Any]] = {}
_around_hand_over: Callable[[str, UUID, str], AbstractContextManager[object]] | None = None


def carry(*variables: ContextVar[Any]) -> None:
    """Have the values of these context variables follow every task that is handed over: a request's id, a tenant.

    Call it where the application is put together, also in that of a worker. A value that is not a string, a number,
    a boolean or None stays behind, and so does one that was never set.

    Args:
        variables: Context variables; each is known by its name.

    Raises:
        ValueError: If two different ones have the same name.
    """
    for variable in variables:
        if _variables.setdefault(variable.name, variable) is not variable:
            raise ValueError(
                f"Two context variables that are to follow tasks are called {variable.name!r}: the record knows them "
                "by this name. Give one another name: ContextVar('…')."
            )


def hand_over_in(around: Callable[[str, UUID, str], AbstractContextManager[object]] | None) -> None:
    """Have what follows a task be captured inside ``with around(task, id, pool)``, a span; None for no more."""
    global _around_hand_over  # noqa: PLW0603  # one per process, as the tracer is
    _around_hand_over = around


def capture(task: str, id: UUID, pool: str) -> str | None:
    """Return what should follow a task, as JSON text, or None if there is nothing."""
    carried: dict[str, Any] = {}
    # Only what the application has already imported can be in use, so nothing is imported for this.
    if "opentelemetry.trace" in sys.modules:
        try:
            headers = _trace_headers(task, id, pool)
        except Exception as exc:
            # Whoever asks for a task must not fail because somebody's tracer did.
            logger.error(  # noqa: TRY400  # without values
                "The trace could not be given to task %r (%s)", task, id, exc_info=without_values(exc)
            )
        else:
            if headers:
                carried["trace"] = headers
    told = {**carried, **_told()}
    return None if not told else _text(told) or _text(carried)


def _told() -> dict[str, Any]:
    """What the application has said of itself: the log's context, and the variables that it named."""
    found: dict[str, Any] = {}
    structlog = sys.modules.get("structlog")
    if structlog is not None:
        bound = structlog.contextvars.get_contextvars()
        plain = {name: value for name, value in bound.items() if isinstance(value, _PLAIN) and name not in _OWN}
        if plain:
            found["structlog"] = plain
    if _variables:
        values = {name: variable.get(_variables) for name, variable in _variables.items()}
        plain = {name: value for name, value in values.items() if isinstance(value, _PLAIN)}
        if plain:
            found["variables"] = plain
    return found


def _trace_headers(task: str, id: UUID, pool: str) -> dict[str, str]:
    # FastAPI brings OpenTelemetry's interface along; without a span it has nothing to carry.
    from opentelemetry import propagate

    headers: dict[str, str] = {}
    around = _around_hand_over
    with _NOTHING if around is None else around(task, id, pool):
        propagate.inject(headers)
    return headers


def _text(carried: dict[str, Any]) -> str | None:
    """As JSON; None if that cannot be, or is too much: a link that can be found is worth more than none at all."""
    if not carried:
        return None
    try:
        text = json.dumps(carried, allow_nan=False)
    except ValueError:
        return None
    return text if len(text) <= _MAX_BYTES else None


def restored(text: str | None) -> AbstractContextManager[object]:
    """Put back what ``capture`` returned, for the length of a ``with``.

    What cannot be put back is told of, and does not keep a task from running.
    """
    if text is None:
        return _NOTHING
    stack = ExitStack()
    try:
        _restore(json.loads(text), stack)
    except Exception as exc:  # whatever somebody has written there
        logger.warning("What followed a task across the hand-over could not be put back", exc_info=without_values(exc))
    return stack


def _restore(carried: dict[str, Any], stack: ExitStack) -> None:
    for name, value in carried.get("variables", {}).items():
        variable = _variables.get(name)
        if variable is not None:
            stack.callback(variable.reset, variable.set(value))
    structlog = sys.modules.get("structlog")
    if structlog is not None and carried.get("structlog"):
        stack.enter_context(structlog.contextvars.bound_contextvars(**carried["structlog"]))
    if carried.get("trace"):
        try:
            from opentelemetry import context as otel
            from opentelemetry import propagate
        except ImportError:
            # The asker had it, this worker does not: the task itself needs neither.
            return
        stack.callback(otel.detach, otel.attach(propagate.extract(carried["trace"])))


def logged(run: CurrentRun) -> AbstractContextManager[object]:
    """Have every line of structlog say which task wrote it, for the length of a ``with``.

    The standard library's logging asks ``current_run()``, by ``monitoring.logging.TaskContextFilter``.
    """
    structlog = sys.modules.get("structlog")
    if structlog is None:
        return _NOTHING
    bound: AbstractContextManager[object] = structlog.contextvars.bound_contextvars(
        task=run.name, task_id=str(run.id), attempt=run.attempt
    )
    return bound
