"""How long something took: counts for good, percentiles of what happened lately."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftercommit.runner.rounds import pause_between_sweeps
from aftercommit.watch.timing import RECENT, Meter, Timing, percentile

seconds = st.floats(min_value=0, max_value=1e6)


def test_nothing_measured_is_nothing() -> None:
    """Where nothing was measured, everything is zero."""
    assert Meter().read() == Timing(count=0, total=0.0, p50=0.0, p95=0.0, p99=0.0, longest=0.0)


def test_percentiles_are_values_that_were_measured() -> None:
    """Of 1 to 100 seconds, half took no longer than 50, and 99 per cent no longer than 99."""
    meter = Meter()
    for value in range(100, 0, -1):
        meter.add(float(value))

    timing = meter.read()

    assert (timing.p50, timing.p95, timing.p99, timing.longest) == (50.0, 95.0, 99.0, 100.0)
    assert (timing.count, timing.total) == (100, 5050.0)


def test_only_the_last_count_for_percentiles() -> None:
    """What happened long ago stays in the count and in the sum, and goes out of the percentiles."""
    meter = Meter()
    meter.add(1000.0)
    for _ in range(RECENT):
        meter.add(1.0)

    timing = meter.read()

    assert (timing.count, timing.total) == (RECENT + 1, 1000.0 + RECENT)
    assert (timing.p99, timing.longest) == (1.0, 1.0)


@given(st.lists(seconds, min_size=RECENT - 5, max_size=2 * RECENT))
def test_the_last_values_are_in_order(values: list[float]) -> None:
    """However they come, and however many are alike, percentiles are those of the last values, and of no others."""
    meter = Meter()
    for value in values:
        meter.add(value)

    timing, last = meter.read(), sorted(values[-RECENT:])

    assert timing.longest == last[-1]
    assert [timing.p50, timing.p95, timing.p99] == [percentile(last, percent) for percent in (50, 95, 99)]


@given(st.lists(seconds, min_size=1), st.integers(min_value=1, max_value=100))
def test_a_percentile_is_the_smallest_that_suffices(values: list[float], percent: int) -> None:
    """At least so many per cent do not exceed it, and no smaller value would do."""
    ordered = sorted(values)

    found = percentile(ordered, percent)

    assert sum(each <= found for each in ordered) * 100 >= percent * len(ordered)
    assert sum(each < found for each in ordered) * 100 < percent * len(ordered)


def test_no_measurement_is_lost_between_threads() -> None:
    """Threads that measure at once are all counted."""
    meter, begin = Meter(), threading.Barrier(8)

    def measure() -> None:
        begin.wait(30)
        for _ in range(2000):
            meter.add(0.5)

    threads = [threading.Thread(target=measure) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (meter.read().count, meter.read().total) == (16_000, 8000.0)


@pytest.mark.parametrize(
    ("took", "is_read", "pause"),
    [(0.001, False, 60.0), (0.001, True, 15.0), (0.05, True, 15.0), (1.0, True, 200.0), (1.0, False, 200.0)],
)
def test_the_whole_queue_is_looked_at_seldom(took: float, is_read: bool, pause: float) -> None:
    """Once a minute, more often while somebody reads, and more rarely where one look takes long."""
    assert pause_between_sweeps(took, is_read=is_read) == pause
