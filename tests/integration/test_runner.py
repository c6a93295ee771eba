"""What the runner promises: tasks run, fail, are repeated and retried, each in a world of its own."""

import asyncio
import contextvars
import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from sqlalchemy import exc, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import PoolSettings, Retry, current_run, signals
from aftercommit.errors import CommitWithoutCheckpoint, PayloadError, RowGone, TaskTimeout
from aftercommit.records import moves
from aftercommit.runner import rounds
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Counter, Effect, Heard, Workshop

postgres_drivers = pytest.mark.drivers("psycopg", "asyncpg")
sqlite_drivers = pytest.mark.drivers("pysqlite", "aiosqlite")
sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database, heartbeat=0.2, silent_after=30.0, pools={"other": PoolSettings(pool_size=2)})
    yield shop
    shop.close()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What the library says."""
    with Heard(signals.Signal) as heard:
        yield heard


def effect(session: Session, label: str) -> None:
    """What most tasks here do."""
    session.add(Effect(label=label))


@contextmanager
def statements(sent: list[str]) -> Iterator[None]:
    """Put down what is sent to any database."""

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


# --- starting -----------------------------------------------------------------------------------------------------


def test_a_task_starts_at_its_commit_without_polling(shop: Workshop, heard: Heard):
    """A task of this process is born claimed: no look into the database comes between commit and start."""
    task = shop.task()(effect)
    sent: list[str] = []
    with shop.running():
        heard.wait(signals.WorkerStarted)
        shop.drain()

        with statements(sent):
            id = shop.ask(task, "a")
            heard.wait(signals.TaskSucceeded)

    record = shop.record(id)
    assert (record.state, record.attempt, record.claims, shop.effects()) == ("succeeded", 1, 1, ["a"])
    assert any("INSERT INTO aftercommit_task" in each for each in sent)
    assert not any("claims = claims + 1" in each for each in sent)


def test_what_was_queued_before_the_start_is_run(shop: Workshop, heard: Heard):
    """Records that wait in the database are claimed once a runner is there, oldest first."""
    task = shop.task(pool="other")(effect)
    with shop.running(runs=("default",)):
        ids = [shop.ask(task, str(number)) for number in range(5)]
        assert {shop.record(id).state for id in ids} == {"queued"}

    with shop.running():
        shop.drain()

    assert shop.effects() == ["0", "1", "2", "3", "4"]
    started = [each.id for each in heard.of(signals.TaskStarted)]
    assert sorted(started[:2]) == sorted(ids[:2])


@sync_drivers
def test_def_tasks_run_on_threads_of_their_pool(shop: Workshop):
    """A ``def`` task runs in a thread named after its pool, at most as many at once as the pool is wide."""
    names: list[str] = []
    gate = threading.Event()
    both = threading.Barrier(3)

    @shop.task(pool="other", gate=gate, begun=lambda: names.append(threading.current_thread().name) or both.wait(30))
    def busy(session: Session, label: str) -> None:
        """Nothing."""

    with shop.running():
        shop.commit(lambda session: [shop.db.after_commit(session, busy, str(n)) for n in range(2)] and None)
        both.wait(TIMEOUT)
        gate.set()
        shop.drain()

    assert len(set(names)) == 2
    assert all(name.startswith("aftercommit-other-") for name in names)


def test_pools_are_no_wider_than_they_say(shop: Workshop, heard: Heard):
    """With every place of one pool taken, its next task waits, and another pool's does not."""
    gate = threading.Event()
    busy = shop.task(pool="other", gate=gate)(effect)

    @shop.task()
    def quick(session: Session, label: str) -> None:
        """Nothing."""

    with shop.running():
        shop.commit(lambda session: [shop.db.after_commit(session, busy, str(n)) for n in range(3)] and None)
        heard.wait(signals.TaskStarted, count=2)
        shop.ask(quick)
        done = heard.wait(signals.TaskSucceeded)

        assert done.task == "quick"
        assert [each.task for each in heard.of(signals.TaskStarted)].count("effect") == 2
        gate.set()
        shop.drain()

    assert shop.effects() == ["0", "1", "2"]


def test_a_pool_runs_as_many_at_once_as_it_is_told(database: DatabaseUnderTest):
    """With ``concurrency=1`` a second task waits, however many connections are free."""
    shop = Workshop(database, pools={"other": PoolSettings(pool_size=5, concurrency=1)})
    gate = threading.Event()
    task = shop.task(pool="other", gate=gate)(effect)

    with shop.running():
        shop.drain()
        shop.commit(lambda session: [shop.db.after_commit(session, task, str(n)) for n in range(3)] and None)
        figures = shop.db.stats().pools["other"]
        gate.set()
        shop.drain()

    assert (figures.running, figures.backlog) == (1, 2)
    assert shop.effects() == ["0", "1", "2"]
    shop.close()


def test_tasks_that_hold_no_connection_may_outnumber_them(database: DatabaseUnderTest):
    """With ``concurrency=4`` four tasks run at once over one connection, if each commits before it waits."""
    shop = Workshop(database, pools={"other": PoolSettings(pool_size=1, concurrency=4)})
    together = threading.Barrier(4)

    def plain(session: Session) -> None:
        session.execute(sa.text("SELECT 1"))
        session.commit()
        together.wait(TIMEOUT)
        effect(session, "together")

    async def native(session: AsyncSession) -> None:
        await session.execute(sa.text("SELECT 1"))
        await session.commit()
        await asyncio.to_thread(together.wait, TIMEOUT)
        session.add(Effect(label="together"))

    meets: Any = shop.db.task(name="meets", pool="other")(native if shop.is_async else plain)
    with shop.running():
        shop.commit(lambda session: [shop.db.after_commit(session, meets) for _ in range(4)] and None)
        shop.drain()

    assert [(record.state, record.attempt) for record in shop.records()] == [("succeeded", 1)] * 4
    assert shop.effects() == ["together"] * 4
    shop.close()


@sync_drivers
@pytest.mark.parametrize(
    ("told", "runs", "succeed"),
    [
        ("none", ("default", "other"), set()),
        ("other", ("default",), {"in other"}),
        ("all", (), {"in default", "in other"}),
    ],
)
def test_the_environment_says_which_pools_run(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, told: str, runs: tuple[str, ...], succeed: set[str]
):
    """``AFTERCOMMIT_RUNS`` names the pools that a process runs, whatever its code says in ``runs=``."""
    monkeypatch.setenv("AFTERCOMMIT_RUNS", told)
    tasks = [shop.db.task(name=f"in {pool}", pool=pool)(_nothing) for pool in ("default", "other")]

    with shop.running(runs=runs):
        shop.commit(lambda session: [shop.db.after_commit(session, task) for task in tasks] and None)
        if succeed:
            shop.drain()

    assert {record.task for record in shop.records() if record.state == "succeeded"} == succeed
    assert {record.task for record in shop.records() if record.state == "queued"} == {
        "in default",
        "in other",
    } - succeed


def _nothing() -> None:
    """What a task does that only has to be run."""


# --- failing ------------------------------------------------------------------------------------------------------


def test_one_failure_touches_no_other(shop: Workshop, caplog: pytest.LogCaptureFixture):
    """A task that raises is recorded with its traceback and logged once; those beside it take effect."""
    good = shop.task()(effect)

    @shop.task()
    def bad(session: Session, label: str) -> None:
        effect(session, "never")
        session.flush()
        raise ValueError(f"no {label}")

    with shop.running(), caplog.at_level(logging.INFO):

        def ask(session: Session) -> Any:
            shop.db.after_commit(session, good, "a")
            handle = shop.db.after_commit(session, bad, "way")
            shop.db.after_commit(session, good, "b")
            return handle.id

        id = shop.commit(ask)
        shop.drain()

    record = shop.record(id)
    assert shop.effects() == ["a", "b"]
    assert (record.state, record.error, record.attempt) == ("failed", "ValueError: no way", 1)
    assert "in bad" in (record.traceback or "")
    assert [each["attempt"] for each in record.errors or ()] == [1]
    lines = [line.getMessage() for line in caplog.records if line.levelno >= logging.ERROR]
    assert len(lines) == 1
    assert all(part in lines[0] for part in ("'bad'", str(id), "attempt 1"))


def test_on_failure_is_part_of_the_recording(shop: Workshop):
    """What ``on_failure`` writes and the note of the failure commit together, in a session that has not failed."""
    seen: list[str] = []

    def mark(session: Session, error: BaseException, label: str = "") -> None:
        record_state = session.connection().exec_driver_sql("SELECT state FROM aftercommit_task").scalar()
        seen.append(f"{type(error).__name__} {record_state}")
        session.add(Effect(label=f"failed {label}"))

    @shop.task(on_failure=mark)
    def bad(session: Session, label: str) -> None:
        session.execute(sa.text("SELECT nonsense"))

    with shop.running():
        id = shop.ask(bad, "x")
        shop.drain()

    assert shop.effects() == ["failed x"]
    assert seen[0].endswith(" failed")
    assert shop.record(id).state == "failed"


def test_on_failure_that_raises_hides_nothing(shop: Workshop):
    """If ``on_failure`` raises, what it wrote is rolled back, and the record tells of both errors."""

    def mark(session: Session, error: BaseException, label: str = "") -> None:
        session.add(Effect(label="never"))
        session.flush()
        raise KeyError("second")

    @shop.task(on_failure=mark)
    def bad(session: Session, label: str) -> None:
        raise ValueError("first")

    with shop.running():
        id = shop.ask(bad)
        shop.drain()

    record = shop.record(id)
    assert (record.state, shop.effects(), record.error) == ("failed", [], "ValueError: first")
    assert "second" in (record.traceback or "")


def test_without_arguments_on_failure_is_not_called(shop: Workshop, heard: Heard):
    """A row that is gone and arguments that cannot be read fail the task, once, and call nothing."""
    called: list[object] = []

    def plain(session: Session, row: Counter) -> None:
        called.append(row)

    async def native(session: AsyncSession, row: Counter) -> None:
        called.append(row)

    by_row: Any = shop.db.task(pool="other", name="by_row", on_failure=lambda *_: called.append(1))(
        native if shop.is_async else plain
    )

    with shop.running(runs=("default",)):

        def ask(session: Session) -> Any:
            row = Counter()
            session.add(row)
            session.flush()
            return [shop.db.after_commit(session, by_row, row).id for _ in range(2)]

        gone, changed = shop.commit(ask)
        shop.sql("DELETE FROM counter")
        shop.sql("""UPDATE aftercommit_task SET arguments = '{"row": "nonsense"}' WHERE id = :id""",
                 id=changed if not shop.under_test.is_sqlite else changed.hex)  # fmt: skip
    with shop.running():
        shop.drain()

    failures = {each.id: each.error for each in heard.of(signals.TaskFailed)}
    assert (type(failures[gone]), type(failures[changed])) == (RowGone, PayloadError)
    assert called == []
    assert {record.attempt for record in shop.records()} == {1}


def test_unencodable_errors_are_recorded(shop: Workshop):
    """Half a surrogate pair or a NUL in an error's message does not keep the failure from being written."""

    @shop.task()
    def bad(session: Session, label: str) -> None:
        raise ValueError("a\0b \ud800 c")

    with shop.running():
        id = shop.ask(bad)
        shop.drain()

    record = shop.record(id)
    assert (record.state, record.error) == ("failed", "ValueError: a\\0b \\ud800 c")


# --- what crosses, and what stays ---------------------------------------------------------------------------------

_request: contextvars.ContextVar[str] = contextvars.ContextVar("_request", default="nobody's")


def test_logs_context_crosses_and_the_requests_does_not(shop: Workshop):
    """structlog's bound values follow the task, beside its own; the request's other variables stay with it."""
    seen: list[Any] = []
    own = {"task", "task_id", "attempt"}

    @shop.task()
    def look(session: Session, label: str) -> None:
        bound = structlog.contextvars.get_contextvars()
        assert own <= bound.keys()
        seen.append(({name: bound[name] for name in bound.keys() - own}, _request.get()))

    with shop.running():

        def ask(session: Session) -> None:
            _request.set("the request's")
            with structlog.contextvars.bound_contextvars(request_id="r1"):
                shop.db.after_commit(session, look)

        contextvars.copy_context().run(shop.commit, ask)
        shop.drain()
        shop.ask(look)
        shop.drain()

    assert seen == [({"request_id": "r1"}, "nobody's"), ({}, "nobody's")]


def test_the_run_knows_itself(shop: Workshop):
    """``current_run()`` tells id, name and attempt inside, and is None outside; children know their parent."""
    seen: list[Any] = []
    child = shop.task()(effect)

    @shop.task()
    def parent(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        seen.append((run.id, run.name, run.attempt))
        shop.db.after_commit(session, child, "child")

    with shop.running():
        id = shop.ask(parent)
        shop.drain()

    assert seen == [(id, "parent", 1)]
    assert current_run() is None
    assert [record.parent for record in shop.records()] == [None, id]
    assert shop.effects() == ["child"]


def test_a_finished_run_keeps_nothing_alive(shop: Workshop):
    """Neither the session nor what it loaded outlives the run, though thread, loop and connection do."""
    sessions: list[weakref.ref[Any]] = []

    @shop.task()
    def look(session: Session, label: str) -> None:
        session.execute(select(Counter)).all()
        sessions.append(weakref.ref(session))

    with shop.running():
        shop.ask(look)
        shop.drain()
        gc.collect()

        assert sessions[0]() is None


# --- deploys ------------------------------------------------------------------------------------------------------


def test_unknown_names_wait(shop: Workshop):
    """A record whose task this process does not know stays queued, and harms neither the runner nor the others."""
    task = shop.task()(effect)
    with shop.running():
        shop.drain()
        unknown = shop.sql(
            "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at) VALUES "
            "('01900000000070008000000000000001', 'from_tomorrow', 'default', 'queued', '{}', '2020-01-01', "
            "'2020-01-01')"
        )
        shop.db.runner.expect("default")  # type: ignore[union-attr]
        shop.ask(task, "a")
        shop.drain()

    assert unknown is None
    assert [record.state for record in shop.records()] == ["queued", "succeeded"]


def test_a_former_name_is_served(shop: Workshop):
    """A record under a former name runs the task that carries it as an alias."""
    shop.task(aliases=("effect_of_old",))(effect)
    with shop.running():
        shop.sql(
            "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at) VALUES "
            "('01900000000070008000000000000001', 'effect_of_old', 'default', 'queued', '{\"label\": \"a\"}', "
            "'2020-01-01', '2020-01-01')"
        )
        shop.drain()

    assert shop.effects() == ["a"]


def test_a_task_that_moved_to_another_pool_is_found(database: DatabaseUnderTest):
    """What was queued in the pool that a task had before runs, whether that pool still exists or not."""
    # As long as silence takes to be noticed, the old pool may be another application's, which is starting again.
    shop = Workshop(database, pools={"other": PoolSettings(pool_size=1)}, heartbeat=0.2, silent_after=1.0)
    shop.task(pool="default")(effect)
    with shop.running():
        for number, pool in enumerate(("other", "no_more")):
            shop.sql(
                "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at) VALUES "
                f"('0190000000007000800000000000000{number}', 'effect', '{pool}', 'queued', "
                f'\'{{"label": "{pool}"}}\', '
                "'2020-01-01', '2020-01-01')"
            )
        with Heard(signals.TaskSucceeded) as heard:
            shop.db.runner.look()  # type: ignore[union-attr]
            heard.wait(signals.TaskSucceeded, count=2)

    assert shop.effects() == ["no_more", "other"]
    shop.close()


# --- repeats and retries ------------------------------------------------------------------------------------------


def test_four_hundred_increments_end_at_four_hundred(shop: Workshop, heard: Heard):
    """Read-modify-write of one row by 400 tasks, side by side, loses nothing, and conflicts are no attempts."""

    @shop.task(pool="other" if shop.under_test.is_sqlite else "default")
    def bump(session: Session, label: str) -> None:
        row = session.get_one(Counter, 1)
        row.n += 1

    shop.sql("INSERT INTO counter (id, n) VALUES (1, 0)")
    with shop.running():
        for _ in range(20):
            shop.commit(lambda session: [shop.db.after_commit(session, bump) for _ in range(20)] and None)
        shop.db.drain(120.0)

    assert shop.sql("SELECT n FROM counter") == 400
    assert {(record.state, record.attempt) for record in shop.records()} == {("succeeded", 1)}


@postgres_drivers
def test_get_or_create_races_are_repeated(shop: Workshop):
    """Two runs that both find a row missing, and one of which catches its unique violation, both succeed."""
    shop.sql("CREATE UNIQUE INDEX only_one ON effect (label)")
    meeting = threading.Barrier(2)
    tries: list[int] = []

    def get_or_create(session: Session, label: str) -> None:
        found = session.scalar(select(Effect).where(Effect.label == label))
        tries.append(1)
        if len(tries) <= 2 and not shop.is_async:
            meeting.wait(TIMEOUT)
        if found is None:
            try:
                with session.begin_nested():
                    session.add(Effect(label=label))
            except exc.IntegrityError:
                # In the old snapshot nothing is to be found even now.
                found = session.scalars(select(Effect).where(Effect.label == label)).one()
        session.get_one(Counter, 1).n += 1

    shop.sql("INSERT INTO counter (id, n) VALUES (1, 0)")
    task = shop.task()(get_or_create)
    with shop.running():
        shop.commit(lambda session: [shop.db.after_commit(session, task, "one") for _ in range(2)] and None)
        shop.drain()

    assert [record.state for record in shop.records()] == ["succeeded", "succeeded"]
    assert (shop.effects(), shop.sql("SELECT n FROM counter")) == (["one"], 2)


def test_named_errors_are_retried_later(shop: Workshop, heard: Heard):
    """What ``Retry(on=…)`` names goes back as queued, due later by the database's clock, until attempts are used up."""
    attempts: list[int] = []

    @shop.task(retry=Retry(attempts=3, base=0.01, on=ConnectionError))
    def flaky(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        attempts.append(run.attempt)
        raise ConnectionError(label)

    with shop.running():
        id = shop.ask(flaky, "down")
        heard.wait(signals.TaskFailed)

    record = shop.record(id)
    assert attempts == [1, 2, 3]
    assert (record.state, record.attempt) == ("failed", 3)
    assert [each["attempt"] for each in record.errors or ()] == [1, 2, 3]
    assert [each.in_place for each in heard.of(signals.TaskRetried)] == [False, False]


def test_a_retry_waits_by_the_databases_clock(shop: Workshop, heard: Heard):
    """A record that goes back says when it is due, and is not claimed before."""

    @shop.task(retry=Retry(attempts=2, base=1000.0, cap=1000.0, on=ConnectionError))
    def flaky(session: Session, label: str) -> None:
        raise ConnectionError

    with shop.running():
        id = shop.ask(flaky)
        delay = heard.wait(signals.TaskRetried).delay
        shop.drain()
        record = shop.record(id)

    assert (record.state, record.attempt) == ("queued", 1)
    assert record.started_at is not None
    assert abs((record.run_at - record.started_at).total_seconds() - delay) < 5


def test_other_errors_of_the_application_are_final(shop: Workshop):
    """An exception that ``on`` does not name fails the task at its first attempt."""

    @shop.task(retry=Retry(attempts=3, on=ConnectionError))
    def bad(session: Session, label: str) -> None:
        raise KeyError

    with shop.running():
        id = shop.ask(bad)
        shop.drain()

    assert (shop.record(id).state, shop.record(id).attempt) == ("failed", 1)


def test_in_memory_tasks_are_retried_in_place(shop: Workshop, heard: Heard):
    """``durable=False`` writes no record, and is retried by the process that has it."""
    tries: list[int] = []

    @shop.task(durable=False, retry=Retry(attempts=3, base=0.01, on=ConnectionError))
    def flaky(session: Session, label: str) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError
        effect(session, label)

    with shop.running():
        shop.ask(flaky, "third")
        heard.wait(signals.TaskSucceeded)

    assert (shop.effects(), shop.records()) == (["third"], [])
    assert [each.in_place for each in heard.of(signals.TaskRetried)] == [True, True]


# --- commits in the middle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True], ids=["ORM", "raw SQL"])
def test_a_commit_that_would_be_repeated_is_refused(shop: Workshop, heard: Heard, raw: bool):
    """A commit before the end that wrote something, by whatever means, is rolled back and told of."""

    @shop.task()
    def two(session: Session, label: str) -> None:
        if raw:
            session.execute(sa.text("INSERT INTO effect (label) VALUES ('x')"))
        else:
            effect(session, "x")
        session.commit()

    with shop.running():
        shop.ask(two)
        failed = heard.wait(signals.TaskFailed)

    assert isinstance(failed.error, CommitWithoutCheckpoint)
    assert shop.effects() == []


def test_a_commit_that_only_read_is_allowed(shop: Workshop):
    """A task may give its connection back during slow work, if it has written nothing."""

    @shop.task()
    def reads(session: Session, label: str) -> None:
        session.execute(select(Counter)).all()
        session.commit()
        effect(session, label)

    with shop.running():
        shop.ask(reads, "a")
        shop.drain()

    assert shop.effects() == ["a"]


def test_repeatable_tasks_may_commit(shop: Workshop):
    """``repeatable=True`` says that running again from the top does no harm."""

    @shop.task(repeatable=True)
    def steps(session: Session, label: str) -> None:
        effect(session, "1")
        session.commit()
        effect(session, "2")

    with shop.running():
        shop.ask(steps)
        shop.drain()

    assert shop.effects() == ["1", "2"]


def test_a_retried_run_goes_on_from_its_checkpoint(shop: Workshop, heard: Heard):
    """What was saved with a commit comes back in ``restored``, and what was committed with it is not done again."""

    @shop.task(retry=Retry(attempts=2, base=0.0, on=ConnectionError))
    def steps(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        for step in range(run.restored or 0, 4):
            if step == 2 and run.attempt == 1:
                effect(session, "lost")
                session.flush()
                raise ConnectionError
            effect(session, str(step))
            run.checkpoint(step + 1)
            session.commit()

    with shop.running():
        shop.ask(steps)
        heard.wait(signals.TaskSucceeded)

    assert shop.effects() == ["0", "1", "2", "3"]


def test_progress_is_seen_while_the_task_runs(shop: Workshop, heard: Heard):
    """``progress`` reaches the record while the task runs, on SQLite as long as it holds no transaction."""
    gate = threading.Event()

    def count(done: int) -> None:
        run = current_run()
        assert run is not None
        run.progress(done, 10)

    async def native() -> None:
        count(3)
        await asyncio.to_thread(gate.wait, TIMEOUT)
        count(10)

    def plain() -> None:
        count(3)
        gate.wait(TIMEOUT)
        count(10)

    counts: Any = shop.db.task(name="counts")(native if shop.is_async else plain)

    with shop.running():
        id = shop.ask(counts)
        deadline = time.monotonic() + TIMEOUT
        while shop.record(id).progress_done != 3:
            assert time.monotonic() < deadline
        running = shop.record(id)
        gate.set()
        heard.wait(signals.TaskSucceeded)
        while shop.record(id).progress_done != 10:
            assert time.monotonic() < deadline

    assert (running.state, running.progress_done, running.progress_total) == ("running", 3, 10)


# --- time limits --------------------------------------------------------------------------------------------------


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_an_async_task_that_takes_too_long_is_cancelled(shop: Workshop, heard: Heard):
    """At its time limit an async task is cancelled and rolled back, and the record says so."""
    never = threading.Event()

    @shop.db.task(name="slow", timeout=0.2)
    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            never.set()

    with shop.running():
        id = shop.ask(slow)
        failed = heard.wait(signals.TaskFailed)

    assert isinstance(failed.error, TaskTimeout)
    assert never.is_set()
    assert (shop.record(id).state, "TaskTimeout" in (shop.record(id).error or "")) == ("failed", True)


@pytest.mark.drivers("psycopg", "asyncpg", "aiosqlite")
def test_nothing_of_an_async_task_that_takes_too_long_lands(shop: Workshop, heard: Heard):
    """What its session has written by then is rolled back, and its connection comes back."""
    written = threading.Event()

    @shop.db.task(name="slow", timeout=1)
    async def slow(session: AsyncSession) -> None:
        session.add(Effect(label="never"))
        await session.flush()
        written.set()
        await asyncio.Event().wait()

    with shop.running():
        shop.ask(slow)
        failed = heard.wait(signals.TaskFailed)
        shop.drain()
        checked_out = shop.db.async_engine("default").pool.checkedout()  # type: ignore[attr-defined]

    assert isinstance(failed.error, TaskTimeout)
    assert written.is_set()
    assert (shop.effects(), checked_out) == ([], 0)


@sync_drivers
def test_a_sync_task_is_told_at_its_next_statement(shop: Workshop, heard: Heard):
    """A ``def`` task whose time is over gets TaskTimeout from its next statement, and nothing of it lands."""
    told: list[BaseException] = []

    @shop.task(timeout=1)
    def slow(session: Session, label: str) -> None:
        effect(session, "never")
        deadline = time.monotonic() + TIMEOUT
        try:
            while time.monotonic() < deadline:
                session.execute(sa.text("SELECT 1"))
        except BaseException as error:
            told.append(error)
            raise

    with shop.running():
        shop.ask(slow)
        failed = heard.wait(signals.TaskFailed)

    assert isinstance(failed.error, TaskTimeout)
    assert isinstance(told[0], TaskTimeout)
    assert shop.effects() == []


@sync_drivers
def test_a_sync_task_that_hangs_loses_its_place(shop: Workshop, heard: Heard):
    """A ``def`` task that does not listen is failed all the same; its pool keeps its width, and it cannot land."""
    gate = threading.Event()
    left: list[BaseException] = []
    called: list[str] = []

    def mark(session: Session, error: BaseException, label: str = "") -> None:
        called.append(type(error).__name__)
        session.add(Effect(label="marked"))

    @shop.task(pool="other", timeout=0.2, on_failure=mark)
    def hangs(session: Session, label: str) -> None:
        effect(session, "never")
        session.flush()
        gate.wait(TIMEOUT)
        try:
            session.commit()
        except BaseException as error:
            left.append(error)
            raise

    quick = shop.task(pool="other")(effect)
    with shop.running():
        ids = shop.commit(lambda session: [shop.db.after_commit(session, hangs).id for _ in range(2)])
        heard.wait(signals.TaskFailed, count=2)
        shop.commit(lambda session: [shop.db.after_commit(session, quick, "quick") for _ in range(4)] and None)
        heard.wait(signals.TaskSucceeded, count=4)
        gate.set()
        shop.drain()

    assert [shop.record(id).state for id in ids] == ["failed", "failed"]
    assert called == ["TaskTimeout", "TaskTimeout"]
    assert shop.effects() == ["marked", "marked", "quick", "quick", "quick", "quick"]
    assert all(isinstance(each, TaskTimeout) for each in left)


@postgres_drivers
def test_the_server_is_told_of_a_time_limit(shop: Workshop):
    """In a task's transactions, and only there, PostgreSQL limits statements and idleness to the task's timeout."""
    seen: dict[str, list[int]] = {}

    def look(session: Session, label: str) -> None:
        names = "('statement_timeout', 'idle_in_transaction_session_timeout')"
        rows = session.execute(sa.text(f"SELECT CAST(setting AS integer) FROM pg_settings WHERE name IN {names}"))
        seen.setdefault(label, []).extend(rows.scalars())

    def limited(session: Session, label: str) -> None:
        look(session, "limited")
        session.commit()
        look(session, "after a commit")

    def unlimited(session: Session, label: str) -> None:
        look(session, "unlimited")

    tasks = [shop.task(timeout=600.0)(limited), shop.task()(unlimited)]
    with shop.running():
        for task in tasks:
            shop.ask(task)
            shop.drain()

    # What is left of the ten minutes, and a moment more: the task is to hear it from us first.
    assert len(seen["limited"]) == len(seen["after a commit"]) == 2
    assert all(500_000 < each <= 601_000 for each in seen["limited"] + seen["after a commit"])
    assert seen["unlimited"] == [0, 0]


@pytest.mark.drivers("psycopg")
def test_the_server_ends_what_takes_too_long(shop: Workshop, heard: Heard, monkeypatch: pytest.MonkeyPatch):
    """A statement that runs past the time limit is cut off by PostgreSQL itself, and seen as the task's time limit."""
    # Nobody else gives the task up first.
    monkeypatch.setattr(rounds, "OVERRUN_SECONDS", 10 * TIMEOUT)

    @shop.task(timeout=2)
    def sleeps(session: Session, label: str) -> None:
        session.execute(sa.text("SELECT pg_sleep(60)"))

    with shop.running():
        shop.ask(sleeps)
        failed = heard.wait(signals.TaskFailed)

    assert isinstance(failed.error, TaskTimeout)
    cause = failed.error.__cause__
    assert isinstance(cause, exc.DBAPIError)
    assert getattr(cause.orig, "sqlstate", None) == "57014"


@pytest.mark.drivers("pysqlite", "aiosqlite")
def test_what_a_task_writes_past_sqlalchemy_is_in_its_transaction(shop: Workshop, heard: Heard):
    """A task's transaction begins before its first statement: what its driver writes is undone with the rest."""

    @shop.task()
    def writes(session: Session, label: str) -> None:
        cursor = session.connection().connection.cursor()
        cursor.execute("INSERT INTO effect (label) VALUES ('never')")
        cursor.close()
        raise ZeroDivisionError

    with shop.running():
        shop.ask(writes)
        heard.wait(signals.TaskFailed)

    assert shop.effects() == []


# --- by hand ------------------------------------------------------------------------------------------------------


def test_cancelling_a_running_task_undoes_it(shop: Workshop, heard: Heard):
    """A task that is cancelled while it runs can commit nothing, and its record stays cancelled."""
    gate, begun = threading.Event(), threading.Event()
    task = shop.task(gate=gate, begun=begun.set)(effect)
    with shop.running():
        id = shop.ask(task, "never")
        assert begun.wait(TIMEOUT)

        if shop.is_async:
            shop.on_loop(shop.db.async_cancel(id))
        else:
            shop.db.cancel(id)
        gate.set()
        shop.drain()

    assert (shop.record(id).state, shop.effects()) == ("cancelled", [])


def test_a_failed_task_can_be_retried(shop: Workshop, heard: Heard):
    """``db.retry`` queues a failed task once more, with all its attempts."""
    outcome: list[str] = ["fail"]

    @shop.task()
    def task(session: Session, label: str) -> None:
        if outcome:
            raise ValueError(outcome.pop())
        effect(session, label)

    with shop.running():
        id = shop.ask(task, "second")
        heard.wait(signals.TaskFailed)
        shop.on_loop(shop.db.async_retry(id)) if shop.is_async else shop.db.retry(id)
        heard.wait(signals.TaskSucceeded)

    assert (shop.record(id).state, shop.record(id).attempt, shop.effects()) == ("succeeded", 1, ["second"])


def test_a_paused_pool_starts_nothing(shop: Workshop, heard: Heard):
    """What is asked for while its pool is paused stays queued; resumed, it runs."""
    task = shop.task(pool="other")(effect)

    def do(sync: Any, native: Any) -> None:
        shop.on_loop(native("other")) if shop.is_async else sync("other")

    with shop.running():
        do(shop.db.pause, shop.db.async_pause)
        lane = shop.db.runner.lanes["other"]  # type: ignore[union-attr]
        deadline = time.monotonic() + TIMEOUT
        while not lane.is_paused:
            assert time.monotonic() < deadline
        id = shop.ask(task, "a")
        assert shop.record(id).state == "queued"
        shop.drain()
        assert shop.record(id).state == "queued"

        do(shop.db.resume, shop.db.async_resume)
        heard.wait(signals.TaskSucceeded)

    assert shop.effects() == ["a"]


# --- ownership ----------------------------------------------------------------------------------------------------


def test_a_claim_that_never_began_is_found_again(shop: Workshop, heard: Heard):
    """A record that says that this worker runs it, which it does not (the asker's COMMIT lost its answer), is run."""
    task = shop.task()(effect)
    with shop.running():
        runner = shop.db.runner
        assert runner is not None
        worker = runner.id.hex if shop.under_test.is_sqlite else runner.id
        shop.sql(
            "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at, attempt, claims, "
            "worker) VALUES ('01900000000070008000000000000001', 'effect', 'default', 'running', "
            "'{\"label\": \"orphan\"}', '2020-01-01', '2020-01-01', 1, 1, :worker)",
            worker=worker,
        )
        heard.wait(signals.TaskSucceeded)

    assert task.name == "effect"
    assert shop.effects() == ["orphan"]
    assert [(record.state, record.attempt) for record in shop.records()] == [("succeeded", 1)]


@sync_drivers
def test_a_record_claimed_anew_is_held_by_its_new_run(shop: Workshop):
    """A run that lets go of its record late does not take it from the run that has it by then."""
    task = shop.task()(effect)
    with shop.running():
        runner = shop.db.runner
        assert runner is not None
        id = shop.ask(task, "a")
        shop.drain()
        record = shop.record(id)
        old = _run(task, record, claims=1)
        new = _run(task, record, claims=2)
        runner.held[id] = new

        runner._let_go(old)

        assert runner.held.pop(id) is new


def _run(task: Any, record: Any, *, claims: int) -> Any:
    from aftercommit.runner.run import Run

    return Run(
        task=task, id=record.id, claim=moves.Claim(record.id, 1, claims), attempt=1, max_attempts=5, arguments="{}"
    )


def test_tasks_asked_for_from_many_threads_all_run(shop: Workshop):
    """Whatever the threads and the order of commits and claims, nothing waits for ever and nothing runs twice."""
    task = shop.task()(effect)
    with shop.running(), ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: shop.ask(task, f"{number:03}"), range(100)))
        shop.drain()

    assert shop.effects() == [f"{number:03}" for number in range(100)]
