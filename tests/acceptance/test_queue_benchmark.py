"""The measurement of durable tasks still measures."""

import pytest

from benchmarks.queue.__main__ import BY_HAND, MEASUREMENTS, OURS
from benchmarks.queue.measure import measure
from tests.support.databases import DatabaseUnderTest


@pytest.mark.drivers("pysqlite", "asyncpg")
@pytest.mark.parametrize("measurement", MEASUREMENTS[:2])
@pytest.mark.parametrize("contestant", [BY_HAND, OURS])
def test_every_row_is_changed_exactly_once(database: DatabaseUnderTest, contestant: str, measurement: str):
    """A measurement ends only when each row has been changed, by hand and by a task, and fails if one was twice."""
    figure = measure(database, contestant, measurement, tasks=20, width=4)

    assert min(figure.per_second, figure.cpu) > 0


@pytest.mark.drivers("pysqlite", "psycopg")
@pytest.mark.parametrize("measurement", ["start, alone", "start, steady"])
def test_every_start_is_known(database: DatabaseUnderTest, measurement: str):
    """Each task tells how long after its commit it began."""
    figure = measure(database, OURS, measurement, tasks=10, width=4)

    assert len(figure.waits) == 10


@pytest.mark.drivers("asyncpg")
def test_a_start_elsewhere_is_known(database: DatabaseUnderTest):
    """So does one that another process runs."""
    figure = measure(database, OURS, "start elsewhere", tasks=10, width=4)

    assert len(figure.waits) == 10
