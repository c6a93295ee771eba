"""Which moments a schedule names: pure arithmetic, without a clock.

The next tick is computed from the one before, never from "now": nothing drifts. A schedule's *anchor* is the moment of
its creation; ``Every`` counts from there, unless it has a ``start``.

All moments that go in are aware, and all that come out are in UTC: Python compares two moments of one zone by their
wall clocks, which go back once a year.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Final

from aftercommit.schedules.when import Cron, Every, When

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["first_tick", "newest", "next_tick", "ticks_after"]

_MICROSECOND: Final = timedelta(microseconds=1)
_CONFIRMED_FROM: Final = 2
"""Backwards and forwards differ where clocks change, so forwards has the last word, from two ticks before."""


def ticks_after(when: When, anchor: datetime, moment: datetime) -> Iterator[datetime]:
    """Every tick later than *moment*, the earliest first, within its ``start`` and ``end``."""
    moment = moment.astimezone(UTC)
    found = _elapsed(when, anchor, moment) if isinstance(when, Every) else _by_clock(when, moment)
    for tick in found:
        if when.end is not None and tick > when.end:
            return
        yield tick


def next_tick(when: When, anchor: datetime, moment: datetime) -> datetime | None:
    """The first tick later than *moment*; None if there is none."""
    return next(ticks_after(when, anchor, moment), None)


def first_tick(when: When, anchor: datetime) -> datetime | None:
    """The first tick of a schedule that was made at *anchor*."""
    if isinstance(when, Every) and when.immediately and (when.start is None or when.start <= anchor):
        return None if when.end is not None and anchor > when.end else anchor.astimezone(UTC)
    return next_tick(when, anchor, anchor)


def newest(when: When, anchor: datetime, moment: datetime, *, since: datetime) -> datetime | None:
    """The last tick later than *since* and not later than *moment*; None if there is none.

    However long ago *since* is, this takes the time of a few ticks.
    """
    since, last = since.astimezone(UTC), moment.astimezone(UTC)
    if when.end is not None:
        last = min(last, when.end)
    if last <= since:
        return None
    if isinstance(when, Every):
        origin = _origin(when, anchor)
        count = (last - origin) // _step(when)
        found = origin + count * _step(when)
        return found if count >= _first(when) and found > since else None
    for earlier in _going_back(when, last):
        # From a moment before a tick, that tick itself is among those that follow.
        confirmed = None
        for tick in _by_clock(when, max(since, earlier - _MICROSECOND)):
            if tick > last:
                break
            confirmed = tick
        if confirmed is not None or earlier <= since:
            return confirmed
    return None


def _going_back(when: Cron, moment: datetime) -> Iterator[datetime]:
    """Where to begin forwards, further and further back."""
    backwards = when.before(moment)
    skip = _CONFIRMED_FROM
    while True:
        earlier = next(islice(backwards, skip, None), None)
        if earlier is None:
            yield datetime.min.replace(tzinfo=UTC) + timedelta(days=366)
            return
        yield earlier
        skip *= 2


def _elapsed(when: Every, anchor: datetime, moment: datetime) -> Iterator[datetime]:
    origin, step = _origin(when, anchor), _step(when)
    count = max(_first(when), (moment - origin) // step + 1)
    try:
        tick = origin + count * step
        while True:
            yield tick
            tick += step
    except OverflowError:
        return


def _by_clock(when: Cron, moment: datetime) -> Iterator[datetime]:
    if when.start is not None and moment < when.start:
        moment = when.start - _MICROSECOND
    return when.after(moment)


def _origin(when: Every, anchor: datetime) -> datetime:
    return (when.start or anchor).astimezone(UTC)


def _first(when: Every) -> int:
    """Where ``start`` moves the grid, it is a tick itself; the creation is none, unless ``immediately`` says so."""
    return 0 if when.start is not None else 1


def _step(when: Every) -> timedelta:
    return timedelta(seconds=when.seconds)
