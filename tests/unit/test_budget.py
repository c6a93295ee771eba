"""The arithmetic of connections: pools times processes, beside what a server allows."""

import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftercommit import Database, PoolSettings
from aftercommit.errors import ConfigurationError
from aftercommit.pools.budget import Budget, Limits, Share, shares
from aftercommit.pools.pools import BOOKKEEPING
from aftercommit.runner.budgeting import expected_processes, others

SETTINGS = {
    "request": PoolSettings(max_overflow=5),
    "default": PoolSettings(),
    "files": PoolSettings(pool_size=2, max_overflow=1),
    BOOKKEEPING: PoolSettings(pool_size=1, max_overflow=1),
}

limits = st.builds(
    Limits,
    max_connections=st.integers(1, 10_000),
    reserved=st.integers(0, 100),
    role=st.none() | st.integers(0, 1000),
    database=st.none() | st.integers(0, 1000),
)


@given(limits, st.integers(1, 100), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_over_means_more_than_any_limit_allows(limits: Limits, processes: int, sizes: list[int]):
    """It is over as soon as one of the server's limits is, and the figures of the verdict add up."""
    parts = tuple(Share(pool=f"p{n}", connections=size) for n, size in enumerate(sizes))

    budget = Budget(shares=parts, processes=processes, limits=limits)

    bounds = [limits.max_connections - limits.reserved, limits.role, limits.database]
    assert budget.is_over is any(bound is not None and processes * sum(sizes) > bound for bound in bounds)
    assert f"× {sum(sizes)} connections = {processes * sum(sizes)}" in budget.verdict
    assert str(limits.allowed) in limits.reason or f"{limits.max_connections} - {limits.reserved}" in limits.reason


def test_behind_a_pooler_nothing_is_known_to_be_over():
    """The server's limits are those of the pooler's connections, not of ours, and the verdict says so."""
    server = Limits(max_connections=10, reserved=3, is_pooled=True)

    budget = Budget(shares=(Share(pool="request", connections=10),), processes=8, limits=server)

    assert not budget.is_over
    assert "= 80, to a pooler" in budget.verdict


def test_the_advice_names_how_many_processes_fit():
    """Where some fit, it says how many; where not even one does, it does not offer that."""
    part = (Share(pool="request", connections=10),)

    some = Budget(shares=part, processes=9, limits=Limits(max_connections=43, reserved=3))
    none = Budget(shares=part, processes=9, limits=Limits(max_connections=12, reserved=3))

    assert "at most 4 processes" in some.advice
    assert "process" not in none.advice


def test_each_pool_counts_as_it_is_used():
    """Twice for two flavours, once where none is known, not at all where its tasks run elsewhere."""
    found = shares(
        SETTINGS, runs=("default", "files"), flavours={"request": {"sync", "async"}, "files": {"async"}}, listens=True
    )
    web = shares(SETTINGS, runs=(), flavours={"files": {"sync"}}, listens=False)

    assert {each.pool: each.connections for each in found} == {
        "request": 20, "default": 5, "files": 3, "bookkeeping": 2, "listening": 1,
    }  # fmt: skip
    assert {each.pool: each.connections for each in web} == {"request": 10, "bookkeeping": 2}


def test_flavours_of_tasks_are_known():
    """A pool whose tasks are of both kinds counts twice where the URL serves both, else once."""
    both, one = Database("postgresql://localhost/a"), Database("postgresql+asyncpg://localhost/a")
    for db in (both, one):

        @db.task
        def plain() -> None: ...

        @db.task
        async def native() -> None: ...

    assert {each.pool: each.connections for each in both.shares(["default"])}["default"] == 10
    assert {each.pool: each.connections for each in one.shares(["default"])}["default"] == 5


def test_processes_that_died_here_are_not_counted():
    """A killed process counts as alive for a while, but not on the machine that can tell, nor under our own number."""
    here = socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass

    found = others([("elsewhere", 1), (here, os.getppid()), (here, child.pid), (here, os.getpid())])

    assert found == 2


@pytest.mark.parametrize(("told", "expected"), [(None, 1), ("", 1), ("4", 4), ("0", 1), ("many", 1)])
def test_the_environment_may_say_how_many(monkeypatch: pytest.MonkeyPatch, told: str | None, expected: int):
    """``WEB_CONCURRENCY`` is what uvicorn and gunicorn read; what is no number is left to them."""
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    if told is not None:
        monkeypatch.setenv("WEB_CONCURRENCY", told)

    assert expected_processes() == expected


def test_no_processes_are_refused_at_once():
    """A number of processes below one is said where it is written."""
    db = Database("postgresql://localhost/a")

    with pytest.raises(ConfigurationError, match="processes=0"):
        db.running(processes=0)
