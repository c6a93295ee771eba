"""What a task returns, as its record keeps it: a convenience that never fails a run."""

from __future__ import annotations

import inspect
import logging
import math
import threading
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ResultPlan"]

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 64 * 1024
_UNKNOWN: Final = object()


class ResultPlan:
    """How the result of one task is stored: by its return annotation, if that names something JSON can carry."""

    __slots__ = ("_adapter", "_function", "_lock")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._adapter: Any = _UNKNOWN
        self._lock = threading.Lock()

    def store(self, result: Any, *, task: str) -> str | None:
        """Return *result* as JSON text, or None if it cannot be kept; then the log says why."""
        if result is None:
            return None
        if self._adapter is _UNKNOWN:
            with self._lock:
                if self._adapter is _UNKNOWN:
                    self._adapter = _adapter(self._function)
        if self._adapter is None:
            return None
        try:
            text: str = self._adapter.dump_json(result, warnings="error").decode()
            # Written for infinity and for what is no number, too, and none of these may come back as None.
            if "null" in text and not _is_finite(self._adapter.dump_python(result)):
                raise ValueError("JSON has neither infinity nor NaN")  # noqa: TRY301  # as what is refused above
        except (PydanticSerializationError, UnicodeError, ValueError, TypeError) as exc:
            logger.info("The result of task %r is not kept: %s", task, type(exc).__name__)
            return None
        if len(text) > MAX_BYTES:
            logger.info("The result of task %r is not kept: it has %d bytes, more than %d", task, len(text), MAX_BYTES)
            return None
        return text


def _adapter(function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    if inspect.signature(function).return_annotation is inspect.Signature.empty:
        return None
    try:
        return TypeAdapter(get_type_hints(function, include_extras=True)["return"])
    except Exception:  # noqa: BLE001  # an annotation for readers only: then nothing is kept
        return None


def _is_finite(dumped: Any) -> bool:
    """Whether all numbers in it are."""
    if isinstance(dumped, float):
        return math.isfinite(dumped)
    if isinstance(dumped, dict):
        return all(map(_is_finite, [*dumped, *dumped.values()]))
    return not isinstance(dumped, (list, tuple, set, frozenset)) or all(map(_is_finite, dumped))
