"""mypy and pyright see the real signature of a task: right code passes, wrong code does not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ACCEPTED, REFUSED = HERE / "accepted.py", HERE / "refused.py"


def mypy() -> dict[Path, set[int]]:
    """The lines with errors by ``mypy --strict``."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--show-absolute-path"]
    output = subprocess.run(
        [*command, "--cache-dir", str(ROOT / ".mypy_cache"), str(ACCEPTED), str(REFUSED)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found: dict[Path, set[int]] = {ACCEPTED: set(), REFUSED: set()}
    for name, line in re.findall(r"^(.+?):(\d+)(?::\d+)?: error:", output.stdout, flags=re.MULTILINE):
        found[Path(name)].add(int(line))
    assert output.returncode in {0, 1}, output.stdout + output.stderr
    return found


def pyright() -> dict[Path, set[int]]:
    """The lines with errors by pyright."""
    output = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(ACCEPTED), str(REFUSED)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found: dict[Path, set[int]] = {ACCEPTED: set(), REFUSED: set()}
    for each in json.loads(output.stdout)["generalDiagnostics"]:
        if each["severity"] == "error":
            found[Path(each["file"])].add(each["range"]["start"]["line"] + 1)
    return found


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_what_users_write_is_checked(checker):
    """No error where everything is right, and one on each line that is marked, by either checker."""
    marked = {
        number
        for number, line in enumerate(REFUSED.read_text(encoding="utf-8").splitlines(), start=1)
        if line.endswith("# refused")
    }

    found = checker()

    assert found[ACCEPTED] == set()
    assert sorted(found[REFUSED]) == sorted(marked)
