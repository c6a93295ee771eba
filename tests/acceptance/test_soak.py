"""The soak still soaks: a few seconds of it."""

import subprocess
import sys

import pytest

from tests.support.servers import ROOT


@pytest.mark.parametrize("driver", ["pysqlite", "psycopg"])
def test_a_short_soak_comes_out_right(driver: str):
    """It prints its seed first, strikes, finds everything done exactly once, says so, and ends with status 0."""
    command = [sys.executable, "-m", "benchmarks.soak", "--seconds", "3", "--seed", "7", "--driver", driver]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    first, last = done.stdout.splitlines()
    assert first == "seed 7"
    assert last.startswith(f"{driver}: ")
    assert last.endswith("states ['succeeded']: exactly once")
