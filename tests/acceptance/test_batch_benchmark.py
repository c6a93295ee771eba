"""The measurements of batches and events still measure: every side does all that it is to do."""

import asyncio

import pytest
from sqlalchemy import create_engine

from benchmarks.batch import __main__ as batch
from benchmarks.batch import child as batch_child
from benchmarks.batch import table as orders
from benchmarks.events import __main__ as events
from benchmarks.events import child as events_child
from benchmarks.events import table as accounts
from benchmarks.events.ways import Job
from tests.support.databases import DatabaseUnderTest


@pytest.mark.drivers("psycopg", "pysqlite")
@pytest.mark.parametrize("name", batch_child.SIDES)
def test_every_side_handles_every_record(database: DatabaseUnderTest, name: str) -> None:
    """Each leaves the table as the others do."""
    side = batch_child.SIDES[name]
    engine = orders.tune(create_engine(database.url))
    orders.fill(engine, 250, bad=side.bad)

    side.run(database.url)

    orders.check(engine, 250, bad=side.bad)
    engine.dispose()


@pytest.mark.drivers("pysqlite")
def test_a_round_of_records_knows_what_it_took(database: DatabaseUnderTest) -> None:
    """A side runs in a process of its own, which tells its speed, its computing and its memory."""
    result = batch.run(database.url, "run_batch, 1 % bad", 300)

    assert (result.driver, result.side, result.rows) == ("pysqlite", "run_batch, 1 % bad", 300)
    assert min(result.rate, result.computed, result.peak) > 0


@pytest.mark.drivers("asyncpg", "aiosqlite")
@pytest.mark.parametrize("kind", events.KINDS)
@pytest.mark.parametrize("name", [name for name in events_child.SIDES if name != "faststream-outbox"])
def test_every_side_handles_every_event(database: DatabaseUnderTest, name: str, kind: str) -> None:
    """Each counts every event once, on rows of their own and on one that all want."""
    engine = create_engine(database.sync_url)
    accounts.fill(engine, 30)
    job = Job(database.url, accounts.events_of(30, hot=kind == "hot"), width=4)

    seconds = asyncio.run(events_child.SIDES[name].run(job))

    accounts.check(engine, 30, hot=kind == "hot")
    assert seconds > 0
    assert job.calls >= 30
    engine.dispose()


@pytest.mark.drivers("aiosqlite")
def test_a_round_of_events_knows_what_it_took(database: DatabaseUnderTest) -> None:
    """A side runs in a process of its own, which tells its speed and how often it called its handler."""
    result = events.run(database, "db.on, read and write", "cold", events=20, width=2)

    assert (result.driver, result.kind, result.calls) == ("aiosqlite", "cold", 1.0)
    assert result.rate > 0
