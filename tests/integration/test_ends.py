"""Ends of a run that are no accidents: ``Discard``, ``RetryLater``, errors that are expected, exits from outside."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from textwrap import dedent
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.orm import Session

from aftercommit import Discard, Retry, RetryLater, current_run, signals
from aftercommit.errors import ConfigurationError, TaskDefinitionError
from aftercommit.records import census
from aftercommit.tasks.ends import expected_end
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Heard, Workshop


class PaymentDeclined(Exception):
    """An outcome that the application knows."""


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop."""
    shop = Workshop(database)
    yield shop
    shop.close()


class Compensation:
    """An ``on_failure`` that notes what it was called with."""

    def __init__(self, shop: Workshop) -> None:
        self.errors: list[BaseException] = []

        def plain(session: Session, error: BaseException, label: str = "") -> None:
            self.errors.append(error)
            session.add(Effect(label=f"failed {label}"))

        async def native(session: Any, error: BaseException, label: str = "") -> None:
            await session.run_sync(plain, error, label)

        self.call = native if shop.is_async else plain


# --- Discard ----------------------------------------------------------------------------------------------------------


def test_a_discarded_run_is_cancelled_with_its_reason(shop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    """Rolled back, its reason is the record's error, no ``on_failure`` is called, and no error logged."""
    compensation = Compensation(shop)

    @shop.task(on_failure=compensation.call, retry=Retry(on=Exception))
    def works(session: Session, label: str) -> None:
        session.add(Effect(label=label))
        session.flush()
        raise Discard("the order was withdrawn")

    with caplog.at_level(logging.INFO, "aftercommit"), shop.running(), Heard(signals.Signal) as heard:
        id = shop.ask(works, "x")
        told = heard.wait(signals.TaskDiscarded)

    record = shop.record(id)
    assert (record.state, record.error, record.traceback) == ("cancelled", "the order was withdrawn", None)
    assert (record.attempt, record.finished_at is not None) == (1, True)
    assert (told.id, told.reason) == (id, "the order was withdrawn")
    assert (shop.effects(), compensation.errors) == ([], [])
    assert not heard.of(signals.TaskFailed)
    assert [each.levelname for each in caplog.records if "discarded" in each.getMessage()] == ["INFO"]
    assert not [each for each in caplog.records if each.levelno > logging.INFO]


def test_a_discarded_run_is_counted(shop: Workshop) -> None:
    """It is neither done nor failed."""

    @shop.task()
    def works(session: Session, label: str) -> None:
        raise Discard

    with shop.running(), Heard(signals.TaskDiscarded) as heard:
        shop.ask(works, "x")
        heard.wait(signals.TaskDiscarded)
        (figures,) = shop.db.stats().tasks.values()

    assert (figures.discarded, figures.failed, figures.done) == (1, 0, 0)


def test_what_is_discarded_can_be_queued_by_hand(shop: Workshop) -> None:
    """Like what an operator has cancelled."""
    calls: list[str] = []

    @shop.task()
    def works(session: Session, label: str) -> None:
        calls.append(label)
        if len(calls) == 1:
            raise Discard("not yet")
        session.add(Effect(label=label))

    with shop.running(), Heard(signals.TaskDiscarded, signals.TaskSucceeded) as heard:
        id = shop.ask(works, "x")
        heard.wait(signals.TaskDiscarded)
        if shop.is_async:
            shop.on_loop(shop.db.async_retry(id))
        else:
            shop.db.retry(id)
        heard.wait(signals.TaskSucceeded)

    assert shop.effects() == ["x"]


def test_groups_end_as_all_their_members_say() -> None:
    """What comes out of an ``asyncio.TaskGroup`` is a group."""
    soon, late, gone = RetryLater(1.0), RetryLater(5.0), Discard("gone")

    assert expected_end(ExceptionGroup("", [gone, gone])) is gone
    assert expected_end(ExceptionGroup("", [soon, ExceptionGroup("", [late])])) is late
    assert expected_end(ExceptionGroup("", [gone, late])) is None
    assert expected_end(ExceptionGroup("", [gone, ValueError()])) is None


# --- RetryLater -------------------------------------------------------------------------------------------------------


def test_a_postponed_run_costs_no_attempt_however_often(shop: Workshop) -> None:
    """More often than what comes to nothing may be claimed (30), and than there are attempts."""
    calls: list[int] = []

    @shop.task(retry=Retry(attempts=2))
    def works(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        calls.append(run.attempt)
        session.add(Effect(label=label))
        session.flush()
        if len(calls) <= 40:
            raise RetryLater(0.0, "the provider says wait")

    with shop.running(), Heard(signals.TaskSucceeded, signals.TaskFailed, signals.TaskPostponed) as heard:
        id = shop.ask(works, "x")
        heard.wait(signals.Signal)
        heard.wait(signals.TaskSucceeded)
        assert len(heard.of(signals.TaskPostponed)) == 40

    record = shop.record(id)
    assert calls == [1] * 41
    assert (record.state, record.attempt, record.claims, record.errors) == ("succeeded", 1, 41, None)
    assert shop.effects() == ["x"]


def test_a_postponed_run_waits_and_says_why(shop: Workshop) -> None:
    """The record is ``queued``, due after the seconds that were given, with the reason in it."""

    @shop.task()
    def works(session: Session, label: str) -> None:
        raise RetryLater(3600.0, "the provider says wait")

    with shop.running(), Heard(signals.TaskPostponed) as heard:
        id = shop.ask(works, "x")
        told = heard.wait(signals.TaskPostponed)

    record = shop.record(id)
    assert (record.state, record.attempt, record.worker) == ("queued", 0, None)
    assert (record.error, record.traceback) == ("the provider says wait", None)
    assert 3590 < (record.run_at - record.enqueued_at).total_seconds() < 3660
    assert (told.delay, told.reason) == (3600.0, "the provider says wait")


def test_after_a_checkpoint_a_postponed_run_goes_on_from_there(shop: Workshop) -> None:
    """What was committed with the checkpoint stays; what came after it is rolled back."""
    restored: list[Any] = []

    @shop.task()
    def works(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        restored.append(run.restored)
        if run.restored is None:
            session.add(Effect(label="first"))
            run.checkpoint(1)
            session.commit()
            session.add(Effect(label="never"))
            session.flush()
            raise RetryLater(0.0)
        session.add(Effect(label="second"))

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        shop.ask(works, "x")
        heard.wait(signals.TaskSucceeded)

    assert restored == [None, 1]
    assert shop.effects() == ["first", "second"]


def test_giving_up_counts_from_the_hand_over(shop: Workshop) -> None:
    """By the database's clock: of a record that was asked for an hour ago, the time is over with its first run."""
    compensation = Compensation(shop)
    calls: list[str] = []

    @shop.task(retry=Retry(give_up_after=1800.0), on_failure=compensation.call)
    def works(session: Session, label: str) -> None:
        calls.append(label)
        raise RetryLater(1.0, "the provider says wait")

    with shop.running():
        id = shop.ask(works.with_options(delay=3600.0), "x")
    an_hour_ago = (
        "strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 hours') || '000'"
        if shop.under_test.is_sqlite
        else "now() - interval '1 hour'"
    )
    shop.sql(f"UPDATE aftercommit_task SET enqueued_at = {an_hour_ago}, run_at = {an_hour_ago}")
    with shop.running(), Heard(signals.TaskFailed) as heard:
        failed = heard.wait(signals.TaskFailed)

    assert (calls, isinstance(failed.error, RetryLater)) == (["x"], True)
    assert shop.record(id).state == "failed"
    assert [type(each) for each in compensation.errors] == [RetryLater]
    assert shop.effects() == ["failed x"]


def test_it_is_given_up_before_a_wait_that_would_be_in_vain(shop: Workshop) -> None:
    """What could begin again only after the limit has failed now."""

    @shop.task(retry=Retry(give_up_after=60.0))
    def works(session: Session, label: str) -> None:
        raise RetryLater(120.0)

    with shop.running(), Heard(signals.TaskFailed) as heard:
        id = shop.ask(works, "x")
        heard.wait(signals.TaskFailed)

    assert shop.record(id).state == "failed"


def test_a_task_in_memory_waits_in_its_place(shop: Workshop) -> None:
    """It has no record to be queued."""
    calls: list[str] = []

    @shop.task(durable=False)
    def works(session: Session, label: str) -> None:
        calls.append(label)
        if len(calls) < 3:
            raise RetryLater(0.01)

    with shop.running(), Heard(signals.TaskSucceeded, signals.TaskPostponed) as heard:
        shop.ask(works, "x")
        heard.wait(signals.TaskSucceeded)

    assert (calls, len(heard.of(signals.TaskPostponed))) == (["x"] * 3, 2)


@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan"), float("inf"), True, "60", None])
def test_seconds_that_cannot_be_waited_are_refused(seconds: Any) -> None:
    """Where they are written."""
    with pytest.raises(ValueError, match="give seconds"):
        RetryLater(seconds)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), True, "60"])
def test_limits_that_cannot_be_meant_are_refused(seconds: Any) -> None:
    """Where the task is declared."""
    with pytest.raises(ConfigurationError, match="give_up_after"):
        Retry(give_up_after=seconds)


# --- expected errors --------------------------------------------------------------------------------------------------


def test_an_expected_error_is_a_failure_without_noise(shop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    """``failed`` in one line, ``on_failure`` called, logged as info, marked in the signal and the record."""
    compensation = Compensation(shop)

    @shop.task(expected=(PaymentDeclined,), on_failure=compensation.call)
    def works(session: Session, label: str) -> None:
        session.add(Effect(label=label))
        session.flush()
        raise PaymentDeclined("no money")

    with caplog.at_level(logging.INFO, "aftercommit"), shop.running(), Heard(signals.TaskFailed) as heard:
        id = shop.ask(works, "x")
        told = heard.wait(signals.TaskFailed)
        (figures,) = shop.db.stats().tasks.values()

    record = shop.record(id)
    assert (record.state, record.traceback, record.expected) == ("failed", None, True)
    assert "PaymentDeclined: no money" in (record.error or "")
    assert (told.expected, figures.expected, figures.failed) == (True, 1, 0)
    assert shop.effects() == ["failed x"]
    lines = [each for each in caplog.records if "as expected" in each.getMessage()]
    assert [(each.levelname, each.exc_info) for each in lines] == [("INFO", None)]
    assert not [each for each in caplog.records if each.levelno > logging.INFO]


def test_an_expected_error_is_retried_where_the_policy_names_it(shop: Workshop) -> None:
    """And is an expected failure after the last attempt."""
    calls: list[str] = []

    @shop.task(expected=PaymentDeclined, retry=Retry(attempts=2, base=0.0, on=PaymentDeclined))
    def works(session: Session, label: str) -> None:
        calls.append(label)
        raise PaymentDeclined

    with shop.running(), Heard(signals.TaskFailed) as heard:
        shop.ask(works, "x")
        told = heard.wait(signals.TaskFailed)

    assert (calls, told.expected) == (["x", "x"], True)


def test_the_doctor_leaves_expected_failures_alone(shop: Workshop) -> None:
    """What the application knows is no alarm; another failure of the same task is."""

    @shop.task(expected=(PaymentDeclined,))
    def works(session: Session, label: str) -> None:
        raise (PaymentDeclined if label == "known" else ValueError)(label)

    with shop.running(), Heard(signals.TaskFailed) as heard:
        for label in ("known", "unknown", "known"):
            shop.ask(works, label)
        heard.wait(signals.TaskFailed, count=3)

    with shop.outside.connect() as connection:
        (found,) = census.failures(connection, within=60.0)
    assert (found.failed, "unknown" in found.error) == (1, True)


def test_a_failure_that_is_queued_by_hand_is_expected_no_more(shop: Workshop) -> None:
    """The mark belongs to the end that it was written with."""
    errors: list[type[Exception]] = [PaymentDeclined, ValueError]

    @shop.task(expected=(PaymentDeclined,))
    def works(session: Session, label: str) -> None:
        raise errors.pop(0)

    with shop.running(), Heard(signals.TaskFailed) as heard:
        id = shop.ask(works, "x")
        heard.wait(signals.TaskFailed)
        if shop.is_async:
            shop.on_loop(shop.db.async_retry(id))
        else:
            shop.db.retry(id)
        heard.wait(signals.TaskFailed, count=2)

    assert (shop.record(id).state, shop.record(id).expected) == ("failed", False)


@pytest.mark.parametrize("expected", ["PaymentDeclined", (KeyboardInterrupt,), (3,)])
def test_what_is_no_class_of_errors_cannot_be_expected(shop: Workshop, expected: Any) -> None:
    """Said where the task is declared."""
    with pytest.raises(TaskDefinitionError, match="expected"):

        @shop.task(expected=expected)
        def works(session: Session, label: str) -> None: ...


# --- exits ------------------------------------------------------------------------------------------------------------


def test_an_exit_of_the_task_itself_is_its_failure(shop: Workshop) -> None:
    """It says so in its own code."""

    @shop.task()
    def works(session: Session, label: str) -> None:
        sys.exit(3)

    with shop.running(), Heard(signals.TaskFailed) as heard:
        shop.ask(works, "x")
        told = heard.wait(signals.TaskFailed)

    assert isinstance(told.error, SystemExit)


EXITING = """
    import asyncio, os, signal, sys
    from sqlalchemy.ext.asyncio import AsyncSession
    from aftercommit import Database

    class Control:
        def stop(self, number, frame):
            signal.signal(number, signal.SIG_DFL)
            raise SystemExit(7)

    signal.signal(signal.SIGUSR1, Control().stop)
    db = Database(sys.argv[1])

    @db.task
    async def works(session: AsyncSession) -> None:
        await session.connection()
        os.kill(os.getpid(), signal.SIGUSR1)
        while True:
            pass

    async def main() -> None:
        async with db.running(create_tables=True):
            async with db.async_session() as session:
                print(db.after_commit(session, works).id, flush=True)
            await asyncio.sleep(30)

    asyncio.run(main())
"""


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_an_exit_by_process_control_interrupts_the_task_and_ends_the_process(shop: Workshop) -> None:
    """Raised in the task's code by a signal's handler: the record is queued again, and the process ends."""
    url = shop.under_test.url
    shown = url if isinstance(url, str) else url.render_as_string(hide_password=False)

    done = subprocess.run(
        [sys.executable, "-c", dedent(EXITING), shown],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
        check=False,
    )

    record = shop.record(UUID(done.stdout.split()[0]))
    assert done.returncode == 7, done.stderr
    assert (record.state, record.attempt, record.error) == ("queued", 0, None)
    assert signal.SIGUSR1.name not in done.stderr
