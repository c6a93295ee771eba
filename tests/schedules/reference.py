"""When a cron expression fires, minute by minute: slow, simple, and written without a look at the code under test.

The rules are those of Debian's cron (cron(8), "Notes"; crontab(5)): an expression whose minute and hour are fixed goes
by the wall clock, once for each local time that it names; a star in either goes by elapsed time.
"""

import calendar
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

MINUTE = timedelta(minutes=1)
MONTHS = {calendar.month_abbr[number].upper(): number for number in range(1, 13)}
DAYS = {calendar.day_abbr[(number - 1) % 7].upper(): number for number in range(7)}


def values(field: str, low: int, high: int, names: dict[str, int]) -> set[int]:
    """The numbers that one field names."""
    found: set[int] = set()
    for part in field.upper().split(","):
        span, _, step = part.partition("/")
        if span == "*":
            first, last = low, high
        else:
            left, _, right = span.partition("-")
            first = names.get(left) if left in names else int(left)
            last = (names.get(right) if right in names else int(right)) if right else (high if step else first)
        found.update(range(first, last + 1, int(step or 1)))
    return found


@dataclass(frozen=True)
class Expression:
    """A cron expression, taken apart."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    both_days: bool
    by_wall_clock: bool

    @classmethod
    def parse(cls, text: str) -> "Expression":
        """Read it."""
        minute, hour, day, month, weekday = text.split()
        return cls(
            minutes=frozenset(values(minute, 0, 59, {})),
            hours=frozenset(values(hour, 0, 23, {})),
            days=frozenset(values(day, 1, 31, {})),
            months=frozenset(values(month, 1, 12, MONTHS)),
            weekdays=frozenset(number % 7 for number in values(weekday, 0, 7, DAYS)),
            both_days=day.startswith("*") or weekday.startswith("*"),
            by_wall_clock=not (minute.startswith("*") or hour.startswith("*")),
        )

    def on(self, day: date) -> bool:
        """Whether it fires on that day at all."""
        if day.month not in self.months:
            return False
        of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return (of_month and of_week) if self.both_days else (of_month or of_week)

    def at(self, local: datetime) -> bool:
        """Whether it names that local minute."""
        return local.minute in self.minutes and local.hour in self.hours and self.on(local.date())


def fired(text: str, zone: ZoneInfo, first: datetime, last: datetime) -> list[datetime]:
    """Every moment later than *first* and not later than *last* at which it fires; both are whole minutes in UTC."""
    expression = Expression.parse(text)
    walk = _by_wall_clock if expression.by_wall_clock else _by_elapsed_time
    return sorted({moment for moment in walk(expression, zone, first, last) if first < moment <= last})


def _by_elapsed_time(expression: Expression, zone: ZoneInfo, first: datetime, last: datetime) -> Iterator[datetime]:
    moment = first
    while moment <= last:
        if expression.at(moment.astimezone(zone)):
            yield moment
        moment += MINUTE


def _by_wall_clock(expression: Expression, zone: ZoneInfo, first: datetime, last: datetime) -> Iterator[datetime]:
    # Every minute that a calendar and a clock on the wall can show, whether this zone had it or not.
    day = first.astimezone(zone).date() - timedelta(days=2)
    while day <= last.astimezone(zone).date() + timedelta(days=1):
        if expression.on(day):
            for hour in expression.hours:
                for minute in expression.minutes:
                    yield _moment_of(datetime.combine(day, time(hour, minute)), zone)
        day += timedelta(days=1)


def _moment_of(wall: datetime, zone: ZoneInfo) -> datetime:
    """The first moment at which the clocks show *wall*, or, where they never do, the first after it that they show."""
    while True:
        moment = wall.replace(tzinfo=zone, fold=0).astimezone(UTC)
        if moment.astimezone(zone).replace(tzinfo=None, fold=0) == wall:
            return moment
        wall += MINUTE


def changes(zone: ZoneInfo, first_year: int, last_year: int) -> Iterator[datetime]:
    """The moments, to the minute, at which the zone's clocks are changed."""
    moment, end = datetime(first_year, 1, 1, tzinfo=UTC), datetime(last_year + 1, 1, 1, tzinfo=UTC)
    offset = moment.astimezone(zone).utcoffset()
    while moment < end:
        following = moment + timedelta(hours=12)
        before, offset = offset, following.astimezone(zone).utcoffset()
        if before != offset:
            low, high = moment, following
            while high - low > MINUTE:
                middle = low + ((high - low) // 2 // MINUTE) * MINUTE
                if middle.astimezone(zone).utcoffset() == before:
                    low = middle
                else:
                    high = middle
            yield high
        moment = following
