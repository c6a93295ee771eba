"""Fixtures of the contract suite."""

from collections.abc import Iterator

import pytest

from tests.contract.stand import Stand
from tests.support.databases import DatabaseUnderTest


@pytest.fixture
def stand(database: DatabaseUnderTest) -> Iterator[Stand]:
    """A ``Database`` with its tables, on each driver in turn."""
    stand = Stand(database)
    try:
        stand.create()
        yield stand
    finally:
        stand.close()
