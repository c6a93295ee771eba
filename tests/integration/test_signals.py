"""Every step in a task's life, and what befalls its surroundings, is told: once, where it happens, with plain facts."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.orm import Session

from aftercommit import PoolSettings, Retry, current_run, signals
from aftercommit.errors import PoolExhausted
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop, async_held_elsewhere, held_elsewhere

sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database, heartbeat=0.2, silent_after=30.0, pools={"other": PoolSettings(pool_size=2)})
    yield shop
    shop.close()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What the library says."""
    with Heard(signals.Signal) as heard:
        yield heard


class Threads:
    """The names of the threads on which signals of a kind were told."""

    def __init__(self) -> None:
        self.names: dict[type[signals.Signal], set[str]] = {}

    def __call__(self, signal: signals.Signal) -> None:
        """Note it."""
        self.names.setdefault(type(signal), set()).add(threading.current_thread().name)


@pytest.fixture
def threads() -> Iterator[Threads]:
    """Where they are told."""
    threads = Threads()
    signals.subscribe(signals.Signal)(threads)
    yield threads
    signals.unsubscribe(threads)


def effect(session: Session, label: str) -> None:
    """What most tasks here do."""
    session.add(Effect(label=label))


def by_hand(shop: Workshop, sync: Any, native: Any, *args: Any) -> None:
    """Call one of ``db.cancel`` and its like, in the flavour under test."""
    shop.on_loop(native(*args)) if shop.is_async else sync(*args)


# --- steps --------------------------------------------------------------------------------------------------------


def test_an_ordinary_life_is_told_in_order(shop: Workshop, heard: Heard, threads: Threads):
    """Handed over, started, succeeded: each once, with the task's name, id, pool and attempt, on the task's thread."""
    task = shop.task(pool="other")(effect)
    with shop.running():
        id = shop.ask(task, "a")
        heard.wait(signals.TaskSucceeded)

    steps = [each for each in heard.of(signals.Signal) if isinstance(each, signals.TasksHandedOver | signals.RunSignal)]
    assert [type(each) for each in steps] == [signals.TasksHandedOver, signals.TaskStarted, signals.TaskSucceeded]
    assert (steps[0].tasks, steps[0].ids, steps[0].pools) == (("effect",), (id,), ("other",))
    assert [(each.task, each.id, each.pool, each.attempt) for each in steps[1:]] == [("effect", id, "other", 1)] * 2
    runs_on = "aftercommit-loop" if shop.is_async else "aftercommit-other-1"
    assert threads.names[signals.TaskStarted] == threads.names[signals.TaskSucceeded] == {runs_on}


def test_what_was_queued_already_is_not_handed_over_again(shop: Workshop, heard: Heard):
    """A task whose key is queued already is not written, and so not told as handed over."""
    task = shop.task()(effect).with_options(key="once", delay=3600.0)
    with shop.running():
        first = shop.ask(task, "a")
        shop.ask(task, "b")

    assert [each.ids for each in heard.of(signals.TasksHandedOver)] == [(first,)]


def test_a_cancelled_run_loses_its_claim(shop: Workshop, heard: Heard, threads: Threads):
    """``db.cancel`` is told where it is called, and the run that it ends tells that its claim is lost."""
    gate, begun = threading.Event(), threading.Event()
    task = shop.task(gate=gate, begun=begun.set)(effect)
    with shop.running():
        id = shop.ask(task, "never")
        assert begun.wait(TIMEOUT)

        by_hand(shop, shop.db.cancel, shop.db.async_cancel, id)
        gate.set()
        lost = heard.wait(signals.ClaimLost)
        shop.drain()

    assert heard.of(signals.TasksCancelled) == [signals.TasksCancelled(ids=(id,))]
    assert (lost.task, lost.id, lost.pool, lost.attempt) == ("effect", id, "default", 1)
    assert lost.seconds > 0
    assert len(heard.of(signals.ClaimLost)) == 1
    assert heard.of(signals.TaskSucceeded) == []


def test_a_task_queued_by_hand_is_told(shop: Workshop, heard: Heard):
    """``db.retry`` tells which task is queued once more, and why."""
    outcome = ["fail"]

    @shop.task()
    def task(session: Session, label: str) -> None:
        if outcome:
            raise ValueError(outcome.pop())

    with shop.running():
        id = shop.ask(task)
        heard.wait(signals.TaskFailed)
        by_hand(shop, shop.db.retry, shop.db.async_retry, id)
        heard.wait(signals.TaskSucceeded)

    assert heard.of(signals.TasksRequeued) == [signals.TasksRequeued(ids=(id,), reason="db.retry")]


def test_a_retry_tells_of_the_attempt_that_failed(shop: Workshop, heard: Heard):
    """What is tried again later is told with its error, and the next start with the next attempt."""

    @shop.task(retry=Retry(base=0.01, on=(ValueError,)))
    def task(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        if run.attempt == 1:
            raise ValueError("not yet")

    with shop.running():
        shop.ask(task)
        heard.wait(signals.TaskSucceeded)

    retried = heard.of(signals.TaskRetried)
    assert [(each.attempt, str(each.error), each.in_place) for each in retried] == [(1, "not yet", False)]
    assert [each.attempt for each in heard.of(signals.TaskStarted)] == [1, 2]


@sync_drivers
def test_a_claim_that_nobody_runs_is_told(shop: Workshop, heard: Heard):
    """A record that says that this worker runs it, which it does not, is told as queued once more."""
    shop.task()(effect)
    with shop.running():
        runner = shop.db.runner
        assert runner is not None
        worker = runner.id.hex if shop.under_test.is_sqlite else runner.id
        shop.sql(
            "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at, attempt, claims, "
            "worker) VALUES ('01900000000070008000000000000001', 'effect', 'default', 'running', "
            "'{\"label\": \"orphan\"}', '2020-01-01', '2020-01-01', 1, 1, :worker)",
            worker=worker,
        )
        requeued = heard.wait(signals.TasksRequeued)
        heard.wait(signals.TaskSucceeded)

    assert [each.hex for each in requeued.ids] == ["01900000000070008000000000000001"]


# --- surroundings -------------------------------------------------------------------------------------------------


def test_a_pause_is_told_by_whoever_follows_it(shop: Workshop, heard: Heard, threads: Threads):
    """A worker tells when it has noticed that a pool was paused, and when it was resumed, on the bookkeeping thread."""
    with shop.running():
        by_hand(shop, shop.db.pause, shop.db.async_pause, "other")
        paused = heard.wait(signals.PoolPaused)
        by_hand(shop, shop.db.resume, shop.db.async_resume, "other")
        resumed = heard.wait(signals.PoolResumed)

    assert (paused.pool, resumed.pool) == ("other", "other")
    assert threads.names[signals.PoolPaused] == {"aftercommit-bookkeeper"}


def test_a_database_that_does_not_work_is_told_once(shop: Workshop, heard: Heard, threads: Threads):
    """The bookkeeping tells when it cannot work on the database, with the error, and when it can again."""
    with shop.running():
        shop.sql("ALTER TABLE aftercommit_worker RENAME TO elsewhere")
        down = heard.wait(signals.DatabaseDown)
        shop.sql("ALTER TABLE elsewhere RENAME TO aftercommit_worker")
        up = heard.wait(signals.DatabaseUp)

    assert "aftercommit_worker" in str(down.error)
    assert up.seconds > 0
    assert (len(heard.of(signals.DatabaseDown)), len(heard.of(signals.DatabaseUp))) == (1, 1)
    assert threads.names[signals.DatabaseDown] == {"aftercommit-bookkeeper"}


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_pool_that_runs_dry_is_told(database: DatabaseUnderTest, heard: Heard):
    """Whoever waits for a connection in vain is told of, with how long he waited and how many are in use."""
    narrow = PoolSettings(pool_size=1, max_overflow=0, pool_timeout=0.05)
    shop = Workshop(database, pools={"request": narrow})
    with shop.running():
        with pytest.raises(PoolExhausted):
            shop.on_loop(_wait(shop)) if shop.is_async else _wait_in_thread(shop)
        shop.drain()
    shop.close()

    assert heard.of(signals.PoolRanDry) == [signals.PoolRanDry(pool="request", seconds=0.05, held=1, waiting=0)]


def _wait_in_thread(shop: Workshop) -> None:
    with held_elsewhere(shop.db.engine()), shop.db.session() as another:
        another.connection()


async def _wait(shop: Workshop) -> None:
    async with async_held_elsewhere(shop.db.async_engine()), shop.db.async_session() as another:
        await another.connection()


# --- subscribers --------------------------------------------------------------------------------------------------


def test_a_subscriber_that_raises_harms_nobody(shop: Workshop, heard: Heard, caplog: pytest.LogCaptureFixture):
    """An error in a subscriber is logged; the task's effect, the other subscribers and the next task are as ever."""
    task = shop.task()(effect)

    def broken(signal: signals.Signal) -> None:
        raise RuntimeError("the counter is broken")

    signals.subscribe(signals.Signal)(broken)
    try:
        with shop.running(), caplog.at_level(logging.ERROR, "aftercommit.signals"):
            shop.ask(task, "a")
            shop.ask(task, "b")
            heard.wait(signals.TaskSucceeded, count=2)
    finally:
        signals.unsubscribe(broken)

    assert shop.effects() == ["a", "b"]
    assert [record.state for record in shop.records()] == ["succeeded", "succeeded"]
    assert any("the counter is broken" in str(record.exc_info) for record in caplog.records)
