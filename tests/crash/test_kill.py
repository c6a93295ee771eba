"""Whatever is killed or frozen, and whenever: every committed request takes effect exactly once."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import TaskRecord
from tests.crash.child import BETWEEN_CHECKPOINTS, OWN_CLAIM, POINTS, make, request
from tests.support.databases import DatabaseUnderTest
from tests.support.processes import Log, spawn
from tests.support.servers import ROOT
from tests.support.workshop import Counter, Effect


class Child:
    """A process of ``tests.crash.child``."""

    def __init__(self, process: "Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        self.log = Log(process.stdout)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)


@contextmanager
def child(database: DatabaseUnderTest, point: str = "", *more: str) -> Iterator[Child]:
    """Start one; at the end it is killed."""
    process = spawn(
        [sys.executable, "-m", "tests.crash.child", database.url, database.driver, point, *more],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
    )
    started = Child(process)
    try:
        yield started
    finally:
        process.kill()
        process.wait()
        started.log.join()


def state(database: DatabaseUnderTest) -> tuple[list[str], list[str], list[tuple[str, int]]]:
    """The committed requests, the effects, and state and attempt of every record."""
    engine = sa.create_engine(database.sync_url)
    with Session(engine) as session:
        requests = [str(each) for each in session.scalars(sa.select(Counter.id).order_by(Counter.id))]
        effects = list(session.scalars(sa.select(Effect.label).order_by(Effect.label)))
        records = [(each.state, each.attempt) for each in session.scalars(sa.select(TaskRecord))]
    engine.dispose()
    return requests, effects, records


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_process_loses_and_doubles_nothing(database: DatabaseUnderTest, point: str):
    """SIGKILL at any point: another process finishes what was committed, and nothing that was not."""
    with child(database, point) as victim:
        victim.log.wait_for(f"AT {point}")
        victim.send(signal.SIGKILL)
        victim.process.wait()

    with child(database) as heir:
        heir.log.wait_for("DRAINED")

    requests, effects, records = state(database)
    expected = [] if point == "before the commit" else ["1"]
    assert (requests, effects) == (expected, expected)
    attempts = 1 if point == "after the end" else 2
    assert records == [("succeeded", attempts)] * len(expected)


def test_what_a_worker_claimed_itself_outlives_it(database: DatabaseUnderTest):
    """SIGKILL after the claim of what another process handed over: a third one finishes it."""
    plain = "pysqlite" if database.is_sqlite else "psycopg"
    web = make(database.sync_url, plain)
    web.db.create_tables()
    request(web, "1")
    web.close()
    assert state(database) == (["1"], [], [("queued", 0)])

    with child(database, OWN_CLAIM) as victim:
        victim.log.wait_for(f"AT {OWN_CLAIM}")
        assert state(database) == (["1"], [], [("running", 1)])
        victim.send(signal.SIGKILL)
        victim.process.wait()
    with child(database) as heir:
        heir.log.wait_for("DRAINED")

    assert state(database) == (["1"], ["1"], [("succeeded", 2)])


def test_a_killed_task_goes_on_from_its_last_checkpoint(database: DatabaseUnderTest):
    """SIGKILL between two checkpoints: what was committed with the last one stands, and is not done again."""
    with child(database, BETWEEN_CHECKPOINTS) as victim:
        victim.log.wait_for(f"AT {BETWEEN_CHECKPOINTS}")
        assert state(database) == (["1"], ["1, step 0", "1, step 1"], [("running", 1)])
        victim.send(signal.SIGKILL)
        victim.process.wait()

    with child(database) as heir:
        heir.log.wait_for("DRAINED")

    assert state(database) == (["1"], [f"1, step {step}" for step in range(4)], [("succeeded", 2)])


def test_a_frozen_process_cannot_commit_when_it_wakes(database: DatabaseUnderTest, tmp_path: Path):
    """SIGSTOP past the rescue, then SIGCONT: the zombie gets LostClaim, and the other run stands."""
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    with child(database, "frozen", str(fifo)) as zombie:
        zombie.log.wait_for("AT frozen")
        zombie.send(signal.SIGSTOP)
        with child(database) as heir:
            heir.log.wait_for("DRAINED")
        assert state(database)[1:] == (["1"], [("succeeded", 2)])

        zombie.send(signal.SIGCONT)
        with fifo.open("wb"):
            pass
        zombie.log.wait_for("AC302")
        zombie.log.wait_for("DRAINED")

    assert state(database) == (["1"], ["1"], [("succeeded", 2)])


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_task_that_kills_its_process_ends_failed(database: DatabaseUnderTest):
    """A poisonous task is given to one process after another, and ends failed after its last attempt, saying why."""
    for _ in range(5):
        with child(database, "in the effect") as victim:
            victim.log.wait_for("AT in the effect")
            victim.send(signal.SIGKILL)
            victim.process.wait()

    with child(database) as heir:
        heir.log.wait_for("DRAINED")

    engine = sa.create_engine(database.sync_url)
    with Session(engine) as session:
        record = session.scalars(sa.select(TaskRecord).order_by(TaskRecord.id)).first()
        assert record is not None
        assert (record.state, record.attempt) == ("failed", 5)
        assert (record.error or "").startswith("aftercommit.errors.WorkerLost")
    engine.dispose()
