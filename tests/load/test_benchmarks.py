"""The measurements of bulkheads and of the watch still measure."""

import pytest

from benchmarks.bulkhead.__main__ import SIDES, run
from benchmarks.overhead.__main__ import prepared
from benchmarks.watchman.__main__ import measure
from tests.support.databases import DatabaseUnderTest


@pytest.mark.drivers("asyncpg")
@pytest.mark.parametrize("side", SIDES)
def test_a_round_measures_requests_beside_tasks(database: DatabaseUnderTest, side: str) -> None:
    """A round knows how long requests took, idle and beside tasks that hold their connections."""
    result = run(database.url, database.driver, side, seconds=0.2, width=2)

    assert min(len(result.idle), len(result.saturated)) >= 2
    assert (result.failed, result.holding >= 5) == (0, True)


def test_the_watch_is_measured(database: DatabaseUnderTest) -> None:
    """On every driver there is a session's life, and what the watch adds to it."""
    found = measure(prepared(database).url, writes=True, stretches=1)

    assert found.life > 0
