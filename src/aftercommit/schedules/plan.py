"""What is to be fired now: a pure decision, made again by every process that looks, with the same outcome."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Final

from aftercommit.schedules.ticks import newest, next_tick, ticks_after

if TYPE_CHECKING:
    from aftercommit.schedules.when import When

__all__ = ["AT_ONCE", "COUNTED", "LATE", "Dropped", "Firing", "Planned", "plan"]

AT_ONCE: Final = 100
"""How many ticks one transaction fires at most."""

COUNTED: Final = 1000
"""Up to how many missed ticks are counted: a year of ``* * * * *`` would be seconds of computing."""

LATE: Final = timedelta(seconds=60)
"""For how long ``catch_up="none"`` still fires a tick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One tick that is to be fired.

    Attributes:
        at: The tick.
        missed: How many ticks before it, since the last one that was looked at, it stands for; counted to 1000.
    """

    at: datetime
    missed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Ticks that will never be fired.

    Attributes:
        count: How many, counted to 1000.
        first: The oldest.
        last: The newest.
        reason: Why, for a log.
    """

    count: int
    first: datetime
    last: datetime
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """What one transaction does with a schedule that is due.

    Attributes:
        ticks: What is fired, the oldest first; empty if all that was due is dropped.
        next_at: The tick that comes then; None if there is none. May be due already (``catch_up="all"``).
        dropped: What is given up.
    """

    ticks: tuple[Planned, ...]
    next_at: datetime | None
    dropped: Dropped | None


def plan(when: When, *, anchor: datetime, next_at: datetime, now: datetime) -> Firing:
    """Decide what to fire, at *now*, of a schedule whose next tick was to be *next_at*.

    Promises: every tick that is named is later than or equal to *next_at* and not later than *now*, no tick is named
    twice, and those that are named, represented (``missed``) or dropped are all that were due.

    Args:
        when: The schedule.
        anchor: When it was made.
        next_at: Its next tick, as the row says.
        now: By the database's clock.

    Returns:
        The firing; nothing at all, with *next_at* unchanged, where it is not due.
    """
    if next_at > now:
        return Firing(ticks=(), next_at=next_at, dropped=None)
    next_at, now = next_at.astimezone(UTC), now.astimezone(UTC)
    oldest, reason = _oldest_wanted(when, now)
    last = newest(when, anchor, now, since=next_at) or next_at
    if last < oldest:
        count = _count(when, anchor, next_at, last)
        dropped = Dropped(count=count, first=next_at, last=last, reason=reason)
        return Firing(ticks=(), next_at=next_tick(when, anchor, last), dropped=dropped)
    if when.catch_up == "all":
        return _each(when, anchor, next_at, now)
    missed = 0 if last == next_at else _count(when, anchor, next_at, last) - 1
    return Firing(ticks=(Planned(at=last, missed=missed),), next_at=next_tick(when, anchor, last), dropped=None)


def _each(when: When, anchor: datetime, next_at: datetime, now: datetime) -> Firing:
    oldest, reason = _oldest_wanted(when, now)
    dropped = None
    first: datetime | None = next_at
    if next_at < oldest:
        first = next_tick(when, anchor, oldest - timedelta(microseconds=1))
        given_up = newest(when, anchor, oldest - timedelta(microseconds=1), since=next_at) or next_at
        count = _count(when, anchor, next_at, given_up)
        dropped = Dropped(count=count, first=next_at, last=given_up, reason=reason)
    ticks: list[datetime] = []
    while first is not None and first <= now and len(ticks) < AT_ONCE:
        ticks.append(first)
        first = next_tick(when, anchor, first)
    return Firing(ticks=tuple(Planned(at=each, missed=0) for each in ticks), next_at=first, dropped=dropped)


def _oldest_wanted(when: When, now: datetime) -> tuple[datetime, str]:
    """The moment before which ticks are given up, and why."""
    oldest, reason = datetime.min.replace(tzinfo=UTC), ""
    if when.catch_up == "none":
        oldest, reason = now - LATE, f'more than {LATE.seconds} s late, and catch_up="none"'
    if when.catch_up_within is not None and now - timedelta(seconds=when.catch_up_within) > oldest:
        within = when.catch_up_within
        oldest, reason = now - timedelta(seconds=within), f"older than catch_up_within={within:g} s"
    return oldest, reason


def _count(when: When, anchor: datetime, first: datetime, last: datetime) -> int:
    """How many ticks there are from *first* to *last*, both included, counted to 1000."""
    following = islice(ticks_after(when, anchor, first), COUNTED - 1)
    return 1 + sum(1 for _ in _until(following, last))


def _until(ticks: islice[datetime], last: datetime) -> list[datetime]:
    found = []
    for tick in ticks:
        if tick > last:
            break
        found.append(tick)
    return found
