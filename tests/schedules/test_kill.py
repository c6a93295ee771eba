"""Processes that fire the same schedules are killed, frozen and started again: one record for each tick."""

import os
import random
import signal
import sys
import threading
from collections import defaultdict
from contextlib import ExitStack
from datetime import datetime
from itertools import pairwise

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import ScheduleRecord, TaskRecord
from tests.crash.test_kill import Child
from tests.schedules.child import NAMES, make
from tests.support.databases import DatabaseUnderTest
from tests.support.processes import spawn
from tests.support.servers import ROOT
from tests.support.workshop import Effect

PROCESSES = 4
MISHAPS = 14


def start(database: DatabaseUnderTest, stack: ExitStack) -> Child:
    """Start one; at the end it is killed."""
    process = spawn(
        [sys.executable, "-m", "tests.schedules.child", database.url, database.driver],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
    )
    started = Child(process)
    stack.callback(started.log.join)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return started


@pytest.mark.drivers("psycopg", "pysqlite")
def test_one_record_for_each_tick_whatever_is_killed(database: DatabaseUnderTest):
    """Records are distinct ticks, each took effect once, fired counts them, and their windows tile time."""
    rng = random.Random(7)
    pause = threading.Event()
    # The application's tables first: processes that make them side by side would be in each other's way.
    make(database.url, database.driver).close()
    with ExitStack() as stack:
        running = [start(database, stack) for _ in range(PROCESSES)]
        for each in running:
            each.log.wait_for("RUNNING", timeout=60.0)
        for _ in range(MISHAPS):
            # What befalls them is spread over time; nothing is waited for.
            pause.wait(rng.uniform(0.2, 0.9))
            victim = rng.randrange(PROCESSES)
            if rng.random() < 0.5:
                running[victim].send(signal.SIGSTOP)
                pause.wait(rng.uniform(0.1, 1.6))
                running[victim].send(signal.SIGCONT)
            else:
                running[victim].send(signal.SIGKILL)
                running[victim].process.wait()
                running[victim] = start(database, stack)

    shop = make(database.url, database.driver)
    with shop.running():
        # Else a tick that fires behind the look would be queued when this process stops.
        for name in (*NAMES, "skips"):
            shop.db.pause_schedule(name)
        shop.drain()
    shop.close()

    engine = sa.create_engine(database.sync_url)
    with Session(engine) as session:
        schedules = {each.name: each for each in session.scalars(sa.select(ScheduleRecord))}
        records = list(session.scalars(sa.select(TaskRecord)))
        effects = list(session.scalars(sa.select(Effect.label)))
    engine.dispose()
    windows: dict[str, list[tuple[datetime, datetime]]] = defaultdict(list)
    for label in effects:
        name, previous, at = label.rsplit(" ", 2)
        windows[name].append((datetime.fromisoformat(previous), datetime.fromisoformat(at)))
    assert {each.state for each in records} == {"succeeded"}
    assert set(schedules) == {*NAMES, "skips"}
    for name, schedule in schedules.items():
        ticks = [each.scheduled_at for each in records if each.schedule == name]
        found = sorted(windows[name])
        assert schedule.fired == len(ticks) == len(set(ticks)) == len(found)
        assert len(ticks) >= 5
        assert found[0][0] == schedule.created_at
        assert all(earlier[1] == later[0] for earlier, later in pairwise(found))
        assert found[-1][1] == schedule.last_at
