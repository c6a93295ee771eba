"""The tick of a schedule that a run was asked for by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

if TYPE_CHECKING:
    from datetime import tzinfo

__all__ = ["Tick", "tick_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One tick of a schedule; ``(previous, at]`` of successive runs tile time without gap or overlap.

    Attributes:
        schedule: The schedule's name.
        at: The moment that the schedule named, in its own time zone; the run may have begun later.
        previous: The last tick before it that fired; for the first one, the schedule's creation.
        missed: How many ticks in between could not be fired in time, so that this run stands for them; to 1000.
        triggered: Whether somebody asked for this run by hand; then *at* is that moment.
    """

    schedule: str
    at: datetime
    previous: datetime
    missed: int = 0
    triggered: bool = False


def tick_of(context: str | None) -> Tick | None:
    """The tick that a record's context holds, if a schedule asked for it.

    Args:
        context: JSON text; whatever cannot be read says nothing.
    """
    if context is None or '"tick"' not in context:
        return None
    try:
        found = json.loads(context)["tick"]
        zone = _zone(found.get("timezone"))
        return Tick(
            schedule=str(found["schedule"]),
            at=datetime.fromisoformat(found["at"]).astimezone(zone),
            previous=datetime.fromisoformat(found["previous"]).astimezone(zone),
            missed=int(found.get("missed", 0)),
            triggered=bool(found.get("triggered")),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _zone(name: object) -> tzinfo:
    if not isinstance(name, str) or name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        # Another machine knew it.
        return UTC
