"""Heartbeats keep a worker alive for others, whatever its event loop does."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import signals
from aftercommit.records.tables import WorkerRecord
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Heard, Workshop

SILENT_AFTER = 3.0


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_a_blocked_event_loop_is_named_and_nothing_is_rescued(database: DatabaseUnderTest) -> None:
    """A task that blocks the loop for longer than a worker may be silent is reported by name, and keeps its claim."""
    shop, other = (Workshop(database, heartbeat=0.1, silent_after=SILENT_AFTER) for _ in range(2))
    begun, gate = threading.Event(), threading.Event()

    async def blocks() -> None:
        begun.set()
        # Waits as code does that computes, or that calls a blocking library: without an await.
        gate.wait(TIMEOUT)

    task = shop.db.task(name="blocks")(blocks)
    other.db.task(name="blocks")(blocks)

    with (
        Heard(signals.LoopBlocked, signals.TasksRescued, signals.TaskSucceeded) as heard,
        shop.running(),
        other.running(),
        ThreadPoolExecutor(1) as asker,
    ):
        shop.drain()
        other.drain()
        # On a thread, because the loop that hands it over is the one that stands still.
        asked = asker.submit(shop.ask, task)
        assert begun.wait(TIMEOUT)
        try:
            wait_for_heartbeats(other, seconds=2 * SILENT_AFTER)
            heard.wait(signals.LoopBlocked, count=len(heard.of(signals.LoopBlocked)) + 2)
            # On a busy machine any loop may stand for a moment; those have no task on them.
            blocked = [each for each in heard.of(signals.LoopBlocked) if each.tasks]
        finally:
            gate.set()
        record = asked.result(TIMEOUT)
        heard.wait(signals.TaskSucceeded)

    assert {each.tasks for each in blocked} == {("blocks",)}
    lines = {each.line for each in blocked}
    assert len(lines) == 1
    [line] = lines
    assert line is not None
    assert "test_heartbeats.py:" in line
    assert line.endswith(" in blocks")
    assert [each.seconds for each in blocked] == sorted({each.seconds for each in blocked})
    assert len(blocked) > 1
    assert heard.of(signals.TasksRescued) == []
    found = shop.record(record)
    assert (found.state, found.attempt, found.claims) == ("succeeded", 1, 1)
    other.close()
    shop.close()


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_code_that_is_no_task_and_blocks_the_event_loop_is_named_by_its_line(
    database: DatabaseUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    """An endpoint has no name here; the line at which the loop stands says what to look at, in the log as well."""
    shop = Workshop(database, heartbeat=0.1)
    begun, gate = threading.Event(), threading.Event()

    async def endpoint() -> None:
        begun.set()
        gate.wait(TIMEOUT)

    with Heard(signals.LoopBlocked) as heard, shop.running():
        asyncio.run_coroutine_threadsafe(endpoint(), shop.loop)
        assert begun.wait(TIMEOUT)
        try:
            told = heard.wait(signals.LoopBlocked, count=len(heard.of(signals.LoopBlocked)) + 1)
        finally:
            gate.set()
    shop.close()

    assert told.tasks == ()
    assert told.line is not None
    assert told.line.endswith(" in endpoint")
    assert any(
        "The event loop has not turned for" in each.getMessage() and f"it is at {told.line};" in each.getMessage()
        for each in caplog.records
    )


def wait_for_heartbeats(shop: Workshop, *, seconds: float) -> None:
    """Wait until this worker has looked around for so long, by the database's clock."""
    runner = shop.db.runner
    assert runner is not None

    def last() -> float:
        with Session(shop.outside) as session:
            return (
                session.scalars(sa.select(WorkerRecord.seen_at).where(WorkerRecord.id == runner.id)).one().timestamp()
            )

    first, deadline = last(), time.monotonic() + TIMEOUT
    while last() - first < seconds:
        assert time.monotonic() < deadline, "the other worker made no heartbeats"
