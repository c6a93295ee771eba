"""What follows a task across the hand-over besides its arguments: trace headers and the log's context.

Plain text, kept on the record, so that a link survives a restart and a rescue. The request's other context
variables stay behind: they may hold a session, a user, a whole request.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["capture", "restored"]

_PLAIN = (str, int, float, bool, type(None))
_MAX_BYTES = 4096
_NOTHING: Final = nullcontext()


def capture() -> str | None:
    """Return what should follow the task, as JSON text, or None if there is nothing."""
    carried: dict[str, Any] = {}
    # Only what the application has already imported can be in use, so nothing is imported for this.
    structlog = sys.modules.get("structlog")
    if structlog is not None:
        bound = structlog.contextvars.get_contextvars()
        plain = {name: value for name, value in bound.items() if isinstance(value, _PLAIN)}
        if plain:
            carried["structlog"] = plain
    # FastAPI brings OpenTelemetry's interface along; without a span it has nothing to carry.
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import propagate

        headers: dict[str, str] = {}
        propagate.inject(headers)
        if headers:
            carried["trace"] = headers
    if not carried:
        return None
    try:
        text = json.dumps(carried, allow_nan=False)
    except ValueError:
        return None
    return text if len(text) <= _MAX_BYTES else None


def restored(text: str | None) -> AbstractContextManager[object]:
    """Put back what ``capture`` returned, for the length of a ``with``."""
    if text is None:
        return _NOTHING
    stack = ExitStack()
    carried = json.loads(text)
    structlog = sys.modules.get("structlog")
    if structlog is not None and carried.get("structlog"):
        stack.enter_context(structlog.contextvars.bound_contextvars(**carried["structlog"]))
    if carried.get("trace"):
        try:
            from opentelemetry import context as otel
            from opentelemetry import propagate
        except ImportError:
            # The asker had it, this worker does not: the task itself needs neither.
            return stack
        stack.callback(otel.detach, otel.attach(propagate.extract(carried["trace"])))
    return stack
