"""A schedule's ticks are those of Debian's cron, in every zone and at every change of its clocks."""

import random
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import islice, pairwise, takewhile
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aftercommit.schedules.plan import AT_ONCE, COUNTED, plan
from aftercommit.schedules.ticks import first_tick, newest, next_tick, ticks_after
from aftercommit.schedules.when import Cron, Every, When
from tests.schedules.reference import MINUTE, changes, fired

ZONES = """
    UTC Europe/Berlin Europe/London Europe/Dublin Europe/Lisbon Europe/Moscow Europe/Istanbul Europe/Chisinau
    Europe/Volgograd Atlantic/Azores Atlantic/Reykjavik America/New_York America/Chicago America/Phoenix
    America/St_Johns America/Havana America/Sao_Paulo America/Santiago America/Asuncion America/Caracas
    America/Godthab America/Port-au-Prince America/Mexico_City Africa/Casablanca Africa/El_Aaiun Africa/Cairo
    Africa/Juba Asia/Tokyo Asia/Kolkata Asia/Kathmandu Asia/Tehran Asia/Gaza Asia/Amman Asia/Beirut Asia/Pyongyang
    Asia/Dhaka Australia/Lord_Howe Australia/Adelaide Pacific/Apia Pacific/Fakaofo Pacific/Chatham Pacific/Norfolk
    Antarctica/Troll
""".split()  # noqa: SIM905  # forty lines otherwise
EXPRESSIONS = [
    "30 2 * * *", "0 0 * * *", "0 3 * * *", "15,45 1,2,3 * * *", "0-59/20 0-4 * * *", "59 23 * * *", "30 23 * * *",
    "* * * * *", "*/15 * * * *", "0 * * * *", "0 */2 * * *", "30 */3 * * *", "*/7 2 * * *", "* 2,3 * * *",
    "0 7 * * mon-fri", "0 12 1 * *", "0 12 1 * mon", "5 4 */2 * *", "0 1 31 * *", "0 2 * * sun", "0 2 * 3,10 7",
]  # fmt: skip
ANCHOR = datetime(2024, 2, 28, 22, 13, 7, 250_000, tzinfo=UTC)


@cache
def moments_of_change(zone: str) -> list[datetime]:
    """When its clocks are changed, from 2000 to 2040."""
    return list(changes(ZoneInfo(zone), 2000, 2040))


def ticks_between(when: When, first: datetime, last: datetime) -> list[datetime]:
    """What the code under test says."""
    found = []
    for tick in ticks_after(when, ANCHOR, first):
        if tick > last:
            break
        found.append(tick)
    return found


@pytest.mark.parametrize("zone", ZONES)
def test_every_change_of_clocks_from_2000_to_2040(zone: str):
    """Around each change of a zone's clocks the ticks are those of a minute-by-minute reference."""
    rng = random.Random(zone)
    for change in moments_of_change(zone):
        first, last = change - timedelta(hours=30), change + timedelta(hours=30)
        expression = rng.choice(EXPRESSIONS)

        found = ticks_between(Cron(expression, timezone=zone), first, last)

        assert found == fired(expression, ZoneInfo(zone), first, last), f"{expression} around {change}"


@settings(max_examples=60, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    expression=st.sampled_from(EXPRESSIONS),
    at=st.integers(0, 10_000),
    minutes=st.integers(-2000, 2000),
)
@example(zone="Pacific/Apia", expression="0 3 * * *", at=4, minutes=0)
@example(zone="Australia/Lord_Howe", expression="0 */2 * * *", at=3, minutes=30)
def test_ticks_are_those_of_the_reference_from_any_moment(zone: str, expression: str, at: int, minutes: int):
    """Whatever moment one begins at, near a change of clocks or not."""
    known = moments_of_change(zone) or [datetime(2024, 2, 29, tzinfo=UTC)]
    first = known[at % len(known)] + minutes * MINUTE
    last = first + timedelta(hours=40)

    found = ticks_between(Cron(expression, timezone=zone), first, last)

    assert found == fired(expression, ZoneInfo(zone), first, last)


@settings(max_examples=60, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    expression=st.sampled_from(EXPRESSIONS),
    at=st.integers(0, 10_000),
    minutes=st.integers(-3000, 3000),
    seconds=st.integers(0, 59),
    back=st.integers(1, 60),
)
def test_the_newest_tick_is_found_from_behind(  # noqa: PLR0917  # drawn
    zone: str, expression: str, at: int, minutes: int, seconds: int, back: int
):
    """Looking backwards finds what going forwards finds, near a change of clocks, too."""
    known = moments_of_change(zone) or [datetime(2024, 2, 29, tzinfo=UTC)]
    now = known[at % len(known)] + minutes * MINUTE + timedelta(seconds=seconds)
    since = now - timedelta(hours=back)
    when = Cron(expression, timezone=zone)

    found = newest(when, ANCHOR, now, since=since)

    forwards = ticks_between(when, since, now)
    assert found == (forwards[-1] if forwards else None)


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.floats(1, 100_000),
    ago=st.floats(0, 1e7),
    start=st.none() | st.floats(-1e6, 1e6),
    length=st.integers(1, 50),
)
def test_elapsed_time_never_drifts(seconds: float, ago: float, start: float | None, length: int):
    """The ticks of Every are its origin plus whole multiples, from whatever moment one asks."""
    origin = None if start is None else ANCHOR + timedelta(seconds=start)
    when = Every(seconds, start=origin)
    moment = ANCHOR + timedelta(seconds=ago)

    found = list(islice(ticks_after(when, ANCHOR, moment), length))

    step = timedelta(seconds=when.seconds)
    assert all((tick - (origin or ANCHOR)) % step == timedelta(0) for tick in found)
    assert all(later - earlier == step for earlier, later in pairwise(found))
    assert found[0] > moment
    assert found[0] - moment <= step or found[0] == (origin or ANCHOR + step)
    assert newest(when, ANCHOR, found[-1], since=moment) == found[-1]


def test_the_first_tick_comes_after_the_creation_unless_immediately():
    """A schedule fires at its creation only if it says so."""
    assert first_tick(Every(30), ANCHOR) == ANCHOR + timedelta(seconds=30)
    assert first_tick(Every(30, immediately=True), ANCHOR) == ANCHOR
    assert first_tick(Every(30, start=ANCHOR + timedelta(hours=1)), ANCHOR) == ANCHOR + timedelta(hours=1)
    assert first_tick(Cron("0 0 * * *"), ANCHOR) == datetime(2024, 2, 29, tzinfo=UTC)


def test_nothing_fires_before_its_start_or_after_its_end():
    """Both ends are themselves within."""
    start, end = datetime(2024, 3, 1, 7, tzinfo=UTC), datetime(2024, 3, 3, 7, tzinfo=UTC)
    when = Cron("0 7 * * *", start=start, end=end)

    found = list(ticks_after(when, ANCHOR, ANCHOR))

    assert [tick.day for tick in found] == [1, 2, 3]
    assert newest(when, ANCHOR, end + timedelta(days=30), since=ANCHOR) == end
    assert next_tick(when, ANCHOR, end) is None


# --- what is fired ----------------------------------------------------------------------------------------------


WHENS = st.one_of(
    st.builds(
        Cron,
        st.sampled_from(EXPRESSIONS[:12]),
        timezone=st.sampled_from(ZONES),
        catch_up=st.sampled_from(["latest", "none"]),
        catch_up_within=st.none() | st.floats(60, 1e6),
    ),
    st.builds(
        Cron,
        st.sampled_from(EXPRESSIONS[:12]),
        timezone=st.sampled_from(ZONES),
        catch_up=st.just("all"),
        catch_up_within=st.floats(60, 1e5),
    ),
    st.builds(
        Every,
        st.floats(1, 5000),
        catch_up=st.sampled_from(["latest", "none"]),
        catch_up_within=st.none() | st.floats(60, 1e5),
    ),
    st.builds(Every, st.floats(10, 5000), catch_up=st.just("all"), catch_up_within=st.floats(60, 1e5)),
)


@settings(max_examples=60, deadline=None)
@given(when=WHENS, late=st.floats(0, 2e4), at=st.integers(0, 200))
def test_a_plan_fires_represents_or_drops_every_tick_once(when: When, late: float, at: int):
    """Whatever was missed: no tick twice, none in the future, none before the last, none silently gone."""
    known = moments_of_change(when.timezone) if isinstance(when, Cron) else []
    begin = known[at % len(known)] - timedelta(hours=20) if known else ANCHOR
    next_at = first_tick(when, begin)
    assert next_at is not None
    now = next_at + timedelta(seconds=late)
    due = [next_at, *takewhile(lambda tick: tick <= now, ticks_after(when, begin, next_at))]

    seen: list[datetime] = []
    dropped = represented = 0
    following: datetime | None = next_at
    for _ in range(100):
        assert following is not None
        if following > now:
            break
        firing = plan(when, anchor=begin, next_at=following, now=now)
        seen += [each.at for each in firing.ticks]
        represented += sum(each.missed for each in firing.ticks)
        dropped += firing.dropped.count if firing.dropped else 0
        assert firing.next_at is None or firing.next_at > following
        assert len(firing.ticks) <= AT_ONCE
        following = firing.next_at

    assert seen == sorted(set(seen))
    assert set(seen) <= set(due)
    assert following == next_tick(when, begin, now)
    if len(due) < COUNTED:
        assert len(seen) + represented + dropped == len(due)
    if when.catch_up == "latest" and when.catch_up_within is None:
        assert seen == due[-1:]


@pytest.mark.parametrize(
    ("catch_up", "within", "fired_now", "gone"),
    [("latest", None, 1, 0), ("none", None, 0, 73), ("all", 86400.0, 25, 48), ("latest", 60.0, 0, 73)],
)
def test_three_days_without_a_process(catch_up: str, within: float | None, fired_now: int, gone: int):
    """An hourly schedule, three days and half an hour late."""
    when = Cron("0 * * * *", catch_up=catch_up, catch_up_within=within)  # type: ignore[arg-type]
    next_at = datetime(2024, 3, 1, tzinfo=UTC)
    now = next_at + timedelta(days=3, minutes=0.0 if catch_up == "all" else 30)

    firing = plan(when, anchor=ANCHOR, next_at=next_at, now=now)

    assert len(firing.ticks) == fired_now
    assert (firing.dropped.count if firing.dropped else 0) == gone
    assert firing.next_at == datetime(2024, 3, 4, 1, tzinfo=UTC)
    if catch_up == "latest" and within is None:
        assert firing.ticks[0].missed == 72


def test_a_year_of_minutes_is_planned_at_once():
    """Missed ticks are counted to a thousand, however many there are."""
    next_at = datetime(2023, 1, 1, tzinfo=UTC)

    firing = plan(Cron("* * * * *"), anchor=ANCHOR, next_at=next_at, now=next_at + timedelta(days=365))

    assert [each.missed for each in firing.ticks] == [COUNTED - 1]
