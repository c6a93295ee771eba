"""The doctor on real databases: everything that is planted is found, with what to type, and nothing else."""

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from aftercommit import Database, Every, PoolSettings, TaskRecord
from aftercommit.cli.doctor.examination import examine
from aftercommit.cli.doctor.findings import Finding, Level
from aftercommit.records.schema import SCHEMA_VERSION
from aftercommit.records.tables import PoolState, ScheduleRecord, SchemaRecord, WorkerRecord
from tests.crash.proxy import Proxy
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.workshop import Effect, Workshop

BAD = (Level.WARNING, Level.WRONG)


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop with our tables and a task ``effect`` in ``default``, on each driver in turn."""
    shop = Workshop(database, pools={"files": PoolSettings(pool_size=1)})
    shop.task()(effect)
    TaskRecord.metadata.create_all(shop.outside)
    if database.path is not None:
        for file in database.path.parent.glob(f"{database.path.name}*"):
            file.chmod(0o600)
    with Session(shop.outside) as session:
        session.add(SchemaRecord(id=1, version=SCHEMA_VERSION))
        session.commit()
    yield shop
    shop.close()


def effect(session: Session, label: str) -> None:
    """What the task does."""
    session.add(Effect(label=label))


def plant(shop: Workshop, *records: Any) -> None:
    """Write records by hand."""
    with Session(shop.outside) as session:
        session.add_all(records)
        session.commit()


def before(seconds: float) -> datetime:
    """That long ago."""
    return datetime.now(UTC) - timedelta(seconds=seconds)


def worker(*, seen: float = 0.0, pools: tuple[str, ...] = ("default", "files"), names: tuple[str, ...] = ("effect",),
           id: UUID | None = None) -> WorkerRecord:  # fmt: skip
    """The row of a worker that was heard of *seen* seconds ago."""
    return WorkerRecord(
        id=id or uuid4(), host="elsewhere", pid=77, started_at=before(600), seen_at=before(seen), pools=list(pools),
        names=list(names),
    )  # fmt: skip


def task(name: str = "effect", *, state: str = "queued", due: float = 300.0, **more: Any) -> TaskRecord:
    """A record that has been due for *due* seconds."""
    return TaskRecord(
        **{"id": uuid4(), "task": name, "pool": "default", "state": state, "arguments": {}, "run_at": before(due),
           "enqueued_at": before(due), **more}
    )  # fmt: skip


def bad(shop: Workshop, **options: Any) -> list[Finding]:
    """What is not as it should be."""
    return [each for each in examine(shop.db, "shop:db", **{"processes": None, **options}) if each.level in BAD]


def test_a_healthy_set_up_has_no_finding(shop: Workshop):
    """With a worker alive, everything that was looked at is in order, notes left out as well."""
    with shop.running():
        findings = examine(shop.db, "shop:db", processes=None)

    assert {each.level for each in findings} == {Level.OK}
    assert {each.check for each in findings} >= {"packages", "drivers", "tables", "workers", "records"}


def test_examining_changes_nothing_and_takes_no_lock(shop: Workshop):
    """The doctor reads: while a task has what it has, also SQLite's write lock, it says so and goes on."""
    plant(shop, worker(), task())

    with shop.outside.connect() as holder:
        holder.exec_driver_sql("BEGIN IMMEDIATE" if shop.under_test.is_sqlite else "BEGIN")
        holder.exec_driver_sql("UPDATE aftercommit_task SET priority = 1")
        findings = bad(shop)
        holder.exec_driver_sql("ROLLBACK")

    checks = {each.check for each in findings}
    assert checks == ({"write lock", "queue"} if shop.under_test.is_sqlite else {"queue"})
    assert shop.records()[0].state == "queued"


def schedule(name: str = "nightly", *, due: float = 600.0, **more: Any) -> ScheduleRecord:
    """A schedule that has been due for *due* seconds."""
    return ScheduleRecord(
        **{"name": name, "task": "effect", "arguments": {}, "origin": "data", "kind": "every", "seconds": 60.0,
           "options": {}, "anchor": before(9e5), "created_at": before(9e5), "next_at": before(due), **more}
    )  # fmt: skip


def declaring(digest: str) -> WorkerRecord:
    """A live worker that declares ``nightly``."""
    found = worker()
    found.declares = {"nightly": digest}
    return found


CODE = {"origin": "code", "due": -600.0}
SCHEDULES: list[tuple[Callable[[], list[Any]], Level, str, str]] = [
    (lambda: [schedule()], Level.WRONG, "The schedule 'nightly' is overdue, by 10 min", "No process runs tasks"),
    (lambda: [worker(names=("other",)), schedule()], Level.WRONG, "overdue", "knows its task 'effect'"),
    (lambda: [worker(), schedule(origin="code")], Level.NOTE, "declared by no code any more", "aliases"),
    (lambda: [worker(), schedule()], Level.WRONG, "overdue", "should have fired it"),
    (lambda: [declaring("a"), declaring("b"), schedule(**CODE)], Level.WARNING, "differently", "As during a deploy"),
    (lambda: [worker(), schedule(**CODE)], Level.NOTE, "declared by no code any more", "aliases"),
    (
        lambda: [worker(), schedule(due=-60, kind="cron", expression="0 7 * * *", timezone="Mars/Olympus")],
        Level.WARNING, "(0 7 * * *, Mars/Olympus) cannot be read on this machine", "AC601",
    ),
    (
        lambda: [worker(), schedule(due=-60, skipped=9, fired=3)], Level.WARNING, "has skipped 9 of 12 ticks",
        "had not ended",
    ),
    (
        lambda: [worker(), schedule(paused_at=before(8 * 86400), paused_by="ada")], Level.WARNING,
        "'nightly' has been paused by ada for 8 days", "until it is resumed",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("planted", "level", "found", "why"), SCHEDULES)
def test_what_is_wrong_with_schedules(
    shop: Workshop, planted: Callable[[], list[Any]], level: Level, found: str, why: str
):
    """Each trouble is one finding, with its reason."""
    plant(shop, *planted())

    [finding] = [each for each in examine(shop.db, "shop:db", processes=None) if each.check == "schedules"]

    assert finding.level is level
    assert found in finding.found
    assert why in finding.why


def test_a_schedule_that_only_the_code_at_hand_declares(shop: Workshop):
    """The workers run other code: nobody fires it."""
    shop.db.schedule(Every(60.0, name="nightly"), shop.db.tasks["effect"], "x")
    plant(shop, worker(), schedule(origin="code"))

    [finding] = [each for each in bad(shop) if each.check == "schedules"]

    assert finding.level is Level.WRONG
    assert "No live worker's code declares it" in finding.why


def test_schedules_in_order_are_no_finding(shop: Workshop):
    """Due soon, paused since yesterday, or ended."""
    plant(
        shop, worker(), schedule(due=60), schedule("paused", paused_at=before(86400)),
        schedule("ended", ended_at=before(9e5)),
    )  # fmt: skip

    assert not [each for each in examine(shop.db, "shop:db", processes=None) if each.check == "schedules"]


HELD = uuid4()


PLANTED: list[tuple[Callable[[], list[Any]], Level, str, str, str]] = [
    (
        lambda: [task()], Level.WRONG, "workers",
        "No process runs tasks, and 1 task is due, the oldest for 5 min", "aftercommit worker shop:db",
    ),
    (
        lambda: [worker(), task("gone")], Level.WARNING, "names",
        "knows the task 'gone', and 1 task is queued, the oldest due for 5 min", "aliases=('gone',)",
    ),
    (
        lambda: [worker(), task("gone", due=-600.0)], Level.WARNING, "names",
        "knows the task 'gone', and 1 task is queued",
        "aftercommit tasks cancel --db shop:db --state queued --task gone",
    ),
    (
        lambda: [worker(names=()), task()], Level.WRONG, "names",
        "knows the task 'effect'", "aftercommit worker shop:db",
    ),
    (
        lambda: [worker(pools=("default",)), task(pool="files")], Level.WRONG, "pools",
        "No live worker runs the pool 'files', and 1 task is queued", "aftercommit worker shop:db --pools files",
    ),
    (
        lambda: [worker(pools=("default",)), worker(names=("other",), pools=("files",)), task(pool="files")],
        Level.WARNING, "names",
        "No live worker that runs the pool 'files' knows the task 'effect', and 1 task is queued",
        "aftercommit worker shop:db --pools files",
    ),
    (
        lambda: [worker(), task(pool="old")], Level.WRONG, "pools",
        "No live worker runs the pool 'old', and 1 task is queued", "aftercommit worker shop:db",
    ),
    (
        lambda: [worker(pools=("files",))], Level.WARNING, "pools",
        "No live worker runs the pool 'default', and 0 tasks", "--pools default",
    ),
    (
        lambda: [worker(), PoolState(name="default", paused_at=before(60)), task()], Level.WARNING, "pools",
        "The pool 'default' is paused, and 1 task is queued", "aftercommit pools resume default --db shop:db",
    ),
    (
        lambda: [worker(), task(), task()], Level.WARNING, "queue",
        "Pool 'default': 2 tasks are queued, 2 of them due, the oldest for 5 min", "--state running",
    ),
    (
        lambda: [worker(), worker(seen=240.0, id=HELD), task(state="running", worker=HELD)], Level.WARNING, "workers",
        "Worker 77 on elsewhere has been silent for 4 min and holds 1 task", "ps -p 77    # on elsewhere",
    ),
    (
        lambda: [worker(seen=240.0, id=HELD), task(state="running", worker=HELD)], Level.WRONG, "workers",
        "has been silent for 4 min and holds 1 task", "aftercommit worker shop:db",
    ),
    (
        lambda: [task(state="running", worker=HELD)], Level.WRONG, "workers",
        "1 task is said to be run by a worker that is no more", "aftercommit worker shop:db",
    ),
    (
        lambda: [
            worker(),
            task("a", state="failed", finished_at=before(60), error="ValueError: old"),
            task("a", state="failed", finished_at=before(30), error="ValueError: new"),
            task("a", state="failed", finished_at=before(90_000), error="ValueError: yesterday"),
        ],
        Level.WARNING, "failures", "2 × 'a' failed for good",
        "aftercommit tasks retry --db shop:db --state failed --task a",
    ),
    (
        lambda: [worker(), task(state="succeeded", finished_at=before(30 * 86400))], Level.WARNING, "records",
        "1 finished records are kept, the oldest for 30 days", "keep_finished",
    ),
]  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted[3][:40])
def test_what_is_planted_is_found(shop: Workshop, planted: tuple[Callable[[], list[Any]], Level, str, str, str]):
    """Each alone, once, at its level, with the figures, the reason, and what to type."""
    records, level, check, found, remedy = planted
    plant(shop, *records())

    (finding,) = bad(shop)

    assert (finding.level, finding.check) == (level, check)
    assert found in finding.found
    assert finding.why
    assert remedy in "\n".join(finding.remedy)
    assert "--pools old" not in "\n".join(finding.remedy)  # there is none, so no worker would start


def test_the_last_error_of_a_name_is_shown(shop: Workshop):
    """Of several failures, what the latest says."""
    plant(
        shop,
        worker(),
        task("a", state="failed", finished_at=before(60), error="ValueError: old"),
        task("a", state="failed", finished_at=before(30), error="ValueError: new"),
    )

    (finding,) = bad(shop)

    assert finding.why == "The last one says: ValueError: new"


def test_a_silent_worker_with_nothing_in_hand_is_a_note(shop: Workshop):
    """Nobody waits for it."""
    plant(shop, worker(), worker(seen=240.0))

    findings = [each for each in examine(shop.db, "shop:db", processes=None) if each.level is not Level.OK]

    assert [(each.level, each.check) for each in findings] == [(Level.NOTE, "workers")]


def test_what_clears_away_by_hand_can_be_typed(database: DatabaseUnderTest):
    """In the words of the database at hand, and it deletes what is older, and nothing else."""
    shop = Workshop(database, keep_finished=None)
    shop.task()(effect)
    TaskRecord.metadata.create_all(shop.outside)
    plant(
        shop,
        SchemaRecord(id=1, version=SCHEMA_VERSION),
        task(state="succeeded", finished_at=before(91 * 86400)),
        task(state="succeeded", finished_at=before(89 * 86400)),
    )
    (finding,) = [each for each in examine(shop.db, "shop:db", processes=None) if each.check == "records"]

    shop.sql(finding.remedy[0])

    assert len(shop.records()) == 1
    shop.close()


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "level", "found"),
    [
        ("DROP TABLE aftercommit_progress", None, "the table aftercommit_progress is missing"),
        ("UPDATE aftercommit_schema SET version = 0", Level.WRONG, "of version 0, and this release needs"),
    ],
)
def test_tables_that_do_not_fit_are_found(shop: Workshop, damage: str, level: Level | None, found: str):
    """Missing ones are made at start-up on SQLite, so there they are a warning; older ones are wrong everywhere."""
    shop.sql(damage)

    (finding,) = [each for each in bad(shop) if each.check == "tables"]

    assert finding.level is (level or (Level.WARNING if shop.under_test.is_sqlite else Level.WRONG))
    assert found in finding.found
    assert finding.remedy == ("aftercommit schema shop:db --apply",)


def test_newer_tables_are_a_note(shop: Workshop):
    """Within a minor release older code works with them."""
    plant(shop, worker())
    shop.sql(f"UPDATE aftercommit_schema SET version = {SCHEMA_VERSION + 1}")

    findings = [each for each in examine(shop.db, "shop:db", processes=None) if each.level is not Level.OK]

    assert [(each.level, each.check) for each in findings] == [(Level.NOTE, "tables")]
    assert f"version {SCHEMA_VERSION + 1}" in findings[0].found


# --- PostgreSQL -------------------------------------------------------------------------------------------------

postgresql = pytest.mark.drivers("psycopg", "asyncpg")


@postgresql
@pytest.mark.parametrize(
    ("setting", "level", "found"),
    [
        ("default_transaction_isolation = 'serializable'", Level.WARNING, "'serializable'"),
        ("default_transaction_read_only = on", Level.WRONG, "default_transaction_read_only is on"),
        ("synchronous_commit = off", Level.NOTE, "synchronous_commit is off"),
        ("statement_timeout = '2min'", Level.NOTE, "statement_timeout is 120 s"),
        ("idle_in_transaction_session_timeout = '5s'", Level.NOTE, "idle_in_transaction_session_timeout is 5 s"),
        ("transaction_timeout = '1h'", Level.WARNING, "transaction_timeout is 3600 s"),
    ],
)
def test_settings_of_the_server_are_read(
    shop: Workshop, postgres: PostgresServer, setting: str, level: Level, found: str
):
    """As our connections have them, in whatever unit they were written."""
    plant(shop, worker())
    postgres.execute(f"ALTER DATABASE {{}} SET {setting}", str(shop.outside.url.database))  # type: ignore[arg-type]

    (finding,) = [each for each in examine(shop.db, "shop:db", processes=None) if each.level is not Level.OK]

    assert finding.level is level
    assert found in finding.found


@postgresql
@pytest.mark.parametrize("whose", ["DATABASE {}", "ROLE postgres IN DATABASE {}"])
@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_isolation = 'serializable'",
        "default_transaction_read_only = on",
        "synchronous_commit = off",
    ],
)
def test_what_is_to_be_typed_changes_the_setting(shop: Workshop, postgres: PostgresServer, whose: str, setting: str):
    """Wherever the setting was made, and also where all transactions are read-only."""
    plant(shop, worker())
    postgres.execute(f"ALTER {whose} SET {setting}", str(shop.outside.url.database))  # type: ignore[arg-type]
    (finding,) = [each for each in examine(shop.db, "shop:db", processes=None) if each.level is not Level.OK]

    with psycopg.connect(shop.under_test.sync_url.replace("+psycopg", ""), autocommit=True) as psql:
        psql.execute(finding.remedy[0].encode())

    assert {each.level for each in examine(shop.db, "shop:db", processes=None)} == {Level.OK}


@postgresql
def test_tables_that_somebody_has_locked_are_not_waited_for(shop: Workshop):
    """As during a migration: it is said, with what to look at, and the rest is examined all the same."""
    plant(shop, worker())

    with shop.outside.connect() as holder:
        holder.exec_driver_sql("BEGIN")
        holder.exec_driver_sql("LOCK TABLE aftercommit_task IN ACCESS EXCLUSIVE MODE")
        findings = examine(shop.db, "shop:db", processes=None)
        (locked,) = [each for each in findings if each.level not in {Level.OK, Level.NOTE}]
        pids = [row[0] for row in holder.exec_driver_sql(locked.remedy[0]).all()]
        mine = holder.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        holder.exec_driver_sql("ROLLBACK")

    assert (locked.check, locked.level) == ("tables", Level.WRONG)
    assert "locked" in locked.found
    assert pids == [mine]
    assert {"server", "connections", "clock"} <= {each.check for each in findings}


@postgresql
@pytest.mark.parametrize(
    ("granted", "denied"),
    [
        ("SELECT ON aftercommit_schema", "aftercommit_task"),
        ("SELECT ON ALL TABLES IN SCHEMA public", "aftercommit_task"),
        (
            "SELECT, INSERT, UPDATE, DELETE ON aftercommit_task, aftercommit_worker, aftercommit_pool",
            "aftercommit_batch",
        ),
    ],
)
def test_a_role_that_may_not_use_the_tables_is_told_so(
    shop: Workshop, postgres: PostgresServer, granted: str, denied: str
):
    """The role and the tables are named, and what is to be typed by their owner mends it."""
    plant(shop, worker())
    role = f"role_{shop.outside.url.database}"
    shop.sql(f"CREATE ROLE {role} LOGIN")
    shop.sql(f"GRANT {granted} TO {role}")
    theirs = Database(make_url(shop.under_test.url).set(username=role))
    theirs.task(name="effect")(lambda: None)
    try:
        (finding,) = [each for each in examine(theirs, "shop:db", processes=None) if each.level in BAD]
        for line in finding.remedy:
            shop.sql(line)
        after = [each for each in examine(theirs, "shop:db", processes=None) if each.level in BAD]
    finally:
        shop.sql(f"DROP OWNED BY {role}")
        shop.sql(f"DROP ROLE {role}")

    assert (finding.check, finding.level) == ("tables", Level.WRONG)
    assert repr(role) in finding.found
    assert denied in finding.found
    assert after == []


@postgresql
def test_too_many_connections_are_a_warning(shop: Workshop):
    """All pools times the processes that are alive, or as many as are named, against the server's limit."""
    plant(shop, worker(), worker())

    fits = [each for each in examine(shop.db, "shop:db", processes=None) if each.check == "connections"]
    (over,) = bad(shop, processes=40)

    assert "2 processes × 19 connections = 38, and the server allows 197" in fits[0].found
    assert over.check == "connections"
    assert "40 processes × 19 connections = 760, but the server allows 197" in over.found
    assert "at most 10 processes" in over.why


@postgresql
def test_dead_rows_are_counted(shop: Workshop):
    """The server's own figures, with the statement that clears them away."""
    plant(shop, worker())
    shop.sql(
        "INSERT INTO aftercommit_task (id, task, pool, state, arguments, run_at, enqueued_at) "
        "SELECT gen_random_uuid(), 'effect', 'default', 'queued', '{}', now(), now() FROM generate_series(1, 12000)"
    )
    shop.sql("DELETE FROM aftercommit_task")
    shop.sql("SELECT pg_stat_force_next_flush()")

    (finding,) = bad(shop)

    assert finding.check == "bloat"
    assert "12000 dead rows" in finding.found


_PID = re.compile(rb"(K\x00\x00\x00\x0c)....", re.DOTALL)


class Pooler(Proxy):
    """Stands for the server at the start of each connection, as poolers do, and makes up a number of its own."""

    def _to_client(self, client: socket.socket, server: socket.socket, _committing: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(_PID.sub(lambda found: found[1] + bytes((0, 0, 0, 7)), data))
            client.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def pooled(shop: Workshop, postgres: PostgresServer) -> Iterator[Database]:
    """The same database, by way of a pooler."""
    proxy = Pooler(postgres.port)
    db = Database(sa.make_url(shop.under_test.url).set(port=proxy.port))
    yield db
    proxy.close()


@postgresql
def test_a_pooler_is_recognised(shop: Workshop, pooled: Database):
    """Its limits are the ones that count: nothing is judged, and what to give it is said."""
    plant(shop, worker())

    vanished, found = [each for each in examine(pooled, "shop:db", processes=40) if each.level is not Level.OK]

    assert (vanished.level, vanished.check) == (Level.NOTE, "vanished clients")
    assert "idle_in_transaction_session_timeout is off" in vanished.found
    assert (found.level, found.check) == (Level.NOTE, "connections")
    assert "to a pooler, whose limits are the ones that count" in found.found
    assert "max_client_conn = 720" in found.remedy[0]


@postgresql
def test_sessions_that_no_rescuer_could_end_come_with_how_long_they_stay(shop: Workshop, postgres: PostgresServer):
    """By the server's own settings, over its network; and with what changes that, which can be typed."""
    plant(shop, worker())
    name = str(shop.outside.url.database)
    postgres.execute("ALTER DATABASE {} SET tcp_keepalives_idle = 7200", name)
    postgres.execute("ALTER DATABASE {} SET tcp_keepalives_interval = 75", name)
    postgres.execute("ALTER DATABASE {} SET tcp_keepalives_count = 9", name)
    shop.sql("CREATE ROLE other_worker SUPERUSER")
    with Session(shop.outside) as session:
        (row,) = session.scalars(sa.select(WorkerRecord))
        row.backends = [[1, 1, "other_worker", False]]
        session.commit()
    shop.sql("CREATE ROLE plain_doctor LOGIN")
    try:
        shop.sql("GRANT ALL ON ALL TABLES IN SCHEMA public TO plain_doctor")
        db = Database(sa.make_url(shop.under_test.url).set(username="plain_doctor"))

        (finding,) = [each for each in examine(db, "shop:db", processes=1) if each.level in BAD]

        assert finding.check == "vanished clients"
        assert "up to 7875 s (tcp_keepalives 7200 s + 9 × 75 s)" in finding.found
        assert "'plain_doctor' may not end those of 'other_worker'" in finding.why
        assert finding.remedy[0] == "GRANT other_worker TO plain_doctor;"
        for line in finding.remedy:
            shop.sql(line)
        assert [each for each in examine(db, "shop:db", processes=1) if each.level in BAD] == []
    finally:
        shop.sql("DROP OWNED BY plain_doctor")
        shop.sql("DROP ROLE plain_doctor, other_worker")


@postgresql
def test_behind_a_pooler_strict_refuses_nothing(shop: Workshop, pooled: Database):
    """What the server allows says nothing about how many clients the pooler takes."""

    async def start() -> bool:
        try:
            async with pooled.running(processes=40, strict=True):
                return pooled.runner is not None
        finally:
            await pooled.async_dispose()

    assert asyncio.run(start())


@pytest.mark.drivers("psycopg")
def test_old_tables_of_a_database_without_durable_tasks_are_not_missed(postgres_url: str):
    """An application that has only tasks in memory needs none of our tables."""
    shop = Workshop(DatabaseUnderTest(url=postgres_url, driver="psycopg"))

    findings = examine(shop.db, "shop:db", processes=None)
    shop.close()

    assert [(each.check, each.level) for each in findings if each.level is not Level.OK] == [("tables", Level.NOTE)]
