"""The measurement of what a request costs still measures."""

import pytest

from benchmarks.overhead.__main__ import SIDES, prepared, run
from tests.support.databases import DatabaseUnderTest


@pytest.mark.drivers("pysqlite", "asyncpg")
@pytest.mark.parametrize("side", SIDES)
def test_every_application_does_every_job(database: DatabaseUnderTest, side: str):
    """A round ends only when all jobs are done, and knows the wait of each."""
    result = run(prepared(database), side, requests=20, width=4, warm_up=10)

    assert (len(result.waited), len(result.waited_alone)) == (20, 10)
    assert min(result.answered, result.done, result.cpu) > 0
