"""``db.cancel`` reaches the code that runs, wherever it runs, and says who asked."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from textwrap import dedent
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import current_run, signals
from aftercommit.errors import ConfigurationError, LostClaim, TaskCancelled
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop

HEARTBEAT = 0.3


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop."""
    shop = Workshop(database, heartbeat=HEARTBEAT if database.is_sqlite else 60.0, silent_after=180.0)
    yield shop
    shop.close()


def cancel(shop: Workshop, id: UUID, by: str | None = None) -> None:
    """Cancel it from this process."""
    if shop.is_async:
        shop.on_loop(shop.db.async_cancel(id, by=by))
    else:
        shop.db.cancel(id, by=by)


CANCELLING = """
    import asyncio, sys
    from uuid import UUID
    from aftercommit import Database

    db = Database(sys.argv[1])
    if sys.argv[3] == "async":
        asyncio.run(db.async_cancel(UUID(sys.argv[2]), by="Ann"))
    else:
        db.cancel(UUID(sys.argv[2]), by="Ann")
"""


def cancel_elsewhere(shop: Workshop, id: UUID) -> None:
    """Cancel it from a process of its own."""
    url = shop.under_test.url
    shown = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    subprocess.run(
        [sys.executable, "-c", dedent(CANCELLING), shown, str(id), "async" if shop.is_async else "sync"],
        timeout=TIMEOUT,
        env=os.environ,
        check=True,
    )


def wait_until_heard(shop: Workshop) -> None:
    """On PostgreSQL: until the runner has heard itself."""
    deadline = time.monotonic() + TIMEOUT
    runner = shop.db.runner
    assert runner is not None
    while not shop.under_test.is_sqlite and not runner.is_listening:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Bodies:
    """A task that runs until it is stopped, without a statement; what it noted."""

    def __init__(self, shop: Workshop) -> None:
        self.begun = threading.Event()
        self.ended_at = 0.0
        self.errors: list[BaseException] = []
        self.failed: list[BaseException] = []
        self.was_cancelled: list[bool] = []

        def note(session: Any, error: BaseException) -> None:
            self.failed.append(error)

        async def async_note(session: Any, error: BaseException) -> None:
            self.failed.append(error)

        @shop.db.task(name="plain", on_failure=note)
        def plain(session: Session) -> None:
            run = current_run()
            assert run is not None
            self.was_cancelled.append(run.is_cancelled)
            self.begun.set()
            try:
                for _ in range(int(TIMEOUT / 0.01)):
                    time.sleep(0.01)
                    run.check()
            except BaseException as exc:
                self.was_cancelled.append(run.is_cancelled)
                self.errors.append(exc)
                self.ended_at = time.monotonic()
                raise

        @shop.db.task(name="native", on_failure=async_note)
        async def native(session: AsyncSession) -> None:
            run = current_run()
            assert run is not None
            self.begun.set()
            try:
                await asyncio.sleep(TIMEOUT)
            except BaseException as exc:
                self.errors.append(exc)
                self.ended_at = time.monotonic()
                raise

        self.task: Any = native if shop.is_async else plain


def test_a_run_is_stopped_from_another_process(shop: Workshop) -> None:
    """Within a second where NOTIFY is heard (its heartbeat comes once a minute here), else with the next heartbeat."""
    bodies = Bodies(shop)

    with shop.running(), Heard(signals.ClaimLost, signals.TaskFailed) as heard:
        wait_until_heard(shop)
        id = shop.ask(bodies.task)
        assert bodies.begun.wait(TIMEOUT)
        cancel_elsewhere(shop, id)
        returned_at = time.monotonic()
        lost = heard.wait(signals.ClaimLost)

    assert bodies.ended_at - returned_at < 1.0 + 2 * HEARTBEAT
    (error,) = bodies.errors
    assert isinstance(error, asyncio.CancelledError if shop.is_async else TaskCancelled)
    assert (lost.is_cancelled, lost.by) == (True, "Ann")
    record = shop.record(id)
    assert (record.state, record.cancelled_by) == ("cancelled", "Ann")
    assert (bodies.failed, heard.of(signals.TaskFailed)) == ([], [])


def test_a_run_is_stopped_from_its_own_process_at_once(shop: Workshop) -> None:
    """Without NOTIFY, and without a heartbeat; ``is_cancelled`` says so to a ``def``."""
    bodies = Bodies(shop)

    with shop.running(), Heard(signals.ClaimLost, signals.TasksCancelled) as heard:
        id = shop.ask(bodies.task)
        assert bodies.begun.wait(TIMEOUT)
        cancel(shop, id, "Ann")
        lost = heard.wait(signals.ClaimLost)
        told = heard.wait(signals.TasksCancelled)

    assert (told.by, lost.by, lost.is_cancelled) == ("Ann", "Ann", True)
    assert bodies.was_cancelled == ([] if shop.is_async else [False, True])
    assert bodies.failed == []


def test_the_next_statement_raises(shop: Workshop) -> None:
    """And what the run had written is rolled back."""
    errors: list[BaseException] = []
    begun, gate = threading.Event(), threading.Event()

    @shop.task(begun=begun.set, gate=gate)
    def works(session: Session, label: str) -> None:
        try:
            session.add(Effect(label=label))
            session.flush()
        except BaseException as exc:
            errors.append(exc)
            raise

    with shop.running(), Heard(signals.ClaimLost) as heard:
        id = shop.ask(works, "x")
        assert begun.wait(TIMEOUT)
        cancel(shop, id)
        gate.set()
        heard.wait(signals.ClaimLost)

    if not shop.is_async:
        assert [type(each) for each in errors] == [TaskCancelled]
        assert isinstance(errors[0], LostClaim)
    assert (shop.effects(), shop.record(id).state, shop.record(id).cancelled_by) == ([], "cancelled", None)


def test_who_cancelled_is_forgotten_when_it_is_queued_again(shop: Workshop) -> None:
    """A queued task can be cancelled, too, and queued again."""

    @shop.task()
    def works(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        id = shop.ask(works.with_options(delay=3600.0), "x")
        cancel(shop, id, "Ann")
        before = shop.record(id)
        shop.on_loop(shop.db.async_retry(id)) if shop.is_async else shop.db.retry(id)
        heard.wait(signals.TaskSucceeded)

    assert (before.state, before.cancelled_by) == ("cancelled", "Ann")
    assert (shop.record(id).cancelled_by, shop.effects()) == (None, ["x"])


@pytest.mark.parametrize("by", ["", "x" * 256, "a\0b", 7, "\ud800"])
def test_who_asks_must_be_storable(shop: Workshop, by: Any) -> None:
    """Refused before anything is sent."""
    with pytest.raises(ConfigurationError, match="by="):
        cancel(shop, UUID(int=1), by) if not shop.is_async else asyncio.run(shop.db.async_cancel(UUID(int=1), by=by))
