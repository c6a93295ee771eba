"""What a claim is worth: whoever has lost it commits nothing and calls nothing again, and nobody else touches it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from aftercommit import PoolSettings, current_run, signals
from aftercommit.errors import LostClaim
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Counter, Effect, Heard, Workshop

postgres_drivers = pytest.mark.drivers("psycopg", "asyncpg")


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn, whose heartbeats are too rare to tell a run that it has lost its claim."""
    shop = Workshop(database, heartbeat=2 * TIMEOUT, silent_after=6 * TIMEOUT)
    yield shop
    shop.close()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What the library says."""
    with Heard(signals.Signal) as heard:
        yield heard


def this_run() -> Any:
    """The run at hand."""
    run = current_run()
    assert run is not None
    return run


def cancel(shop: Workshop, id: UUID) -> None:
    """Cancel a record as another process does, of which the run hears nothing."""
    text = id.hex if shop.under_test.is_sqlite else str(id)
    shop.sql("UPDATE aftercommit_task SET state = 'cancelled', queued_key = NULL WHERE id = :id", id=text)


# --- commits in the middle ----------------------------------------------------------------------------------------


def save(session: Session) -> None:
    """Commit an effect with a checkpoint."""
    session.add(Effect(label="never"))
    this_run().checkpoint(1)
    session.commit()


def write(session: Session) -> None:
    """Commit an effect without one, in a task that may be repeated from the top."""
    session.add(Effect(label="never"))
    session.commit()


def read(session: Session) -> None:
    """Commit what was only read."""
    session.execute(sa.select(Effect)).all()
    session.commit()


IN_THE_MIDDLE = pytest.mark.parametrize("commit", [save, write, read], ids=["checkpoint", "repeatable", "read-only"])


@IN_THE_MIDDLE
def test_a_lost_claim_commits_nothing_in_the_middle(
    shop: Workshop, heard: Heard, commit: Callable[[Session], None]
) -> None:
    """A run whose record was cancelled meanwhile gets LostClaim from its next commit, whatever kind that is."""
    told: list[BaseException] = []

    @shop.task(repeatable=commit is write)
    def steps(session: Session, label: str) -> None:
        cancel(shop, this_run().id)
        try:
            commit(session)
        except BaseException as error:
            told.append(error)
            raise

    with shop.running():
        id = shop.ask(steps)
        heard.wait(signals.ClaimLost)

    assert [type(error) for error in told] == [LostClaim]
    assert (shop.record(id).state, shop.record(id).checkpoint, shop.effects()) == ("cancelled", None, [])


@postgres_drivers
@IN_THE_MIDDLE
def test_an_older_snapshot_does_not_hide_that_the_claim_is_lost(
    shop: Workshop, heard: Heard, commit: Callable[[Session], None]
) -> None:
    """A commit in the middle of a transaction that began before the claim was lost fails, and is not repeated."""
    told: list[BaseException] = []

    @shop.task(repeatable=commit is write)
    def steps(session: Session, label: str) -> None:
        session.execute(sa.select(Counter)).all()
        cancel(shop, this_run().id)
        try:
            commit(session)
        except BaseException as error:
            told.append(error)
            raise

    with shop.running():
        id = shop.ask(steps)
        heard.wait(signals.ClaimLost)

    assert [isinstance(error, DBAPIError) for error in told] == [True]
    assert (shop.record(id).state, shop.record(id).checkpoint, shop.effects()) == ("cancelled", None, [])


# --- after a conflict ---------------------------------------------------------------------------------------------


@postgres_drivers
def test_a_claim_that_was_lost_calls_no_function_again(shop: Workshop, heard: Heard) -> None:
    """After a conflict the claim is looked at first: a function whose record was cancelled meanwhile is not called."""
    calls: list[int] = []

    @shop.task()
    def increments(session: Session, label: str) -> None:
        row = session.get_one(Counter, 1)
        calls.append(row.n)
        if len(calls) == 1:
            shop.sql("UPDATE counter SET n = n + 1")
            cancel(shop, this_run().id)
        row.n += 1
        session.add(Effect(label="never"))

    shop.sql("INSERT INTO counter (id, n) VALUES (1, 0)")
    with shop.running():
        id = shop.ask(increments)
        heard.wait(signals.ClaimLost)

    assert calls == [0]
    assert (shop.record(id).state, shop.effects(), shop.sql("SELECT n FROM counter")) == ("cancelled", [], 1)


@postgres_drivers
def test_a_repeat_in_place_goes_on_from_its_checkpoint(shop: Workshop, heard: Heard) -> None:
    """What was committed with a checkpoint before a conflict is restored for the repeat, and not done again."""
    restored: list[int | None] = []

    @shop.task()
    def steps(session: Session, label: str) -> None:
        run = this_run()
        restored.append(run.restored)
        if run.restored is None:
            session.add(Effect(label="step 1"))
            run.checkpoint(1)
            session.commit()
        row = session.get_one(Counter, 1)
        if len(restored) == 1:
            shop.sql("UPDATE counter SET n = n + 1")
        row.n += 1
        session.add(Effect(label="step 2"))

    shop.sql("INSERT INTO counter (id, n) VALUES (1, 0)")
    with shop.running():
        id = shop.ask(steps)
        repeated = heard.wait(signals.TaskRetried)
        heard.wait(signals.TaskSucceeded)

    assert repeated.in_place
    assert restored == [None, 1]
    assert (shop.effects(), shop.sql("SELECT n FROM counter")) == (["step 1", "step 2"], 2)
    assert (shop.record(id).attempt, shop.record(id).claims) == (1, 1)


# --- what the bookkeeping leaves alone ----------------------------------------------------------------------------


@postgres_drivers
def test_bookkeeping_never_touches_the_row_of_a_running_task(database: DatabaseUnderTest) -> None:
    """Heartbeats, progress and pruning leave the record as it is, or the task's last commit would be in conflict."""
    shop = Workshop(database, heartbeat=0.05, silent_after=TIMEOUT)
    pruning = Workshop(database, pools={"other": PoolSettings()}, keep_finished=0.001)
    begun = threading.Event()
    seen: list[tuple[str, str]] = []

    def wait_for(statement: str, what: str, **parameters: Any) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not shop.sql(statement, **parameters):
            assert time.monotonic() < deadline, what

    def row(id: UUID) -> str:
        # Who wrote this version of the row, who locked it, and where it stands: any update changes all three.
        return str(shop.sql("SELECT concat(xmin, ' ', xmax, ' ', ctid) FROM aftercommit_task WHERE id = :id", id=id))

    @shop.task()
    def finished(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    @shop.task()
    def works(session: Session, label: str) -> None:
        run = this_run()
        session.execute(sa.select(Counter)).all()
        before = row(run.id)
        begun.set()
        for done in range(1, 4):
            run.progress(done, 3)
            wait_for("SELECT done = :done FROM aftercommit_progress", "no progress was written", done=done)
            worker = "SELECT seen_at FROM aftercommit_worker ORDER BY started_at LIMIT 1"
            wait_for(f"SELECT ({worker}) > :seen", "no heartbeat was made", seen=shop.sql(worker))
        wait_for("SELECT count(*) = 1 FROM aftercommit_task", "the finished record was not pruned")
        seen.append((before, row(run.id)))
        session.add(Effect(label=label))

    with shop.running(), ThreadPoolExecutor(1) as asker:
        shop.ask(finished, "finished")
        shop.drain()
        asked = asker.submit(shop.ask, works, "works")
        assert begun.wait(TIMEOUT)
        # A worker prunes when it starts: one that knows neither of the tasks, and runs none.
        with pruning.running(runs=["other"]):
            id = asked.result(TIMEOUT)
            shop.drain()
        figures = shop.db.stats().tasks["works"]

    assert [before == after for before, after in seen] == [True], seen
    assert (figures.conflicts, figures.done) == (0, 1)
    assert (shop.record(id).state, shop.record(id).attempt, shop.effects()) == ("succeeded", 1, ["finished", "works"])
    pruning.close()
    shop.close()
