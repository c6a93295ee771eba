"""When a task is due again and again: ``Cron`` and ``Every``, checked where they are written.

Both are plain values. The arithmetic of their ticks stands in ``ticks``, what is to be fired in ``plan``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from aftercommit.errors import ConfigurationError, ScheduleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["CatchUp", "Cron", "Every", "Overlap", "When"]

CatchUp = Literal["latest", "none", "all"]
Overlap = Literal["skip", "wait", "allow"]

_MAX_NAME: Final = 255
_MAX_SECONDS: Final = 100 * 366 * 86400.0
_EPOCH: Final = datetime(2001, 1, 1, tzinfo=UTC)
_NICKNAMES: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}
_FIELDS: Final = "minute, hour, day of the month, month, day of the week"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Common:
    """What both kinds of schedules have in common; see ``Cron``."""

    name: str | None = None
    aliases: tuple[str, ...] = ()
    catch_up: CatchUp = "latest"
    catch_up_within: float | None = None
    overlap: Overlap = "skip"
    jitter: float = 0.0
    start: datetime | None = None
    end: datetime | None = None

    def _check(self, shown: str) -> None:
        object.__setattr__(self, "aliases", _names(self.aliases, shown))
        for name in (self.name, *self.aliases):
            if name is not None:
                _check_name(name, shown)
        if self.catch_up not in get_args(CatchUp):
            raise ScheduleError(
                f'{shown}: catch_up={self.catch_up!r}. Write "latest" (missed ticks fire once), "none" (they are '
                'dropped) or "all" (each fires).'
            )
        if self.overlap not in get_args(Overlap):
            raise ScheduleError(
                f'{shown}: overlap={self.overlap!r}. Write "skip" (no second run beside an unfinished one), "wait" '
                '(it follows) or "allow".'
            )
        if self.catch_up_within is not None and not _is_seconds(self.catch_up_within, above=0.0):
            raise ScheduleError(
                f"{shown}: catch_up_within={self.catch_up_within!r}. Give a positive number of seconds."
            )
        if self.catch_up == "all" and self.catch_up_within is None:
            raise ScheduleError(
                f'{shown}: catch_up="all" fires every missed tick, and after a long outage these may be thousands. '
                "Say how old they may be: catch_up_within=86400.0 for a day."
            )
        if not _is_seconds(self.jitter):
            raise ScheduleError(f"{shown}: jitter={self.jitter!r}. Give seconds, 0 or more.")
        for word, moment in (("start", self.start), ("end", self.end)):
            object.__setattr__(self, word, _moment(moment, word, shown))
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ScheduleError(f"{shown}: end={self.end} is not later than start={self.start}: it would never fire.")

    def _check_jitter(self, shortest: float, shown: str) -> None:
        if self.jitter >= shortest:
            raise ScheduleError(
                f"{shown}: jitter={self.jitter:g} s, and two ticks may be only {shortest:g} s apart: they could "
                f"change places. Give a jitter below {shortest:g}."
            )


@dataclass(frozen=True, init=False, eq=True, repr=False)
class Cron(_Common):
    """Ticks of a cron expression with five fields, in a time zone, by the rules of Debian's cron.

    A fixed local time that daylight saving time leaves out fires once, at the end of the gap; one that exists twice
    fires once, the first time. Where the minute or the hour begins with ``*``, elapsed time counts: such an
    expression fires in both of two equal hours, and not in a missing one.

    Needs the package cronsim: ``pip install "aftercommit[schedules]"``.

    Args:
        expression: Five fields (minute, hour, day of the month, month, day of the week), or one of ``@hourly``,
            ``@daily``, ``@weekly``, ``@monthly``, ``@yearly``.
        timezone: Name of a time zone, such as ``"Europe/Berlin"``, or a ``ZoneInfo``.
        name: The schedule's name, at most 255 characters; the task's name by default.
        aliases: Former names of the schedule: its row is renamed, and what it remembers is kept.
        catch_up: What becomes of ticks that nobody could fire in time. ``"latest"``: the newest fires once and says
            how many it stands for. ``"none"``: those more than 60 seconds late are dropped. ``"all"``: each fires.
        catch_up_within: Seconds; older ticks are dropped. Required with ``catch_up="all"``.
        overlap: What becomes of a tick while the record of the one before is unfinished. ``"skip"``: it is left out.
            ``"wait"``: it fires once that record has ended. ``"allow"``: it fires.
        jitter: Seconds by up to which the record's start is delayed, by a hash of schedule and tick; below the
            shortest distance of two ticks.
        start: No tick before this moment; aware.
        end: No tick after this moment; aware.

    Raises:
        ScheduleError: If the schedule cannot be meant.
        ConfigurationError: If cronsim is not installed.
    """

    expression: str
    timezone: str

    def __init__(
        self,
        expression: str,
        *,
        timezone: str | ZoneInfo = "UTC",
        name: str | None = None,
        aliases: Sequence[str] = (),
        catch_up: CatchUp = "latest",
        catch_up_within: float | None = None,
        overlap: Overlap = "skip",
        jitter: float = 0.0,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> None:
        _fill(
            self, expression=expression, timezone=_zone_name(timezone), name=name, aliases=aliases, catch_up=catch_up,
            catch_up_within=catch_up_within, overlap=overlap, jitter=jitter, start=start, end=end,
        )  # fmt: skip
        shown = repr(self)
        object.__setattr__(self, "expression", _expression(expression, shown))
        zone = _zone(self.timezone, shown)
        self._check(shown)
        first = next(_simulated(self.expression, _EPOCH.astimezone(zone), shown), None)
        if first is None:
            raise ScheduleError(
                f"{shown}: there is no such moment within the next fifty years. Look at the day of the month and the "
                "month."
            )
        if self.jitter:
            self._check_jitter(self.shortest, shown)

    def __repr__(self) -> str:
        """As it was written, without what was left out."""
        zone = "" if self.timezone == "UTC" else f", timezone={self.timezone!r}"
        name = "" if self.name is None else f", name={self.name!r}"
        return f"Cron({self.expression!r}{zone}{name})"

    @property
    def zone(self) -> ZoneInfo:
        """The time zone itself.

        Raises:
            ScheduleError: If this machine does not know it.
        """
        return _zone(self.timezone, repr(self))

    def after(self, moment: datetime) -> Iterator[datetime]:
        """Every tick later than *moment*, in UTC, the earliest first; each later than the one before."""
        last, zone = moment.astimezone(UTC), self.zone
        if self.counts_elapsed_time:
            yield from _between_changes(self.expression, zone, last, repr(self))
            return
        for local in _simulated(self.expression, last.astimezone(zone), repr(self)):
            # Wall clocks go back: what the expression names may lie behind us, or be the same moment once more.
            tick = local.astimezone(UTC)
            if tick > last:
                last = tick
                yield tick

    def before(self, moment: datetime) -> Iterator[datetime]:
        """Ticks up to *moment*, in UTC, the newest first; near a change of the clocks one may be missing or doubled.

        ``ticks.newest`` confirms them forwards.
        """
        there = (moment.astimezone(UTC) + timedelta(seconds=1)).astimezone(self.zone)
        for local in _simulated(self.expression, there, repr(self), reverse=True):
            yield local.astimezone(UTC)

    @property
    def counts_elapsed_time(self) -> bool:
        """Whether its minute or its hour begins with a star."""
        minute, hour = self.expression.split()[:2]
        return minute.startswith("*") or hour.startswith("*")

    @cached_property
    def shortest(self) -> float:
        """Seconds: the shortest distance of two ticks that are looked at, over four years and two changes of clocks."""
        return _shortest(self.expression, self.timezone)

    def describe(self) -> str:
        """In words, such as ``"At 07:00 on every weekday, Europe/Berlin"``."""
        return f"{_cronsim()(self.expression, _EPOCH).explain()}, {self.timezone}"


@dataclass(frozen=True, init=False, eq=True, repr=False)
class Every(_Common):
    """A tick every so many seconds, by elapsed time, counted from the schedule's creation or from ``start``.

    Args:
        seconds: The distance of two ticks, at least 1.
        immediately: Whether it fires at its creation, too: once in the schedule's life, not at each start of a process.
        name: As for ``Cron``.
        aliases: As for ``Cron``.
        catch_up: As for ``Cron``.
        catch_up_within: As for ``Cron``.
        overlap: As for ``Cron``.
        jitter: As for ``Cron``.
        start: The moment from which the ticks are counted, itself the first; aware.
        end: No tick after this moment; aware.

    Raises:
        ScheduleError: If the schedule cannot be meant.
    """

    seconds: float
    immediately: bool

    def __init__(
        self,
        seconds: float,
        *,
        immediately: bool = False,
        name: str | None = None,
        aliases: Sequence[str] = (),
        catch_up: CatchUp = "latest",
        catch_up_within: float | None = None,
        overlap: Overlap = "skip",
        jitter: float = 0.0,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> None:
        _fill(
            self, seconds=seconds, immediately=immediately, name=name, aliases=aliases, catch_up=catch_up,
            catch_up_within=catch_up_within, overlap=overlap, jitter=jitter, start=start, end=end,
        )  # fmt: skip
        shown = repr(self)
        if not _is_seconds(seconds, above=0.0) or seconds < 1:
            raise ScheduleError(
                f"{shown}: give at least 1 second. What has to happen more often is a loop in a process of its own, "
                "not a task for each round."
            )
        object.__setattr__(self, "seconds", float(seconds))
        self._check(shown)
        self._check_jitter(self.seconds, shown)

    def __repr__(self) -> str:
        """As it was written, without what was left out."""
        name = "" if self.name is None else f", name={self.name!r}"
        return f"Every({self.seconds!r}{name})"

    @property
    def zone(self) -> tzinfo:
        """UTC: elapsed time knows no zone."""
        return UTC

    def describe(self) -> str:
        """In words, such as ``"every 30 s"``."""
        return f"every {self.seconds:g} s"


When = Cron | Every


# --- checking ---------------------------------------------------------------------------------------------------


def _fill(when: Any, **values: Any) -> None:
    # Frozen for everybody else: this is how dataclasses fill in a frozen instance themselves.
    for name, value in values.items():
        object.__setattr__(when, name, value)


def _names(aliases: Iterable[str], shown: str) -> tuple[str, ...]:
    if isinstance(aliases, str):
        raise ScheduleError(f"{shown}: aliases={aliases!r} is one text. Write aliases=({aliases!r},).")
    return tuple(aliases)


def _check_name(name: object, shown: str) -> None:
    if not isinstance(name, str) or not name:
        raise ScheduleError(f"{shown}: {name!r} is no name of a schedule. Give a text of 1 to {_MAX_NAME} characters.")
    if len(name) > _MAX_NAME:
        raise ScheduleError(f"The schedule name {name[:40]!r}… is longer than {_MAX_NAME} characters.")
    if not name.isprintable():
        raise ScheduleError(f"{shown}: the name holds characters that cannot be shown. Write it without them.")


def _moment(moment: object, word: str, shown: str) -> datetime | None:
    """Return it in UTC: Python compares two moments of one zone by their wall clocks, which go back once a year."""
    if moment is None:
        return None
    if not isinstance(moment, datetime):
        raise ScheduleError(f"{shown}: {word}={moment!r} is no datetime.")
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise ScheduleError(
            f"{shown}: {word}={moment!r} has no time zone, so it does not say which moment it means. "
            "Give it one: .replace(tzinfo=ZoneInfo('Europe/Berlin'))."
        )
    return moment.astimezone(UTC)


def _is_seconds(value: object, *, above: float = -1.0) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return above < value <= _MAX_SECONDS and value >= 0


def _zone_name(zone: object) -> str:
    if isinstance(zone, ZoneInfo) and zone.key:
        return zone.key
    return zone if isinstance(zone, str) else repr(zone)


def _zone(name: str, shown: str) -> ZoneInfo:
    found = _known_zone(name)
    if found is None:
        raise ScheduleError(
            f"{shown}: this machine does not know the time zone {name!r}. Write the name of a place, such as "
            '"Europe/Berlin", not an offset, which would be wrong for half of the year. Where the system has no time '
            "zones (slim images of Debian), install the package tzdata: pip install tzdata."
        )
    return found


@lru_cache(maxsize=512)
def _known_zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def _expression(expression: object, shown: str) -> str:
    if not isinstance(expression, str):
        raise ScheduleError(f"{shown}: an expression is a text of five fields ({_FIELDS}).")
    text = " ".join(expression.split())
    if text.lower() == "@reboot":
        raise ScheduleError(
            f'{shown}: "@reboot" has no time, and a process that starts is no moment of the schedule. Call the '
            "function in the application's lifespan; Every(…, immediately=True) fires once in the schedule's life."
        )
    if text.startswith("@"):
        found = _NICKNAMES.get(text.lower())
        if found is None:
            raise ScheduleError(f"{shown}: unknown. There are {', '.join(_NICKNAMES)}.")
        return found
    count = len(text.split())
    if count == 6:  # noqa: PLR2004  # some crons have seconds there
        raise ScheduleError(f"{shown}: six fields. Cron here has five ({_FIELDS}); for seconds write Every(seconds).")
    if count != 5:  # noqa: PLR2004  # cron's
        raise ScheduleError(f"{shown}: {count} field(s). Cron has five: {_FIELDS}.")
    return text


# --- cronsim ----------------------------------------------------------------------------------------------------


def _cronsim() -> Any:
    try:
        from cronsim import CronSim
    except ImportError as exc:
        raise ConfigurationError(
            'Cron needs the package cronsim, and it is not installed: pip install "aftercommit[schedules]". '
            "Every(seconds) needs nothing."
        ) from exc
    return CronSim


def _simulated(expression: str, moment: datetime, shown: str, *, reverse: bool = False) -> Iterator[datetime]:
    from_cron = _cronsim()
    import cronsim

    if moment.tzinfo is not UTC and getattr(moment.tzinfo, "key", None) == "UTC":
        # cronsim takes the short way for this object alone.
        moment = moment.astimezone(UTC)
    try:
        found: Iterator[datetime] = from_cron(expression, moment, reverse=reverse)
    except cronsim.CronSimError as exc:
        raise ScheduleError(
            f"{shown}: {str(exc)[:1].lower()}{str(exc)[1:]}. Cron has five fields ({_FIELDS}); names are MON to SUN "
            "and JAN to DEC, steps are written */5, ranges 1-5, lists 1,3."
        ) from exc
    return found


def _between_changes(expression: str, zone: ZoneInfo, moment: datetime, shown: str) -> Iterator[datetime]:
    """Ticks by elapsed time: those of a clock that is never changed, from one change of the zone's clocks to the next.

    cronsim by itself steps over some where clocks are changed by half an hour (2.8: ``0 */2`` on Lord Howe).
    """
    while True:
        offset = moment.astimezone(zone).utcoffset() or timedelta(0)
        until = _next_change(zone, moment)
        try:
            for local in _simulated(expression, moment + offset, shown):
                if until is not None and local - offset >= until:
                    break
                yield local - offset
            else:
                return
        except OverflowError:
            return
        if until is None:
            return
        # The moment of the change may be a tick itself.
        offset = until.astimezone(zone).utcoffset() or timedelta(0)
        moment = until
        first = next(_simulated(expression, until + offset - timedelta(seconds=1), shown), None)
        if first is not None and first - offset == until:
            yield until


def _next_change(zone: ZoneInfo, moment: datetime) -> datetime | None:
    """When the zone's clocks are changed next, later than *moment*, within fifty years."""
    for year in range(moment.year, min(moment.year + 51, 9999)):
        for change in _changes_in(zone.key, year):
            if change > moment:
                return change
    return None


@lru_cache(maxsize=4096)
def _changes_in(zone_name: str, year: int) -> tuple[datetime, ...]:
    """Every moment of a year, in UTC, at which a zone's clocks are changed."""
    zone, found = ZoneInfo(zone_name), []
    half_day, second = timedelta(hours=12), timedelta(seconds=1)
    moment = datetime(year, 1, 1, tzinfo=UTC)
    while moment.year == year:
        low, high = moment, moment + half_day
        if low.astimezone(zone).utcoffset() != high.astimezone(zone).utcoffset():
            before = low.astimezone(zone).utcoffset()
            while high - low > second:
                middle = low + (high - low) // 2 // second * second
                low, high = (middle, high) if middle.astimezone(zone).utcoffset() == before else (low, middle)
            found.append(high)
        moment += half_day
    return tuple(found)


@lru_cache(maxsize=512)
def _shortest(expression: str, timezone: str) -> float:
    """The shortest distance, in seconds, of two ticks in a sample: 1500 of them, and a hundred around each change."""
    when = Cron.__new__(Cron)
    _fill(when, expression=expression, timezone=timezone, name=None)
    shortest = math.inf
    year = datetime.now(UTC).year
    changes = [*_changes_in(timezone, year), *_changes_in(timezone, year + 1)]
    for start in (_EPOCH, *(change - timedelta(days=1) for change in changes)):
        last: datetime | None = None
        for number, at in enumerate(when.after(start)):
            if last is not None:
                shortest = min(shortest, (at - last).total_seconds())
            last = at
            if number >= (1500 if start is _EPOCH else 100) or at.year > start.year + 8:
                break
    return shortest
