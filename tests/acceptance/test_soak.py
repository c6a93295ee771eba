"""The soak still soaks: a few seconds of it, and it finds what is broken on purpose."""

import re
import subprocess
import sys

import pytest

from benchmarks.soak.application import VARIANTS
from tests.support.databases import DRIVERS
from tests.support.servers import ROOT

# The faults and the work that bring each of them to light within seconds.
CONCENTRATED = {
    "fence": ("--seconds=6", "--only=kill", "--only=stop", "--work=count", "--work=slow"),
    "isolation": ("--seconds=3", "--no-faults", "--work=count", "--work=many"),
    "on_failure": ("--seconds=3", "--no-faults", "--work=doomed"),
    "key": ("--seconds=3", "--no-faults", "--work=key"),
    "early": ("--seconds=3", "--no-faults", "--work=count"),
    "late": ("--seconds=6", "--only=kill", "--work=count"),
}


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    command = [sys.executable, "-m", "benchmarks.soak", "--seed=7", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_short_soak_balances(driver: str):
    """It prints its seed first, strikes, finds the books in balance, says so in one line, and ends with status 0."""
    done = soak("--seconds=4", f"--driver={driver}")

    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "seed 7"
    assert re.fullmatch(rf"{driver}: \d+ faults, \d+ tasks, all ended in [\d.]+ s: the books balance", lines[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_finds_what_is_broken(variant: str):
    """An application that is broken on purpose ends in findings, each with the history of its record, and status 1."""
    done = soak("--driver=psycopg", f"--broken={variant}", *CONCENTRATED[variant])

    assert done.returncode == 1, done.stdout + done.stderr
    assert "FINDING" in done.stdout
    assert "ledgers and logs:" in done.stdout


def test_a_seed_is_a_schedule():
    """The same seed asks for the same faults and the same work; another seed for others."""
    from random import Random

    from benchmarks.soak.kinds import requests_of
    from benchmarks.soak.soak import faults_of, schedule

    def plan(seed: int) -> list[object]:
        heavy, _ = faults_of("psycopg")
        faults = schedule(heavy, Random(f"{seed}/psycopg/heavy"), pause=(0.0, 1.0))
        work = requests_of(f"{seed}/psycopg", "0.1", 1, None)
        struck = [(wait, name, rng.random()) for _, (wait, name, rng) in zip(range(50), faults, strict=False)]
        asked = [(each.label, each.kind, each.gives_up) for _, each in zip(range(50), work, strict=False)]
        return [struck, asked]

    first, again, other = plan(7), plan(7), plan(8)

    assert first == again
    assert first != other
