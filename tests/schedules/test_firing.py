"""Each tick of a schedule is one record, whoever fires it, and one effect."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Cron, Every, ScheduleRecord, current_run, signals
from aftercommit.errors import ScheduleError, ScheduleStateError
from aftercommit.records import schedules
from aftercommit.records.ids import uuid7
from aftercommit.schedules.registry import Registry
from aftercommit.schedules.scheduler import Scheduler
from aftercommit.testing import replace, ticks
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Counter, Effect, Heard, Workshop

YEARLY = Cron("0 0 1 1 *", name="yearly")


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop with tables."""
    shop = Workshop(database, heartbeat=0.2, silent_after=5.0)
    yield shop
    shop.close()


def effect(session: Session, label: str) -> None:
    """Leave a trace."""
    session.add(Effect(label=label))


def row(shop: Workshop, name: str) -> ScheduleRecord:
    """A schedule's row."""
    with Session(shop.outside) as session:
        return session.get_one(ScheduleRecord, name)


def set_back(shop: Workshop, name: str, **ago: float) -> datetime:
    """Have a schedule be overdue."""
    with Session(shop.outside) as session, session.begin():
        found = session.get_one(ScheduleRecord, name)
        found.next_at = datetime.now(UTC).replace(microsecond=0) - timedelta(**ago)
        found.version += 1
        return found.next_at


def make(shop: Workshop, when: Any, task: Any, *args: Any) -> None:
    """A schedule as data."""
    shop.commit(lambda session: shop.db.create_schedule(session, when, task, *args))


def test_ticks_fire_once_each_and_their_windows_tile(shop: Workshop):
    """Every tick has one record and one run, and ``(previous, at]`` of successive runs tile time."""
    windows: list[tuple[datetime, datetime]] = []

    def tell(session: Session, label: str) -> None:
        windows.append((current_run().tick.previous, current_run().tick.at))

    task = shop.task()(tell)
    shop.db.schedule(Every(1.0, name="often"), task, "x")

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        heard.wait(signals.TaskSucceeded, count=3)

    found = row(shop, "often")
    records = [record for record in shop.records() if record.schedule == "often"]
    assert found.fired == len(records) == len({record.scheduled_at for record in records})
    windows.sort()
    assert all(earlier[1] == later[0] for earlier, later in pairwise(windows))
    assert windows[0][0] == found.created_at


@pytest.mark.drivers("psycopg", "pysqlite")
def test_many_who_fire_at_once_write_one_record(shop: Workshop):
    """The row decides: of eight that find the same tick due, one writes its record."""
    task = shop.task()(effect)
    with shop.running():
        make(shop, Every(3600.0, name="hourly"), task, "x")
    engine = shop.db.engine()
    together = threading.Barrier(8)

    class Executor:
        def execute(self, work: Any) -> Any:
            with engine.begin() as connection:
                return work(connection)

    class Together(Executor):
        met = False

        def execute(self, work: Any) -> Any:
            found = super().execute(work)
            # They have looked, and nobody has fired.
            if isinstance(found, tuple) and len(found) == 3 and not self.met:
                self.met = True
                together.wait(30)
            return found

    def fire(_: int) -> None:
        scheduler = Scheduler(
            Together(), Registry(), shop.db.tasks, expect=lambda _pool: None, max_bytes=1000, keep=None, worker=uuid7()
        )
        scheduler.make()

    missed = 0
    for hours, minutes in ((50, 5), (30, 15), (10, 25)):
        # Minutes, too, so that the newest tick is another one each time.
        set_back(shop, "hourly", hours=hours, minutes=minutes)
        shop.sql("UPDATE aftercommit_task SET state = 'succeeded'")
        shop.sql("UPDATE aftercommit_schedule SET anchor = next_at")
        missed += hours
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fire, range(8)))

    found = row(shop, "hourly")
    assert (found.fired, found.missed) == (3, missed)
    assert len(shop.records()) == 3


def test_it_exists_if_and_only_if_its_transaction_commits(shop: Workshop):
    """Rolled back, or in a savepoint that is rolled back, a schedule never was; a second of its name is refused."""
    task = shop.task()(effect)

    def fail(session: Session) -> None:
        shop.db.create_schedule(session, YEARLY, task, "x")
        raise RuntimeError

    def undo(session: Session) -> None:
        with pytest.raises(RuntimeError), session.begin_nested():
            fail(session)
        session.add(Effect(label="kept"))

    with shop.running():
        with pytest.raises(RuntimeError):
            shop.commit(fail)
        shop.commit(undo)
        assert shop.sql("SELECT count(*) FROM aftercommit_schedule") == 0
        make(shop, YEARLY, task, "x")

        def again(session: Session) -> None:
            with pytest.raises(ScheduleError):
                shop.db.create_schedule(session, YEARLY, task, "x")
            session.add(Effect(label="usable"))

        shop.commit(again)

    assert shop.effects() == ["kept", "usable"]
    assert row(shop, "yearly").origin == "data"


@pytest.mark.parametrize(("overlap", "fired", "skipped"), [("skip", 1, 1), ("wait", 1, 0), ("allow", 2, 0)])
@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_tick_while_the_last_run_is_unfinished(shop: Workshop, overlap: Any, fired: int, skipped: int):
    """``skip`` leaves it out, ``wait`` fires it once that run has ended, ``allow`` fires it."""
    task = shop.task()(effect)
    with shop.running():
        make(shop, Every(3600.0, name="hourly", overlap=overlap), task, "x")
        shop.db.pause("default")
    with shop.running(), Heard(signals.ScheduleFired, signals.ScheduleSkipped) as heard:
        set_back(shop, "hourly", hours=5)
        shop.db.outbox.look()
        heard.wait(signals.ScheduleFired)
        set_back(shop, "hourly", hours=1)
        shop.db.outbox.look()
        if overlap == "skip":
            heard.wait(signals.ScheduleSkipped)
        elif overlap == "allow":
            heard.wait(signals.ScheduleFired, count=2)
        assert (row(shop, "hourly").fired, row(shop, "hourly").skipped) == (fired, skipped)
        shop.db.resume("default")
        if overlap == "wait":
            heard.wait(signals.ScheduleFired, count=2)
        shop.drain()

    assert len(shop.effects()) == (1 if overlap == "skip" else 2)


@pytest.mark.parametrize(("catch_up", "records", "missed"), [("latest", 1, 72), ("none", 0, 0), ("all", 24, 0)])
@pytest.mark.drivers("psycopg", "pysqlite")
def test_three_days_without_a_process(shop: Workshop, catch_up: Any, records: int, missed: int):
    """The newest tick fires and stands for the others; or none; or each of the last day, in order."""
    told: list[int] = []

    def tell(session: Session, label: str) -> None:
        told.append(current_run().tick.missed)

    task = shop.task()(tell)
    within = {"catch_up_within": 86_390.0} if catch_up == "all" else {}
    with shop.running():
        make(shop, Every(3600.0, name="hourly", catch_up=catch_up, **within), task, "x")
    set_back(shop, "hourly", days=3, seconds=90)
    anchor = row(shop, "hourly").next_at
    shop.sql("UPDATE aftercommit_schedule SET anchor = next_at")
    assert anchor is not None

    with shop.running(), Heard(signals.ScheduleMissed) as heard:
        if catch_up != "latest":
            gone = heard.wait(signals.ScheduleMissed)
            assert gone.first == anchor
        shop.drain()

    found = sorted(record.scheduled_at for record in shop.records() if record.scheduled_at is not None)
    assert len(found) == records
    assert told == [missed] * records
    if catch_up == "all":
        assert found == [found[0] + timedelta(hours=n) for n in range(24)]


def test_pause_resume_and_trigger(shop: Workshop):
    """What is paused fires nothing, and its ticks are refused; what is triggered runs now, and moves no tick."""
    told: list[bool] = []

    def tell(session: Session, label: str) -> None:
        told.append(current_run().tick.triggered)

    task = shop.task()(tell)
    with shop.running():
        make(shop, YEARLY, task, "x")
        before = row(shop, "yearly").next_at
        call(shop, "trigger_schedule", "yearly")
        shop.drain()
        call(shop, "pause_schedule", "yearly", by="ada")
        paused = row(shop, "yearly")
        set_back(shop, "yearly", days=400)
        shop.drain()
        call(shop, "resume_schedule", "yearly")
        shop.drain()
        with pytest.raises(ScheduleStateError):
            call(shop, "resume_schedule", "yearly")
        with pytest.raises(ScheduleStateError):
            call(shop, "trigger_schedule", "monthly")

    assert told == [True]
    assert (paused.paused_by, row(shop, "yearly").next_at) == ("ada", before)


def call(shop: Workshop, name: str, *args: Any, **kwargs: Any) -> Any:
    """A method of the database, or its async twin."""
    if not shop.is_async:
        return getattr(shop.db, name)(*args, **kwargs)
    return shop.on_loop(getattr(shop.db, f"async_{name}")(*args, **kwargs))


def test_changed_in_the_users_transaction(shop: Workshop):
    """What was made as data is changed and deleted in a transaction; what the code declares is not."""
    task = shop.task()(effect)
    shop.db.schedule(Cron("0 0 1 2 *", name="of the code"), task, "x")
    with shop.running():
        make(shop, YEARLY, task, "x")
        shop.commit(lambda session: shop.db.update_schedule(session, "yearly", Cron("0 0 1 3 *")))
        changed = row(shop, "yearly")
        for change in (
            lambda session: shop.db.delete_schedule(session, "of the code"),
            lambda session: shop.db.update_schedule(session, "of the code", YEARLY),
            lambda session: shop.db.delete_schedule(session, "nothing"),
        ):
            with pytest.raises((ScheduleStateError, ScheduleError)):
                shop.commit(change)
        shop.commit(lambda session: shop.db.delete_schedule(session, "yearly"))

    assert changed.next_at is not None
    assert (changed.next_at.month, changed.expression) == (3, "0 0 1 3 *")
    assert shop.sql("SELECT count(*) FROM aftercommit_schedule") == 1


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_deploy_changes_renames_and_forgets(shop: Workshop):
    """The last to start wins; a rename keeps what is remembered; what nobody declares is not fired, and goes."""
    task = shop.task()(effect)

    def deploy(*whens: Any) -> None:
        shop.db.schedules._declared.clear()
        for when in whens:
            shop.db.schedule(when, task, "x")
        with shop.running():
            shop.drain()

    deploy(Cron("0 0 1 2 *", name="old"))
    shop.sql("UPDATE aftercommit_schedule SET fired = 7")
    deploy(Cron("0 0 1 3 *", name="new", aliases=("old",)))
    renamed = row(shop, "new")
    assert (renamed.fired, renamed.expression) == (7, "0 0 1 3 *")

    set_back(shop, "new", days=400)
    deploy()
    assert row(shop, "new").fired == 7
    shop.sql("UPDATE aftercommit_schedule SET declared_at = '2020-01-01 00:00:00.000000'")
    deploy()
    assert shop.sql("SELECT count(*) FROM aftercommit_schedule") == 0


def test_immediately_fires_once_in_its_life(shop: Workshop):
    """At its creation, and not at each start of a process."""
    task = shop.task()(effect)
    shop.db.schedule(Every(3600.0, name="hourly", immediately=True), task, "x")

    for _ in range(3):
        with shop.running():
            shop.drain()

    assert shop.effects() == ["x"]
    assert shop.records()[0].scheduled_at == row(shop, "hourly").created_at


def test_a_row_that_is_gone_ends_its_schedule(shop: Workshop):
    """One that was made as data for a row ends with that row, and says why; it fails once, and not for ever."""

    def note(session: Session, counter: Counter) -> None:
        session.add(Effect(label=str(counter.id)))

    async def async_note(session: AsyncSession, counter: Counter) -> None:
        session.add(Effect(label=str(counter.id)))

    task = shop.db.task(name="note")(async_note if shop.is_async else note)

    def customer(session: Session) -> None:
        counter = Counter(id=7)
        session.add(counter)
        shop.db.create_schedule(session, Every(3600.0, name="of 7"), task, counter)

    with shop.running(), Heard(signals.ScheduleEnded, signals.TaskFailed) as heard:
        shop.commit(customer)
        set_back(shop, "of 7", hours=1)
        shop.drain()
        assert shop.effects() == ["7"]
        shop.sql("DELETE FROM counter")
        set_back(shop, "of 7", seconds=10)
        shop.drain()

    ended = heard.wait(signals.ScheduleEnded)
    found = row(shop, "of 7")
    assert (ended.schedule, ended.reason) == ("of 7", found.ended_because)
    assert (found.next_at, found.fired) == (None, 2)
    assert found.ended_at is not None
    assert len(heard.of(signals.TaskFailed)) == 1


def test_a_clock_that_went_forward_and_back(shop: Workshop):
    """A tick a year from now, fired by a clock that was wrong, does not keep a schedule from going on."""
    task = shop.task()(effect)
    with shop.running():
        make(shop, Every(3600.0, name="hourly"), task, "x")
    with Session(shop.outside) as session, session.begin():
        found = session.get_one(ScheduleRecord, "hourly")
        found.last_at = datetime.now(UTC) + timedelta(days=365)
        found.next_at = found.last_at + timedelta(hours=1)

    with shop.running():
        shop.drain()

    following = row(shop, "hourly").next_at
    assert following is not None
    assert following < datetime.now(UTC) + timedelta(hours=1, seconds=5)


def test_in_a_users_test_nothing_fires_by_itself(database: DatabaseUnderTest):
    """``tasks.tick`` writes the record of a tick, and ``tasks.run`` runs it with that tick."""
    shop = Workshop(database)
    told: list[Any] = []

    def tell(session: Session, label: str) -> None:
        told.append((label, current_run().tick))

    task = shop.task()(tell)
    shop.db.schedule(Cron("0 3 * * *", timezone="Asia/Tokyo", name="report apac"), task, "apac")
    at = datetime(2026, 3, 1, 18, tzinfo=UTC)

    async def on_loop() -> None:
        async with replace(shop.db, url=database.url) as tasks:
            id = await tasks.async_tick("report apac", at=at)
            assert [pending.id for pending in tasks.pending] == [id]
            await tasks.async_run()

    if database.is_async:
        asyncio.run(on_loop())
    else:
        with replace(shop.db, url=database.url) as tasks:
            assert [declared.name for declared in tasks.schedules] == ["report apac"]
            tasks.tick("report apac", at=at)
            tasks.run()
    shop.close()

    [(label, tick)] = told
    assert (label, tick.at, str(tick.at.tzinfo), tick.schedule) == ("apac", at, "Asia/Tokyo", "report apac")
    assert [each.year for each in ticks(Cron("0 0 29 2 *"), since=at, count=2)] == [2028, 2032]


def test_a_tick_has_one_id_whoever_writes_it():
    """A kept tick cannot be written twice, even if the row is set back by hand."""
    at = datetime(2026, 3, 1, 7, tzinfo=UTC)

    one, other = schedules.tick_id("report", at), schedules.tick_id("report", at + timedelta(microseconds=1))

    assert one == schedules.tick_id("report", at)
    assert one.version == 7
    assert one != other
    assert schedules.tick_id("other", at) != one


def test_refused(shop: Workshop):
    """What cannot be scheduled is refused where it is written."""

    def in_memory(session: Session, label: str) -> None:
        """Cheap work."""

    task, memory = shop.task()(effect), shop.task(durable=False)(in_memory)

    shop.db.schedule(Every(5.0), task, "x")
    for when, what in [
        (Every(7.0), task),
        (Every(7.0, name="m"), memory),
        (Every(7.0, name="d"), task.with_options(delay=3.0)),
        ("@daily", task),
    ]:
        with pytest.raises(ScheduleError):
            shop.db.schedule(when, what, "x")


class Directly:
    """Writes on a connection of its own."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop

    def execute(self, work: Any) -> Any:
        """Do it in a transaction."""
        with self._shop.outside.begin() as connection:
            return work(connection)


def scheduler_of(shop: Workshop) -> Scheduler:
    """One of a process of its own."""
    return Scheduler(
        Directly(shop), Registry(), shop.db.tasks, expect=lambda _: None, max_bytes=1000, keep=None, worker=uuid7()
    )


@pytest.mark.drivers("psycopg", "pysqlite")
def test_more_than_fit_into_one_look_are_fired_at_once(shop: Workshop):
    """The rest does not wait for a look that comes by itself."""
    task = shop.task()(effect)
    with shop.running():
        pass
    for number in range(150):
        make(shop, Cron("0 0 1 1 *", name=f"yearly {number}"), task, "x")
    with Session(shop.outside) as session, session.begin():
        for each in session.scalars(select(ScheduleRecord)):
            each.next_at = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
    scheduler = scheduler_of(shop)

    looks = 0
    while scheduler.due <= time.monotonic():
        scheduler.make()
        looks += 1

    assert len(shop.records()) == 150
    assert looks <= 3


@pytest.mark.drivers("psycopg", "pysqlite")
def test_all_schedules_are_put_right_however_many(shop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """Those that are right do not keep the others from being looked at."""
    monkeypatch.setattr(schedules, "_PAGE", 10)
    task = shop.task()(effect)
    with shop.running():
        pass
    for number in range(35):
        make(shop, Cron("0 0 1 1 *", name=f"yearly {number}"), task, "x")
    make(shop, Cron("0 * * * *", name="near"), task, "x")
    right = row(shop, "near").next_at
    with Session(shop.outside) as session, session.begin():
        found = session.get_one(ScheduleRecord, "near")
        found.next_at = right + timedelta(minutes=20)
        found.last_at = right - timedelta(hours=1)

    scheduler_of(shop).make()

    assert row(shop, "near").next_at == right
