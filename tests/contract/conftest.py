"""Fixtures of the contract suite."""

from collections.abc import Iterator

import pytest

from tests.contract.stand import Stand
from tests.support.databases import DatabaseUnderTest


@pytest.fixture
def stand(database: DatabaseUnderTest) -> Iterator[Stand]:
    """A ``Database`` with its tables, on each driver in turn."""
    yield from _stand(database, is_async=database.is_async)


@pytest.fixture
def async_stand(database: DatabaseUnderTest) -> Iterator[Stand]:
    """The same for ``AsyncSession``: psycopg serves both. Use it with the drivers of ``ASYNC``."""
    yield from _stand(database, is_async=True)


def _stand(database: DatabaseUnderTest, *, is_async: bool) -> Iterator[Stand]:
    stand = Stand(database, is_async=is_async)
    try:
        stand.create()
        yield stand
    finally:
        stand.close()
