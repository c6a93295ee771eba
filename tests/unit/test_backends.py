"""Which of the server's processes are surely ours."""

from hypothesis import given
from hypothesis import strategies as st

from aftercommit.pools.backends import Noted, Seen, identify

NOW = 1000.0
AT = 1_700_000_000_000_000


def seen(pid: int, *, begun: float) -> Seen:
    """A backend that began at *begun*, by our monotonic clock."""
    return Seen(pid=pid, began=AT + round(begun * 1e6), age=NOW - begun, role="shop")


def test_one_that_began_before_we_were_connected_is_ours():
    """We were told its number when it was there already."""
    noted = Noted(pid=7, since=990.0)

    ours, again = identify([noted], [seen(7, begun=989.99)], until=NOW)

    assert ([each.pid for each in ours], again) == ([7], False)
    assert noted.began == ours[0].began


def test_one_that_began_later_has_taken_the_number_over():
    """It may be anybody's; asking again is of no use for ever."""
    noted = Noted(pid=7, since=990.0)

    answers = [identify([noted], [seen(7, begun=995.0)], until=NOW) for _ in range(6)]

    assert [ours for ours, _ in answers] == [[]] * 6
    assert [again for _, again in answers] == [True] * 4 + [False] * 2


def test_one_that_was_recognised_is_not_mixed_up_later():
    """Its number is somebody else's now, however the times look."""
    noted = Noted(pid=7, since=990.0)
    identify([noted], [seen(7, begun=989.99)], until=NOW)

    ours, _ = identify([noted], [seen(7, begun=989.995)], until=NOW)

    assert ours == []


def test_an_answer_that_took_long_proves_nothing():
    """Between the server's answer and its arrival any time may have passed: it is asked again."""
    noted = Noted(pid=7, since=990.0)

    ours, again = identify([noted], [seen(7, begun=989.99)], until=NOW + 5.0)

    assert (ours, again) == ([], True)


def test_one_that_is_gone_is_left_out():
    """A connection that the server has ended has no backend."""
    assert identify([Noted(pid=7, since=990.0)], [], until=NOW) == ([], False)


@given(
    since=st.floats(0, 900),
    gap=st.floats(0.11, 1000),
    late=st.floats(0, 10),
)
def test_a_number_that_was_used_again_is_never_ours(since: float, gap: float, late: float):
    """Whenever the other began, and however long the answer was on its way."""
    begun = since + gap
    there = Seen(pid=7, began=AT, age=max(0.0, NOW + 1000 - begun), role="shop")

    ours, _ = identify([Noted(pid=7, since=since)], [there], until=NOW + 1000 + late)

    assert ours == []
