"""Whether a value came back from JSON as it was: equal, and of the same types."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any

import pydantic

from aftercommit.tasks.unsafe import is_mapped_type

__all__ = ["Difference", "difference"]

# The way to the difference, and the two values there.
Difference = tuple[tuple[str, ...], object, object]

_SCALARS = (str, int, float, bytes)
_VALUES = frozenset({dt.datetime, dt.date, dt.time, dt.timedelta, decimal.Decimal, uuid.UUID, bytes, str})


def difference(sent: object, back: object, *, unset: bool = True) -> Difference | None:  # noqa: PLR0911 - one for each kind
    """Return where *back* is not what *sent* was, None where they are the same.

    Args:
        sent: What was handed over.
        back: What the task would get.
        unset: Whether Pydantic models must also agree on which of their fields were set.
    """
    if sent is back:
        return None
    cls = type(sent)
    if isinstance(sent, _SCALARS) and type(back) in (*_SCALARS, bool) and cls is not type(back):
        # True for an int, 1 for a float, a StrEnum for a str: what Python's own types call the same. Never "1" for 1.
        alike = isinstance(sent, type(back)) or (type(back) is float and isinstance(sent, int))
        return None if alike and sent == back else ((), sent, back)
    if cls is not type(back) and next((base for base in cls.__mro__ if base in _VALUES), None) is not type(back):
        # A subclass of a plain value is that value: asyncpg's UUID, a datetime of freezegun's. No datetime is a date.
        return (), sent, back
    if is_mapped_type(cls):
        return (), sent, back
    if isinstance(sent, Mapping) and isinstance(back, Mapping):
        return _of_mappings(sent, back, unset=unset)
    if isinstance(sent, (list, tuple, deque)):
        return _of_sequences(sent, back, unset=unset)
    if isinstance(sent, pydantic.BaseModel):
        return _of_models(sent, back, unset=unset)
    if dataclasses.is_dataclass(sent):
        names = [field.name for field in dataclasses.fields(sent)]
        return _of_attributes(names, sent, back, unset=unset)
    return None if _is_equal(sent, back) else ((), sent, back)


def _is_equal(sent: Any, back: Any) -> bool:
    try:
        if isinstance(sent, (dt.datetime, dt.time)):
            # By the clock on the wall and its offset: Python calls no two times of an hour that comes twice equal.
            walls = sent.replace(tzinfo=None, fold=0) == back.replace(tzinfo=None, fold=0)
            zones = (sent.tzinfo is None) == (back.tzinfo is None)
            return bool(walls and zones and sent.utcoffset() == back.utcoffset())
        if isinstance(sent, (set, frozenset)) and {type(item) for item in sent} != {type(item) for item in back}:
            return False
        answer = sent == back
    except Exception:  # noqa: BLE001 - a comparison of the user's: one that fails has not found them equal
        return False
    return answer is True  # numpy answers with an array


def _of_mappings(sent: Mapping[Any, Any], back: Mapping[Any, Any], *, unset: bool) -> Difference | None:
    if len(sent) != len(back):
        return (), sent, back
    for (key, value), (back_key, back_value) in zip(sent.items(), back.items(), strict=True):
        if difference(key, back_key, unset=unset) is not None:
            return (), key, back_key
        found = difference(value, back_value, unset=unset)
        if found is not None:
            return _under(f"[{key!r}]" if isinstance(key, (int, str)) else f"[{type(key).__name__}]", found)
    return None


def _of_sequences(sent: Any, back: Any, *, unset: bool) -> Difference | None:
    if len(sent) != len(back):
        return (), sent, back
    names = getattr(type(sent), "_fields", None)
    for index, (item, back_item) in enumerate(zip(sent, back, strict=True)):
        found = difference(item, back_item, unset=unset)
        if found is not None:
            return _under(f".{names[index]}" if names else f"[{index}]", found)
    return None


def _of_models(sent: pydantic.BaseModel, back: Any, *, unset: bool) -> Difference | None:
    if unset and sent.model_fields_set != back.model_fields_set:
        return (), sent, back
    # By field: a cached property lies in __dict__, too, and is no part of the value.
    found = _of_attributes(list(type(sent).model_fields), sent, back, unset=unset)
    if found is not None:
        return found
    for part in ("__pydantic_extra__", "__pydantic_private__"):
        found = _of_mappings(getattr(sent, part, None) or {}, getattr(back, part, None) or {}, unset=unset)
        if found is not None:
            return found
    return None


_MISSING = object()


def _of_attributes(names: list[str], sent: object, back: object, *, unset: bool) -> Difference | None:
    for name in names:
        value, back_value = getattr(sent, name, _MISSING), getattr(back, name, _MISSING)
        found = difference(value, back_value, unset=unset)
        if found is not None:
            return _under(f".{name}", found)
    return None


def _under(step: str, found: Difference) -> Difference:
    steps, sent, back = found
    return (step, *steps), sent, back
