"""``db.wait_for`` and its twin: until a task has ended, here or elsewhere."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, TaskRecord, current_run, signals
from aftercommit.errors import ConfigurationError, TaskStateError
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop."""
    shop = Workshop(database, pools={"other": PoolSettings(pool_size=1)})
    yield shop
    shop.close()


def wait(shop: Workshop, id: UUID, timeout: float = TIMEOUT, db: Database | None = None) -> TaskRecord:
    """Wait for it, in the flavour under test."""
    db = db or shop.db
    if shop.is_async:
        found: TaskRecord = asyncio.run(db.async_wait_for(id, timeout))
        return found
    return db.wait_for(id, timeout)


@pytest.mark.parametrize("ends", ["succeeded", "failed", "cancelled"])
def test_it_waits_for_the_end_whatever_it_is(shop: Workshop, ends: str) -> None:
    """And returns the record, readable without a session."""
    begun, gate = threading.Event(), threading.Event()

    @shop.task(begun=begun.set, gate=gate)
    def works(session: Session, label: str) -> None:
        if ends == "failed":
            raise ValueError(label)
        session.add(Effect(label=label))

    with shop.running(), ThreadPoolExecutor(1) as other:
        id = shop.ask(works, "x")
        waiting = other.submit(wait, shop, id)
        assert begun.wait(TIMEOUT)
        assert not waiting.done()
        if ends == "cancelled":
            shop.on_loop(shop.db.async_cancel(id, by="Ann")) if shop.is_async else shop.db.cancel(id, by="Ann")
        gate.set()
        record = waiting.result(TIMEOUT)

    assert (record.id, record.task, record.state) == (id, "works", ends)
    assert record.finished_at is not None
    assert record.progress_done is None


def test_an_end_in_this_process_is_heard_of(shop: Workshop) -> None:
    """Without waiting for the next look, which would be a second away by then."""
    begun, gate = threading.Event(), threading.Event()

    @shop.task(begun=begun.set, gate=gate)
    def works(session: Session, label: str) -> None: ...

    with shop.running(), ThreadPoolExecutor(1) as other, Heard(signals.TaskSucceeded) as heard:
        id = shop.ask(works, "x")
        waiting = other.submit(wait, shop, id)
        assert begun.wait(TIMEOUT)
        time.sleep(3.0)  # the task takes its time: looks are rare by now
        gate.set()
        heard.wait(signals.TaskSucceeded)
        ended = time.monotonic()
        waiting.result(TIMEOUT)
        assert time.monotonic() - ended < 0.5


def test_one_connection_and_few_looks_serve_all_who_wait(shop: Workshop) -> None:
    """Fifty wait, in a process that runs nothing, and ask no more often than one."""
    begun, gate = threading.Event(), threading.Event()

    @shop.task(begun=begun.set, gate=gate)
    def works(session: Session, label: str) -> None: ...

    elsewhere = Database(shop.under_test.url)
    with shop.running(), ThreadPoolExecutor(50) as others:
        id = shop.ask(works, "x")
        assert begun.wait(TIMEOUT)
        waiting = [others.submit(wait, shop, id, TIMEOUT, elsewhere) for _ in range(50)]
        since = time.monotonic()
        while elsewhere.following.looks < 5:
            assert time.monotonic() - since < TIMEOUT
            time.sleep(0.01)
        looks, since = elsewhere.following.looks, time.monotonic()
        time.sleep(3.0)  # the task takes its time
        rate = (elsewhere.following.looks - looks) / (time.monotonic() - since)
        gate.set()
        states = {each.result(TIMEOUT).state for each in waiting}
    asyncio.run(elsewhere.async_dispose()) if shop.is_async else elsewhere.dispose()

    assert states == {"succeeded"}
    assert rate < 10


def test_time_that_is_over_says_how_the_task_stands(shop: Workshop) -> None:
    """Its state, its attempt and its progress."""
    begun, gate = threading.Event(), threading.Event()

    def tell() -> None:
        run = current_run()
        assert run is not None
        run.progress(3, 10)
        begun.set()

    @shop.task(begun=tell, gate=gate)
    def works(session: Session, label: str) -> None: ...

    with shop.running():
        id = shop.ask(works, "x")
        assert begun.wait(TIMEOUT)
        with pytest.raises(TimeoutError, match=r"'works' .* still running, attempt 1 of 5.* after 1\.5 s"):
            wait(shop, id, 1.5)
        gate.set()
        assert wait(shop, id).state == "succeeded"


def test_what_was_not_committed_is_not_waited_for(shop: Workshop) -> None:
    """It could never end: its record does not exist before the commit."""

    @shop.task()
    def works(session: Session, label: str) -> None: ...

    with shop.running():
        with pytest.raises(TaskStateError, match="hand-over has not been committed"):
            wait(shop, uuid4())
        if not shop.is_async:
            with shop.db.session() as session:
                handle = shop.db.after_commit(session, works)
                with pytest.raises(TaskStateError, match="hand-over has not been committed"):
                    shop.db.wait_for(handle.id)
            assert shop.db.wait_for(handle.id).state == "succeeded"


@pytest.mark.drivers("psycopg", "asyncpg", "pysqlite", "aiosqlite")
def test_a_task_does_not_wait_for_one_that_may_need_its_place(shop: Workshop) -> None:
    """Of the same pool, both would wait for ever; on SQLite, of any pool."""
    errors: list[BaseException | None] = []

    @shop.task(pool="other")
    def elsewhere(session: Session, label: str) -> None: ...

    @shop.task()
    def queued(session: Session, label: str) -> None: ...

    def note(call: Any) -> None:
        try:
            call()
        except Exception as exc:  # noqa: BLE001  # looked at below
            errors.append(exc)
        else:
            errors.append(None)

    @shop.db.task(name="waits")
    def plain(first: UUID, second: UUID) -> None:
        note(lambda: shop.db.wait_for(first))
        note(lambda: shop.db.wait_for(second))

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        ids = [shop.ask(each.with_options(delay=600.0 if each is queued else 1.0)) for each in (queued, elsewhere)]
        shop.ask(plain, *ids)
        heard.wait(signals.TaskSucceeded, count=2)

    assert isinstance(errors[0], ConfigurationError)
    assert isinstance(errors[1], ConfigurationError) if shop.under_test.is_sqlite else errors[1] is None


def test_the_sync_twin_refuses_an_event_loop(shop: Workshop) -> None:
    """It would keep it from turning."""

    async def ask() -> None:
        shop.db.wait_for(uuid4())

    with pytest.raises(ConfigurationError, match="async_wait_for"):
        asyncio.run(ask())


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), True, "30"])
def test_times_that_cannot_be_meant_are_refused(shop: Workshop, timeout: Any) -> None:
    """Before anything is looked for."""
    with pytest.raises(ConfigurationError, match="timeout"):
        wait(shop, uuid4(), timeout)


def test_a_stop_ends_all_waiting(shop: Workshop) -> None:
    """No stop waits for those who wait."""

    @shop.task()
    def works(session: Session, label: str) -> None: ...

    with ThreadPoolExecutor(1) as other:
        with shop.running():
            id = shop.ask(works.with_options(delay=600.0), "x")
            waiting = other.submit(wait, shop, id)
            since = time.monotonic()
            while not shop.db.following.looks:
                assert time.monotonic() - since < TIMEOUT
                time.sleep(0.01)
        with pytest.raises(TimeoutError, match=r"queued.*when this process stopped"):
            waiting.result(1.0)
