"""``on_failure``: its numbers are exact, it is always called, and it always comes to an end."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import PoolSettings, Retry, current_run, signals
from aftercommit.records import moves
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Counter, Effect, Heard, Workshop


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver, with a pool that is eight wide and looks often."""
    made = Workshop(database, pools={"wide": PoolSettings(pool_size=8)})
    yield made
    made.close()


def fail(session: Session, label: str) -> None:
    """The body of a task that always fails."""
    raise ValueError("first")


def test_a_hundred_failures_count_a_hundred(shop: Workshop):
    """``stats.failed += 1`` in ``on_failure`` loses no update, however many fail at once."""

    def count(session: Session, error: BaseException, label: str) -> None:
        session.get_one(Counter, 1).n += 1

    bad = shop.task(pool="wide", on_failure=count)(fail)
    with shop.running(), Heard(signals.TaskFailed) as heard:
        shop.commit(lambda session: session.add(Counter(id=1)))
        shop.commit(lambda session: [shop.db.after_commit(session, bad, str(n)) for n in range(100)])
        shop.drain()

        assert shop.sql("SELECT n FROM counter") == 100
    assert {record.state for record in shop.records()} == {"failed"}
    assert len(heard.of(signals.TaskFailed)) == 100


def test_it_has_the_isolation_of_its_task(shop: Workshop):
    """``isolation_level`` of the task is that of ``on_failure``, too; on SQLite both begin with the write lock."""
    seen: list[str] = []

    def look(session: Session, error: BaseException, label: str) -> None:
        if shop.under_test.is_sqlite:
            driver: Any = session.connection().connection.driver_connection
            seen.append("serializable" if driver.in_transaction else "none")
        else:
            seen.append(session.scalar(sa.text("SHOW transaction_isolation")) or "")

    levels = (None, "SERIALIZABLE")
    tasks = [_named(shop, f"bad{n}", isolation_level=level, on_failure=look) for n, level in enumerate(levels)]
    with shop.running():
        for task in tasks:
            shop.ask(task, "x")
            shop.drain()

    assert seen == (["serializable"] * 2 if shop.under_test.is_sqlite else ["repeatable read", "serializable"])


def _named(shop: Workshop, name: str, **options: Any) -> Any:
    def body(session: Session, label: str) -> None:
        raise ValueError("first")

    body.__name__ = name
    return shop.task(**options)(body)


def test_a_row_that_two_failures_create_is_created_once(shop: Workshop):
    """A unique violation in ``on_failure`` is repeated, as in a task: the next try sees the other's row."""
    both = threading.Barrier(2)
    calls: list[str] = []

    def get_or_create(session: Session, error: BaseException, label: str) -> None:
        calls.append(label)
        row = session.get(Counter, 7)
        if len(calls) <= 2 and not (shop.is_async or shop.under_test.is_sqlite):
            both.wait(TIMEOUT)
        if row is None:
            row = Counter(id=7, n=0)
            session.add(row)
            session.flush()
        row.n += 1

    bad = shop.task(pool="wide", on_failure=get_or_create)(fail)
    with shop.running():
        shop.commit(lambda session: [shop.db.after_commit(session, bad, str(n)) for n in range(2)])
        shop.drain()

        assert shop.sql("SELECT n FROM counter WHERE id = 7") == 2


ENDS: dict[str, Callable[[], BaseException]] = {
    "sys.exit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "an exception": lambda: ValueError("second"),
    "StopIteration": StopIteration,
    "a BaseException": lambda: BaseException("second"),
    "a group": lambda: BaseExceptionGroup("two", [SystemExit(1), ValueError("x")]),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("durable", [True, False], ids=["durable", "in memory"])
def test_every_end_of_it_is_recorded(shop: Workshop, end: str, durable: bool):
    """However ``on_failure`` ends, the failure is recorded, once, without its effects, and its error is noted."""
    check_end(shop, end, durable=durable, native=False)


@pytest.mark.drivers("asyncpg", "aiosqlite")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("durable", [True, False], ids=["durable", "in memory"])
def test_every_end_of_an_async_one_is_recorded(shop: Workshop, end: str, durable: bool):
    """The same where it is an ``async def``."""
    check_end(shop, end, durable=durable, native=True)


def check_end(shop: Workshop, end: str, *, durable: bool, native: bool) -> None:
    """Fail a task whose ``on_failure`` ends like that, and look at what is left."""
    calls: list[int] = []

    def leave(session: Session, error: BaseException, label: str) -> None:
        calls.append(1)
        session.add(Effect(label="never"))
        session.flush()
        raise ENDS[end]()  # noqa: RSE102  # makes one

    async def leave_native(session: Any, error: BaseException, label: str) -> None:
        await session.run_sync(lambda plain: (calls.append(1), plain.add(Effect(label="never")), plain.flush()))
        raise ENDS[end]()  # noqa: RSE102  # makes one

    bad = shop.task(durable=durable, on_failure=leave_native if native else leave)(fail)
    with shop.running(), Heard(signals.TaskFailed) as heard:
        shop.ask(bad, "x")
        failed = heard.wait(signals.TaskFailed)
        shop.drain()

    assert calls == [1]
    assert shop.effects() == []
    assert len(heard.of(signals.TaskFailed)) == 1
    assert any("on_failure raised, too" in note for note in failed.error.__notes__)
    if durable:
        [record] = shop.records()
        assert (record.state, record.attempt, record.error) == ("failed", 1, "ValueError: first")
        assert "on_failure raised, too" in (record.traceback or "")


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_one_that_cancels_itself_is_recorded(shop: Workshop):
    """``current_task().cancel()`` in ``on_failure`` is its own end, not that of the event loop."""
    calls: list[int] = []

    async def cancel(session: Any, error: BaseException, label: str) -> None:
        calls.append(1)
        this = asyncio.current_task()
        assert this is not None
        this.cancel()
        await session.execute(sa.text("SELECT 1"))

    bad = shop.task(on_failure=cancel)(fail)
    with shop.running(), Heard(signals.TaskFailed) as heard:
        shop.ask(bad, "x")
        heard.wait(signals.TaskFailed)
        shop.drain()

    [record] = shop.records()
    assert (calls, record.state) == ([1], "failed")
    assert "on_failure raised, too" in (record.traceback or "")


def test_a_commit_of_its_own_is_no_lost_claim(shop: Workshop):
    """Ended by a commit out of habit, or failing behind one, ``on_failure`` has recorded the failure all the same."""

    def mark(session: Session, error: BaseException, label: str) -> None:
        session.add(Effect(label="kept"))
        session.commit()
        session.add(Effect(label="never"))
        session.flush()
        raise KeyError("second")

    bad = shop.task(on_failure=mark)(fail)
    with shop.running(), Heard(signals.TaskFailed, signals.ClaimLost) as heard:
        shop.ask(bad, "x")
        heard.wait(signals.TaskFailed)
        shop.drain()

    assert heard.of(signals.ClaimLost) == []
    assert (shop.records()[0].state, shop.effects()) == ("failed", ["kept"])


def test_it_sees_the_run_but_not_what_the_run_saw(shop: Workshop):
    """``current_run()`` is there; what the database answered to the task's function is not held against it."""
    seen: list[Any] = []

    def look(session: Session, error: BaseException, label: str) -> None:
        run = current_run()
        assert run is not None
        seen.append((run.name, run.saw_unique))

    @shop.task(on_failure=look)
    def bad(session: Session, label: str) -> None:
        session.add(Effect(id=1, label="x"))
        session.flush()

    with shop.running():
        shop.commit(lambda session: session.add(Effect(id=1, label="there")))
        shop.ask(bad, "x")
        shop.drain()

    assert seen == [("bad", False)]


@pytest.mark.drivers("asyncpg")
def test_a_plain_task_has_one_on_a_driver_without_plain_sessions(shop: Workshop):
    """A `def` task that takes no session, on asyncpg: its ``on_failure`` is called, with a ``Session``."""

    def mark(session: Session, error: BaseException) -> None:
        session.add(Effect(label=type(error).__name__))

    @shop.db.task(on_failure=mark)
    def bad() -> None:
        raise ValueError("first")

    with shop.running():
        shop.ask(bad)
        shop.drain()

    assert (shop.records()[0].state, shop.effects()) == ("failed", ["ValueError"])


def test_an_error_of_ours_before_the_call_is_not_silent(shop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """If ``on_failure`` cannot be called, the record says so, and why."""
    written = moves.fail

    def broken(*args: Any, **kwargs: Any) -> bool:
        done = written(*args, **kwargs)
        if not tripped:
            tripped.append(1)
            raise DeprecationWarning("ours")
        return done

    tripped: list[int] = []
    monkeypatch.setattr(moves, "fail", broken)
    bad = shop.task(on_failure=lambda *_: None)(fail)
    with shop.running():
        shop.ask(bad, "x")
        shop.drain()

    [record] = shop.records()
    assert record.state == "failed"
    assert "on_failure could not be called: DeprecationWarning: ours" in (record.traceback or "")


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_nothing_of_it_is_deprecated(shop: Workshop):
    """Under ``-W error`` an ``async def`` one is called, on every version of Python."""
    called: list[int] = []

    async def mark(session: Any, error: BaseException, label: str) -> None:
        called.append(1)

    bad = shop.task(on_failure=mark)(fail)
    with shop.running():
        shop.ask(bad, "x")
        shop.drain()

    assert called == [1]


@pytest.mark.drivers("psycopg", "asyncpg")
def test_its_own_slow_sql_is_its_own_failure(shop: Workshop):
    """57014 at a statement of its own, again and again, is its end: recorded, without its effects."""
    calls: list[int] = []

    def slow(session: Session, error: BaseException, label: str) -> None:
        calls.append(1)
        session.execute(sa.text("SET LOCAL statement_timeout = '10ms'"))
        session.execute(sa.text("SELECT pg_sleep(60)"))

    bad = shop.task(on_failure=slow)(fail)
    with shop.running():
        shop.ask(bad, "x")
        shop.drain()

    [record] = shop.records()
    assert (calls, record.state) == ([1] * 4, "failed")
    assert "57014" in (record.traceback or "")


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_task_that_a_stop_leaves_behind_is_compensated_later(database: DatabaseUnderTest):
    """``Retry(attempts=1)`` and a stop that cannot wait: the next worker fails it and calls ``on_failure``."""
    shop = Workshop(database, heartbeat=0.2, silent_after=1.0)
    begun, gate = threading.Event(), threading.Event()

    def mark(session: Session, error: BaseException, label: str) -> None:
        session.add(Effect(label=f"{type(error).__name__} {label}"))

    @shop.task(retry=Retry(attempts=1), on_failure=mark, begun=begun.set, gate=gate)
    def once(session: Session, label: str) -> None:
        session.add(Effect(label="never"))

    with shop.running(grace=0.0):
        id = shop.ask(once, "x")
        assert begun.wait(TIMEOUT)
    gate.set()
    with shop.running():
        shop.drain()

    assert (shop.record(id).state, shop.effects()) == ("failed", ["WorkerLost x"])
    shop.close()


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_a_loop_that_closes_does_not_end_it(shop: Workshop):
    """A cancellation from outside is no end of ``on_failure``: it is called again, and its effects take place once."""
    begun: list[int] = []

    async def mark(session: Any, error: BaseException, label: str) -> None:
        begun.append(1)
        await session.run_sync(lambda plain: (plain.add(Effect(label="failed")), plain.flush()))
        if len(begun) == 1:
            # What asyncio.run() does at its end.
            for task in asyncio.all_tasks():
                if "_settle" in str(task) or "async_end" in str(task) or task.get_name().startswith("aftercommit:"):
                    task.cancel()
            await asyncio.sleep(TIMEOUT)

    bad = shop.task(on_failure=mark)(fail)
    with shop.running(), Heard(signals.TaskFailed) as heard:
        id = shop.ask(bad, "x")
        heard.wait(signals.TaskFailed)
        shop.drain()

    record = shop.record(id)
    assert (record.state, len(begun), shop.effects()) == ("failed", 2, ["failed"])
    assert "raised, too" not in (record.traceback or "")


@pytest.mark.parametrize("undo", ["rollback", "close"])
def test_a_rollback_of_its_own_takes_the_record_of_the_failure_along_and_it_is_written_again(shop: Workshop, undo: str):
    """What ``on_failure`` writes behind a ``session.rollback()`` is committed once, with the record of the failure."""
    calls: list[int] = []

    def start_over(session: Session, error: BaseException, label: str) -> None:
        calls.append(1)
        session.add(Effect(label="undone"))
        session.flush()
        getattr(session, undo)()
        session.add(Effect(label="kept"))

    bad = shop.task(on_failure=start_over)(fail)
    with shop.running(), Heard(signals.TaskFailed) as heard:
        id = shop.ask(bad, "x")
        heard.wait(signals.TaskFailed)
        shop.drain()

    assert (calls, shop.effects(), shop.record(id).state) == ([1], ["kept"], "failed")


def test_one_that_only_rolls_back_is_recorded_all_the_same(shop: Workshop):
    """Nothing is left of its transaction, but the failure is recorded."""

    def undo(session: Session, error: BaseException, label: str) -> None:
        session.rollback()

    bad = shop.task(on_failure=undo)(fail)
    with shop.running(), Heard(signals.TaskFailed) as heard:
        id = shop.ask(bad, "x")
        heard.wait(signals.TaskFailed)
        shop.drain()

    assert shop.record(id).state == "failed"
