"""Hosts whose clocks differ: whatever is decided by a clock is decided by the database's."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import signals
from aftercommit.records.tables import WorkerRecord
from tests.crash.clock_child import LATER, SILENT_AFTER, make
from tests.support.databases import DatabaseUnderTest
from tests.support.processes import Log, spawn
from tests.support.servers import ROOT
from tests.support.workshop import TIMEOUT, Heard, Workshop


# SQLite's clock is the host's, and nobody shares its file with another host.
@pytest.mark.drivers("psycopg", "asyncpg")
@pytest.mark.parametrize("seconds", [3600, -3600], ids=["ahead", "behind"])
def test_a_wrong_clock_rescues_nothing_and_starts_nothing_early(
    database: DatabaseUnderTest, tmp_path: Path, seconds: int
) -> None:
    """A worker an hour ahead or behind and a right one leave each other's tasks alone, and delays are what they are."""
    gate, fifo = threading.Event(), tmp_path / "gate"
    os.mkfifo(fifo)
    shop, here, there, quick = make(database.url, database.driver, {"here": gate, "there": None})
    with Heard(signals.TaskStarted, signals.TasksRescued, signals.TaskSucceeded) as heard, shop.running(runs=["here"]):
        child = spawn(
            [sys.executable, "-m", "tests.crash.clock_child", database.url, database.driver, str(seconds), str(fifo)],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
        )
        assert child.stdout is not None
        log = Log(child.stdout)
        try:
            log.wait_for("READY")
            held = [shop.ask(here, "here"), shop.ask(there, "there")]
            early = shop.ask(quick.with_options(delay=LATER), "too early, by the clock of its runner")
            soon = shop.ask(quick.with_options(delay=0.1), "soon")
            heard.wait(signals.TaskStarted)
            log.wait_for("AT the gate")

            wait_for_heartbeats(shop, seconds=1.5 * SILENT_AFTER)
            wait_for_success(shop, soon)
            gate.set()
            with fifo.open("wb"):
                pass
            for id in held:
                wait_for_success(shop, id)
        finally:
            child.kill()
            child.wait()
            log.join()

    assert heard.of(signals.TasksRescued) == []
    assert "RESCUED" not in log.text
    assert [(shop.record(id).attempt, shop.record(id).claims) for id in held] == [(1, 1)] * 2
    assert shop.effects() == ["here", "soon", "there"]
    waiting = [record for record in shop.records() if record.state == "queued"]
    assert early in {record.id for record in waiting}
    assert [round((record.run_at - record.enqueued_at).total_seconds()) for record in waiting] == [LATER] * 2
    now = shop.sql("SELECT clock_timestamp()")
    assert all(0 < (record.run_at - now).total_seconds() <= LATER for record in waiting)
    shop.close()


def wait_for_success(shop: Workshop, id: object) -> None:
    """Wait until a record says that it succeeded."""
    deadline = time.monotonic() + TIMEOUT
    while shop.record(id).state != "succeeded":  # type: ignore[arg-type]
        assert time.monotonic() < deadline, shop.record(id)  # type: ignore[arg-type]


def wait_for_heartbeats(shop: Workshop, *, seconds: float) -> None:
    """Wait until two workers have looked around for so long, by the database's clock."""

    def last() -> list[float]:
        with Session(shop.outside) as session:
            workers = session.scalars(sa.select(WorkerRecord.seen_at).order_by(WorkerRecord.started_at))
            return [each.timestamp() for each in workers]

    first, deadline = last(), time.monotonic() + TIMEOUT
    assert len(first) == 2
    while any(now - then < seconds for then, now in zip(first, last(), strict=True)):
        assert time.monotonic() < deadline, "a worker made no heartbeats"
