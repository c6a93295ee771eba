"""What the commands print is text: nothing that is stored moves a terminal, forges a line or stops a command."""

import json
import re
import sys
import types
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from click.testing import Result
from typer.testing import CliRunner

from aftercommit import Database, TaskRecord
from aftercommit.cli.commands import app
from aftercommit.records.tables import PoolState, WorkerRecord

ODD = (
    "\x1b]0;title\x07", "\x1b[31mred", "\x9b31m", "\x90q\x9c", "a\r\nstate  succeeded", "a\x0bb", "\u202egpj.exe",
    "\u2066x", "[bold]name[/bold]", "[/]", "[link=http://evil]x[/link]", "a\\", "[red", "naïve 日本", "\u2028x",
)  # fmt: skip
MOVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture
def db(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A database that the commands find as ``its_shop:db``."""
    module = types.ModuleType("its_shop")
    module.db = db = Database(sqlite_url)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "its_shop", module)
    db.create_tables()
    yield db
    db.dispose()


def command(*words: str, columns: int = 160) -> Result:
    """Run one, as on a terminal of that width."""
    runner = CliRunner(env={"COLUMNS": str(columns), "AFTERCOMMIT_DB": "its_shop:db"})
    return runner.invoke(app, list(words))


def plant(db: Database, text: str, **more: object) -> UUID:
    """Write a record in which *text* stands wherever text may stand."""
    now = datetime.now(UTC)
    columns = {
        "id": uuid4(), "task": text, "pool": text, "state": "failed", "key": text, "error": text, "traceback": text,
        "errors": [{"attempt": 1, "at": text, "error": text, "traceback": text}], "arguments": {text: [text]},
        "result": text, "checkpoint": text, "context": {"trace": text}, "run_at": now, "enqueued_at": now,
        "finished_at": now, **more,
    }  # fmt: skip
    with db.session() as session:
        session.add(TaskRecord(**columns))
        session.add(WorkerRecord(id=uuid4(), host=text, pid=1, started_at=now, seen_at=now, pools=[text], names=[text]))
        session.merge(PoolState(name=text, paused_at=now))
    return columns["id"]  # type: ignore[return-value]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_no_control_character_reaches_the_terminal(db: Database, text: str):
    """Names, keys, errors, tracebacks, arguments and hosts are shown, and what is in them is not obeyed."""
    id = plant(db, text)
    plant(db, text, id=uuid4(), state="queued", finished_at=None)

    results = {
        words: command(*words)
        for words in (
            ("tasks", "list"), ("tasks", "list", "--json"), ("tasks", "show", str(id)),
            ("tasks", "show", str(id), "--json"), ("pools", "list"), ("pools", "list", "--json"), ("doctor",),
            ("doctor", "--json"),
        )
    }  # fmt: skip

    for words, result in results.items():
        assert result.exit_code in ({0, 1} if "doctor" in words else {0}), (words, result.output, result.exception)
        assert MOVES.search(result.output) is None, (words, result.output)
        if words[:2] == ("tasks", "show") and words[-1] == "--json":
            assert json.loads(result.output)["arguments"] == {text: [text]}
    listed = results["tasks", "list"].output
    assert text in listed or "\\" in listed
    assert not any(
        line.startswith("state  succeeded") for result in results.values() for line in result.output.splitlines()
    )


def test_what_is_no_text_is_shown(db: Database):
    """Half a character in arguments, NUL in a name, a state that nobody knows, entries that somebody wrote by hand."""
    id = plant(db, "odd", state="[weird]", arguments={"half": "\ud800", "nul": "\0"}, errors=[{"attempt": 1}, {}])
    with db.engine("request").begin() as connection:
        connection.execute(sa.text("UPDATE aftercommit_task SET task = :name"), {"name": "a\0b"})

    shown, listed, found = (
        command("tasks", "show", str(id)),
        command("tasks", "list"),
        command("tasks", "list", "--json"),
    )

    assert (shown.exit_code, listed.exit_code, found.exit_code) == (0, 0, 0), shown.output + listed.output
    assert "[weird]" in shown.output
    assert "[weird]" in listed.output
    assert "a\\0b" in listed.output
    assert "\\ud800" in shown.output
    assert json.loads(found.output)[0]["task"] == "a\0b"


@pytest.mark.parametrize("columns", [50, 60, 80, 100, 160])
def test_the_state_is_seen_on_any_terminal(db: Database, columns: int):
    """Where there is not room for all columns, the id and the state stay whole, and what is missing is named."""
    id = plant(db, "an_ordinary_task_with_a_long_name", error="ValueError: no\n", state="cancelled")

    listed = command("tasks", "list", columns=columns).output

    assert "cancelled" in listed
    assert str(id) in listed
    assert ("has room for" in listed) == (columns < 100)


def test_the_commands_tell_of_errors_without_values(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module that cannot be imported says why, and not with what."""
    tmp_path.joinpath("its_broken.py").write_text(
        "import sqlalchemy as sa\nwith sa.create_engine('sqlite://').connect() as c:\n"
        "    c.execute(sa.text('SELECT json(:v)'), {'v': '{' + '4111' * 4})\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)

    said = command("tasks", "list", "--db", "its_broken:db")

    assert said.exit_code == 2
    assert "malformed JSON" in said.output
    assert "41114111" not in said.output


def test_a_doctor_that_knows_no_task_names_the_option_first(db: Database):
    """Queued tasks that nobody knows may only miss an import: that comes first, to cancel them comes last."""
    plant(db, "default", task="send", state="queued", finished_at=None)

    said = command("doctor")
    found = {each["check"]: each for each in json.loads(command("doctor", "--json").output)["findings"]}

    assert said.exit_code == 1
    assert found["names"]["level"] == "wrong"
    assert "--import" in found["names"]["remedy"][0]
    assert "cancel" not in "".join(found["names"]["remedy"][:-1])
