"""Batches: short transactions, one bad record costs nothing to the others, and nothing is done twice or left out."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any, Self
from uuid import UUID

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

from aftercommit import BatchReport, Database, PoolSettings, Retry, TaskRecord, current_run
from aftercommit.batches import sources
from aftercommit.batches.stretches import Stretch, gaps, merged
from aftercommit.errors import BatchError, BatchStopped, ConfigurationError, RowGone
from aftercommit.watch.leaks import watch_of
from tests.support.databases import DatabaseUnderTest


class Base(DeclarativeBase):
    """Tables of an application."""


class Item(Base):
    """A record of a batch."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(default=0)
    note: Mapped[str | None] = mapped_column(unique=True)


class Pair(Base):
    """A record with a key of two parts."""

    __tablename__ = "pair"
    left: Mapped[str] = mapped_column(primary_key=True)
    right: Mapped[UUID] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(default=0)


class Parent(Base):
    """What a child must have, at the latest at the commit."""

    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)


class Child(Base):
    """A row whose foreign key is checked at the COMMIT."""

    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int] = mapped_column(sa.ForeignKey("parent.id", deferrable=True, initially="DEFERRED"))


class Bench:
    """A ``Database`` on the driver under test, run natively; handlers are written once, for a ``Session``."""

    def __init__(self, under_test: DatabaseUnderTest, isolation_level: str | None = None) -> None:
        self.under_test = under_test
        pool = PoolSettings(pool_size=5, isolation_level=isolation_level)
        self.db = Database(under_test.url, pools={"default": pool})
        self.outside = sa.create_engine(under_test.sync_url)
        self.loop = asyncio.Runner() if under_test.is_async else None
        Base.metadata.create_all(self.outside)
        if self.loop is None:
            self.db.create_tables()
        else:
            self.loop.run(self.db.async_create_tables())

    def close(self) -> None:
        """Give everything back; nothing may be checked out by then."""
        pool = self.db.engine("default").pool if self.loop is None else self.db.async_engine("default").pool
        assert pool.checkedout() == 0  # type: ignore[attr-defined]
        if self.loop is None:
            self.db.dispose()
        else:
            self.loop.run(self.db.async_dispose())
            self.loop.close()
        self.outside.dispose()

    def fill(self, count: int) -> None:
        """Make items 1 to *count*."""
        with Session(self.outside) as session, session.begin():
            session.add_all(Item(id=number) for number in range(1, count + 1))

    def run(self, source: Any, handler: Callable[..., Any], **options: Any) -> BatchReport:
        """Run a batch outside of tasks."""
        if self.loop is None:
            return self.db.run_batch(source, handler, **options)
        return self.loop.run(self.db.async_run_batch(source, handler, **options))

    def batch_task(self, body: Callable[[], tuple[Any, ...]], *, retry: Retry | None = None, **options: Any) -> Any:
        """Declare a task that runs the batch that *body* gives, and keeps the report in ``reports``."""
        self.reports: list[BatchReport] = []
        db = self.db
        if self.loop is None:

            @db.task(name="work", retry=retry or Retry(base=0.01))
            def work() -> int:
                self.reports.append(db.run_batch(*body(), **options))
                return self.reports[-1].total

            return work

        @db.task(name="work", retry=retry or Retry(base=0.01))
        async def async_work() -> int:
            self.reports.append(await db.async_run_batch(*body(), **options))
            return self.reports[-1].total

        return async_work

    def drain(self, task: Any) -> TaskRecord:
        """Hand *task* over, run all that is due, again after each ``_Crash``, and return its record."""
        if self.loop is None:
            with self.db.session() as session:
                handle = self.db.after_commit(session, task)
            self.db.drain()
        else:
            self.loop.run(self._drain(task))
            handle = self._handle
        self.crashes = 0
        while "_Crash" in (self.record(handle.id).error or ""):
            self.crashes += 1
            if self.loop is None:
                self.db.retry(handle.id)
                self.db.drain()
            else:
                self.loop.run(self.db.async_retry(handle.id))
                self.loop.run(self.db.async_drain())
        return self.record(handle.id)

    async def _drain(self, task: Any) -> None:
        async with self.db.async_session() as session:
            self._handle = self.db.after_commit(session, task)
        await self.db.async_drain()

    def record(self, id: UUID) -> TaskRecord:
        """The record as it stands."""
        with Session(self.outside) as session:
            return session.get_one(TaskRecord, id)

    def look(self, statement: sa.Select[Any]) -> list[Any]:
        """What somebody else sees."""
        with Session(self.outside) as session:
            return list(session.execute(statement).all())

    @property
    def counts(self) -> dict[int, int]:
        """``n`` of each item."""
        return {row[0]: row[1] for row in self.look(select(Item.id, Item.n))}

    @property
    def notes(self) -> dict[int, str]:
        """The notes of marked items."""
        return {row[0]: row[1] for row in self.look(select(Item.id, Item.note).where(Item.note.is_not(None)))}


@pytest.fixture
def bench(database: DatabaseUnderTest) -> Iterator[Bench]:
    """A bench on the driver under test."""
    made = Bench(database)
    yield made
    made.close()


@pytest.fixture
def postgres_bench(database: DatabaseUnderTest) -> Iterator[Callable[[str], Bench]]:
    """Make a bench whose task runs are at another isolation."""
    made: list[Bench] = []

    def make(isolation_level: str) -> Bench:
        made.append(Bench(database, isolation_level))
        return made[-1]

    yield make
    for each in made:
        each.close()


def count_up(session: Session, item: Item) -> None:
    """Handle an item."""
    item.n += 1


def mark(session: Session, item: Item, error: BaseException) -> None:
    """Mark an item that failed."""
    item.note = f"{item.id}: {error}"


def failing(*bad: int) -> Callable[[Session, Item], None]:
    """Handle items, but not the *bad* ones."""

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        if item.id in bad:
            raise ValueError("bad")

    return handle


# --- sources ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["keys of some pages ahead", "the end of the next page"])
def paging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to cut pages, whatever their size."""
    monkeypatch.setattr(sources, "_LARGE", 1 if request.param == "the end of the next page" else 1000)


@pytest.mark.usefixtures("paging")
def test_every_row_of_a_select_is_handled_once(bench: Bench) -> None:
    """Pages are cut by the primary key, whatever order and filter the Select has."""
    bench.fill(25)
    source = select(Item).where(Item.id != 13).order_by(Item.n.desc())

    report = bench.run(source, count_up, size=10)

    assert (report.total, report.succeeded, report.failed, report.failures) == (24, 24, 0, ())
    assert bench.counts == {number: int(number != 13) for number in range(1, 26)}
    assert report.seconds > 0
    assert report.rate == pytest.approx(24 / report.seconds)


@pytest.mark.usefixtures("paging")
def test_pages_of_a_composite_key(bench: Bench) -> None:
    """Keys of several parts, of any type, are compared as a whole by the database."""
    with Session(bench.outside) as session, session.begin():
        session.add_all(Pair(left=left, right=UUID(int=number)) for left in "aBc" for number in range(7))

    def handle(session: Session, pair: Pair) -> None:
        pair.n += 1

    report = bench.run(select(Pair), handle, size=4)

    assert report.total == 21
    assert bench.look(select(Pair.n).distinct()) == [(1,)]


@pytest.mark.usefixtures("paging")
def test_rows_that_appear_and_vanish_do_no_harm(bench: Bench) -> None:
    """What is deleted ahead is not missed, what appears ahead is handled, what appears behind is not."""
    bench.fill(30)

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        if item.id == 5:
            session.execute(sa.delete(Item).where(Item.id.in_([6, 17])))
            session.add_all([Item(id=0), Item(id=31)])

    report = bench.run(select(Item), handle, size=5)

    assert report.total == 28 + 1
    assert bench.counts == {0: 0, **{number: 1 for number in range(1, 32) if number not in (6, 17)}}


@pytest.mark.usefixtures("paging")
def test_a_handler_that_leaves_the_filter_behind_misses_nothing(bench: Bench) -> None:
    """A Select of what is still to be done gets shorter with every chunk, and no page moves for that."""
    bench.fill(20)

    report = bench.run(select(Item).where(Item.n == 0), count_up, size=3)

    assert report.total == 20
    assert set(bench.counts.values()) == {1}


def test_keys_of_an_entity(bench: Bench) -> None:
    """Keys are loaded with one statement a chunk, in the order given; a key without a row is that record's failure."""
    bench.fill(5)
    seen: list[int] = []
    marked: list[Any] = []

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        seen.append(item.id)

    report = bench.run(
        [4, 2, 99, 1], handle, entity=Item, size=10, on_error=lambda session, item, error: marked.append((item, error))
    )

    assert (report.succeeded, report.failed) == (3, 1)
    assert seen == [4, 2, 1]
    assert report.failures[0].key == 99
    assert isinstance(report.failures[0].error, RowGone)
    assert marked == [(99, report.failures[0].error)]


def test_a_chunk_loads_its_rows_with_one_statement(bench: Bench) -> None:
    """However many records a chunk has, they are loaded with one SELECT."""
    bench.fill(100)
    pool = bench.db.engine("default") if bench.loop is None else bench.db.async_engine("default").sync_engine
    sent: list[str] = []
    sa.event.listen(pool, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))

    bench.run(list(range(1, 101)), lambda session, item: None, entity=Item, size=50)

    assert len([each for each in sent if "FROM item" in each]) == 2


def test_a_chunk_of_a_select_loads_its_rows_with_one_statement(bench: Bench) -> None:
    """The rows of a page come with one SELECT; the keys of several pages ahead with another."""
    bench.fill(100)
    pool = bench.db.engine("default") if bench.loop is None else bench.db.async_engine("default").sync_engine
    sent: list[str] = []
    sa.event.listen(pool, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))

    report = bench.run(select(Item), count_up, size=50, progress=False)

    selects = [each for each in sent if each.startswith("SELECT") and "FROM item" in each]
    keys = [each for each in selects if each.startswith("SELECT DISTINCT")]
    assert report.succeeded == 100
    assert len(selects) - len(keys) == 2
    # One for both pages, and one that finds nothing behind them.
    assert len(keys) == 2


def test_values_and_generators(bench: Bench) -> None:
    """Any values will do, also those that a generator makes while the batch runs."""

    def handle(session: Session, number: int) -> None:
        session.add(Item(id=number))

    report = bench.run((number for number in range(1, 12)), handle, size=4)

    assert report.total == 11
    assert sorted(bench.counts) == list(range(1, 12))


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_async_generators_and_handlers(bench: Bench) -> None:
    """An async generator is read chunk by chunk, and an async handler is awaited with an AsyncSession."""

    async def numbers() -> AsyncIterator[int]:
        for number in range(1, 12):
            await asyncio.sleep(0)
            yield number

    async def handle(session: AsyncSession, number: int) -> None:
        session.add(Item(id=number))
        await session.flush()
        if number == 7:
            raise ValueError("bad")

    async def note(session: AsyncSession, number: int, error: BaseException) -> None:
        session.add(Item(id=-number, note=str(error)))
        await session.flush()

    report = bench.run(numbers(), handle, size=4, on_error=note)

    assert (report.succeeded, report.failed) == (10, 1)
    assert sorted(bench.counts) == [-7, *(number for number in range(1, 12) if number != 7)]


def test_memory_does_not_grow_with_the_batch(bench: Bench) -> None:
    """Ten times as many records take no more memory at once."""

    def peak(count: int) -> int:
        tracemalloc.start()
        bench.run((f"{number:2000}" for number in range(count)), lambda session, value: None, size=50)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(500)

    assert peak(5000) < peak(500) + 500_000


@pytest.mark.usefixtures("paging")
def test_keys_of_a_select_are_given_without_their_rows(bench: Bench) -> None:
    """A Select of the primary key gives keys, page by page, and no statement loads their rows."""
    bench.fill(25)
    pool = bench.db.engine("default") if bench.loop is None else bench.db.async_engine("default").sync_engine
    sent: list[str] = []
    sa.event.listen(pool, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))
    given: list[list[int]] = []

    def handle(session: Session, keys: list[int]) -> None:
        given.append(keys)
        session.execute(sa.update(Item).where(Item.id.between(keys[0], keys[-1]), Item.n == 0).values(n=Item.n + 1))

    report = bench.run(select(Item.id).where(Item.n == 0), handle, size=10, per_chunk=True)

    assert (report.total, report.succeeded) == (25, 25)
    assert given == [list(range(1, 11)), list(range(11, 21)), list(range(21, 26))]
    assert set(bench.counts.values()) == {1}
    assert not [each for each in sent if "item.note" in each]


@pytest.mark.usefixtures("paging")
@pytest.mark.drivers("psycopg", "pysqlite")
def test_bad_ones_among_keys_of_a_select(bench: Bench) -> None:
    """A key is a record as a row is: one that fails is isolated, marked and reported by itself; parts make a tuple."""
    with Session(bench.outside) as session, session.begin():
        session.add_all(Pair(left="a", right=UUID(int=number)) for number in range(7))
    bad = ("a", UUID(int=4))
    marked: list[Any] = []

    def handle(session: Session, key: tuple[str, UUID]) -> None:
        if key == bad:
            raise ValueError("bad")
        session.get_one(Pair, key).n += 1

    report = bench.run(
        select(Pair.left, Pair.right), handle, size=3, on_error=lambda session, key, error: marked.append(key)
    )

    assert (report.succeeded, [each.key for each in report.failures], marked) == (6, [bad], [bad])
    assert sorted(bench.look(select(Pair.n))) == [(0,), *[(1,)] * 6]


def test_memory_does_not_grow_with_the_rows(bench: Bench) -> None:
    """A Select of ten times as many rows takes no more memory at once."""
    with bench.outside.begin() as connection:
        connection.execute(
            sa.insert(Item), [{"id": number, "n": 0, "note": f"{number:2000}"} for number in range(2500)]
        )

    def peak(count: int) -> int:
        tracemalloc.start()
        bench.run(select(Item).where(Item.id < count), lambda session, item: None, size=25)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(250)

    assert peak(2500) < peak(250) + 500_000


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_async_handlers_of_rows(bench: Bench) -> None:
    """Async handlers read a row's attributes without awaiting, also in on_error, after the rollback."""
    bench.fill(7)

    async def handle(session: AsyncSession, item: Item) -> None:
        item.n += 1
        await session.flush()
        if item.id == 5:
            raise ValueError("bad")

    async def note(session: AsyncSession, item: Item, error: BaseException) -> None:
        item.note = f"{item.id} had {item.n}"

    report = bench.run(select(Item), handle, size=4, on_error=note)

    assert (report.succeeded, [each.key for each in report.failures]) == (6, [5])
    assert bench.counts == {number: int(number != 5) for number in range(1, 8)}
    assert bench.notes == {5: "5 had 0"}


def test_a_chunk_is_one_transaction(bench: Bench) -> None:
    """Each chunk is committed once, with what its handlers wrote, before the next is begun."""
    bench.fill(10)
    seen: list[int] = []

    def handle(session: Session, item: Item) -> None:
        if item.id % 4 == 1:
            seen.append(sum(bench.counts.values()))
        item.n += 1

    bench.run(select(Item), handle, size=4)

    assert seen == [0, 4, 8]


@pytest.mark.drivers("pysqlite")
@pytest.mark.parametrize(
    ("source", "options"),
    [
        (select(Item.n), {}),
        (select(Item.id, Item.n), {}),
        (select(Pair.left), {}),
        (select(Pair.right, Pair.left), {}),
        (select(Item.id + 1), {}),
        (select(aliased(Item)), {}),
        (select(aliased(Item).id), {}),
        (select(sa.func.count()), {}),
        (select(Item.id), {"entity": Item}),
        (select(Item, Pair), {}),
        (select(Item).limit(5), {}),
        (select(Item), {"entity": Item}),
        ([1], {"entity": int}),
        ("values", {}),
        (7, {}),
        ([1], {"size": 0}),
        ([1], {"workers": 0}),
        ([1], {"workers": 6}),
        ([1], {"max_failures": -1}),
        ([1], {"pool": "nowhere"}),
    ],
)
def test_what_cannot_be_meant_is_refused(bench: Bench, source: Any, options: dict[str, Any]) -> None:
    """A batch that cannot be right is refused before anything runs."""
    with pytest.raises(ConfigurationError):
        bench.run(source, lambda session, item: None, **options)


@pytest.mark.drivers("pysqlite")
def test_async_things_need_the_async_batch(bench: Bench) -> None:
    """An async handler or source given to the sync batch is an error that names the other one."""

    async def handle(session: AsyncSession, item: Item) -> None: ...

    async def numbers() -> AsyncIterator[int]:
        yield 1

    for source, handler in (([1], handle), (numbers(), count_up)):
        with pytest.raises(ConfigurationError, match="async_run_batch"):
            bench.db.run_batch(source, handler)


# --- bad records ------------------------------------------------------------------------------------------------


def test_one_bad_record_costs_nothing_to_the_others(bench: Bench) -> None:
    """Good records are done once, bad ones are rolled back and marked once, in the same transaction."""
    bench.fill(20)

    report = bench.run(select(Item), failing(3, 14), size=6, on_error=mark)

    assert (report.total, report.succeeded, report.failed) == (20, 18, 2)
    assert [each.key for each in report.failures] == [3, 14]
    assert [str(each.error) for each in report.failures] == ["bad", "bad"]
    assert all(isinstance(each.error, ValueError) for each in report.failures)
    assert bench.counts == {number: int(number not in (3, 14)) for number in range(1, 21)}
    assert bench.notes == {3: "3: bad", 14: "14: bad"}


def test_good_chunks_are_run_plain(bench: Bench) -> None:
    """Only a chunk with a bad record in it pays for savepoints, and only for those around what is good in it."""
    bench.fill(20)
    pool = bench.db.engine("default") if bench.loop is None else bench.db.async_engine("default").sync_engine
    savepoints: list[str] = []
    sa.event.listen(pool, "savepoint", lambda _connection, name: savepoints.append(name))

    bench.run(select(Item), failing(3), size=5)

    assert len(savepoints) == 2


def test_flush_errors_belong_to_their_record(bench: Bench) -> None:
    """What the database refuses at a flush is the failure of the record that wrote it."""
    bench.fill(10)

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        item.note = "same" if item.id in (4, 8) else None

    report = bench.run(select(Item), handle, size=10)

    assert [each.key for each in report.failures] == [8]
    assert bench.counts == {number: int(number != 8) for number in range(1, 11)}


def test_commit_errors_belong_to_their_record(bench: Bench) -> None:
    """A deferred constraint that fails at the COMMIT fails the record that broke it; the others are done."""
    bench.fill(10)

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        if item.id in (2, 7):
            session.add(Child(id=item.id, parent=404))

    report = bench.run(select(Item), handle, size=5, on_error=mark)

    assert [each.key for each in report.failures] == [2, 7]
    assert all(isinstance(each.error, sa.exc.IntegrityError) for each in report.failures)
    assert bench.counts == {number: int(number not in (2, 7)) for number in range(1, 11)}
    assert sorted(bench.notes) == [2, 7]
    assert bench.look(select(Child.id)) == []


def test_failures_are_capped_in_memory_and_all_marked(bench: Bench) -> None:
    """A report carries a hundred failures; on_error sees all of them."""
    marked: list[int] = []

    def handle(session: Session, number: int) -> None:
        raise ValueError(number)

    report = bench.run(range(130), handle, size=20, on_error=lambda session, number, error: marked.append(number))

    assert report.failed == 130
    assert len(report.failures) == 100
    assert marked == list(range(130))


def test_hopeless_batch_stops_early_and_says_so(bench: Bench) -> None:
    """Past max_failures the batch stops; what was committed stays, and the error has the report."""
    bench.fill(30)

    with pytest.raises(BatchStopped, match="max_failures=3") as caught:
        bench.run(select(Item), failing(*range(6, 31)), size=5, on_error=mark, max_failures=3)

    assert (caught.value.report.succeeded, caught.value.report.failed) == (5, 5)
    assert sorted(bench.notes) == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_hopeless_batch_fails_its_task_and_says_so(bench: Bench, workers: int) -> None:
    """In a task, on one lane or several, past max_failures: the record is failed, with the error and the number."""
    bench.fill(60)

    task = bench.batch_task(
        lambda: (select(Item), failing(*range(1, 61))), size=5, workers=workers, on_error=mark, max_failures=3
    )
    record = bench.drain(task)

    assert (record.state, record.attempt, bench.reports) == ("failed", 1, [])
    assert "BatchStopped" in (record.error or "")
    assert "max_failures=3" in (record.error or "")
    # A chunk that was under way on each lane, and no more.
    assert 5 <= len(bench.notes) <= 5 * workers
    assert len(bench.notes) % 5 == 0


def test_on_error_that_fails_stops_the_batch(bench: Bench) -> None:
    """A failure that cannot be marked is not passed over in silence."""
    bench.fill(5)

    def broken(session: Session, item: Item, error: BaseException) -> None:
        raise KeyError("no")

    with pytest.raises(BatchError, match="KeyError"):
        bench.run(select(Item), failing(3), size=5, on_error=broken)

    assert set(bench.counts.values()) == {0}


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_a_handler_may_not_end_its_chunk(bench: Bench, end: str) -> None:
    """A chunk is one transaction: a commit or rollback by habit is an error, and nothing of the chunk is kept."""
    bench.fill(5)

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        getattr(session, end)()

    with pytest.raises(BatchError, match="A chunk is one transaction"):
        bench.run(select(Item), handle, size=5)

    assert set(bench.counts.values()) == {0}


def test_per_chunk_takes_lists_and_isolates_the_bad_one(bench: Bench) -> None:
    """A handler for whole chunks is called with lists of one where a chunk has failed."""
    bench.fill(10)
    sizes: list[int] = []

    def handle(session: Session, items: list[Item]) -> None:
        sizes.append(len(items))
        for item in items:
            item.n += 1
        if any(item.id == 7 for item in items):
            raise ValueError("bad")

    report = bench.run(select(Item), handle, size=5, per_chunk=True, on_error=mark)

    assert sizes == [5, 5, 1, 1, 1, 1, 1]
    assert (report.succeeded, [each.key for each in report.failures]) == (9, [7])
    assert bench.counts == {number: int(number != 7) for number in range(1, 11)}
    assert bench.notes == {7: "7: bad"}


def test_interrupts_pass_through(bench: Bench) -> None:
    """Ctrl+C is nobody's failure: the chunk at hand is rolled back and the batch ends."""
    bench.fill(10)

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        if item.id == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(select(Item), handle, size=5)

    assert bench.counts == {number: int(number <= 5) for number in range(1, 11)}


# --- conflicts --------------------------------------------------------------------------------------------------


@pytest.mark.drivers("psycopg", "asyncpg")
def test_conflicts_repeat_the_chunk(bench: Bench) -> None:
    """A row that somebody changed meanwhile costs a repeat of the chunk, no update and no failure."""
    bench.fill(4)
    rounds: list[int] = []

    def handle(session: Session, item: Item) -> None:
        if item.id == 3:
            rounds.append(item.n)
            if len(rounds) == 1:
                with bench.outside.begin() as connection:
                    connection.execute(sa.update(Item).where(Item.id == 3).values(n=100))
        item.n += 1

    report = bench.run(select(Item), handle, size=4)

    assert (report.succeeded, report.failed) == (4, 0)
    assert rounds == [0, 100]
    assert bench.counts == {1: 1, 2: 1, 3: 101, 4: 1}


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_serialization_failure_at_the_commit_repeats_the_chunk(postgres_bench: Callable[[str], Bench]) -> None:
    """What SERIALIZABLE finds out only at the COMMIT is nobody's failure: the chunk is run again and sees the other."""
    bench = postgres_bench("SERIALIZABLE")
    bench.fill(2)
    rounds: list[int] = []

    def handle(session: Session, item: Item) -> None:
        if item.id == 1:
            item.n = 10
            session.flush()
            return
        rounds.append(item.n)
        if len(rounds) == 1:
            # It reads what this chunk has written, as it was before, and writes what this chunk has read.
            with bench.outside.connect().execution_options(isolation_level="SERIALIZABLE") as other, other.begin():
                before = other.scalar(select(Item.n).where(Item.id == 1))
                other.execute(sa.update(Item).where(Item.id == 2).values(n=before + 5))

    report = bench.run(select(Item), handle, size=2)

    assert (report.succeeded, report.failed) == (2, 0)
    assert rounds == [0, 5]
    assert bench.counts == {1: 10, 2: 5}


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_lost_connection_repeats_the_chunk(bench: Bench) -> None:
    """A server that ends the chunk's connection costs a repeat on another one."""
    bench.fill(4)
    rounds: list[int] = []

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        if item.id == 3:
            rounds.append(item.id)
            if len(rounds) == 1:
                pid = session.scalar(sa.text("SELECT pg_backend_pid()"))
                with bench.outside.begin() as connection:
                    connection.execute(sa.text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})

    report = bench.run(select(Item), handle, size=4)

    assert (report.succeeded, report.failed, len(rounds)) == (4, 0, 2)
    assert set(bench.counts.values()) == {1}


@pytest.mark.drivers("psycopg", "asyncpg")
@pytest.mark.parametrize("with_bad", [False, True])
def test_a_row_that_somebody_else_created_first_is_seen_by_the_next_try(bench: Bench, with_bad: bool) -> None:
    """The usual get-or-create races at any isolation; the record that lost is run again and finds the row."""
    tries: list[bool] = []

    def handle(session: Session, number: int) -> None:
        if number == 1 and with_bad:
            # Then the race is met for the first time in the second step of the ladder, whose snapshot is as old.
            raise ValueError("bad")
        found = session.get(Item, number)
        if number == 2:
            tries.append(found is not None)
            if len(tries) == 1:
                with bench.outside.begin() as connection:
                    connection.execute(sa.insert(Item).values(id=2, n=10))
        if found is None:
            found = Item(id=number, n=0)
            session.add(found)
        found.n += 1

    report = bench.run([1, 2, 3], handle, size=3)

    assert [failure.key for failure in report.failures] == ([1] if with_bad else [])
    assert bench.counts == {**({} if with_bad else {1: 1}), 2: 11, 3: 1}


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_row_that_really_is_there_is_the_records_failure(bench: Bench) -> None:
    """A unique violation that a fresh snapshot does not explain is bad data."""
    bench.fill(1)

    def handle(session: Session, number: int) -> None:
        session.execute(sa.insert(Item).values(id=number))

    report = bench.run([3, 1, 2], handle, size=3)

    assert [failure.key for failure in report.failures] == [1]
    assert sorted(bench.counts) == [1, 2, 3]


# --- inside a durable task --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("paging")
def test_a_batch_in_a_task_saves_its_position(bench: Bench) -> None:
    """A task that dies in the middle goes on behind the last committed chunk: nothing twice, nothing left out."""
    bench.fill(20)
    calls: list[int] = []

    def handle(session: Session, item: Item) -> None:
        calls.append(item.id)
        item.n += 1
        if item.id == 3:
            raise ValueError("bad")
        if item.id == 13 and calls.count(13) == 1:
            raise _Crash

    record = bench.drain(bench.batch_task(lambda: (select(Item), handle), size=5, on_error=mark))

    assert (record.state, bench.crashes, record.result) == ("succeeded", 1, 20)
    assert bench.counts == {number: int(number != 3) for number in range(1, 21)}
    assert bench.notes == {3: "3: bad"}
    assert [number for number in calls if calls.count(number) > 1] == [1, 2, 3] * 2 + [11, 12, 13] * 2
    report = bench.reports[-1]
    assert (report.succeeded, report.failed, report.failures[0].key) == (19, 1, 3)
    assert str(report.failures[0].error) == "ValueError: bad"


class _Crash(BaseException):
    """Something that no batch takes for a record's failure."""


def test_a_task_goes_on_in_a_generator(bench: Bench) -> None:
    """A source of values is read again from its beginning, and what is done is passed over."""
    crashes = [9]

    def handle(session: Session, number: int) -> None:
        session.add(Item(id=number))
        if number in crashes:
            crashes.clear()
            raise _Crash

    record = bench.drain(bench.batch_task(lambda: (iter(range(1, 16)), handle), size=4))

    assert (record.state, bench.crashes, record.result) == ("succeeded", 1, 15)
    assert sorted(bench.counts) == list(range(1, 16))


@pytest.mark.usefixtures("paging")
def test_a_finished_batch_is_not_run_again(bench: Bench) -> None:
    """If the task fails behind its batch, the next attempt gets the same report without doing anything."""
    bench.fill(7)
    task = bench.batch_task(lambda: (select(Item), failing(2)), size=3)
    function, tries = task.function, []

    if bench.loop is None:

        def again() -> int:
            function()
            tries.append(1)
            if len(tries) == 1:
                raise ConnectionError
            return 0

        wrapped: Any = bench.db.task(name="again", retry=Retry(base=0.0, on=ConnectionError))(again)
    else:

        async def async_again() -> int:
            await function()
            tries.append(1)
            if len(tries) == 1:
                raise ConnectionError
            return 0

        wrapped = bench.db.task(name="again", retry=Retry(base=0.0, on=ConnectionError))(async_again)

    record = bench.drain(wrapped)

    assert (record.state, record.attempt) == ("succeeded", 2)
    assert bench.counts == {number: int(number != 2) for number in range(1, 8)}
    first, second = bench.reports
    assert (first.total, first.failed) == (second.total, second.failed) == (7, 1)
    assert second.failures[0].key == 2


def test_two_batches_of_one_task_have_positions_of_their_own(bench: Bench) -> None:
    """The same handler over two sources is two batches."""
    bench.fill(6)
    db = bench.db
    if bench.loop is None:

        @db.task
        def twice() -> None:
            db.run_batch(select(Item), count_up, size=4)
            db.run_batch(select(Item).where(Item.id > 3), count_up, size=4)

        record = bench.drain(twice)
    else:

        @db.task
        async def async_twice() -> None:
            await db.async_run_batch(select(Item), count_up, size=4)
            await db.async_run_batch(select(Item).where(Item.id > 3), count_up, size=4)

        record = bench.drain(async_twice)

    assert record.state == "succeeded", record.traceback
    assert bench.counts == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}


def test_progress_stands_on_the_record(bench: Bench) -> None:
    """Whoever looks at the task's record sees how far its batch is."""
    bench.fill(10)

    record = bench.drain(bench.batch_task(lambda: (select(Item), count_up), size=5))

    assert (record.progress_done, record.progress_total) == (10, 10)


@pytest.mark.drivers("psycopg", "pysqlite")
def test_the_tasks_own_session_must_not_be_in_a_transaction(bench: Bench) -> None:
    """The chunks take the task's place, so it has to commit first; then all is well."""
    bench.fill(5)
    raised: list[str] = []

    @bench.db.task
    def work(session: Session) -> None:
        assert session.scalar(select(sa.func.count(Item.id))) == 5
        try:
            bench.db.run_batch(select(Item), count_up)
        except BatchError as exc:
            raised.append(str(exc))
        session.commit()
        bench.db.run_batch(select(Item), count_up)

    record = bench.drain(work)

    assert record.state == "succeeded", record.traceback
    assert len(raised) == 1
    assert "session.commit()" in raised[0]
    assert set(bench.counts.values()) == {1}


@pytest.mark.drivers("psycopg", "pysqlite")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_cancelled_task_commits_no_further_chunk(bench: Bench, workers: int) -> None:
    """Every chunk's commit is fenced, in every lane: once the record is somebody else's, nothing can be committed."""
    bench.fill(60)
    others_hold_chunks = workers > 1 and not bench.under_test.is_sqlite
    within, cancelled = threading.Semaphore(0), threading.Event()
    ids: list[UUID] = []
    standing: list[dict[int, int]] = []

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        run = current_run()
        assert run is not None
        ids.append(run.id)
        if others_hold_chunks and item.id > 5 and item.id % 5 == 1:
            # The first chunk is committed while each of the others is in the middle of its own.
            within.release()
            assert cancelled.wait(30)

    def cancel(done: int, total: int | None) -> None:
        # Behind the chunk's commit: SQLite would wait for the chunk itself.
        if standing or done < 5:
            return
        for _ in range(workers - 1 if others_hold_chunks else 0):
            assert within.acquire(timeout=30)
        with bench.outside.begin() as connection:
            connection.execute(sa.update(TaskRecord).where(TaskRecord.id == ids[0]).values(state="cancelled"))
        standing.append(bench.counts)
        cancelled.set()

    source = select(Item)
    record = bench.drain(bench.batch_task(lambda: (source, handle), size=5, workers=workers, progress=cancel))

    assert record.state == "cancelled"
    assert bench.counts == standing[0]
    assert 5 <= sum(standing[0].values()) < 60


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_claim_that_was_lost_runs_no_handler_again(bench: Bench) -> None:
    """Somebody else's record shows as a conflict at REPEATABLE READ; the chunk is not repeated for that."""
    bench.fill(3)
    calls: list[int] = []

    def handle(session: Session, item: Item) -> None:
        calls.append(item.id)
        item.n += 1
        run = current_run()
        assert run is not None
        if item.id == 2:
            with bench.outside.begin() as connection:
                connection.execute(sa.update(TaskRecord).where(TaskRecord.id == run.id).values(state="cancelled"))

    record = bench.drain(bench.batch_task(lambda: (select(Item), handle), size=3))

    assert record.state == "cancelled"
    assert calls == [1, 2, 3]
    assert set(bench.counts.values()) == {0}


@pytest.mark.drivers("psycopg", "pysqlite")
def test_conflicts_of_chunks_do_not_repeat_the_task(bench: Bench) -> None:
    """What chunks have dealt with is no reason to repeat the task when it fails for a reason of its own."""
    bench.fill(4)
    runs: list[int] = []

    def handle(session: Session, item: Item) -> None:
        item.note = "same"

    @bench.db.task
    def work() -> None:
        runs.append(1)
        bench.db.run_batch(select(Item), handle, size=4)
        raise KeyError("of its own")

    record = bench.drain(work)

    assert (record.state, record.attempt, len(runs)) == ("failed", 1, 1)


@pytest.mark.drivers("psycopg", "pysqlite")
def test_batches_in_tests_that_roll_back(bench: Bench) -> None:
    """Where a test replaces the database by a connection, a task's batch runs in the test's transaction."""
    from aftercommit import testing

    bench.fill(12)
    task = bench.batch_task(lambda: (select(Item), failing(3)), size=5, workers=3, on_error=mark)

    with bench.outside.connect() as connection, connection.begin() as outer:
        with testing.replace(bench.db, connection=connection) as tasks:
            with bench.db.session() as session:
                bench.db.after_commit(session, task)
            tasks.run()
        done = connection.execute(select(sa.func.sum(Item.n))).scalar()
        outer.rollback()

    assert done == 11
    assert set(bench.counts.values()) == {0}


@pytest.mark.drivers("psycopg", "pysqlite")
def test_pool_is_the_tasks_own(bench: Bench) -> None:
    """Another pool than the task's would hold two places for one piece of work, and is refused."""
    record = bench.drain(bench.batch_task(lambda: ([1], count_up), pool="request"))

    assert record.state == "failed"
    assert "task's own place" in (record.error or "")


@pytest.mark.drivers("pysqlite")
def test_positions_go_with_their_task(bench: Bench) -> None:
    """When a task's record is pruned, nothing of its batches is left behind."""
    from aftercommit.records import workers
    from aftercommit.records.tables import BatchPosition

    bench.fill(3)
    bench.drain(bench.batch_task(lambda: (select(Item), count_up)))
    assert len(bench.look(select(BatchPosition.lane))) == 1

    with bench.db.engine().begin() as connection:
        workers.prune(connection, keep=-1.0)

    assert bench.look(select(BatchPosition.lane)) == []


# --- progress outside -------------------------------------------------------------------------------------------


@pytest.mark.drivers("pysqlite")
def test_progress_may_be_a_function(bench: Bench) -> None:
    """A function is told what is done and of how many, after every chunk."""
    told: list[tuple[int, int | None]] = []
    bench.fill(7)

    bench.run(select(Item), count_up, size=3, progress=lambda done, total: told.append((done, total)))

    assert told == [(0, 7), (3, 7), (6, 7), (7, 7)]


@pytest.mark.drivers("pysqlite")
def test_bar_is_shown_where_it_is_asked_for(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """progress=True draws a bar on stderr; by default nothing is drawn where there is no terminal."""
    bench.fill(7)

    bench.run(select(Item), count_up, size=3)
    silent = capsys.readouterr().err
    bench.run(select(Item), count_up, size=3, progress=True)

    assert silent == ""
    assert "7/7" in capsys.readouterr().err


ON_A_TERMINAL = """
import sys
from aftercommit import Database

db = Database(sys.argv[1])
db.run_batch(range(50), lambda session, number: None, size=1)
"""


@pytest.mark.drivers("pysqlite")
def test_a_terminal_sees_rate_and_remaining_time(bench: Bench) -> None:
    """On a terminal a bar is drawn without being asked for, with the count, the rate and the time that is left."""
    ours, theirs = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, bench.under_test.url],
        stdin=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # how a terminal says that nobody is at its other end any more
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)

    assert child.wait(30) == 0
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"50/50 +\d+/s +\d:\d\d:\d\d", drawn), drawn


# --- width ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("paging")
def test_workers_share_the_records(bench: Bench) -> None:
    """Lanes side by side do every record once, and isolate bad ones as one lane does."""
    bench.fill(60)

    report = bench.run(select(Item), failing(7, 33, 60), size=4, workers=4, on_error=mark)

    assert (report.succeeded, report.failed) == (57, 3)
    assert bench.counts == {number: int(number not in (7, 33, 60)) for number in range(1, 61)}
    assert sorted(bench.notes) == [7, 33, 60]


@pytest.mark.drivers("psycopg")
def test_workers_really_run_side_by_side(bench: Bench) -> None:
    """Three chunks are open at the same moment with three workers."""
    bench.fill(3)
    meeting = threading.Barrier(3, timeout=20)

    def handle(session: Session, item: Item) -> None:
        meeting.wait()
        item.n += 1

    report = bench.run(select(Item), handle, size=1, workers=3)

    assert (report.succeeded, report.failed) == (3, 0)


@pytest.mark.drivers("psycopg", "asyncpg")
def test_the_first_error_ends_all_lanes(bench: Bench) -> None:
    """What is nobody's failure ends the batch in every lane, and is raised as it is."""
    bench.fill(40)

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        if item.id == 9:
            raise _Crash

    with pytest.raises(_Crash):
        bench.run(select(Item), handle, size=2, workers=3)

    assert bench.counts[9] == 0


@pytest.mark.drivers("psycopg", "asyncpg")
def test_lanes_of_a_task_take_places_and_give_them_back(bench: Bench) -> None:
    """A wide batch in a task uses free places of its pool; a task that comes meanwhile gets one before the end."""
    bench.fill(60)
    meeting = threading.Barrier(5, timeout=20)
    came, ran = threading.Event(), threading.Event()
    widths: set[int] = set()

    def handle(session: Session, item: Item) -> None:
        item.n += 1
        runner = bench.db.runner
        assert runner is not None
        widths.add(runner.lanes["default"]._lent)
        if bench.loop is None and item.id <= 5:
            meeting.wait()
        if item.id == 20 and not came.is_set():
            came.set()
            with Session(bench.outside) as other, other.begin():
                for _ in range(4):
                    bench.db.after_commit(other, bench.db.tasks["quick"])
        if item.id >= 30 and bench.loop is None:
            # All lanes that are left come here: the task can only run in a place that one of them gave back.
            assert ran.wait(20)

    @bench.db.task
    def quick() -> None:
        ran.set()

    record = bench.drain(bench.batch_task(lambda: (select(Item), handle), size=1, workers=5))

    assert record.state == "succeeded", record.traceback
    assert set(bench.counts.values()) == {1}
    assert max(widths) == 4
    assert ran.is_set()


# --- properties -------------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 7),
    order=st.permutations(range(12)),
    cut=st.integers(0, 12),
)
def test_what_is_done_and_what_is_left_are_the_whole(size: int, order: list[int], cut: int) -> None:
    """Stretches in any order, merged, and the gaps between them cover every place once."""
    done = [Stretch(number * size, (number + 1) * size, number or None, number + 1) for number in order[:cut]]

    left = gaps(done)

    covered = [place for each in merged(done) for place in range(each.start, each.stop or 0)]
    open_ones = [place for each in left for place in range(each.start, each.stop or 12 * size + 5)]
    assert sorted(covered + open_ones) == list(range(12 * size + 5))
    assert [each.stop for each in left[:-1]] == [each.start for each in merged(done) if each.start]
    assert left[-1].stop is None


class Deaths:
    """Where a batch dies: at a record, before its n-th COMMIT, and behind its n-th COMMIT; each once."""

    def __init__(self, records: set[int], before: set[int], behind: set[int]) -> None:
        self.records, self._before, self._behind = set(records), set(before), set(behind)
        self._begun = self._done = 0

    def __enter__(self) -> Self:
        sa.event.listen(Session, "before_commit", self._before_commit)
        sa.event.listen(Session, "after_commit", self._after_commit)
        return self

    def __exit__(self, *_: object) -> None:
        sa.event.remove(Session, "before_commit", self._before_commit)
        sa.event.remove(Session, "after_commit", self._after_commit)

    def at(self, record: int) -> None:
        """Die here, if it is the place."""
        if record in self.records:
            self.records.discard(record)
            raise _Crash

    def _before_commit(self, session: Session) -> None:
        if self._is_batch(session):
            self._begun += 1
            if self._begun in self._before:
                raise _Crash

    def _after_commit(self, session: Session) -> None:
        if self._is_batch(session):
            self._done += 1
            if self._done in self._behind:
                raise _Crash

    def _is_batch(self, session: Session) -> bool:
        watch = watch_of(session)
        is_batch = watch is not None and watch.owner.name.startswith("batch of")
        return is_batch and session.get_nested_transaction() is None


@pytest.mark.drivers("pysqlite", "psycopg")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_good_record_once_every_bad_one_marked_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """For any failing records, kind of source, chunk size, width and points of death, nothing is lost or done twice."""
    count = data.draw(st.integers(0, 40), label="count")
    numbers = st.sets(st.integers(1, max(1, count)), max_size=max(1, count))
    bad = data.draw(numbers, label="bad") & set(range(1, count + 1))
    at_commit = data.draw(st.sets(st.sampled_from(sorted(bad)) if bad else st.nothing()), label="bad at the commit")
    size = data.draw(st.integers(1, 12), label="size")
    monkeypatch.setattr(sources, "_LARGE", data.draw(st.sampled_from([1, 1000]), label="large"))
    workers = data.draw(st.integers(1, 3), label="workers")
    kind = data.draw(st.sampled_from(["rows", "keys", "values"]), label="source")
    per_chunk = data.draw(st.booleans(), label="per_chunk")
    points = st.sets(st.integers(1, 30), max_size=2)
    deaths = Deaths(
        data.draw(st.sets(st.integers(1, 40), max_size=3), label="deaths in handlers"),
        data.draw(points, label="deaths before commits"),
        data.draw(points, label="deaths behind commits"),
    )
    with bench.outside.begin() as connection:
        connection.execute(sa.delete(Item))
    bench.fill(count)

    def handle(session: Session, given: Any) -> None:
        for item in given if per_chunk else [given]:
            row = item if isinstance(item, Item) else session.get_one(Item, item)
            row.n += 1
            if row.id in at_commit:
                session.add(Child(id=row.id, parent=404))
            elif row.id in bad:
                raise ValueError("bad")
            deaths.at(row.id)

    def note(session: Session, item: Any, error: BaseException) -> None:
        row = item if isinstance(item, Item) else session.get_one(Item, item)
        row.note = f"{row.note or ''}{row.id}."

    bench.db._tasks.clear()
    source: Any = {"rows": select(Item), "keys": range(1, count + 1), "values": list(range(1, count + 1))}[kind]
    entity = Item if kind == "keys" else None
    task = bench.batch_task(
        lambda: (source, handle), size=size, workers=workers, on_error=note, entity=entity, per_chunk=per_chunk
    )
    with deaths:
        record = bench.drain(task)

    assert record.state == "succeeded", record.traceback
    report = bench.reports[-1]
    assert report.total == report.succeeded + report.failed == count
    assert report.failed == len(bad)
    assert bench.counts == {number: int(number not in bad) for number in range(1, count + 1)}
    assert bench.notes == {number: f"{number}." for number in bad}
    assert bench.look(select(Child.id)) == []
