"""Tables of version 1, with work in them, are brought forward under old and new workers, and nothing is lost."""

import asyncio
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aftercommit import Database, TaskRecord
from aftercommit.cli import schema as command_schema
from aftercommit.errors import SchemaError
from aftercommit.records import schema, steps
from aftercommit.records.steps import AddColumn, AddIndex, DropIndex, Step
from tests.support import history
from tests.support.databases import DatabaseUnderTest
from tests.support.processes import Log, spawn
from tests.support.servers import ROOT

HERE = Path(__file__).parent
both = pytest.mark.drivers("psycopg", "pysqlite")
on_postgresql = pytest.mark.drivers("psycopg", "asyncpg")


@pytest.fixture
def engine(database: DatabaseUnderTest) -> Iterator[sa.Engine]:
    """A database as version 1 left it: queued, running and finished records."""
    engine = sa.create_engine(database.sync_url)
    kind = "sqlite" if database.is_sqlite else "postgresql"
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE asked (label VARCHAR(255) PRIMARY KEY)")
        serial = "INTEGER" if database.is_sqlite else "SERIAL"
        connection.exec_driver_sql(f"CREATE TABLE effect (id {serial} PRIMARY KEY, label VARCHAR(255) NOT NULL)")
        run_script(connection, (HERE / "version_1" / f"{kind}.sql").read_text(encoding="utf-8"))
        run_script(connection, (HERE / "version_1" / "records.sql").read_text(encoding="utf-8"))
    yield engine
    engine.dispose()


def run_script(connection: sa.Connection, script: str) -> None:
    """Run statement by statement, as ``psql`` and ``sqlite3`` do."""
    lines = [line for line in script.splitlines() if not line.startswith("--")]
    for statement in "\n".join(lines).split(";\n"):
        sql = statement.partition(";  --")[0].strip().rstrip(";")
        if sql:
            connection.exec_driver_sql(sql)


def shape(engine: sa.Engine) -> dict[str, Any]:
    """Every table of ours, with its columns and indexes."""
    inspector = sa.inspect(engine)
    found: dict[str, Any] = {}
    for table in sorted(set(TaskRecord.metadata.tables) & set(inspector.get_table_names())):
        columns = {
            each["name"]: (str(each["type"]), each["nullable"], each["default"])
            for each in inspector.get_columns(table)
        }
        indexes = {
            each["name"]: (
                each["column_names"],
                bool(each["unique"]),
                {key: str(value) for key, value in each.get("dialect_options", {}).items()},
            )
            for each in inspector.get_indexes(table)
        }
        found[table] = (columns, indexes)
    return found


def version(engine: sa.Engine) -> int | None:
    """What the tables say."""
    with engine.connect() as connection:
        return connection.scalar(sa.text("SELECT version FROM aftercommit_schema"))


def command(database: DatabaseUnderTest, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run ``aftercommit schema`` of today's code."""
    return subprocess.run(
        [sys.executable, "-m", "aftercommit", "schema", "tests.upgrade.shop:db", *words],
        env={**os.environ, "DATABASE_URL": database.url},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def make(database: DatabaseUnderTest) -> None:
    """Bring the tables forward by the public way."""
    db = Database(database.url)

    async def run() -> None:
        try:
            await db.async_create_tables()
        finally:
            await db.async_dispose()

    if database.is_async:
        asyncio.run(run())
        return
    try:
        db.create_tables()
    finally:
        db.dispose()


def test_older_tables_become_what_new_ones_are(database: DatabaseUnderTest, engine: sa.Engine, tmp_path: Path):
    """Column by column and index by index, on every driver; and a second time changes nothing."""
    make(database)
    make(database)

    assert version(engine) == schema.SCHEMA_VERSION
    brought = shape(engine)
    with engine.begin() as connection:
        TaskRecord.metadata.drop_all(connection)
        schema.create_tables(connection)
    assert brought == shape(engine)


@both
def test_the_command_says_what_is_missing_and_brings_it(database: DatabaseUnderTest, engine: sa.Engine):
    """``--check`` names each column; ``--apply`` adds them; after that there is nothing to print."""
    before, applied, after, printed = (command(database, word) for word in ("--check", "--apply", "--check", "--print"))

    assert before.returncode == 1
    assert "of version 1, and this release needs version" in before.stdout
    for name in ("column aftercommit_task.refunds", "index aftercommit_task_scheduled", "table aftercommit_schedule"):
        assert f"the {name}" in before.stdout
    assert applied.returncode == after.returncode == printed.returncode == 0, applied.stderr
    assert printed.stdout.startswith("-- The tables are there")
    assert version(engine) == schema.SCHEMA_VERSION


def test_what_is_printed_brings_them_forward_by_hand(database: DatabaseUnderTest, engine: sa.Engine):
    """Statement by statement, in no transaction but its own, and short of locks."""
    printed = command(database, "--print")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        run_script(connection, printed.stdout)

    assert command(database, "--check").returncode == 0
    if not database.is_sqlite:
        assert printed.stdout.startswith("SET lock_timeout = '500ms';")
    assert [line.split()[2] for line in printed.stdout.splitlines() if line.startswith("CREATE TABLE")] == [
        "aftercommit_schedule"
    ]


def test_tables_that_say_more_than_they_have_are_found(database: DatabaseUnderTest, engine: sa.Engine):
    """The number was raised by hand, or a migration stopped half-way."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE aftercommit_schema SET version = {schema.SCHEMA_VERSION}")

    checked = command(database, "--check")

    assert checked.returncode == 1
    assert "lack the column aftercommit_task.refunds" in checked.stdout


@on_postgresql
def test_a_change_that_must_wait_lets_others_through(database: DatabaseUnderTest, engine: sa.Engine):
    """Somebody has read the table and stays in the transaction: whoever comes behind the change is not kept."""
    with ThreadPoolExecutor(1) as other, engine.connect() as reader:
        reader.execute(sa.text("SELECT 1 FROM aftercommit_task"))
        done = other.submit(make, database)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as writer:
            wait_until_waiting(writer)
            writer.exec_driver_sql("SET lock_timeout = '10s'")
            for _ in range(5):
                writer.exec_driver_sql("UPDATE aftercommit_task SET priority = 1")
            assert not done.done()
        reader.rollback()
        done.result(60)

    assert version(engine) == schema.SCHEMA_VERSION


def wait_until_waiting(connection: sa.Connection) -> None:
    """Wait until somebody waits for the table."""
    waiting = sa.text(
        "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'aftercommit_task'::regclass)"
    )
    pause = threading.Event()
    for _ in range(3000):
        if connection.scalar(waiting):
            return
        pause.wait(0.01)
    raise AssertionError("nobody waits")


@on_postgresql
def test_a_lock_that_stays_is_an_error_that_says_what_to_do(
    database: DatabaseUnderTest, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
):
    """After many short tries; nothing is changed by then."""
    monkeypatch.setattr(schema, "_TRIES", 2)
    with engine.connect() as reader:
        reader.execute(sa.text("SELECT 1 FROM aftercommit_worker"))

        with pytest.raises(SchemaError, match="aftercommit_task, aftercommit_worker could not be changed"):
            make(database)

    assert version(engine) == 1
    assert "refunds" not in shape(engine)["aftercommit_task"][0]


LATER = (
    *steps.STEPS,
    Step(
        99,
        (
            AddIndex("aftercommit_task", "aftercommit_task_held"),
            DropIndex("aftercommit_task", "aftercommit_task_old"),
            AddColumn("aftercommit_task", "refunds"),
        ),
    ),
)


@pytest.mark.parametrize("concurrently", [False, True])
def test_a_step_may_add_and_drop_indexes(database: DatabaseUnderTest, engine: sa.Engine, *, concurrently: bool):
    """In a transaction, and on PostgreSQL outside of one; an index that could not be finished is made anew."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("DROP INDEX aftercommit_task_held")
        connection.exec_driver_sql("CREATE INDEX aftercommit_task_old ON aftercommit_task (state)")
        if not database.is_sqlite:
            connection.exec_driver_sql("CREATE INDEX aftercommit_task_held ON aftercommit_task (worker)")
            connection.exec_driver_sql(
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'aftercommit_task_held'::regclass"
            )
        found = steps.pending(connection, LATER)
        assert {type(each) for each in found} == {AddColumn, AddIndex, DropIndex}
        for change in found:
            for statement in change.statements(connection.dialect, concurrently=concurrently):
                assert ("CONCURRENTLY" in statement) == (concurrently and change.is_index and not database.is_sqlite)
                connection.exec_driver_sql(statement)
        # Named twice, and done once.
        left = steps.pending(connection, LATER)

    assert left == []
    assert "aftercommit_task_held" in shape(engine)["aftercommit_task"][1]
    assert "aftercommit_task_old" not in shape(engine)["aftercommit_task"][1]


@pytest.mark.parametrize("by_command", [False, True])
def test_a_release_with_such_a_step_brings_tables_forward(
    database: DatabaseUnderTest, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, *, by_command: bool
):
    """By ``create_tables`` and by the command, from version 1 in one go; the number comes last."""
    monkeypatch.setattr(steps, "STEPS", LATER)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 99)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX aftercommit_task_held")
        connection.exec_driver_sql("CREATE INDEX aftercommit_task_old ON aftercommit_task (state)")
        connection.exec_driver_sql("DELETE FROM aftercommit_schema")

    if by_command:
        command_schema._apply(Database(database.url))
    else:
        make(database)

    columns, indexes = shape(engine)["aftercommit_task"]
    assert "refunds" in columns
    assert "aftercommit_task_held" in indexes
    assert "aftercommit_task_old" not in indexes
    assert version(engine) == 99


@contextmanager
def process(database: DatabaseUnderTest, name: str, number: int, *, code: Path | None = None) -> Iterator[Any]:
    """The application, with the code of today or of another release."""
    path = [str(code), str(HERE)] if code is not None else [str(ROOT / "src"), str(HERE)]
    running = spawn(
        [sys.executable, str(HERE / "shop.py"), name, str(number)],
        env={**os.environ, "DATABASE_URL": database.sync_url, "PYTHONPATH": os.pathsep.join(path)},
        cwd=HERE,
    )
    assert running.stdout is not None
    log = Log(running.stdout)
    running.log = log  # type: ignore[attr-defined]
    try:
        log.wait_for("RUNNING")
        if code is not None:
            assert str(code) in log.wait_for("CODE")
        yield running
    finally:
        running.kill()
        running.wait()
        log.join()


def books(engine: sa.Engine) -> tuple[list[str], list[str], dict[str, int]]:
    """What was asked for, what took effect, and the records by state."""
    with engine.connect() as connection:
        asked = sorted(connection.scalars(sa.text("SELECT label FROM asked")))
        effects = sorted(connection.scalars(sa.text("SELECT label FROM effect")))
        states = Counter(connection.scalars(sa.text("SELECT state FROM aftercommit_task")))
        return asked, effects, dict(states)


@both
def test_new_workers_take_over_what_was_left_in_older_tables(database: DatabaseUnderTest, engine: sa.Engine):
    """Queued and running records take effect once; finished ones stay as they were."""
    assert command(database, "--apply").returncode == 0

    with process(database, "new", 20) as new:
        new.log.wait_for("DRAINED", timeout=60.0)

    asked, effects, states = books(engine)
    assert effects == asked
    assert states == {"succeeded": 26, "failed": 1, "cancelled": 1}


@both
def test_old_and_new_workers_work_side_by_side_while_the_tables_change(
    database: DatabaseUnderTest, engine: sa.Engine, tmp_path: Path
):
    """Two old processes work, the tables change, a new one joins, an old one is killed: nothing is lost."""
    code = history.unpack(history.VERSION_1, tmp_path)
    if code is None:
        pytest.skip(history.MISSING)
    with (
        process(database, "old", 150, code=code) as old,
        process(database, "victim", 10_000, code=code) as victim,
    ):
        applied = command(database, "--apply")
        assert applied.returncode == 0, applied.stdout + applied.stderr
        with process(database, "new", 150) as new:
            new.log.wait_for("ASKED", timeout=90.0)
            victim.kill()
            victim.wait()
            old.log.wait_for("DRAINED", timeout=120.0)
            new.log.wait_for("DRAINED", timeout=120.0)

    asked, effects, states = books(engine)
    assert effects == asked
    assert states == {"succeeded": len(asked), "failed": 1, "cancelled": 1}
    assert {f"{name} 0" for name in ("old", "victim", "new")} <= set(asked)
    assert version(engine) == schema.SCHEMA_VERSION
