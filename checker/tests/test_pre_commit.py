"""The hook for pre-commit works in a repository of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIPPED = ("src", "checker", "pyproject.toml", "README.md", "LICENSE", ".pre-commit-hooks.yaml")
WRONG = """
from fastapi import BackgroundTasks, Depends
from sqlalchemy.orm import Session

def endpoint(tasks: BackgroundTasks, db: Session = Depends()) -> None:
    tasks.add_task(print, db)
"""


def in_a_repository(path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run *command* in *path*, as a person with a name and a cache of their own."""
    given = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "PYTHONPATH"))}
    person = {
        f"GIT_{role}_{what}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    return subprocess.run(
        command,
        cwd=path,
        env={**given, **person, "PRE_COMMIT_HOME": str(path.parent / "cache")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=300,
    )


def made(path: Path) -> Path:
    """Make *path* a repository in which all is committed."""
    for step in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "All"]):
        done = in_a_repository(path, "git", *step)
        assert done.returncode == 0, done.stdout
    return path


def test_the_hook_checks_a_repository(tmp_path):
    """pre-commit installs the checker from this repository, and the hook reports a misuse in another one."""
    shipped = tmp_path / "shipped"
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, shipped / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        else:
            shutil.copy(ROOT / name, shipped)
    made(shipped)
    user = tmp_path / "user"
    user.mkdir()
    (user / "main.py").write_text(WRONG)
    made(user)

    hook = [sys.executable, "-m", "pre_commit", "try-repo", str(shipped), "aftercommit-check", "--all-files"]
    found = in_a_repository(user, *hook)
    assert found.returncode == 1, found.stdout
    assert "AC101" in found.stdout

    (user / "main.py").write_text("")
    fine = in_a_repository(user, *hook)
    assert fine.returncode == 0, fine.stdout
    assert "Passed" in fine.stdout
