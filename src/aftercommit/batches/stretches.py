"""Which part of a source is done: stretches of places, and the gaps between them. Pure.

Each record of a source has a *place*: values are counted, and rows are given places page by page, in the order of
their keys. A stretch of places that is done also says between which keys it lies, so that what is left can be found
again whatever became of the rows meanwhile. With several lanes there are a few stretches, with one there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Stretch", "gaps", "merged"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Places from *start* up to, not including, *stop*.

    Attributes:
        start: The first place.
        stop: The place behind the last; None where the end is not known.
        after: The key before its first row; None at the beginning of the source, and for values.
        last: The key of its last row; None where the end is not known, and for values.
    """

    start: int
    stop: int | None
    after: Any = None
    last: Any = None

    def stored(self) -> list[Any]:
        """As JSON has it."""
        return [self.start, self.stop, self.after, self.last]


def merged(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Put together what touches or overlaps, in order of place."""
    found: list[Stretch] = []
    for each in sorted(stretches, key=lambda each: each.start):
        before = found[-1] if found else None
        if before is None or before.stop is None or each.stop is None or each.start > before.stop:
            found.append(each)
        elif each.stop > before.stop:
            found[-1] = Stretch(before.start, each.stop, before.after, each.last)
    return found


def gaps(done: Iterable[Stretch]) -> list[Stretch]:
    """What lies between and behind *done*; the last has no end."""
    left: list[Stretch] = []
    place, key = 0, None
    for each in merged(done):
        if each.start > place:
            left.append(Stretch(place, each.start, key, each.after))
        assert each.stop is not None  # noqa: S101  # what is done has an end
        place, key = each.stop, each.last
    return [*left, Stretch(place, None, key, None)]
