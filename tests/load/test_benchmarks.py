"""The measurements of bulkheads and of the watch still measure."""

import pytest

from benchmarks.bulkhead.__main__ import SIDES, run
from benchmarks.overhead.__main__ import prepared
from benchmarks.watchman.__main__ import measure
from benchmarks.watchman.child import REQUEST, WORK
from tests.support.databases import DatabaseUnderTest


@pytest.mark.drivers("asyncpg")
@pytest.mark.parametrize("side", SIDES)
def test_a_round_measures_requests_beside_tasks(database: DatabaseUnderTest, side: str) -> None:
    """A round knows how long requests took, idle and beside tasks that hold their connections."""
    result = run(database.url, database.driver, side, seconds=0.2, width=2)

    assert min(len(result.idle), len(result.saturated)) >= 2
    assert (result.failed, result.holding >= 5) == (0, True)


@pytest.mark.parametrize("work", [*WORK, REQUEST])
def test_the_watch_is_measured(database: DatabaseUnderTest, work: str) -> None:
    """On every driver, for each kind of session, there is its life, and what the watch adds to it."""
    found = measure(prepared(database), work, rounds=1, stretches=1)

    assert found.life > 0
    assert found.spread == (found.cost, found.cost)
