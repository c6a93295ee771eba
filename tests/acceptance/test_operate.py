"""The operator's page: every command and every statement on it works as it stands there."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from aftercommit.cli.commands import app
from tests.docs.pages import ROOT, Page
from tests.support.processes import Log, spawn

PAGE = Page.read(ROOT / "docs" / "how-to" / "operate.md")

SHOP = """
import os
from aftercommit import Database

db = Database(os.environ["SHOP_URL"])


@db.task
def send_receipt() -> None: ...


@db.task
def process() -> None: ...


def hand_over():
    with db.session() as session:
        db.after_commit(session, send_receipt)
        db.after_commit(session, process)
"""
MAIN = """
from fastapi import FastAPI
from aftercommit.fastapi import install
from shop import db

app = FastAPI()
install(app, db)
"""


@pytest.fixture
def url(postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An application ``shop``, whose tables are made and which has two tasks queued."""
    Path(tmp_path / "shop.py").write_text(SHOP)
    Path(tmp_path / "main.py").write_text(MAIN)
    monkeypatch.setenv("SHOP_URL", postgres_url)
    for name in ("AFTERCOMMIT_DB", "AFTERCOMMIT_RUNS", "WEB_CONCURRENCY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    subprocess.run(
        [sys.executable, "-c", "import shop; shop.db.create_tables(); shop.hand_over()"], check=True, timeout=60
    )
    yield postgres_url
    sys.modules.pop("shop", None)


def commands() -> Iterator[tuple[dict[str, str], list[str]]]:
    """Every line of its shell blocks: variables, and words."""
    for block in PAGE.blocks:
        for line in block.code.splitlines() if block.language == "shell" else ():
            words = shlex.split(line, comments=True)
            variables = [word for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
            yield dict(each.split("=", 1) for each in variables), words[len(variables) :]


def serve(words: list[str], variables: dict[str, str], ready: str) -> None:
    """Start what goes on until it is told to stop; stop it in order."""
    process = spawn([sys.executable, "-m", *words], env={**os.environ, **variables})
    assert process.stdout is not None
    log = Log(process.stdout)
    log.wait_for(ready)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, -signal.SIGTERM)
    log.join()


@pytest.mark.usefixtures("url")
def test_every_command_works():
    """Typed in the order of the page, each of them does what it should and ends with 0."""
    seen = []
    for variables, words in commands():
        seen.append(words[0])
        if words[0] == "uvicorn":
            serve([*words, "--port", "0"], variables, "Application startup complete")
            continue
        assert words[0] == "aftercommit", words
        # Not in processes of their own: those have their tests, and take their time.
        result = CliRunner().invoke(app, words[1:], env=variables)
        # With nobody there who runs tasks, the doctor has something to say.
        expected = {0, 1} if words[1] == "doctor" else {0}
        assert result.exit_code in expected, f"{words}: {result.output}"
    assert set(seen) == {"aftercommit", "uvicorn"}


def test_every_statement_works(url: str):
    """Each by itself, outside of a transaction, as it is typed into psql."""
    statements = [
        statement
        for block in PAGE.blocks
        if block.language == "sql"
        for statement in block.code.split(";")
        if statement.strip()
    ]
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")

    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()

    assert len(statements) > 5


def test_the_numbers_of_kubernetes_add_up():
    """What stands in the manifests is more than uvicorn's wait, the grace, and the fifteen seconds of the text."""
    manifests = [block.code for block in PAGE.blocks if block.language == "yaml"]
    for manifest in manifests:
        found = re.search(r"terminationGracePeriodSeconds: (\d+) # more than ([\d +]+)", manifest)
        assert found is not None
        parts = [int(each) for each in found[2].split("+")]
        named = [int(each) for each in re.findall(r'"(\d+)"', manifest)]

        assert int(found[1]) > sum(parts)
        assert set(named) <= set(parts)

    assert len(manifests) == 2
