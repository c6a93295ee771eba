"""What the database is asked: cheap when idle, by an index when full, and what is heard of other processes."""

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from aftercommit import TaskRecord, signals
from aftercommit.records import moves, sweeping, workers
from aftercommit.records.ids import uuid7
from aftercommit.records.tables import WorkerRecord
from aftercommit.runner import listening
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop

postgres_drivers = pytest.mark.drivers("psycopg", "asyncpg")
FULL = 100_000


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database)
    yield shop
    shop.close()


def effect(session: Session, label: str) -> None:
    """What most tasks here do."""
    session.add(Effect(label=label))


def wait_until(condition: Callable[[], bool]) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline


def wait_until_listening(shop: Workshop) -> None:
    """Wait until this process is known to hear of others."""
    deadline = time.monotonic() + TIMEOUT
    while not shop.db.runner.is_listening:  # type: ignore[union-attr]
        assert time.monotonic() < deadline


# --- other processes ----------------------------------------------------------------------------------------------


@postgres_drivers
def test_a_process_that_only_hands_over_is_heard(database: DatabaseUnderTest):
    """With ``runs=()`` a task is queued, and a worker elsewhere starts it without waiting for its next look."""
    worker = Workshop(database)
    worker.task()(effect)
    web = Workshop(DatabaseUnderTest(url=database.sync_url, driver="psycopg"))
    task = web.task()(effect)
    with worker.running(), web.running(runs=()), Heard(signals.TaskSucceeded) as heard:
        wait_until_listening(worker)
        worker.drain()
        # It has just looked, and would look again only much later.
        worker.db.runner.rounds._next_poll = time.monotonic() + 1000  # type: ignore[union-attr]
        begun = time.monotonic()
        web.ask(task, "a")
        heard.wait(signals.TaskSucceeded)

    assert worker.effects() == ["a"]
    assert time.monotonic() - begun < 5
    web.close()
    worker.close()


@postgres_drivers
def test_listening_is_taken_up_again(shop: Workshop):
    """A listener whose connection is terminated connects again; meanwhile nothing is lost, only slower."""
    task = shop.task()(effect)
    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        wait_until_listening(shop)
        shop.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'aftercommit:listener'"
        )
        deadline = time.monotonic() + TIMEOUT
        while shop.db.runner.is_listening:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
        wait_until_listening(shop)
        shop.ask(task, "a")
        heard.wait(signals.TaskSucceeded)

    assert shop.effects() == ["a"]


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_an_idle_application_is_quiet(driver: str):
    """With nothing to do, a process sends less than one statement per second, pings and transactions included."""
    with PostgresServer({"log_statement": "all"}) as server, server.database() as name:
        shop = Workshop(DatabaseUnderTest(url=server.url(name, driver=driver), driver=driver))
        quiet = threading.Event()
        with shop.running():
            wait_until_listening(shop)
            shop.drain()
            # What the start and the drain asked for is in the log by then.
            quiet.wait(1.0)
            before = len(_statements(server))
            quiet.wait(12.0)
            sent = _statements(server)[before:]
        shop.close()

    assert len(sent) < 12, "\n".join(sent)


def _statements(server: PostgresServer) -> list[str]:
    return [line for line in server.log.lines if re.search(r"LOG: +(statement|execute)", line)]


@pytest.mark.drivers("psycopg")
def test_a_burst_of_hand_overs_is_told_of_once(database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch):
    """Many hand-overs in a row make few notifications, far from one for each, and every task is found."""
    # However slow this machine is, the burst takes less.
    monkeypatch.setattr(listening, "_BETWEEN_NEWS", 5.0)
    worker, web = Workshop(database), Workshop(database)
    worker.task()(effect)
    task = web.task()(effect)
    with psycopg.connect(_plain_url(database), autocommit=True) as ear:
        with worker.running(), Heard(signals.TaskSucceeded) as heard:
            wait_until_listening(worker)
            ear.execute("LISTEN aftercommit")
            with web.running(runs=()):
                for number in range(100):
                    web.ask(task, f"{number:03}")
            heard.wait(signals.TaskSucceeded, count=100)
        ear.execute("NOTIFY aftercommit, 'the end'")
        said = list(itertools.takewhile(lambda each: each.payload != "the end", ear.notifies()))

    assert 1 <= sum('"pools": ["default"]' in each.payload for each in said) <= 20
    assert worker.effects() == [f"{number:03}" for number in range(100)]
    web.close()
    worker.close()


@pytest.mark.drivers("pysqlite", "aiosqlite")
def test_polling_alone_finds_the_work_of_others(database: DatabaseUnderTest):
    """Where nothing can be heard, what others queue after the start is found all the same, again and again."""
    worker = Workshop(database)
    worker.task()(effect)
    web = Workshop(DatabaseUnderTest(url=database.sync_url, driver="pysqlite"))
    task = web.task()(effect)
    with worker.running(), web.running(runs=()), Heard(signals.TaskSucceeded) as heard:
        worker.drain()
        for number in range(2):
            web.ask(task, str(number))
            heard.wait(signals.TaskSucceeded, count=number + 1)

    assert worker.effects() == ["0", "1"]
    web.close()
    worker.close()


def _plain_url(database: DatabaseUnderTest) -> str:
    return make_url(database.url).set(drivername="postgresql").render_as_string(hide_password=False)


# --- a full queue -------------------------------------------------------------------------------------------------


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_full_queue_does_not_slow_the_claim(shop: Workshop):
    """With 100 000 queued tasks a claim reads its index from the front, and takes no longer than one may wait."""
    shop.db.create_tables()
    fill(shop, "queued", FULL)

    with shop.outside.connect() as connection:
        plan = _plan_of(
            connection, lambda: moves.claim(connection, pool="default", names=["effect"], worker=uuid7(), count=10)
        )
        begun = time.monotonic()
        for _ in range(20):
            assert len(moves.claim(connection, pool="default", names=["effect"], worker=uuid7(), count=10)) == 10
        took = (time.monotonic() - begun) / 20

    assert "aftercommit_task_due" in plan
    assert "Seq Scan on aftercommit_task" not in plan
    assert "USE TEMP B-TREE" not in plan
    assert "Sort" not in plan
    assert took < 0.1


@pytest.mark.drivers("psycopg", "pysqlite")
def test_the_whole_queue_is_counted_without_what_has_finished(shop: Workshop):
    """What ``db.stats()`` says of all processes reads the queued and the running, and no finished record."""
    shop.db.create_tables()
    fill(shop, "succeeded", 20_000)
    fill(shop, "queued", 300)
    fill(shop, "running", 20)

    with shop.outside.connect() as connection:
        found = sweeping.sweep(connection, silent_after=30.0)
        plan = _plan_of(connection, lambda: sweeping.sweep(connection, silent_after=30.0))

    assert (found.workers, set(found.tasks)) == (0, {"effect"})
    assert (found.tasks["effect"].queued, found.tasks["effect"].running) == (300, 20)
    # Both are of what is queued, and nothing else.
    assert "aftercommit_task_due" in plan or "aftercommit_task_waiting" in plan
    assert "aftercommit_task_held" in plan
    assert "Seq Scan on aftercommit_task" not in plan
    assert "aftercommit_task_key" not in plan


def fill(shop: Workshop, state: str, number: int) -> None:
    """Write records of one state, all of one task."""
    columns = "id, task, pool, state, arguments, run_at, enqueued_at, priority, finished_at"
    if shop.under_test.is_sqlite:
        finished = "'2020-01-01 00:00:00.000000'" if state == "succeeded" else "NULL"
        shop.sql(
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {number}) "
            f"INSERT INTO aftercommit_task ({columns}) "
            f"SELECT lower(hex(randomblob(16))), 'effect', 'default', '{state}', '{{}}', "
            f"'2020-01-01 00:00:00.000000', '2020-01-01 00:00:00.000000', 0, {finished} FROM n"
        )
    else:
        finished = "now()" if state == "succeeded" else "NULL"
        shop.sql(
            f"INSERT INTO aftercommit_task ({columns}) "
            f"SELECT gen_random_uuid(), 'effect', 'default', '{state}', '{{}}', "
            f"'2020-01-01'::timestamptz + i * interval '1 second', now(), 0, {finished} "
            f"FROM generate_series(1, {number}) i"
        )
    shop.sql("ANALYZE aftercommit_task")


def _plan_of(connection: sa.Connection, work: Callable[[], object]) -> str:
    is_sqlite = connection.dialect.name == "sqlite"
    seen: list[tuple[str, object]] = []

    @sa.event.listens_for(connection, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        seen.append((statement, parameters))

    work()
    sa.event.remove(connection, "before_cursor_execute", note)
    statement, parameters = seen[0]
    rows = connection.exec_driver_sql(
        ("EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN ") + statement,
        parameters,  # type: ignore[arg-type]
    )
    return "\n".join(str(row[-1]) for row in rows)


# --- moves --------------------------------------------------------------------------------------------------------


@pytest.mark.drivers("psycopg", "pysqlite")
def test_two_of_one_key_are_rescued_together(shop: Workshop):
    """Tasks of one key that both ran when their worker died are both queued again, and one of them has the key."""
    shop.db.create_tables()
    for number in (1, 2):
        shop.sql(
            "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at, key, attempt, "
            f"claims, worker) VALUES ('0190000000007000800000000000000{number}', 'effect', 'default', 'running', "
            "'{}', '2020-01-01', '2020-01-01', 'k', 1, 1, '01900000000070008000000000000009')"
        )

    with shop.db.engine().begin() as connection:
        rescued = workers.rescue(connection, silent_after=30.0)

    assert len(rescued) == 2
    assert sorted(str(record.queued_key) for record in shop.records()) == ["None", "k"]


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_worker_is_given_thirty_seconds_by_default(shop: Workshop):
    """The tasks of a worker that was last seen 31 s ago are rescued; those of one seen 20 s ago are let alone."""
    shop.db.create_tables()
    silent, alive = uuid7(), uuid7()
    now = datetime.now(UTC)
    with Session(shop.outside) as session:
        for worker, ago in ((silent, 31), (alive, 20)):
            seen = now - timedelta(seconds=ago)
            session.add(
                WorkerRecord(id=worker, host="h", pid=1, started_at=seen, seen_at=seen, pools=["default"], names=[])
            )
            # Nobody here knows the name, so that nobody runs it once it is queued.
            session.add(
                TaskRecord(
                    id=uuid7(), task="elsewhere", pool="default", state="running", arguments={}, run_at=seen,
                    enqueued_at=seen, attempt=1, claims=1, worker=worker, max_attempts=5,
                )
            )  # fmt: skip
            session.flush()
        session.commit()
    ids = {record.worker: record.id for record in shop.records()}

    with Heard(signals.TasksRescued) as heard, shop.running():
        rescued = heard.wait(signals.TasksRescued)

    assert (rescued.requeued, rescued.failed) == ((ids[silent],), ())
    assert (shop.record(ids[silent]).state, shop.record(ids[alive]).state) == ("queued", "running")


@pytest.mark.drivers("psycopg", "pysqlite")
def test_finished_records_are_pruned_in_pieces(shop: Workshop):
    """What finished long ago goes, as many as were asked for; what is unfinished or young stays."""
    shop.db.create_tables()
    for number, (state, finished) in enumerate(
        [("succeeded", "'2020-01-01'"), ("failed", "'2020-01-02'"), ("succeeded", "'2999-01-01'"), ("queued", "NULL")]
    ):
        shop.sql(
            "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at, finished_at) VALUES "
            f"('0190000000007000800000000000000{number}', 'effect', 'default', '{state}', '{{}}', '2020-01-01', "
            f"'2020-01-01', {finished})"
        )

    with shop.db.engine().begin() as connection:
        pruned = [workers.prune(connection, keep=60.0, count=1) for _ in range(3)]

    assert pruned == [1, 1, 0]
    assert [record.id for record in shop.records()] == [
        UUID(int=(0x0190000000007000800000000000000 << 4) + n) for n in (2, 3)
    ]


def test_a_runner_prunes_what_is_old_enough(database: DatabaseUnderTest, monkeypatch: pytest.MonkeyPatch):
    """A running process deletes what finished longer than ``keep_finished`` ago, a thousand records at a time."""
    shop = Workshop(database, keep_finished=60.0)
    pieces: list[int] = []

    def prune(connection: sa.Connection, *, keep: float, count: int) -> int:
        pieces.append(really_prune(connection, keep=keep, count=count))
        return pieces[-1]

    really_prune = workers.prune
    monkeypatch.setattr(workers, "prune", prune)
    _plant_finished(database, 2500)

    with shop.running():
        wait_until(lambda: not shop.sql("SELECT count(*) FROM aftercommit_task"))

    assert [each for each in pieces if each] == [1000, 1000, 500]
    shop.close()


def test_what_is_kept_for_ever_is_not_pruned(database: DatabaseUnderTest):
    """With ``keep_finished=None`` the runner tidies up as ever, and leaves finished records alone."""
    shop = Workshop(database, keep_finished=None)
    _plant_finished(database, 1)
    # Workers that have been silent for long are forgotten in the same transaction.
    shop.sql(
        "INSERT INTO aftercommit_worker (id, host, pid, pools, names, started_at, seen_at) "
        "VALUES ('01900000000070008000000000000009', 'gone', 1, '[]', '[]', '2020-01-01', '2020-01-01')"
    )

    with shop.running():
        wait_until(lambda: not shop.sql("SELECT count(*) FROM aftercommit_worker WHERE host = 'gone'"))

    assert [record.state for record in shop.records()] == ["succeeded"]
    shop.close()


def _plant_finished(database: DatabaseUnderTest, number: int) -> None:
    """Write records that finished in 2020."""
    plain = Workshop(DatabaseUnderTest(url=database.sync_url, driver="pysqlite" if database.is_sqlite else "psycopg"))
    plain.db.create_tables()
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    with Session(plain.outside) as session, session.begin():
        session.execute(
            sa.insert(TaskRecord),
            [
                {"id": uuid7(), "task": "effect", "pool": "default", "state": "succeeded", "arguments": {},
                 "run_at": long_ago, "enqueued_at": long_ago, "finished_at": long_ago}
                for _ in range(number)
            ],
        )  # fmt: skip
    plain.close()


@pytest.mark.drivers("psycopg")
def test_a_locked_record_does_not_hold_up_the_bookkeeping(shop: Workshop):
    """A record that a COMMIT in doubt still holds is asked for without waiting, and is no orphan for now."""
    shop.db.create_tables()
    worker, id = uuid7(), uuid7()
    shop.sql(
        "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at, attempt, claims, worker) "
        "VALUES (:id, 'effect', 'default', 'running', '{}', now(), now(), 1, 1, :worker)",
        id=id, worker=worker,
    )  # fmt: skip
    url = make_url(shop.under_test.url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as doubtful:
        doubtful.execute("UPDATE aftercommit_task SET state = 'succeeded'")

        with shop.db.engine().begin() as connection:
            released = workers.release_orphans(connection, worker, [id])
        with (
            pytest.raises(sa.exc.OperationalError, match="could not obtain lock"),
            shop.db.engine().begin() as connection,
        ):
            moves.standing(connection, moves.Claim(id, 1, 1))

    assert released == []
