"""A rolling deploy: the tables are those of a newer release already, and this code goes on working with them."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateIndex

from aftercommit import TaskRecord, current_run, signals
from aftercommit.cli.doctor.examination import examine
from aftercommit.cli.doctor.findings import Level
from aftercommit.errors import SchemaError
from aftercommit.records import workers
from aftercommit.records.schema import SCHEMA_VERSION
from aftercommit.records.tables import SchemaRecord, WorkerRecord
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Heard, Workshop

NEWER = SCHEMA_VERSION + 7


def newer_columns() -> list[sa.Column[Any]]:
    """What a newer release may add: columns that may be empty, and columns with a default."""
    return [
        sa.Column("newer_note", sa.Text, nullable=True),
        sa.Column("newer_number", sa.Integer, nullable=False, server_default=sa.text("7")),
    ]


def grow(connection: sa.Connection) -> None:
    """As a migration does it: columns behind the old ones."""
    TaskRecord.metadata.create_all(connection)
    for table in TaskRecord.metadata.tables:
        for column in ("newer_note TEXT", "newer_number INTEGER DEFAULT 7 NOT NULL"):
            connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column}")


def make_anew(connection: sa.Connection) -> None:
    """As a fresh installation of that release may have them: in any order, with the new columns in front."""
    metadata = sa.MetaData()
    for table in TaskRecord.metadata.sorted_tables:
        sa.Table(table.name, metadata, *newer_columns(), *[column._copy() for column in reversed(table.columns)])
    metadata.create_all(connection)
    for table in TaskRecord.metadata.sorted_tables:
        for index in table.indexes:
            connection.execute(CreateIndex(index))


@pytest.fixture(params=[grow, make_anew], ids=["grown", "made anew"])
def shop(request: pytest.FixtureRequest, database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop whose tables are of a newer release, on each driver in turn."""
    shop = Workshop(database, heartbeat=0.2, silent_after=30.0)
    with shop.outside.connect() as connection:
        request.param(connection)
        connection.exec_driver_sql("CREATE TABLE aftercommit_newer (id INTEGER PRIMARY KEY)")
        connection.execute(sa.insert(SchemaRecord).values(id=1, version=NEWER))
    yield shop
    shop.close()


@dataclass
class Sold:
    """An event."""

    number: int


def batch_task(shop: Workshop) -> Any:
    """A task that works through three records, in the flavour under test."""

    def note(session: Session, number: int) -> None:
        session.add(Effect(label=f"batch {number}"))

    def plain() -> None:
        shop.db.run_batch(range(3), note, size=1)

    async def native() -> None:
        await shop.db.async_run_batch(range(3), note, size=1)

    return shop.db.task(name="batch")(native if shop.is_async else plain)


def handler(shop: Workshop) -> None:
    """A handler of the event, in the flavour under test."""

    async def native(event: Sold) -> None: ...

    def plain(event: Sold) -> None: ...

    shop.db.on(Sold, name="sold")(native if shop.is_async else plain)


def test_a_whole_life_on_newer_tables(shop: Workshop):
    """Hand-over, claim, progress, batches, events, failures, cancelling, rescue and clearing away: as on our own."""

    @shop.task()
    def effect(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        run.progress(1, 2)
        session.add(Effect(label=label))

    @shop.task()
    def refuse(session: Session, label: str) -> None:
        raise ValueError(label)

    batch = batch_task(shop)
    handler(shop)
    dead = uuid4()

    hand_over(shop, effect, "queued")
    later = hand_over(shop, effect.with_options(delay=3600.0), "cancelled")
    with Session(shop.outside) as session:
        long_ago = datetime.now(UTC) - timedelta(hours=1)
        session.add(
            WorkerRecord(id=dead, host="gone", pid=1, started_at=long_ago, seen_at=long_ago, pools=[], names=[])
        )
        session.add(
            TaskRecord(
                id=uuid4(), task="effect", pool="default", state="running", arguments={"label": "rescued"},
                attempt=1, claims=1, run_at=long_ago, enqueued_at=long_ago, started_at=long_ago, worker=dead,
            )
        )  # fmt: skip
        session.commit()
    with Heard(signals.TasksRescued) as heard, shop.running():
        heard.wait(signals.TasksRescued)
        shop.ask(refuse, "no")
        cancel(shop, later)
        shop.ask(effect.with_options(key="k", priority=3), "born claimed")
        shop.ask(batch)
        shop.commit(lambda session: shop.db.publish(session, Sold(1), key="first"))
        shop.commit(lambda session: shop.db.publish(session, Sold(1), key="first"))
        shop.drain()
        findings = examine(shop.db, "shop:db", processes=None)
        cleared = shop.db.runner.books.call(lambda connection: workers.prune(connection, keep=-5.0))  # type: ignore[union-attr]

    assert shop.effects() == ["batch 0", "batch 1", "batch 2", "born claimed", "queued", "rescued"]
    assert [each.level for each in findings if each.check == "tables"] == [Level.NOTE]
    assert {each.check for each in findings if each.level in (Level.WARNING, Level.WRONG)} == {"failures"}
    assert cleared == 7
    assert shop.sql("SELECT COUNT(*) FROM aftercommit_batch") == 0
    assert shop.records() == []
    assert shop.sql("SELECT version FROM aftercommit_schema") == NEWER


def hand_over(shop: Workshop, task: Any, label: str) -> Any:
    """Ask for a task in a process that runs none; return its id."""
    if not shop.is_async:
        with shop.db.session() as session:
            return shop.db.after_commit(session, task, label).id

    async def body() -> Any:
        async with shop.db.async_session() as session:
            handle = shop.db.after_commit(session, task, label)
        await shop.db.async_dispose()
        return handle.id

    return asyncio.run(body())


def cancel(shop: Workshop, id: Any) -> None:
    """Cancel a task, in the flavour under test."""
    if shop.is_async:
        shop.on_loop(shop.db.async_cancel(id))
    else:
        shop.db.cancel(id)


def test_making_our_tables_leaves_newer_ones_alone(shop: Workshop):
    """What an older release makes at start-up neither takes the number back nor touches a column."""
    with shop.running():
        pass

    columns = {each["name"] for each in sa.inspect(shop.outside).get_columns("aftercommit_task")}
    assert columns >= {"newer_note", "newer_number"}
    assert shop.sql("SELECT version FROM aftercommit_schema") == NEWER


@pytest.mark.parametrize("damage", ["UPDATE aftercommit_schema SET version = 0", "DELETE FROM aftercommit_schema"])
def test_older_tables_are_an_error_at_start_up(database: DatabaseUnderTest, damage: str):
    """On every database, where start-up is not told to make them: with both versions, and what to type."""
    shop = Workshop(database)
    batch_task(shop)
    TaskRecord.metadata.create_all(shop.outside)
    with Session(shop.outside) as session:
        session.add(SchemaRecord(id=1, version=SCHEMA_VERSION))
        session.commit()
    shop.sql(damage)

    async def start() -> None:
        try:
            async with shop.db.running(create_tables=False):
                pass
        finally:
            await shop.db.async_dispose()

    with pytest.raises(
        SchemaError, match=rf"of version (0|None), and this release needs version {SCHEMA_VERSION}"
    ) as told:
        asyncio.run(start())
    shop.close()

    assert "aftercommit schema --apply" in str(told.value)
