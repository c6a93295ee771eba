"""``aftercommit schedules``, as a process of its own on a real database."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from aftercommit import TaskRecord
from tests.acceptance.test_cli import run

SHOP = """
import asyncio, os
from aftercommit import Cron, Database, Every

db = Database(os.environ["SHOP_URL"])


@db.task(schedule=Cron("0 0 1 1 *", name="of the code"))
def report(region: str = "apac") -> None: ...


async def main():
    async with db.running(create_tables=True):
        async with db.async_session() as session:
            await db.async_create_schedule(session, Every(86400.0, name="made"), report, "emea")
    await db.async_dispose()


if __name__ == "__main__":
    asyncio.run(main())
"""


def test_preview_marks_the_days_of_clock_changes():
    """Without a database; in the night in which half past two does not exist, the tick comes at three."""
    said = run(
        "schedules", "preview", "30 2 * * *", "--timezone", "Europe/Berlin", "--since", "2026-03-28", "--count", "3"
    )

    lines = said.stdout.splitlines()
    assert said.returncode == 0
    assert lines[1:] == [
        "Sat 2026-03-28 02:30 +0100",
        "Sun 2026-03-29 03:00 +0200   clocks go forward on this day",
        "Mon 2026-03-30 02:30 +0200",
    ]
    assert len(json.loads(run("schedules", "preview", "@daily", "--json").stdout)) == 10
    refused = run("schedules", "preview", "0 0 30 2 *")
    assert refused.returncode == 2
    assert "AC601" in refused.stderr


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "asyncpg"])
def test_look_pause_resume_trigger_delete(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """What an operator does by hand."""
    url = f"sqlite:///{tmp_path / 'shop.db'}" if kind == "sqlite" else request.getfixturevalue("postgres_url")
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.setenv("SHOP_URL", url.replace("+psycopg", "+asyncpg") if kind == "asyncpg" else url)
    monkeypatch.setenv("AFTERCOMMIT_DB", "shop:db")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "shop.py"], check=True, timeout=60)

    listed = json.loads(run("schedules", "list", "--json").stdout)
    assert [(each["name"], each["origin"]) for each in listed] == [("made", "data"), ("of the code", "code")]
    assert "of the code" in run("schedules", "list").stdout
    assert run("schedules", "pause", "made", "--by", "ada").stdout == "Schedule 'made' is paused.\n"
    assert json.loads(run("schedules", "show", "made", "--json").stdout)["paused_by"] == "ada"
    again = run("schedules", "pause", "made")
    assert again.returncode == 2
    assert "AC602" in again.stderr
    assert run("schedules", "resume", "made").returncode == 0
    triggered = run("schedules", "trigger", "made")
    assert triggered.returncode == 0, triggered.stderr
    for name, code in (("of the code", 2), ("made", 0), ("nothing", 2)):
        assert run("schedules", "delete", name, "--yes").returncode == code
    engine = create_engine(url)
    with Session(engine) as session:
        [record] = session.query(TaskRecord)
        assert (str(record.id), record.schedule, record.arguments) == (
            triggered.stdout.strip(),
            "made",
            {"region": "emea"},
        )
    engine.dispose()
