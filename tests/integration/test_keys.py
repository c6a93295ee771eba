"""Keys: after the last committed hand-over of a key, one run starts that sees its rows; and nobody waits for it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, signals
from aftercommit.records import keys, moves, positions, workers
from aftercommit.records.ids import uuid7
from aftercommit.runner.outbox import TaskHandle
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Counter, Effect, Heard, Workshop

postgres_drivers = pytest.mark.drivers("psycopg", "asyncpg")
LEVELS = pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "by SQL", "by default"])


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database, heartbeat=0.5, silent_after=30.0)
    yield shop
    shop.close()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What the library says."""
    with Heard(signals.Signal) as heard:
        yield heard


class Asker:
    """Another process that hands tasks of the same names over, and may stand still before its COMMIT."""

    def __init__(self, database: DatabaseUnderTest, level: str = "READ COMMITTED") -> None:
        is_plain = level.startswith("by") or database.is_sqlite
        self._by_sql = level == "by SQL" and not database.is_sqlite
        options: dict[str, Any] = {}
        if level == "by default" and not database.is_sqlite:
            options = {"connect_args": {"options": "-c default_transaction_isolation=repeatable\\ read"}}
        self.db = Database(
            database.sync_url, pool=PoolSettings(isolation_level=None if is_plain else level), engine_options=options
        )
        self.tasks = {name: self.db.task(name=name, pool="default")(lambda: None) for name in ("other", "handle")}
        self.written, self.go_on = threading.Event(), threading.Event()
        self.stands = False
        sa.event.listen(self.db.engine(), "commit", self._stand)
        self._thread = ThreadPoolExecutor(1)

    def _stand(self, _connection: object) -> None:
        if self.stands:
            self.written.set()
            assert self.go_on.wait(TIMEOUT)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One whose transaction has the isolation level under test."""
        with self.db.session() as session:
            if self._by_sql:
                session.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            yield session

    def ask(self, row: int | None, *keys: str, task: str = "handle", before: Callable[[], Any] | None = None) -> Any:
        """Write a row that is to be handled, and hand over under each of *keys*; return the handles."""
        with self.session() as session:
            session.execute(sa.select(sa.func.count()).select_from(Counter)).all()
            if before is not None:
                before()
            if row is not None:
                session.add(Counter(id=row))
            return [self.db.after_commit(session, self.tasks[task].with_options(key=key)) for key in keys]

    def stand_still(self, row: int | None, *keys: str) -> "Future[list[TaskHandle]]":
        """Do so in a thread, up to the COMMIT."""
        self.stands = True
        future = self._thread.submit(self.ask, row, *keys)
        assert self.written.wait(TIMEOUT)
        return future

    def finish(self, future: "Future[list[TaskHandle]]") -> list[TaskHandle]:
        """Let it commit."""
        self.go_on.set()
        return future.result(TIMEOUT)

    def close(self) -> None:
        """Let it end."""
        self.go_on.set()
        self._thread.shutdown()
        self.db.dispose()


@pytest.fixture
def asker(database: DatabaseUnderTest, request: pytest.FixtureRequest) -> Iterator[Asker]:
    """Another process, at the isolation level that the test names."""
    callspec: Any = request.node.callspec
    asker = Asker(database, callspec.params.get("level", "READ COMMITTED"))
    yield asker
    asker.close()


@pytest.fixture
def bystander(database: DatabaseUnderTest) -> Iterator[Asker]:
    """A third one, which never stands still."""
    asker = Asker(database)
    yield asker
    asker.close()


def handle(session: Session, label: str) -> None:
    """Handle every row that is there."""
    session.execute(sa.update(Counter).values(n=Counter.n + 1))


def other(session: Session, label: str) -> None:
    """Say that somebody was here."""
    session.add(Effect(label="other"))


def claim(shop: Workshop, *names: str) -> list[moves.Claimed]:
    """Claim what is due, as a worker does."""
    worker = uuid7()
    with shop.outside.connect() as connection:
        workers.register(connection, worker, host="test", pid=1, pools=["default"], names=list(names))
        return moves.claim(connection, pool="default", names=names, worker=worker, count=10)


@contextmanager
def books(shop: Workshop) -> Iterator[sa.Connection]:
    """A short transaction, of the bookkeeping's kind."""
    level = "SERIALIZABLE" if shop.under_test.is_sqlite else "READ COMMITTED"
    with shop.outside.execution_options(isolation_level=level).begin() as connection:
        yield connection


def handled(shop: Workshop) -> dict[int, int]:
    """How often each row was handled."""
    with Session(shop.outside) as session:
        return {row.id: row.n for row in session.scalars(sa.select(Counter))}


def queued_keys(shop: Workshop) -> list[str | None]:
    """The keys under which records are queued, in the order of their hand-overs."""
    return [each.queued_key for each in shop.records() if each.state == "queued"]


# --- the asker ----------------------------------------------------------------------------------------------------


@postgres_drivers
@LEVELS
def test_what_stands_for_an_asker_is_not_claimed_before_his_commit(
    shop: Workshop, asker: Asker, bystander: Asker, heard: Heard, level: str
) -> None:
    """A worker passes over the queued record, and takes what came later, until the asker has committed."""
    shop.task()(handle)
    shop.task()(other)
    asker.db.create_tables()
    asker.ask(None, "k")
    standing = asker.stand_still(1, "k")
    bystander.ask(None, "o", task="other")

    with shop.running():
        first = heard.wait(signals.TaskSucceeded)
        handles = asker.finish(standing)
        shop.drain()

    assert first.task == "other"
    assert [each.created for each in handles] == [False]
    assert (handled(shop), len(shop.records())) == ({1: 1}, 2)


@postgres_drivers
@LEVELS
@pytest.mark.parametrize("meanwhile", ["claimed", "queued", "claimed and queued", "moved"])
def test_an_asker_with_an_older_snapshot_commits_and_is_served(
    shop: Workshop, asker: Asker, bystander: Asker, level: str, meanwhile: str
) -> None:
    """Whatever became of the key since his transaction began, his commit succeeds, and a run sees his row."""
    asker.db.create_tables()
    if meanwhile != "queued":
        bystander.ask(None, "k")

    def change() -> None:
        if meanwhile == "moved":
            shop.sql("UPDATE aftercommit_task SET priority = 1")
        if "claimed" in meanwhile:
            assert len(claim(shop, "handle")) == 1
        if "queued" in meanwhile:
            bystander.ask(None, "k")

    handles = asker.ask(1, "k", "l", before=change)

    assert handles[1].created
    served = [each for each in shop.records() if each.state == "queued" and each.key == "k"]
    if "queued" not in meanwhile:
        assert handles[0].created or meanwhile == "moved"
    shop.sql("UPDATE aftercommit_task SET state = 'succeeded', finished_at = run_at WHERE state = 'running'")
    shop.task()(handle)
    with shop.running():
        shop.drain()
    assert len(served) in {1, 2}
    assert handled(shop) == {1: 1 + len(served)}


@postgres_drivers
def test_askers_of_one_key_do_not_wait_for_each_other(shop: Workshop, asker: Asker, bystander: Asker) -> None:
    """While the key is queued, somebody who stands still before his COMMIT holds nobody else up."""
    asker.db.create_tables()
    asker.ask(None, "k")
    standing = asker.stand_still(1, "k")

    handles = bystander.ask(2, "k")

    assert [each.created for each in handles + asker.finish(standing)] == [False, False]


@LEVELS
def test_the_same_key_twice_in_one_transaction_is_one_record(shop: Workshop, asker: Asker, level: str) -> None:
    """The first is written, whatever the level; the others know that they were not."""
    asker.db.create_tables()

    handles = asker.ask(1, "b", "a", "b", "a")

    assert [each.created for each in handles] == [True, True, False, False]
    assert sorted(map(str, queued_keys(shop))) == ["a", "b"]


@LEVELS
def test_a_key_is_met_by_every_asker(shop: Workshop, asker: Asker, bystander: Asker, level: str) -> None:
    """While it is queued, a second hand-over writes nothing; rolled back, it never was."""
    asker.db.create_tables()
    bystander.ask(None, "a")
    with asker.session() as session:
        asker.db.after_commit(session, asker.tasks["handle"].with_options(key="b"))
        session.rollback()
    with asker.session() as session:
        with session.begin_nested() as savepoint:
            asker.db.after_commit(session, asker.tasks["handle"].with_options(key="c"))
            savepoint.rollback()
        asker.db.after_commit(session, asker.tasks["handle"].with_options(key="d"))

    handles = asker.ask(1, "a", "b", "c", "d")

    assert [each.created for each in handles] == [False, True, True, False]


# --- what is queued again -----------------------------------------------------------------------------------------


def checkpoint(shop: Workshop, claimed: moves.Claimed) -> None:
    """Save one, as a run does."""
    with books(shop) as connection:
        assert moves.save_checkpoint(connection, claimed.claim, "1")


def position(shop: Workshop, claimed: moves.Claimed) -> None:
    """Save how far a batch is, as a run does."""
    with books(shop) as connection:
        positions.prepare(connection, claimed.claim.id, "batch", lanes=1)
        assert positions.advance(
            connection, claimed.claim.id, "batch", lane=0, done=[[0, 1, None, 1]], succeeded=1, failed=0, failures=None,
            commits=1,
        )  # fmt: skip


def nothing(shop: Workshop, claimed: moves.Claimed) -> None:
    """It has only read."""


def give_back(connection: sa.Connection, worker: UUID, claimed: moves.Claimed) -> None:
    """As at an orderly stop."""
    assert moves.give_back(connection, claimed.claim, None, at="", delay=0.0, refund=True)


def rescue(connection: sa.Connection, worker: UUID, claimed: moves.Claimed) -> None:
    """As another worker does."""
    workers.sign_off(connection, worker)
    assert workers.rescue(connection, silent_after=30.0) == [claimed.claim.id]


def orphan(connection: sa.Connection, worker: UUID, claimed: moves.Claimed) -> None:
    """As its own worker does, if it does not run it."""
    assert workers.release_orphans(connection, worker, [claimed.claim.id]) == [claimed.claim.id]


def by_hand(connection: sa.Connection, worker: UUID, claimed: moves.Claimed) -> None:
    """Cancelled, and wanted once more."""
    assert moves.cancel(connection, claimed.claim.id)
    assert moves.retry(connection, claimed.claim.id)


WAYS_BACK = pytest.mark.parametrize("back", [give_back, rescue, orphan, by_hand])
Way = Callable[[sa.Connection, UUID, moves.Claimed], None]


def queue_again(shop: Workshop, back: Way, done: Callable[[Workshop, moves.Claimed], None]) -> None:
    """Claim the one record that is due, do something with it, and queue it again."""
    worker = uuid7()
    with shop.outside.connect() as connection:
        workers.register(connection, worker, host="test", pid=1, pools=["default"], names=["handle"])
        claimed = moves.claim(connection, pool="default", names=["handle"], worker=worker, count=1)[0]
    done(shop, claimed)
    with books(shop) as connection:
        back(connection, worker, claimed)


@WAYS_BACK
@pytest.mark.parametrize("done", [checkpoint, position, nothing])
def test_only_what_starts_afresh_waits_under_its_key_again(
    shop: Workshop, asker: Asker, back: Way, done: Callable[[Workshop, moves.Claimed], None]
) -> None:
    """A run that goes on from where it was has read already: a hand-over that comes now is written for itself."""
    asker.db.create_tables()
    asker.ask(None, "k")

    queue_again(shop, back, done)
    handles = asker.ask(1, "k")

    assert [each.created for each in handles] == [done is not nothing]
    assert queued_keys(shop) == (["k"] if done is nothing else [None, "k"])


@pytest.mark.parametrize("back", [rescue, orphan])
def test_what_was_begun_too_often_waits_under_no_key(shop: Workshop, asker: Asker, back: Way) -> None:
    """It fails without being begun, and so stands for nobody."""
    asker.db.create_tables()
    asker.ask(None, "k")
    shop.sql("UPDATE aftercommit_task SET max_attempts = :most", most=1 if back is rescue else 0)

    queue_again(shop, back, nothing)

    assert [each.created for each in asker.ask(1, "k")] == [True]


@postgres_drivers
@WAYS_BACK
def test_nobody_who_is_queued_again_waits_for_an_asker(shop: Workshop, asker: Asker, back: Way) -> None:
    """An asker stands still between the INSERT of the key and his COMMIT: the record is queued without it, at once."""
    asker.db.create_tables()
    asker.ask(None, "k")
    asker.ask(None, "l", task="other")

    def stand(_shop: Workshop, _claimed: moves.Claimed) -> None:
        standing.append(asker.stand_still(1, "k"))

    standing: list[Any] = []
    begun = time.monotonic()
    queue_again(shop, back, stand)
    took = time.monotonic() - begun

    assert took < 2.0
    assert queued_keys(shop) == [None, "l"]
    assert [each.created for each in asker.finish(standing[0])] == [True]


@postgres_drivers
def test_one_that_is_stuck_does_not_cost_the_others_their_keys(
    shop: Workshop, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many that are rescued together, only the one whose key an asker holds goes without."""
    # Half a second for all of them is no matter of this test, and not much on a machine that is busy with others.
    monkeypatch.setattr(keys, "_SECONDS", 30.0)
    asker.db.create_tables()
    asker.ask(None, *"abcdefgh")
    claimed = claim(shop, "handle")
    standing = asker.stand_still(1, "c")
    shop.sql("DELETE FROM aftercommit_worker")

    with books(shop) as connection:
        rescued = workers.rescue(connection, silent_after=30.0)

    assert len(rescued) == len(claimed) == 8
    assert sorted(filter(None, queued_keys(shop))) == list("abdefgh")
    asker.finish(standing)


def test_two_of_one_key_that_are_rescued_together_share_it(shop: Workshop, asker: Asker) -> None:
    """The older waits under the key, the other beside it."""
    asker.db.create_tables()
    for _ in range(2):
        asker.ask(None, "k")
        assert len(claim(shop, "handle")) == 1
    shop.sql("DELETE FROM aftercommit_worker")

    with books(shop) as connection:
        workers.rescue(connection, silent_after=30.0)

    assert queued_keys(shop) == ["k", None]
