"""Who comes first: the highest priority, then the oldest, pool by pool; and what comes new waits its turn."""

import threading
import time
from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session

from aftercommit import PoolSettings, signals
from aftercommit.runner import lanes
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop whose pools have one place each, so that there is an order to be seen."""
    one = PoolSettings(pool_size=1)
    shop = Workshop(database, heartbeat=0.2, silent_after=30.0, pools={"one": one, "quick": one})
    yield shop
    shop.close()


def effect(session: Session, label: str) -> None:
    """What most tasks here do."""
    session.add(Effect(label=label))


def in_order(shop: Workshop) -> list[str]:
    """The labels in the order in which the effects took place."""
    with shop.outside.connect() as connection:
        return [label for _, label in connection.exec_driver_sql("SELECT id, label FROM effect ORDER BY id")]


def test_the_highest_priority_comes_first_then_the_oldest(shop: Workshop):
    """What waits in the database is claimed by priority, and within one priority by age."""
    task = shop.task(pool="one")(effect)
    with shop.running(runs=("default",)):
        for label, priority in [("a", 0), ("b", -1), ("c", 5), ("d", 0), ("e", 5), ("f", 0), ("g", -1), ("h", 5)]:
            shop.ask(task.with_options(priority=priority), label)

    with shop.running():
        shop.drain()

    assert in_order(shop) == ["c", "e", "h", "a", "d", "f", "b", "g"]


def test_a_flooded_pool_holds_up_no_other(shop: Workshop):
    """With hundreds queued in one pool and its only place taken, a task of another pool starts and ends."""
    gate = threading.Event()
    slow = shop.task(pool="one", gate=gate)(effect)

    @shop.task(pool="quick")
    def quick(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    with shop.running(), Heard(signals.TaskStarted, signals.TaskSucceeded) as heard:
        shop.commit(lambda session: [shop.db.after_commit(session, slow, f"s{n}") for n in range(300)] and None)
        heard.wait(signals.TaskStarted)

        for number in range(5):
            shop.ask(quick, f"q{number}")
            heard.wait(signals.TaskSucceeded, count=number + 1)

        ended = [each.task for each in heard.of(signals.TaskSucceeded)]
        gate.set()
        shop.db.drain(120.0)

    assert ended == ["quick"] * 5
    assert len(in_order(shop)) == 305


def test_what_comes_new_does_not_overtake_what_waits(shop: Workshop):
    """A task that is handed over while older ones wait in the database is queued behind them, free place or not."""
    gate, begun = threading.Event(), threading.Event()
    task = shop.task(pool="one", gate=gate, begun=begun.set)(effect)
    with shop.running():
        shop.drain()
        first = shop.ask(task, "0")
        assert begun.wait(TIMEOUT)
        # One runs, a few wait here, and the others wait in the database.
        waiting = [shop.ask(task, str(number)) for number in range(1, 10)]
        states = [shop.record(id).state for id in waiting]
        gate.set()
        shop.drain()

    assert shop.record(first).state == "succeeded"
    assert states[0] == "running"
    assert states[-1] == "queued"
    assert states == sorted(states, reverse=True)
    assert in_order(shop) == [str(number) for number in range(10)]


def test_a_low_priority_waits_for_as_long_as_higher_ones_come(shop: Workshop):
    """Priorities are strict: there is no ageing, and whoever asks for last is last."""
    task = shop.task(pool="one")(effect)
    with shop.running(runs=("default",)):
        shop.ask(task.with_options(priority=-1), "low")
        for number in range(30):
            shop.ask(task, f"{number:02}")

    with shop.running():
        shop.drain()

    assert in_order(shop)[-1] == "low"


def test_what_waits_behind_slow_tasks_is_left_to_others(shop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """Many are taken at once where tasks end quickly; once they do not, all but a few are queued again, in order."""
    # However slow this machine is, the first ones were quick.
    monkeypatch.setattr(lanes, "_AHEAD_SECONDS", 1000.0)
    gate = threading.Event()

    @shop.task(pool="one")
    def quick(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    slow = shop.task(pool="one", gate=gate)(effect)
    with shop.running():
        for number in range(4):
            shop.ask(quick, f"quick {number}")
        shop.drain()
        ids = shop.commit(lambda session: [shop.db.after_commit(session, slow, f"{n:02}").id for n in range(30)])
        ahead = shop.db.stats().pools["one"].backlog
        pause, deadline = threading.Event(), time.monotonic() + TIMEOUT
        while (left := [shop.record(id).state for id in ids].count("queued")) != 27 and time.monotonic() < deadline:
            pause.wait(0.02)
        kept = shop.db.stats().pools["one"].backlog
        gate.set()
        shop.drain()

    # One place, and twelve times as many at hand; then the two that are the least.
    assert (ahead, kept, left) == (12, 2, 27)
    assert in_order(shop)[4:] == [f"{n:02}" for n in range(30)]
    assert {shop.record(id).attempt for id in ids} == {1}


def test_what_cannot_be_given_back_now_is_given_back_later(
    database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch
):
    """On SQLite the slow task may hold the lock that it takes to queue the others again: none of them is lost."""
    monkeypatch.setattr(lanes, "_AHEAD_SECONDS", 1000.0)
    # No heartbeat before that is tried.
    shop = Workshop(database, heartbeat=4.0, silent_after=30.0, pools={"one": PoolSettings(pool_size=1)})
    gate, begun = threading.Event(), threading.Event()

    @shop.task(pool="one")
    def quick(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    @shop.task(pool="one")
    def slow(session: Session, label: str) -> None:
        session.add(Effect(label=label))
        session.flush()
        begun.set()
        gate.wait(TIMEOUT)

    with shop.running():
        for number in range(4):
            shop.ask(quick, f"quick {number}")
        shop.drain()
        ids = shop.commit(lambda session: [shop.db.after_commit(session, slow, f"{n:02}").id for n in range(12)])
        assert begun.wait(TIMEOUT)
        pause, deadline = threading.Event(), time.monotonic() + TIMEOUT
        runner = shop.db.runner
        assert runner is not None
        while (kept := len(runner.held)) != 3 and time.monotonic() < deadline:
            pause.wait(0.02)
        gate.set()
        shop.drain()

    # The one that runs, and two at hand.
    assert kept == 3
    assert in_order(shop)[4:] == [f"{n:02}" for n in range(12)]
    assert {(shop.record(id).state, shop.record(id).attempt) for id in ids} == {("succeeded", 1)}
    shop.close()
