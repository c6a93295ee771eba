"""Databases for the models."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from aftercommit.pools import sqlite
from aftercommit.pools.gate import GatedConnection
from aftercommit.records import schema


@pytest.fixture
def sqlite_engine(sqlite_url: str) -> Iterator[Engine]:
    """SQLite, set up as a task's sessions find it."""
    engine = sa.create_engine(
        sqlite_url, connect_args={"isolation_level": None, "timeout": 1.0, "factory": GatedConnection}
    ).execution_options(**{sqlite.IMMEDIATE: True})
    sqlite.set_up(engine)
    sa.event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA synchronous = OFF"))
    yield from _made(engine)


@pytest.fixture
def postgres_engine(postgres_url: str) -> Iterator[Engine]:
    """PostgreSQL."""
    yield from _made(sa.create_engine(postgres_url, pool_size=20, max_overflow=50))


def _made(engine: Engine) -> Iterator[Engine]:
    with engine.begin() as connection:
        schema.create_tables(connection)
        connection.execute(sa.text("CREATE TABLE model_effect (task varchar(40), step integer)"))
        connection.execute(sa.text("CREATE TABLE model_row (id integer, name varchar(40))"))
    yield engine
    engine.dispose()
