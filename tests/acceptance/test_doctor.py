"""``aftercommit doctor`` as a process of its own, as an operator types it."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.processes import Log, spawn

SHOP = """
import os
from sqlalchemy.orm import Session
from sqlalchemy.ext.asyncio import AsyncSession
from aftercommit import Database

{before}

db = Database({url}, engine_options={{"connect_args": {{{arguments}}}}})


@db.task
def double(number: int) -> int:
    return 2 * number

{after}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own, and nothing in the environment that says otherwise."""
    for name in ("AFTERCOMMIT_DB", "AFTERCOMMIT_RUNS", "WEB_CONCURRENCY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def write(*, before: str = "", url: str = '"sqlite:///shop.db"', arguments: str = "", after: str = "") -> None:
    """Write the application."""
    Path("shop.py").write_text(SHOP.format(before=before, url=url, arguments=arguments, after=after))


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for its end."""
    command = [sys.executable, "-m", "aftercommit", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "COLUMNS": "80", **env}
    )


def doctor(*words: str, **env: str) -> tuple[int, dict[str, Any]]:
    """Its exit code, and by check what is more than in order."""
    result = run("doctor", "shop:db", "--json", *words, **env)
    assert result.stdout, result.stderr
    findings = json.loads(result.stdout)["findings"]
    return result.returncode, {each["check"]: each for each in findings if each["level"] not in {"ok", "note"}}


@pytest.fixture(params=["sqlite", "psycopg", "asyncpg"])
def healthy(request: pytest.FixtureRequest) -> Iterator[None]:
    """The application with its tables and a live worker."""
    url = "sqlite:///shop.db"
    if request.param != "sqlite":
        url = request.getfixturevalue("postgres_url").replace("psycopg", request.param)
    write(url=repr(url))
    assert run("schema", "shop:db", "--apply").returncode == 0
    if request.param == "sqlite":
        Path("shop.db").chmod(0o600)
    worker = spawn([sys.executable, "-m", "aftercommit", "worker", "shop:db"])
    assert worker.stdout is not None
    log = Log(worker.stdout)
    log.wait_for(" runs default")
    yield
    worker.terminate()
    worker.wait(30)
    log.join()


@pytest.mark.usefixtures("healthy")
def test_a_healthy_set_up():
    """It says that nothing is wrong and ends with 0, strict or not; scripts read the same."""
    said = run("doctor", "shop:db", "--strict")
    code, found = doctor("--strict")

    assert (said.returncode, code) == (0, 0)
    assert said.stdout.endswith("\nNothing is wrong.\n")
    assert {line[0] for line in said.stdout.splitlines()[:-1] if line} <= {"✓", " "}
    assert found == {}
    assert said.stderr == ""


def test_what_is_wrong_comes_with_what_to_type():
    """For people it is wrapped to the terminal, but for the lines that are there to be copied; it ends with 1."""
    write(after="db.create_tables()\nfrom aftercommit import TaskRecord\nwith db.session() as s:\n    "
          "db.after_commit(s, double, 1)")  # fmt: skip

    said = run("doctor", "shop:db")

    assert said.returncode == 1
    assert "✗ workers: No process runs tasks" in said.stdout
    assert "    → aftercommit worker shop:db\n" in said.stdout
    assert said.stdout.endswith("\n1 wrong.\n")
    # The path of a test's folder may be longer than a line, and is one word.
    assert all(len(line) <= 80 for line in said.stdout.splitlines() if "→" not in line and "shop.db" not in line)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_database_that_cannot_be_reached(driver: str):
    """It says so in the driver's words, without the password, and ends with 1."""
    write(url=f'"postgresql+{driver}://joe:tops3cret@127.0.0.1:1/shop"')

    said = run("doctor", "shop:db")

    assert said.returncode == 1
    assert "✗ database: " in said.stdout
    assert "joe:***@127.0.0.1:1/shop" in said.stdout
    assert "pg_isready -h 127.0.0.1 -p 1 -d shop" in said.stdout
    assert "tops3cret" not in said.stdout + said.stderr
    assert "Traceback" not in said.stderr


def test_a_url_that_cannot_be_had():
    """A function that raises is named by its error's class; its text might hold a secret."""
    write(url='lambda: os.environ["NO_SUCH_VARIABLE"]')

    code, found = doctor()

    assert (code, found["url"]["level"]) == (1, "wrong")
    assert "KeyError" in found["url"]["found"]


@pytest.mark.parametrize(
    ("url", "package", "after", "level"),
    [
        ("postgresql+asyncpg://joe@127.0.0.1:1/shop", "asyncpg", "", "wrong"),
        ("postgresql://joe@127.0.0.1:1/shop", "psycopg", "", "wrong"),
        ("sqlite:///shop.db", "aiosqlite", "@db.task\nasync def more(session: AsyncSession) -> None: ...", "wrong"),
    ],
)
def test_a_driver_that_is_not_installed(url: str, package: str, after: str, level: str):
    """What the URL or a task needs and is not there is named, with the line that installs it."""
    write(url=repr(url), before=f"import sys; sys.modules['{package}'] = None", after=after)

    code, found = doctor()

    assert (code, found["drivers"]["level"]) == (1, level)
    (remedy,) = found["drivers"]["remedy"]
    assert remedy.startswith(f"pip install '{package}")
    assert "double" not in found["drivers"]["why"]  # it takes no session


def test_an_old_package(monkeypatch: pytest.MonkeyPatch):
    """Found by its metadata, as pip would find it."""
    write()
    metadata = Path("old/fastapi-0.120.0.dist-info")
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fastapi\nVersion: 0.120.0\n")

    code, found = doctor(PYTHONPATH=str(Path("old").absolute()))

    assert (code, found["packages"]["level"]) == (1, "wrong")
    assert found["packages"]["remedy"] == ["pip install 'fastapi>=0.121'"]


# --- SQLite -----------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_yet_is_not_made():
    """Looking makes nothing; it is said where the file would be."""
    write()

    said = run("doctor", "shop:db")

    assert said.returncode == 0
    assert "is not there yet" in " ".join(said.stdout.split())
    assert not Path("shop.db").exists()


def test_a_folder_that_does_not_exist():
    """With the line that makes it."""
    write(url='"sqlite:///data/shop.db"')

    code, found = doctor()

    assert (code, found["file"]["level"]) == (1, "wrong")
    assert found["file"]["remedy"] == [f"mkdir -p {Path.cwd() / 'data'}"]


def test_a_path_with_spaces_is_one_word():
    """What is there to be copied can be."""
    write(url='"sqlite:///my data/shop.db"')

    _, found = doctor()

    assert found["file"]["remedy"] == [f"mkdir -p '{Path.cwd() / 'my data'}'"]


AS_ANYBODY = """
import ctypes, os, sys

import aftercommit.cli.commands

# Permissions mean something to root only without its capabilities.
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
if os.getuid() == 0 and ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
    sys.exit("capset failed")
sys.argv[1:] = ["doctor", "shop:db", "--json"]
aftercommit.cli.commands.app()
"""


@pytest.mark.parametrize(("what", "mode"), [("data", 0o555), ("data/shop.db", 0o444)])
def test_a_file_or_folder_that_may_not_be_written(what: str, mode: int):
    """Either is wrong, and named, with the line that mends it."""
    Path("data").mkdir()
    write(url='"sqlite:///data/shop.db"')
    assert run("schema", "shop:db", "--apply").returncode == 0
    Path(what).chmod(mode)

    result = subprocess.run(
        [sys.executable, "-c", AS_ANYBODY], capture_output=True, text=True, timeout=120, check=False
    )
    Path("data").chmod(0o755)

    assert result.returncode == 1, result.stderr
    (found,) = [each for each in json.loads(result.stdout)["findings"] if each["check"] == "file"]
    assert found["level"] == "wrong"
    assert f"{what} is not writable for" in found["found"]
    assert found["remedy"][0].startswith("chmod u+w ")


@pytest.mark.parametrize(
    ("folder", "mode", "level"),
    [(0o755, 0o644, "warning"), (0o755, 0o640, None), (0o755, 0o600, None), (0o750, 0o644, "note")],
)
def test_a_file_that_every_user_may_read(folder: int, mode: int, level: str | None):
    """It is named, its log as well, with the line that mends it; a folder that keeps the others out makes it a note."""
    top = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp")
    with TemporaryDirectory(dir=top) as made:
        file = Path(made, "data", "shop.db")
        file.parent.mkdir()
        Path(made).chmod(0o755)
        write(url=f'"sqlite:///{file}"')
        assert run("schema", "shop:db", "--apply").returncode == 0
        wal = file.with_name("shop.db-wal")
        wal.touch()
        for each in (file, wal):
            each.chmod(mode)
        file.parent.chmod(folder)

        found = json.loads(run("doctor", "shop:db", "--json").stdout)["findings"]

        named = [each for each in found if each["check"] == "file mode"]
        assert [each["level"] for each in named] == ([] if level is None else [level])
        assert "journal mode" in {each["check"] for each in found}
        for each in named:
            assert f"{file} ({mode:04o})" in each["found"]
            assert each["remedy"] == [f"chmod o= {file} {wal}"]


def test_a_file_that_is_opened_read_only():
    """What permissions allow and the URL does not is found by trying."""
    write(url='"sqlite:///shop.db"')
    run("schema", "shop:db", "--apply")
    write(url='"sqlite:///file:shop.db?mode=ro&uri=true"')

    code, found = doctor()

    assert (code, found["write lock"]["level"]) == (1, "wrong")
    assert "readonly" in found["write lock"]["found"]


def test_a_file_that_is_locked_in_another_journal_mode():
    """Somebody has it open in the old way: then nobody gets a write-ahead log, and that is said."""
    write(arguments='"timeout": 0.1')
    other = sqlite3.connect("shop.db", isolation_level=None)
    other.execute("PRAGMA journal_mode=DELETE")
    other.execute("CREATE TABLE mine (id)")
    other.execute("BEGIN IMMEDIATE")
    other.execute("INSERT INTO mine VALUES (1)")

    code, found = doctor()
    other.execute("ROLLBACK")
    other.close()

    assert code == 0
    assert found["journal mode"]["level"] == "warning"
    assert "'delete'" in found["journal mode"]["found"]
    assert "PRAGMA journal_mode=WAL" in found["journal mode"]["remedy"][0]
    assert found["write lock"]["level"] == "warning"


@pytest.mark.parametrize(
    ("content", "why", "typed"),
    [
        (b"no database at all " * 300, "damaged", "sqlite3 'my shop.db' 'PRAGMA integrity_check'"),
        (None, "locked", "lsof 'my shop.db'    # who has it open"),
    ],
)
def test_a_file_that_cannot_be_read_at_all(content: bytes | None, why: str, typed: str):
    """Broken, or locked as a whole by somebody who does not use a write-ahead log."""
    write(url='"sqlite:///my shop.db"', arguments='"timeout": 0.1')
    other = sqlite3.connect("my shop.db", isolation_level=None)
    other.execute("CREATE TABLE mine (id)")
    other.execute("BEGIN EXCLUSIVE")
    if content is not None:
        other.close()
        Path("my shop.db").write_bytes(content)

    code, found = doctor()
    other.close()

    assert (code, found["database"]["level"]) == (1, "wrong")
    assert why in found["database"]["why"]
    assert found["database"]["remedy"] == [typed]


# --- the rest ---------------------------------------------------------------------------------------------------


def test_warnings_count_where_that_is_asked_for(postgres_url: str):
    """Without ``--strict`` only what is wrong ends with 1; the processes are an option's, or the environment's."""
    write(url=repr(postgres_url))
    run("schema", "shop:db", "--apply")

    lenient, by_option = doctor("--processes", "100")
    strict, _ = doctor("--processes", "100", "--strict")
    _, by_environment = doctor(WEB_CONCURRENCY="50")

    assert (lenient, strict) == (0, 1)
    assert "100 processes × 18 connections = 1800, but" in by_option["connections"]["found"]
    assert "50 processes × 18 connections = 900, but" in by_environment["connections"]["found"]
    assert "(by WEB_CONCURRENCY)" in by_environment["connections"]["found"]


def test_a_clock_that_is_wrong(postgres_url: str):
    """This machine's clock is put forward, and the doctor says by how much the two are apart."""
    write(url=repr(postgres_url), before="import time; right = time.time; time.time = lambda: right() + 90")
    run("schema", "shop:db", "--apply")

    code, found = doctor()

    assert code == 0
    assert "behind this machine's" in found["clock"]["found"]
    assert any(f"{seconds} s" in found["clock"]["found"] for seconds in ("89.9", "90.0", "90.1"))


def test_the_environment_is_told_of():
    """What it overrides is a note."""
    write()

    said = run("doctor", "shop:db", AFTERCOMMIT_RUNS="none")

    assert "AFTERCOMMIT_RUNS=none is set here" in said.stdout


@pytest.mark.parametrize("command", ["doctor", "schema"])
@pytest.mark.parametrize(
    ("application", "said"),
    [
        ("db = 1", "is of type int, and not a Database"),
        ("from aftercommit import Database\ndb = Database('x')", "AC401"),
    ],
)
def test_mistakes_are_explained(command: str, application: str, said: str):
    """What is no ``Database``, or none that can be made, ends with 2 and a sentence, never with a traceback."""
    Path("shop.py").write_text(application)

    result = run(command, "shop:db")

    assert result.returncode == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("words", [("doctor", "shop:db"), ("worker", "shop:db"), ("schema", "shop:db")])
def test_an_application_that_cannot_be_imported(words: tuple[str, ...]):
    """Ends with 2, as what cannot be named does, and shows where it failed."""
    Path("shop.py").write_text("import there_is_no_such_package")

    result = run(*words)

    assert result.returncode == 2
    assert 'shop.py", line 1' in result.stderr
    assert "No module named 'there_is_no_such_package'" in result.stderr
    assert "The module 'shop' cannot be imported" in result.stderr


@pytest.mark.parametrize("command", ["doctor", "worker"])
def test_a_module_of_tasks_that_is_not_there(command: str):
    """A slip in ``--import`` is a sentence."""
    write()

    result = run(command, "shop:db", "--import", "shop_tasks.mail")

    assert result.returncode == 2
    assert "There is no module 'shop_tasks' here." in result.stderr
    assert "Traceback" not in result.stderr
