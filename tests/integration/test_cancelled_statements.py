"""57014 at a statement of the library's own: the task did nothing wrong, so nothing fails for good."""

import threading
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Retry, current_run, signals
from tests.support.cancelling import Cancelling
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Counter, Effect, Heard, Workshop

pytestmark = pytest.mark.drivers("psycopg", "asyncpg")


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on both drivers of PostgreSQL."""
    made = Workshop(database)
    yield made
    made.close()


OURS = {
    "finish": "SET state = 'succeeded'",
    "checkpoint": "SET checkpoint = ",
    "lock": "FOR SHARE",
    "time limit": "set_config('statement_timeout'",
    "did it write": "pg_current_xact_id_if_assigned",
    "hand-over": "INSERT INTO aftercommit_task",
    "positions": "UPDATE aftercommit_batch SET position",
    "new positions": "INSERT INTO aftercommit_batch",
    "rows among the arguments": "FROM counter",
}


@pytest.mark.parametrize("times", [1, 3, 4], ids=["once", "to the limit", "beyond it"])
@pytest.mark.parametrize("which", OURS)
def test_a_run_is_repeated(shop: Workshop, which: str, times: int):  # noqa: PLR0915  # a task with one of each
    """The run whose statement of ours was cancelled is run again, and takes effect once."""
    db = shop.db

    @shop.task()
    def other(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    def before(session: Session) -> None:
        run = current_run()
        assert run is not None
        session.execute(sa.text("SELECT 1"))
        if run.restored is None:
            run.checkpoint(1)
            session.add(Effect(label="begun"))
        session.commit()
        session.execute(sa.text("SELECT 1"))
        session.commit()

    def after(session: Session, row: Counter) -> None:
        row.n += 1
        db.after_commit(session, other, "other")

    def handle(session: Session, value: int) -> None:
        session.add(Effect(label=f"value {value}"))

    def plain(session: Session, row: Counter) -> None:
        before(session)
        db.run_batch([1, 2], handle)
        after(session, row)

    async def native(session: AsyncSession, row: Counter) -> None:
        await session.run_sync(before)
        await db.async_run_batch([1, 2], handle)
        await session.refresh(row)
        await session.run_sync(after, row)

    work: Any = db.task(name="work", timeout=30.0, retry=Retry(base=0.01, cap=0.1))(native if shop.is_async else plain)

    def ask(session: Session) -> None:
        row = Counter(id=1)
        session.add(row)
        session.flush()
        db.after_commit(session, work, row)

    with shop.running(), Heard(signals.TaskFailed, signals.TaskSucceeded) as heard:
        shop.drain()
        if which == "hand-over":
            # That of the run, and not of the request.
            seen: list[int] = []
            cancelling = Cancelling(
                shop.outside, lambda sql: OURS[which] in sql and bool(seen.append(1) or len(seen) > 1), times=times
            )
        else:
            cancelling = Cancelling(shop.outside, OURS[which], times=times)
        with cancelling:
            shop.commit(ask)
            heard.wait(signals.TaskSucceeded, count=2)
            shop.drain()

        assert cancelling.reached == times
        assert heard.of(signals.TaskFailed) == []
        assert shop.effects() == ["begun", "other", "value 1", "value 2"]
        assert shop.sql("SELECT n FROM counter") == 1
    record = next(each for each in shop.records() if each.task == "work")
    # Three repeats are no attempts; a batch repeats its own chunks.
    assert record.attempt == (2 if times > 3 and not which.endswith("positions") else 1)


@pytest.mark.parametrize("times", [1, 3], ids=["once", "to the limit"])
def test_a_commit_is_repeated(shop: Workshop, times: int):
    """A COMMIT that the server cancelled has not happened: the run is repeated."""

    @shop.task()
    def work(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    with shop.running(), Heard(signals.TaskSucceeded) as heard, Cancelling(shop.outside, "nothing"):
        shop.drain()
        # Waits in the COMMIT itself, for as often as it is to be cancelled.
        shop.sql("CREATE SEQUENCE slow")
        shop.sql(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN IF nextval('slow') <= {times} THEN PERFORM pg_sleep(60); END IF; RETURN NULL; END $$"
        )
        shop.sql(
            "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON effect DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
            "EXECUTE FUNCTION wait()"
        )
        id = shop.ask(work, "x")
        heard.wait(signals.TaskSucceeded)
        shop.drain()

        assert shop.sql("SELECT last_value FROM slow") == times + 1
    assert (shop.record(id).state, shop.record(id).attempt, shop.effects()) == ("succeeded", 1, ["x"])


@pytest.mark.parametrize("statement", ["SET state = 'failed'", "FOR UPDATE NOWAIT", "FROM counter"])
@pytest.mark.parametrize("times", [1, 3, 5], ids=["once", "to the limit", "beyond it"])
def test_on_failure_is_called_all_the_same(shop: Workshop, statement: str, times: int):
    """However often our statements around it are cancelled, ``on_failure`` is called and takes effect once."""
    conflicts: list[int] = []

    def mark(session: Session, error: BaseException, row: Counter) -> None:
        if not conflicts:
            # Has the claim looked at before the next call.
            conflicts.append(1)
            raise _conflict()
        session.add(Effect(label=f"failed {row.id}"))

    def plain(session: Session, row: Counter) -> None:
        raise ValueError("no")

    async def native(session: AsyncSession, row: Counter) -> None:
        raise ValueError("no")

    work: Any = shop.db.task(name="work", on_failure=mark)(native if shop.is_async else plain)

    def ask(session: Session) -> None:
        row = Counter(id=1)
        session.add(row)
        session.flush()
        shop.db.after_commit(session, work, row)

    with shop.running(), Heard(signals.TaskFailed, signals.ClaimLost) as heard:
        shop.drain()
        seen: list[int] = []
        # The first load is the task's own.
        first = 1 if statement == "FROM counter" else 0
        with Cancelling(
            shop.outside, lambda sql: statement in sql and bool(seen.append(1) or len(seen) > first), times=times
        ) as cancelling:
            shop.commit(ask)
            heard.wait(signals.TaskFailed)
            shop.drain()

        assert cancelling.reached == times
        assert shop.effects() == ["failed 1"]
        assert (len(heard.of(signals.TaskFailed)), heard.of(signals.ClaimLost)) == (1, [])
    assert [record.state for record in shop.records()] == ["failed"]


def _conflict() -> DBAPIError:
    class Conflict(Exception):
        sqlstate = "40001"

    return DBAPIError("SELECT", {}, Conflict())


@pytest.mark.parametrize("statement", ["SET state = 'queued'", "FOR UPDATE NOWAIT"])
def test_a_retry_is_queued(shop: Workshop, statement: str):
    """The statements between two attempts are repeated by themselves."""
    calls: list[int] = []

    @shop.task(retry=Retry(on=ValueError, base=0.01))
    def work(session: Session, label: str) -> None:
        calls.append(1)
        session.add(Effect(label=label))
        session.flush()
        if len(calls) == 1:
            raise _conflict() if "NOWAIT" in statement else ValueError("no")

    with shop.running(), Cancelling(shop.outside, statement, times=2) as cancelling:
        id = shop.ask(work, "x")
        shop.drain()

    assert cancelling.reached == 2
    assert (shop.record(id).state, shop.effects(), len(calls)) == ("succeeded", ["x"], 2)


def test_once_means_once(shop: Workshop):
    """``Retry(attempts=1)``: where the function was called, it is not called again, though only our end met 57014."""
    calls: list[int] = []

    @shop.task(retry=Retry(attempts=1))
    def once(session: Session, label: str) -> None:
        calls.append(1)
        session.add(Effect(label=label))

    with shop.running(), Cancelling(shop.outside, OURS["finish"]):
        id = shop.ask(once, "x")
        shop.drain()

    assert (shop.record(id).state, shop.effects(), calls) == ("failed", [], [1])


def test_what_was_not_called_is_called_once(shop: Workshop):
    """``Retry(attempts=1)``: where the rows could not be loaded, the function has not begun, and begins now."""
    calls: list[int] = []

    def plain(session: Session, row: Counter) -> None:
        calls.append(row.id)

    async def native(session: AsyncSession, row: Counter) -> None:
        calls.append(row.id)

    once: Any = shop.db.task(name="once", retry=Retry(attempts=1))(native if shop.is_async else plain)

    def ask(session: Session) -> None:
        row = Counter(id=1)
        session.add(row)
        session.flush()
        shop.db.after_commit(session, once, row)

    with shop.running(), Cancelling(shop.outside, OURS["rows among the arguments"], times=2):
        shop.commit(ask)
        shop.drain()

    assert (calls, [record.state for record in shop.records()]) == ([1], ["succeeded"])


@pytest.mark.drivers("asyncpg")
def test_a_finish_without_a_session_is_repeated_by_itself(shop: Workshop):
    """A `def` task without a session: its record is finished, and its function not called a second time."""
    calls: list[int] = []

    @shop.db.task
    def bare() -> None:
        calls.append(1)

    with shop.running(), Cancelling(shop.outside, OURS["finish"], times=3):
        id = shop.ask(bare)
        shop.drain()

    assert (calls, shop.record(id).state, shop.record(id).attempt) == ([1], "succeeded", 1)


def test_the_task_s_own_statement_stays_its_own_failure(shop: Workshop):
    """57014 at a statement of the task's own is permanent, as ever; so is one that it wraps."""

    class Mine(Exception):
        pass

    @shop.task()
    def slow(session: Session, label: str) -> None:
        try:
            session.execute(sa.text("SELECT pg_sleep(30)"))
        except DBAPIError as exc:
            if label == "wrapped":
                raise Mine from exc
            raise

    with shop.running(), Heard(signals.TaskRetried) as heard, Cancelling(shop.outside, "nothing"):
        ids = [shop.ask(slow, label) for label in ("bare", "wrapped")]
        shop.drain()

    assert {shop.record(id).state for id in ids} == {"failed"}
    assert heard.of(signals.TaskRetried) == []


def test_one_that_was_caught_repeats_the_run(shop: Workshop):
    """A function that catches our 57014 meets "transaction is aborted" or an error of its own, and is repeated."""

    @shop.task(timeout=30.0)
    def careless(session: Session, label: str) -> None:
        try:
            session.execute(sa.text("SELECT 1"))
        except DBAPIError:
            raise RuntimeError("no database") from None
        session.add(Effect(label=label))

    with shop.running(), Cancelling(shop.outside, OURS["time limit"]):
        id = shop.ask(careless, "x")
        shop.drain()

    assert (shop.record(id).state, shop.effects()) == ("succeeded", ["x"])


def test_a_request_hears_of_its_own(shop: Workshop):
    """A hand-over that is cancelled at a request's commit fails that commit: nobody could repeat the request."""

    @shop.task()
    def never(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    with shop.running():
        shop.drain()
        with Cancelling(shop.outside, OURS["hand-over"]), pytest.raises(DBAPIError):
            shop.ask(never, "x")
        shop.drain()

    assert (shop.records(), shop.effects()) == ([], [])


@pytest.mark.drivers("asyncpg")
@pytest.mark.parametrize("which", ["BEGIN", "COMMIT", "ROLLBACK"])
def test_a_transaction_that_was_not_ended_is_nobody_else_s(shop: Workshop, which: str, monkeypatch: pytest.MonkeyPatch):
    """A BEGIN, COMMIT or ROLLBACK that the server cancelled leaves driver and server at odds: it is dropped."""
    armed, seen = threading.Event(), []
    send = asyncpg.Connection.execute

    async def cancelled(self: Any, query: str, *args: Any, **kwargs: Any) -> Any:
        if armed.is_set() and query.startswith(which):
            armed.clear()
            seen.append(query)
            # In the place of the real one, as a cancel that comes at its very beginning.
            await send(self, "SET statement_timeout = '10ms'; SELECT pg_sleep(60)")
        return await send(self, query, *args, **kwargs)

    @shop.task()
    def work(session: Session, label: str) -> None:
        session.add(Effect(label=label))
        session.flush()
        if label == "first" and not seen and which != "BEGIN":
            armed.set()
            if which == "ROLLBACK":
                raise _conflict()

    with shop.running():
        shop.drain()
        monkeypatch.setattr(asyncpg.Connection, "execute", cancelled)
        ids = [shop.ask(work, "first")]
        shop.drain()
        if which == "BEGIN":
            armed.set()
            with pytest.raises(DBAPIError):
                shop.commit(lambda session: session.execute(sa.text("SELECT 1")))
        ids += [shop.ask(work, str(n)) for n in range(3)]
        shop.drain()

    assert len(seen) == 1
    assert {shop.record(id).state for id in ids} == {"succeeded"}
    assert shop.effects() == ["0", "1", "2", "first"]
