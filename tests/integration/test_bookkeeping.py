"""The bookkeeping: nobody's transaction stops it, no odd record does, and it leaves alone what is another's."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import PoolSettings, Retry, current_run, signals
from aftercommit.records import census, moves, sweeping, waiting, workers
from aftercommit.records.ids import uuid7
from aftercommit.tasks.transient import Fault, fault_of
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop

postgres_drivers = pytest.mark.drivers("psycopg", "asyncpg")


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn, whose heartbeats can be waited for."""
    shop = Workshop(database, pools={"other": PoolSettings()}, heartbeat=0.3, silent_after=60.0)
    yield shop
    shop.close()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What the library says."""
    with Heard(signals.Signal) as heard:
        yield heard


def effect(session: Session, label: str) -> None:
    """Say that it ran."""
    session.add(Effect(label=label))


def wait_until(what: Callable[[], Any]) -> None:
    """Wait for something that nobody tells of."""
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < deadline


# --- locks --------------------------------------------------------------------------------------------------------


@contextmanager
def locked(shop: Workshop, statement: str) -> Iterator[None]:
    """Somebody has locked something, and stands still."""
    with shop.outside.execution_options(isolation_level="READ COMMITTED").begin() as connection:
        connection.exec_driver_sql(statement)
        yield


def seen(shop: Workshop) -> Any:
    """When the worker was last heard of."""
    return shop.sql("SELECT seen_at FROM aftercommit_worker")


@postgres_drivers
@pytest.mark.parametrize("table", ["task", "progress", "event", "batch", "pool"])
def test_heartbeats_go_on_under_a_lock_of_any_other_table(shop: Workshop, table: str) -> None:
    """LOCK TABLE, VACUUM FULL, a migration: claims wait, the worker stays alive for others, and then all goes on."""
    task = shop.task()(effect)
    with shop.running():
        shop.ask(task, "before")
        shop.drain()
        with locked(shop, f"LOCK TABLE aftercommit_{table} IN ACCESS EXCLUSIVE MODE"):
            for _ in range(4):
                last = seen(shop)
                wait_until(lambda last=last: seen(shop) > last)
        shop.ask(task, "after")
        shop.drain()

    assert shop.effects() == ["after", "before"]


@postgres_drivers
def test_no_statement_of_the_bookkeeping_waits_for_longer_than_a_second(shop: Workshop) -> None:
    """Whatever is locked, and whether the server's session is known to be its own or not."""
    shop.task()(effect)
    waits: list[float] = []
    with shop.running(), locked(shop, "LOCK TABLE aftercommit_task IN ACCESS EXCLUSIVE MODE"):
        runner = shop.db.runner
        assert runner is not None
        for is_listening in (False, True):
            wait_until(lambda is_listening=is_listening: not is_listening or runner.is_listening)
            for autocommit in (False, True):
                met: Future[BaseException] = Future()

                def look(autocommit: bool = autocommit, met: Future[BaseException] = met) -> bool:
                    begun = time.monotonic()
                    try:
                        runner.books.execute(
                            lambda c: c.exec_driver_sql("SELECT 1 FROM aftercommit_task"), autocommit=autocommit
                        )
                    except sa.exc.DBAPIError as exc:
                        waits.append(time.monotonic() - begun)
                        met.set_result(exc)
                    return True

                # Done in a round, on the thread.
                runner.settle(look)
                assert "lock timeout" in str(met.result(TIMEOUT))

    assert max(waits) < 10.0


@postgres_drivers
def test_a_row_that_somebody_has_locked_costs_the_others_nothing_at_a_stop(shop: Workshop, heard: Heard) -> None:
    """Of three tasks that are given back, one cannot be; it is rescued later."""
    gate = threading.Event()
    task = shop.task(gate=gate)(effect)
    with shop.running(grace=0.0):
        ids = [shop.ask(task, str(number)) for number in range(3)]
        heard.wait(signals.TaskStarted, count=3)
        held = shop.outside.execution_options(isolation_level="READ COMMITTED").connect()
        held.begin()
        held.execute(sa.text("SELECT 1 FROM aftercommit_task WHERE id = :id FOR UPDATE"), {"id": ids[1]})
    states = [shop.record(id).state for id in ids]
    held.close()
    gate.set()

    assert states == ["queued", "running", "queued"]


# --- another application ------------------------------------------------------------------------------------------


def test_what_an_earlier_release_queued_in_its_pool_is_run_after_a_while(database: DatabaseUnderTest) -> None:
    """Nobody runs that pool, nor has for as long as a worker may be silent: the tasks move to their new one."""
    old = Workshop(database, pools={"old": PoolSettings()})
    new = Workshop(database, heartbeat=0.1, silent_after=0.5)
    waiting_ = old.task(pool="old")(effect)
    new.task()(effect)
    with old.running(runs=["default"]):
        old.ask(waiting_, "a")

    with new.running():
        wait_until(lambda: (new.db.runner.look(), new.effects())[1])  # type: ignore[union-attr]

    assert [each.pool for each in new.records()] == ["default"]
    old.close()
    new.close()


def test_another_applications_queue_is_its_own(database: DatabaseUnderTest) -> None:
    """Two share a database and a task's name, not a pool: as long as its worker lives, neither takes from the other."""
    theirs = Workshop(database, pools={"theirs": PoolSettings(pool_size=1)}, heartbeat=0.1, silent_after=0.5)
    ours = Workshop(database, heartbeat=0.1, silent_after=0.5)
    gate, began = threading.Event(), threading.Event()
    task = theirs.task(pool="theirs", gate=gate, begun=began.set)(effect)
    ours.task()(effect)
    looks = 0

    with theirs.running(), ours.running():
        theirs.ask(task, "busy")
        assert began.wait(TIMEOUT)
        for label in "abc":
            theirs.commit(lambda s, label=label: theirs.db.after_commit(s, task.with_options(priority=1), label))
        runner = ours.db.runner
        assert runner is not None
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            runner.look()
            looks += runner.books.call(lambda c: len(waiting.look(c, names=["effect"])))
        pools = {each.pool for each in ours.records()}
        gate.set()
        theirs.drain()

    assert looks > 0
    assert pools == {"theirs"}
    assert theirs.effects() == ["a", "b", "busy", "c"]
    theirs.close()
    ours.close()


# --- odd records --------------------------------------------------------------------------------------------------

ODD_NUMBERS = [
    ("attempt", 2**31 - 1), ("attempt", -(2**31)), ("claims", 2**31 - 1), ("claims", -(2**31)),
    ("max_attempts", 2**31 - 1), ("max_attempts", -(2**31)), ("priority", 2**31 - 1),
]  # fmt: skip
ODD_ON_SQLITE = [
    ("attempt", "abc"), ("attempt", 2**62), ("claims", 1.5), ("max_attempts", "many"), ("priority", "high"),
    ("run_at", "1-01-01 00:00:00.000000"), ("run_at", "never"), ("run_at", ""), ("id", "no id"), ("parent", "nobody"),
    ("arguments", "{"), ("context", "{"), ("checkpoint", "{"), ("errors", "{"), ("result", "{"),
    ("enqueued_at", "0000-00-00"), ("state", "unknown"),
]  # fmt: skip
ODD_ON_POSTGRESQL = [
    ("run_at", "-infinity"), ("run_at", "infinity"), ("run_at", "0044-03-15 BC"), ("enqueued_at", "-infinity"),
    ("state", "unknown"), ("errors", '"no list"'), ("errors", '[["a"]]'), ("context", "[]"), ("context", '"x"'),
    ("arguments", "[]"), ("arguments", '"x"'), ("checkpoint", "{}"),
]  # fmt: skip


def odd(database: DatabaseUnderTest) -> list[tuple[str, Any]]:
    """What somebody may have written there."""
    return ODD_NUMBERS + (ODD_ON_SQLITE if database.is_sqlite else ODD_ON_POSTGRESQL)


def test_odd_records_stop_no_pool(shop: Workshop, database: DatabaseUnderTest) -> None:
    """A claim takes the others, an odd one ends by itself or waits, and whoever looks at all is told of all."""
    task = shop.task()(effect)
    with shop.running(runs=["other"]):
        ids = [shop.ask(task, f"odd {number}") for number, _ in enumerate(odd(database))]
        for id, (column, value) in zip(ids, odd(database), strict=True):
            given = id.hex if database.is_sqlite else id
            if isinstance(value, str) and not database.is_sqlite:
                kind = {"run_at": "timestamptz", "enqueued_at": "timestamptz", "state": "text"}.get(column, "json")
                shop.sql(
                    f"UPDATE aftercommit_task SET {column} = CAST(:value AS {kind}) WHERE id = :id",
                    value=value,
                    id=given,
                )
            else:
                value_ = f"{value} {given}" if column == "id" else value
                shop.sql(f"UPDATE aftercommit_task SET {column} = :value WHERE id = :id", value=value_, id=given)
        plain = [shop.ask(task, f"plain {number}") for number in range(3)]

    with shop.running():
        wait_until(lambda: {shop.record(id).state for id in plain} == {"succeeded"})
        wait_until(lambda: shop.sql("SELECT count(*) FROM aftercommit_task WHERE state = 'running'") == 0)
    with shop.outside.connect() as connection:
        sweeping.sweep(connection, silent_after=30.0)
        waiting.look(connection, names=["effect"])
        census.queues(connection)
        census.workers(connection)
        census.kept(connection)
        census.failures(connection, within=3600.0)
        workers.rescue(connection, silent_after=30.0)
        workers.prune(connection, keep=-5.0)
        left = {row[0] for row in connection.execute(sa.text("SELECT state FROM aftercommit_task"))}

    assert left <= {"queued", "unknown"}
    assert [label for label in shop.effects() if label.startswith("plain")] == ["plain 0", "plain 1", "plain 2"]


def test_what_is_odd_while_it_runs_stops_no_heartbeat(shop: Workshop, database: DatabaseUnderTest) -> None:
    """Records that somebody edits while a worker holds them, and others that say that it does, are put right."""
    with shop.running(runs=["other"]):
        task = shop.task()(effect)
        ids = [shop.ask(task, str(number)) for number in range(4)]
    worker = uuid7()
    with shop.outside.connect() as connection:
        workers.register(connection, worker, host="test", pid=1, pools=["default"], names=["effect"])
        claimed = moves.claim(connection, pool="default", names=["effect"], worker=worker, count=10)
        assert {each.claim.id for each in claimed} == set(ids)
    for id, number in zip(ids, (2**31 - 1, -(2**31), 0, 1), strict=True):
        given: UUID | str = id.hex if database.is_sqlite else id
        shop.sql("UPDATE aftercommit_task SET attempt = :number WHERE id = :id", number=number, id=given)
    if database.is_sqlite:
        shop.sql("UPDATE aftercommit_task SET id = 'no id' WHERE id = :id", id=ids[3].hex)

    with shop.outside.connect() as connection:
        pulse = workers.beat(connection, worker, silent_after=30.0)
        assert pulse is not None
        released = workers.release_orphans(connection, worker, pulse.running)

    assert set(released) == set(ids[: 3 if database.is_sqlite else 4])


NUMBERS = [2**127 + 1, -(2**64), 2**63 - 1, 0.1 + 0.2, 1.0, -1e300, 5]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_come_back_equal(shop: Workshop, number: float) -> None:
    """As a result and as a checkpoint, after which another claim goes on: whatever the column makes of numbers."""
    restored: list[Any] = []

    def body(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        restored.append(run.restored)
        if run.restored is None:
            session.add(Effect(label=label))
            run.checkpoint(number)
            session.commit()
            raise KeyError

    steps = shop.task(retry=Retry(attempts=1))(body)
    if shop.is_async:

        async def returns() -> int | float:
            return number
    else:

        def returns() -> int | float:  # type: ignore[misc]  # the one or the other
            return number

    result = shop.db.task(returns)
    with shop.running():
        first, second = shop.ask(steps), shop.ask(result)
        shop.drain()
        retry = shop.on_loop(shop.db.async_retry(first)) if shop.is_async else shop.db.retry(first)
        assert retry is None
        shop.drain()

    assert restored == [None, number]
    assert [shop.record(first).checkpoint, shop.record(second).result] == [number, number]


@pytest.mark.drivers("pysqlite")
@pytest.mark.parametrize("value", [[float("inf")], {"a": float("nan")}, float("-inf")])
def test_a_result_that_would_come_back_as_nothing_is_not_kept(shop: Workshop, value: Any) -> None:
    """JSON has no infinity: it is not stored as null, and the run succeeds all the same."""

    def returns() -> Any:
        return value

    task = shop.db.task(returns)
    with shop.running():
        id = shop.ask(task)
        shop.drain()

    assert (shop.record(id).state, shop.record(id).result) == ("succeeded", None)


@postgres_drivers
@pytest.mark.parametrize("write", ["fail", "give_back"])
def test_a_locked_record_is_not_taken_for_a_lost_claim(shop: Workshop, write: str) -> None:
    """Whoever cannot write the end of a claim is told that he must try again, at once, and not that it is gone."""
    with shop.running(runs=["other"]):
        id = shop.ask(shop.task()(effect))
    worker = uuid7()
    with shop.outside.connect() as connection:
        claimed = moves.claim(connection, pool="default", names=["effect"], worker=worker, count=1)[0]
    failure = moves.Failure(error="no", traceback="no")

    def end(connection: sa.Connection) -> bool:
        if write == "fail":
            return moves.fail(connection, claimed.claim, failure, at="2020-01-01")
        return moves.give_back(connection, claimed.claim, failure, at="2020-01-01", delay=0.0, refund=False)

    with locked(shop, "SELECT 1 FROM aftercommit_task FOR UPDATE"):
        with shop.outside.connect() as connection, pytest.raises(sa.exc.DBAPIError) as caught:
            end(connection)
        assert fault_of(caught.value) is Fault.CONFLICT
    with shop.outside.connect() as connection:
        assert end(connection)
    assert shop.record(id).state == {"fail": "failed", "give_back": "queued"}[write]
