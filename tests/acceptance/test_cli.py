"""The command, as a process of its own on a real database."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pytest
from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.orm import Session

from aftercommit import TaskRecord
from aftercommit.records.tables import WorkerRecord

SHOP = """
import asyncio, atexit, os, sys
from sqlalchemy.orm import Session
from aftercommit import Database, PoolSettings

db = Database(os.environ["SHOP_URL"], pools={"files": PoolSettings(pool_size=1)})


@db.task
def double(number: int) -> int:
    return 2 * number


@db.task(pool="files")
def refuse(reason: str) -> None:
    raise ValueError(reason)


@db.task
def wait(gate: str) -> str:
    print("Waiting at the gate", file=sys.stderr, flush=True)
    with open(gate) as fifo:
        return fifo.read()


@atexit.register
def linger():
    if gate := os.environ.get("SHOP_LINGERS"):
        print("Lingering", file=sys.stderr, flush=True)
        with open(gate, "rb", buffering=0) as fifo:
            fifo.read(1)


async def hand_over(gate=None):
    async with db.async_session() as session:
        if gate is None:
            db.after_commit(session, double, 21)
            db.after_commit(session, refuse, "a [bold] reason")
        else:
            db.after_commit(session, wait, gate)
    await db.async_dispose()


if __name__ == "__main__":
    asyncio.run(hand_over(*sys.argv[1:]))
"""


@pytest.fixture(params=["sqlite", "postgresql", "asyncpg"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An application ``shop`` in a folder of its own, on an empty database; the test looks at it from outside."""
    url = f"sqlite:///{tmp_path / 'shop.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.setenv("SHOP_URL", url.replace("+psycopg", "+asyncpg") if request.param == "asyncpg" else url)
    monkeypatch.setenv("AFTERCOMMIT_DB", "shop:db")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    engine = create_engine(url)
    yield engine
    engine.dispose()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for its end."""
    command = [sys.executable, "-m", "aftercommit", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def hand_over(*gate: str) -> None:
    """Have another process ask for one task that succeeds and one that fails, or for one that waits at a gate."""
    subprocess.run([sys.executable, "shop.py", *gate], check=True, timeout=60)


def states(engine: Engine) -> dict[str, str]:
    """What became of the tasks, by name."""
    with Session(engine) as session:
        return {record.task: record.state for record in session.scalars(select(TaskRecord))}


class Worker:
    """A worker process and what it has said so far."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "aftercommit", "worker", "--log-level", "DEBUG", *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []

    def __enter__(self) -> Self:
        """Wait until it runs."""
        self.wait_for(" runs ")
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind, however the test went."""
        self.process.kill()
        self.process.communicate()

    def wait_for(self, *words: str) -> None:
        """Read on until each of these words was said."""
        assert self.process.stderr is not None
        while missing := [word for word in words if not any(word in line for line in self.log)]:
            line = self.process.stderr.readline()
            if not line:
                pytest.fail(f"the worker ended without saying {missing}: {''.join(self.log)}")
            self.log.append(line)

    def stop(self) -> int:
        """Stop it in order; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.wait_for("Stopped")
        return self.process.wait(30)


def test_worker_runs_what_waits_and_stops_in_order(engine: Engine) -> None:
    """A worker runs the tasks of another process, tells of failures, and ends with 0 on SIGTERM."""
    assert run("schema", "--apply").returncode == 0
    hand_over()

    with Worker() as worker:
        worker.wait_for("failed for good", "succeeded after")
        code = worker.stop()

    assert code == 0
    assert states(engine) == {"double": "succeeded", "refuse": "failed"}


def test_a_worker_that_knows_no_task_says_what_to_write(engine: Engine, tmp_path: Path) -> None:
    """Once, as a warning, with the module that declares tasks where that can be guessed."""
    assert run("schema", "--apply").returncode == 0
    package = tmp_path / "bazaar"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "database.py").write_text(
        "import os\nfrom aftercommit import Database\ndb = Database(os.environ['SHOP_URL'])\n"
    )
    (package / "tasks.py").write_text("from bazaar.database import db\n@db.task\ndef send() -> None: ...\n")

    with Worker("bazaar.database:db") as worker:
        assert worker.stop() == 0
    with Worker("bazaar.database:db", "--import", "bazaar.tasks") as told:
        assert told.stop() == 0

    (said,) = [line for line in worker.log if "knows no task" in line]
    assert "WARNING" in said
    assert "aftercommit worker bazaar.database:db --import bazaar.tasks" in said
    assert not any("knows no task" in line for line in told.log)


@pytest.mark.parametrize("finishes", [True, False])
def test_a_second_signal_does_not_tear_the_stop_apart(engine: Engine, tmp_path: Path, finishes: bool) -> None:
    """SIGTERM twice while a task runs: it finishes within its grace, or is queued again as if it had never begun."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    run("schema", "--apply")
    hand_over(str(gate))

    with Worker("--grace", "60" if finishes else "1") as worker:
        worker.wait_for("Waiting at the gate")
        worker.process.send_signal(signal.SIGTERM)
        worker.wait_for("Stopping")
        worker.process.send_signal(signal.SIGTERM)
        if finishes:
            worker.wait_for("SIGTERM again")
            gate.write_text("open")
        worker.wait_for("Stopped")
        code = worker.process.wait(30)

    with Session(engine) as session:
        left = session.scalars(select(TaskRecord)).one()
        workers = session.scalars(select(WorkerRecord)).all()
    assert (code, list(workers)) == (0, [])
    if finishes:
        assert (left.state, left.attempt, left.result) == ("succeeded", 1, "open")
        return
    assert (left.state, left.attempt, left.worker) == ("queued", 0, None)
    with Worker() as heir:
        heir.wait_for("Waiting at the gate")
        gate.write_text("open")
        heir.wait_for("succeeded after")
        heir.stop()
    with Session(engine) as session:
        ended = session.scalars(select(TaskRecord)).one()
    assert (ended.state, ended.attempt, ended.result) == ("succeeded", 1, "open")


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_stop_changes_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A signal that comes when all is done, and the process only has to end, does not make that end a failure."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    # For reading too: it does not wait for a reader, who may have been killed.
    opened = os.open(gate, os.O_RDWR)
    run("schema", "--apply")
    monkeypatch.setenv("SHOP_LINGERS", str(gate))

    with Worker() as worker:
        worker.process.send_signal(number)
        worker.wait_for("Stopped", "Lingering")
        worker.process.send_signal(number)
        os.write(opened, b"x")
        code = worker.process.wait(30)
    os.close(opened)

    assert code == 0


def test_worker_runs_only_the_pools_it_is_told(engine: Engine) -> None:
    """With ``--pools`` the tasks of other pools stay queued."""
    run("schema", "--apply")
    hand_over()

    with Worker("shop:db", "--pools", "files") as worker:
        worker.wait_for("failed for good")
        worker.stop()

    assert states(engine) == {"double": "queued", "refuse": "failed"}


@pytest.mark.parametrize("engine", ["postgresql", "asyncpg"], indirect=True)
def test_a_strict_worker_does_not_start_beyond_the_servers_limit(engine: Engine) -> None:
    """``--processes`` and ``--strict`` are those of ``db.running``: the worker says the arithmetic, and ends."""
    run("schema", "--apply")

    refused = run("worker", "--processes", "1000", "--strict")

    assert refused.returncode == 2
    assert "AC403" in refused.stderr
    assert "1000" in refused.stderr
    with Session(engine) as session:
        assert list(session.scalars(select(WorkerRecord))) == []


def test_tasks_are_listed_shown_retried_and_cancelled(engine: Engine) -> None:
    """Everything about tasks can be read and changed, by id and by filter, by people and by scripts."""
    run("schema", "--apply")
    hand_over()

    listed = json.loads(run("tasks", "list", "--state", "queued", "--json").stdout)
    cancelled = run("tasks", "cancel", "--task", "refuse", "--yes")
    shown = run("tasks", "show", listed[0]["id"])
    retried = run("tasks", "retry", "--state", "cancelled", "--yes")
    again = run("tasks", "retry", listed[0]["id"])

    assert {row["task"] for row in listed} == {"double", "refuse"}
    assert "cancel: 1 task(s)" in cancelled.stdout
    assert "a [bold] reason" in shown.stdout
    assert "cancelled" in shown.stdout
    assert "retry: 1 task(s)" in retried.stdout
    assert states(engine) == {"double": "queued", "refuse": "queued"}
    # Queued again, it is no longer something to retry, and the command says so.
    assert again.returncode == 1
    assert "is not failed or cancelled" in again.stderr


def test_tasks_are_chosen_by_pool_and_age(engine: Engine) -> None:
    """``--pool`` and ``--older-than`` leave out what they do not name, whatever is done with the rest."""
    run("schema", "--apply")
    hand_over()
    hand_over()
    with Session(engine) as session, session.begin():
        old = session.scalars(select(TaskRecord).where(TaskRecord.pool == "default").order_by(TaskRecord.id)).first()
        assert old is not None
        old.enqueued_at = datetime(2020, 1, 1, tzinfo=UTC)
        old_id = str(old.id)

    in_pool = json.loads(run("tasks", "list", "--pool", "files", "--json").stdout)
    aged = json.loads(run("tasks", "list", "--older-than", "1h", "--json").stdout)
    cancelled = json.loads(run("tasks", "cancel", "--pool", "files", "--json").stdout)
    also = json.loads(run("tasks", "cancel", "--older-than", "1d", "--json").stdout)
    by_pool = json.loads(run("tasks", "retry", "--pool", "default", "--json").stdout)
    run("tasks", "cancel", old_id)
    by_age = json.loads(run("tasks", "retry", "--older-than", "15m", "--json").stdout)

    assert [row["task"] for row in in_pool] == ["refuse", "refuse"]
    assert [row["id"] for row in aged] == [old_id]
    assert sorted(cancelled["done"]) == sorted(row["id"] for row in in_pool)
    assert also == by_pool == by_age == {"done": [old_id], "left": []}
    with Session(engine) as session:
        left = sorted((record.task, record.state) for record in session.scalars(select(TaskRecord)))
    assert left == [("double", "queued")] * 2 + [("refuse", "cancelled")] * 2


def test_scripts_read_what_became_of_tasks(engine: Engine) -> None:
    """With ``--json`` the whole record is one document, and so is what was changed and what was left alone."""
    run("schema", "--apply")
    hand_over()
    with Worker() as worker:
        worker.wait_for("failed for good", "succeeded after")
        worker.stop()
    ids = {row["task"]: row["id"] for row in json.loads(run("tasks", "list", "--json").stdout)}

    shown = json.loads(run("tasks", "show", ids["refuse"], "--json").stdout)
    result = json.loads(run("tasks", "show", ids["double"], "--json").stdout)["result"]
    retried = run("tasks", "retry", *ids.values(), "--json")
    cancelled = run("tasks", "cancel", *ids.values(), "--json")

    assert (shown["id"], shown["state"], shown["attempt"]) == (ids["refuse"], "failed", 1)
    assert shown["arguments"] == {"reason": "a [bold] reason"}
    assert shown["error"] == "ValueError: a [bold] reason"
    assert "in refuse" in shown["traceback"]
    assert result == 42
    expected = {"done": [ids["refuse"]], "left": [ids["double"]]}
    assert (json.loads(retried.stdout), json.loads(cancelled.stdout)) == (expected, expected)
    # Something was left alone, and a script sees that without reading.
    assert (retried.returncode, cancelled.returncode) == (1, 1)


def test_pools_are_listed_paused_and_resumed(engine: Engine) -> None:
    """A paused pool starts nothing, and says so, until it is resumed."""
    run("schema", "--apply")
    hand_over()

    paused = run("pools", "pause", "files")
    with Worker() as worker:
        worker.wait_for("succeeded after")
        listed = {row["pool"]: row for row in json.loads(run("pools", "list", "--json").stdout)}
        run("pools", "resume", "files")
        worker.wait_for("failed for good")
        worker.stop()

    assert paused.returncode == 0
    assert listed["files"]["paused"]
    assert listed["files"]["queued"] == 1
    assert listed["default"]["workers"] == 1
    assert states(engine) == {"double": "succeeded", "refuse": "failed"}


def test_schema_is_printed_checked_and_applied(engine: Engine) -> None:
    """What is printed makes the same tables that ``--apply`` makes; ``--check`` tells which case it is."""
    before = run("schema", "--check")
    printed = run("schema")
    applied = run("schema", "--apply")
    after = run("schema", "--check")

    assert before.returncode == 1
    assert "are missing" in before.stdout
    assert "CREATE TABLE aftercommit_task" in printed.stdout
    assert ("autovacuum" in printed.stdout) == (engine.dialect.name == "postgresql")
    assert applied.returncode == after.returncode == 0


@pytest.mark.parametrize("engine", ["postgresql", "asyncpg"], indirect=True)
def test_the_applied_schema_is_told_how_to_vacuum(engine: Engine) -> None:
    """``--apply`` gives the table of tasks the settings that ``aftercommit schema`` prints."""
    printed = run("schema").stdout
    run("schema", "--apply")

    with engine.connect() as connection:
        options = connection.scalar(text("SELECT reloptions FROM pg_class WHERE relname = 'aftercommit_task'"))
    assert len(options) == 4
    assert all(option.replace("=", " = ") in printed for option in options)


def test_the_printed_schema_is_complete(engine: Engine) -> None:
    """The printed statements alone are enough."""
    printed = run("schema").stdout
    with engine.begin() as connection:
        for statement in printed.split(";"):
            if statement.strip():
                connection.exec_driver_sql(statement)

    assert run("schema", "--check").returncode == 0


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("worker", "nothing.here:db"), "There is no module 'nothing'"),
        (("worker", "shop"), "not of the form module:name"),
        (("worker", "shop:double"), "and not a Database"),
        (("worker", "shop:other"), "has nothing called 'other'"),
        (("worker", "shop:db", "--pools", "flies"), "runs names the pool 'flies'"),
        (("tasks", "list"), "aftercommit schema --apply"),
        (("tasks", "list", "--state", "done"), "use one of queued"),
        (("tasks", "list", "--older-than", "soon"), "write a number and s, m, h or d"),
        (("tasks", "retry"), "Which tasks?"),
        (("pools", "pause", "flies"), "There is no pool of tasks 'flies'"),
    ],
)
def test_mistakes_are_explained(engine: Engine, words: tuple[str, ...], said: str) -> None:
    """A mistake ends with 2 and a sentence that says what to write, never with a traceback."""
    result = run(*words)

    assert result.returncode == 2
    assert said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
