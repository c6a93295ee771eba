"""The command: formats, exit codes, configuration, suppression, correction, robustness."""

from __future__ import annotations

import io
import json
import os
import textwrap

import pytest

from aftercommit_check import cache as cache_module
from aftercommit_check import runner
from aftercommit_check.cli import Streams, main
from aftercommit_check.codes import RULES
from aftercommit_check.sources.pins import pin_in_text

BAD = textwrap.dedent("""
    from fastapi import BackgroundTasks, Depends
    from sqlalchemy.orm import Session, sessionmaker

    SessionLocal = sessionmaker()

    def get_db():
        with SessionLocal() as db:
            yield db

    def work(db: Session): db.commit()

    def f(bg: BackgroundTasks, db: Session = Depends(get_db)):
        bg.add_task(
            work,
            db,
        )
""")


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main.py").write_text(BAD)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    return tmp_path


def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    code = main(arguments, Streams(out, err))
    return code, out.getvalue(), err.getvalue()


def test_json(project):
    """JSON is a list of objects with the promised keys; the exit code is 1."""
    code, out, _ = command("--format", "json", ".")

    (found,) = json.loads(out)
    assert code == 1
    assert {key: found[key] for key in ("code", "category", "path", "line", "column", "confidence")} == {
        "code": "AC101", "category": "C1", "path": "main.py", "line": 14, "column": 5, "confidence": "high",
    }  # fmt: skip
    assert found["message"]


def test_nothing_found(project):
    """A clean project exits with 0 and an empty list."""
    (project / "main.py").write_text("x = 1\n")

    assert command("--format", "json")[:2] == (0, "[]\n")


def test_sarif_and_github(project):
    """SARIF names rule and region; GitHub gets one command a finding."""
    sarif = json.loads(command("--format", "sarif")[1])
    github = command("--format", "github")[1]

    (result,) = sarif["runs"][0]["results"]
    assert sarif["version"] == "2.1.0"
    assert result["ruleId"] == "AC101"
    assert result["locations"][0]["physicalLocation"]["region"]["startLine"] == 14
    assert github.startswith("::error file=main.py,line=14,")
    assert github.count("\n") == 1


def test_human(project):
    """People get the excerpt, the way and the correction, in colour if they like."""
    _, out, _ = command("--color", "always")

    assert "bg.add_task(" in out
    assert "the way here" in out
    assert "after_commit(work)" in out
    assert "\x1b[" in out


@pytest.mark.parametrize(
    ("comment", "silent"),
    [("# noqa", True), ("# noqa: AC101", True), ("# noqa: E501, AC101", True), ("# noqa: AC102", False)],
)
@pytest.mark.parametrize("line", ["bg.add_task(", "    )"])
def test_noqa(project, comment, silent, line):
    """A comment on the first or last line of the call silences it, if it names the code or none."""
    (project / "main.py").write_text(BAD.replace(line, f"{line}  {comment}"))

    assert command()[0] == (0 if silent else 1)


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ('select = ["AC102"]', 0),
        ('ignore = ["AC101"]', 0),
        ('ignore = ["AC"]', 0),
        ('exclude = ["main.py"]', 0),
        ('confidence = "high"', 1),
        ('select = ["AC1"]', 1),
        ('select = ["XX"]', 2),
        ("selekt = []", 2),
        ('select = "AC101"', 2),
        ('confidence = "certain"', 2),
    ],
)
def test_configuration(project, table, code):
    """The table in pyproject.toml is obeyed, and refused where it makes no sense."""
    (project / "pyproject.toml").write_text(f"[tool.aftercommit-check]\n{table}\n")

    assert command()[0] == code


def test_command_line_wins(project):
    """Options override the configuration."""
    (project / "pyproject.toml").write_text('[tool.aftercommit-check]\nselect = ["AC102"]\n')

    assert command("--select", "AC101")[0] == 1
    assert command("--select", "AC101", "--ignore", "AC101")[0] == 0
    assert command("--select", "AC101", "--exit-zero")[0] == 0
    assert command("nowhere.py")[0] == 2


def test_baseline(project):
    """Known findings stay quiet when they move; new ones do not."""
    assert command("--write-baseline", "known.json")[0] == 0
    (project / "main.py").write_text("\n\n" + BAD)
    moved = command("--baseline", "known.json")[0]
    (project / "main.py").write_text(BAD + "\ndef g(bg: BackgroundTasks, db: Session): bg.add_task(work, db=db)\n")
    new = command("--baseline", "known.json")[0]

    assert (moved, new) == (0, 1)


FIXABLE = """
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

SessionLocal = sessionmaker(create_engine("sqlite://"))

def f(rows):
    with SessionLocal() as db:
        for row in rows:
            try:
                db.add(row)
                db.commit()
            except Exception:
                print("a bad row")
"""


def test_fix_and_diff(project):
    """The diff shows what the fix does; the fix leaves nothing to do and is done once."""
    (project / "main.py").write_text(FIXABLE)

    code, diff, _ = command("--diff")
    assert code == 1
    assert "+                db.rollback()" in diff
    assert (project / "main.py").read_text() == FIXABLE
    assert command("--fix", "-q")[0] == 0
    assert "        db.rollback()\n                print" in (project / "main.py").read_text()
    assert command()[0] == 0


@pytest.mark.parametrize("code", sorted(RULES))
def test_explain(code):
    """Every rule explains itself."""
    exit_code, out, _ = command("--explain", code)

    assert exit_code == 0
    assert code in out
    assert "Right:" in out


def test_explain_unknown():
    """An unknown rule is an error of usage."""
    assert command("--explain", "AC999")[0] == 2


def test_strange_files(project):
    """Syntax errors, Python 2, other encodings, binary rubbish, loops of links: skipped or read, never a crash."""
    (project / "broken.py").write_text("def f(session:\n")
    (project / "old.py").write_text("session = 1\nprint 'hello'\n")
    (project / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nsession = 'é'\n".encode("latin-1"))
    (project / "wrong.py").write_bytes(b"session = '\xff\xfe'\n")
    (project / "rubbish.py").write_bytes(b"session\x00\x01\x02" * 50)
    (project / "unknown.py").write_bytes(b"# coding: klingon\nsession = 1\n")
    (project / "bom.py").write_bytes(b"\xef\xbb\xbf" + BAD.encode())
    (project / "windows.py").write_bytes(BAD.replace("\n", "\r\n").encode())
    (project / "deep.py").write_text("session = " + "(" * 3000 + "1" + ")" * 3000)
    (project / "chain.py").write_text("session = " + " + ".join(["1"] * 5000))
    (project / "elifs.py").write_text("if session: pass\n" + "elif session: pass\n" * 3000)
    os.symlink(project, project / "loop")
    os.symlink(project / "missing.py", project / "dangling.py")

    _, out, err = command("--format", "json")

    found = {row["path"] for row in json.loads(out)}
    assert found == {"main.py", "bom.py", "windows.py"}
    assert "broken.py: syntax error" in err
    assert "old.py: Python 2" in err


def test_huge_file(project):
    """A file of 50 000 lines is checked in reasonable time."""
    body = "".join(f"def f{n}(a):\n    b = a\n    return b\n\n\n" for n in range(10_000))
    (project / "main.py").write_text(BAD + body)

    assert command()[0] == 1


def test_cache(project):
    """A second run checks nothing; a change in an imported file checks its importers again."""
    (project / "db.py").write_text("from sqlalchemy.orm import Session\ndef get_db(): ...\n")
    (project / "main.py").write_text(
        BAD.replace("from sqlalchemy.orm import Session,", "from db import Session\nfrom sqlalchemy.orm import")
    )
    settings = runner.Settings(cache="kept", base=".")
    first = runner.run(["."], settings)
    second = runner.run(["."], settings)
    (project / "db.py").write_text("class Session: ...\n")
    third = runner.run(["."], settings)

    assert [found.code for found in first.findings] == [found.code for found in second.findings] == ["AC101"]
    assert (first.checked > 0, second.checked) == (True, 0)
    assert third.checked > 0
    assert cache_module.Cache.load("nowhere").results == {}


def test_one_file_sees_its_imports(project):
    """A hook that passes single files gets the same answer as a run over everything."""
    (project / "deps.py").write_text(BAD.partition("def f(")[0])
    (project / "main.py").write_text(
        "from fastapi import BackgroundTasks, Depends\nfrom deps import get_db, work\n\ndef f(bg: BackgroundTasks, db=Depends(get_db)): bg.add_task(work, db)\n"
    )

    assert json.loads(command("main.py", "--format", "json")[1]) == json.loads(command("--format", "json")[1])


@pytest.mark.parametrize(
    ("text", "name", "minor", "exact"),
    [
        ('[[package]]\nname = "fastapi"\nversion = "0.115.4"\n', "uv.lock", 115, True),
        ("fastapi==0.103.2\n", "requirements.txt", 103, True),
        ("fastapi[standard]>=0.121\n", "requirements.txt", 121, False),
        ('dependencies = ["fastapi>=0.110,<1"]', "pyproject.toml", 110, False),
        ('fastapi = "^0.109.0"', "pyproject.toml", 109, True),
        ("fastapi-users==12.1\n", "requirements.txt", None, False),
    ],
)
def test_pins(text, name, minor, exact):
    """The pinned version is found in lock files and requirements."""
    pin = pin_in_text(text, name)

    assert (pin.minor, pin.exact) == (minor, exact)


@pytest.mark.parametrize(("pin", "words"), [("0.104", "checked out"), ("0.110", "revives"), ("0.120", "checked out")])
def test_runtime_by_version(project, pin, words):
    """What happens at run time is told for the version that the project pins."""
    (project / "requirements.txt").write_text(f"fastapi=={pin}.0\n")

    (found,) = json.loads(command("--format", "json")[1])
    assert found["runtime"].startswith(f"FastAPI is pinned to {pin}")
    assert words in found["runtime"]


def test_place_does_not_matter(project, tmp_path, monkeypatch):
    """A tree below a folder called tests or tools is no test suite for that."""
    tree = tmp_path / "tests" / "tools" / "app"
    tree.mkdir(parents=True)
    (tree / "main.py").write_text(BAD)
    (project / "main.py").unlink()

    from_above = json.loads(command("--format", "json", str(tree))[1])
    monkeypatch.chdir(tree)
    from_inside = json.loads(command("--format", "json")[1])

    assert [row["path"] for row in from_above] == ["tests/tools/app/main.py"]
    assert [row["path"] for row in from_inside] == ["main.py"]


def test_processes_agree(project, monkeypatch):
    """Several processes find what one finds."""
    monkeypatch.setattr(runner, "SMALL", 0)
    for number in range(12):
        (project / f"main{number}.py").write_text(BAD)

    assert command("--format", "json", "--no-cache", "--jobs", "1") == command(
        "--format", "json", "--no-cache", "--jobs", "2"
    )
