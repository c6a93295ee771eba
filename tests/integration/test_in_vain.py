"""A record that is claimed again and again and comes to nothing ends ``failed``: no task runs for ever."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import TaskRecord, current_run, signals
from aftercommit.errors import RunInVain
from aftercommit.records import moves, workers
from aftercommit.records.ids import uuid7
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Heard, Workshop


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop whose heartbeats come often: each finds the records that nobody runs."""
    shop = Workshop(database, heartbeat=0.05, silent_after=30.0)
    yield shop
    shop.close()


def own(session: Session) -> Any:
    """The record of the run at hand, for a statement."""
    run = current_run()
    assert run is not None
    return sa.update(TaskRecord).where(TaskRecord.id == run.id)


def resets(session: Session) -> None:
    """Give itself all its attempts."""
    session.execute(own(session).values(attempt=0))


def requeues(session: Session) -> None:
    """Queue itself once more."""
    session.execute(own(session).values(state="queued"))


def deletes(session: Session) -> None:
    """Delete its record."""
    run = current_run()
    assert run is not None
    session.execute(sa.delete(TaskRecord).where(TaskRecord.id == run.id))


@pytest.mark.parametrize("touch", [resets, requeues, deletes], ids=lambda touch: touch.__name__)
def test_a_task_that_rewrites_its_own_record_fails(shop: Workshop, touch: Callable[[Session], None]) -> None:
    """Its commit finds no claim, though nobody has taken it: rolled back, recorded with the reason, and told of."""
    calls: list[str] = []
    failed: list[BaseException] = []

    def note(session: Session, error: BaseException, label: str = "") -> None:
        failed.append(error)

    async def async_note(session: Any, error: BaseException, label: str = "") -> None:
        failed.append(error)

    @shop.task(on_failure=async_note if shop.is_async else note)
    def works(session: Session, label: str) -> None:
        calls.append(label)
        session.add(Effect(label="never"))
        touch(session)

    with shop.running(), Heard(signals.TaskFailed) as heard:
        id = shop.ask(works, "x")
        heard.wait(signals.TaskFailed)

    assert calls == ["x"]
    assert [type(error) for error in failed] == [RunInVain]
    assert shop.record(id).state == "failed"
    assert "RunInVain" in (shop.record(id).error or "")
    assert shop.effects() == []


def test_a_record_that_is_rewritten_from_elsewhere_reaches_the_ceiling(shop: Workshop) -> None:
    """Whatever takes the claim away each time: after some tens of claims it ends ``failed``, with the reason."""
    calls: list[str] = []
    is_lite = shop.under_test.is_sqlite

    @shop.task(repeatable=True)
    def works(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        calls.append(label)
        id = run.id.hex if is_lite else str(run.id)
        shop.sql("UPDATE aftercommit_task SET claims = claims + 1 WHERE id = :id", id=id)

    # On SQLite a task holds the write lock from its first statement on, and this one has not sent any.
    with shop.running(), Heard(signals.TaskFailed) as heard:
        id = shop.ask(works, "x")
        error = heard.wait(signals.TaskFailed).error

    assert isinstance(error, RunInVain)
    assert 30 <= len(calls) <= 40
    assert (shop.record(id).state, shop.effects()) == ("failed", [])


def test_a_record_that_its_task_sets_back_as_a_whole_reaches_the_ceiling_too(shop: Workshop) -> None:
    """Also where no number in the record says how often it was claimed."""
    calls: list[str] = []
    is_lite = shop.under_test.is_sqlite

    @shop.task(repeatable=True)
    def works(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        calls.append(label)
        shop.sql(
            "UPDATE aftercommit_task SET state = 'queued', worker = NULL, attempt = 0, claims = 0, refunds = 0 "
            "WHERE id = :id",
            id=run.id.hex if is_lite else str(run.id),
        )

    def look_again(_: signals.ClaimLost) -> None:
        # Somebody else would find it with the next look, which may be seconds away.
        shop.db.outbox.tell("default")

    signals.subscribe(signals.ClaimLost)(look_again)
    try:
        with shop.running(), Heard(signals.TaskFailed) as heard:
            id = shop.ask(works, "x")
            error = heard.wait(signals.TaskFailed).error
    finally:
        signals.unsubscribe(look_again)

    assert isinstance(error, RunInVain)
    assert len(calls) <= 40
    assert (shop.record(id).state, shop.effects()) == ("failed", [])


# --- what is counted, and what is not ---------------------------------------------------------------------------------


class Claims:
    """One record, and what may become of its claims, without a runner."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.worker = uuid7()

        @shop.task()
        def works(session: Session, label: str) -> None: ...

        TaskRecord.metadata.create_all(shop.outside)
        self.id = uuid7()
        shop.sql(
            "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at) "
            "VALUES (:id, 'works', 'default', 'queued', '{}', :at, :at)",
            id=self.id.hex if shop.under_test.is_sqlite else str(self.id),
            at="2020-01-01 00:00:00.000000" if shop.under_test.is_sqlite else datetime(2020, 1, 1, tzinfo=UTC),
        )

    def claim(self) -> moves.Claimed:
        """Claim it."""
        with self.shop.outside.connect() as c:
            (claimed,) = moves.claim(c, pool="default", names=["works"], worker=self.worker, count=1)
        return claimed

    def give_back(self, claimed: moves.Claimed, **options: Any) -> None:
        """Give it back."""
        with self.shop.outside.connect() as c:
            assert moves.give_back(c, claimed.claim, at="", delay=0.0, **options)

    def release(self) -> None:
        """Nobody runs it."""
        with self.shop.outside.connect() as c:
            assert workers.release_orphans(c, self.worker, [self.id]) == [self.id]

    def checkpoint(self, claimed: moves.Claimed) -> None:
        """Save something."""
        with self.shop.outside.connect() as c:
            assert moves.save_checkpoint(c, claimed.claim, "1")


FAILURE = moves.Failure(error="conflict", traceback="")


@pytest.mark.drivers("psycopg", "pysqlite")
def test_only_claims_that_came_to_nothing_are_counted(database: DatabaseUnderTest) -> None:
    """Conflicts and orphans are; orderly stops, attempts that were used, and claims before a checkpoint are not."""
    shop = Workshop(database)
    claims = Claims(shop)
    seen: list[int] = []

    def claim() -> moves.Claimed:
        claimed = claims.claim()
        seen.append(claimed.refunds)
        return claimed

    for _ in range(3):
        claims.give_back(claim(), failure=None, refund=True)
    claims.give_back(claim(), failure=FAILURE, refund=True)
    claim()
    claims.release()
    claims.give_back(claim(), failure=FAILURE, refund=False)
    claims.give_back(claim(), failure=None, refund=True)
    claimed = claim()
    claims.checkpoint(claimed)
    claims.give_back(claimed, failure=FAILURE, refund=True)
    claims.give_back(claim(), failure=FAILURE, refund=True, got_on=True)
    claim()
    shop.close()

    assert seen == [0, 0, 0, 0, 1, 2, 2, 2, 1, 0]
