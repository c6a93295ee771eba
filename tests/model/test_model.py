"""The library's moves keep their promise in whatever order things happen; broken ones are caught."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import Engine

from aftercommit.pools import sqlite
from aftercommit.records import schema
from tests.model import machine
from tests.model.machine import Machine, Variant


@pytest.fixture
def sqlite_engine(sqlite_url: str) -> Iterator[Engine]:
    """SQLite, set up as a task's sessions find it."""
    engine = sa.create_engine(sqlite_url, connect_args={"isolation_level": None}).execution_options(
        **{sqlite.IMMEDIATE: True}
    )
    sqlite.set_up(engine)
    sa.event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA synchronous = OFF"))
    yield from _made(engine)


@pytest.fixture
def postgres_engine(postgres_url: str) -> Iterator[Engine]:
    """PostgreSQL."""
    yield from _made(sa.create_engine(postgres_url, pool_size=20, max_overflow=50))


def _made(engine: Engine) -> Iterator[Engine]:
    with engine.begin() as connection:
        schema.create_tables(connection)
        connection.execute(sa.text("CREATE TABLE model_effect (task varchar(40), step integer)"))
    yield engine
    engine.dispose()


def check(engine: Engine, variant: Variant, *, examples: int) -> None:
    """Let everything happen, in many orders."""
    kind = type("MachineUnderTest", (Machine,), {"engine": engine, "variant": variant})
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )


def test_exactly_once_on_sqlite(sqlite_engine: Engine):
    """Whatever happens, effects and records agree, nothing is lost and nothing happens twice."""
    check(sqlite_engine, Variant(), examples=60)


def test_exactly_once_on_postgresql(postgres_engine: Engine):
    """The same with runs whose snapshot is older than what became of their claim."""
    check(postgres_engine, Variant(), examples=60)


@pytest.mark.parametrize(
    "variant",
    [
        machine.NoFence(),
        machine.FenceWithoutClaim(),
        machine.FenceByAttempt(),
        machine.CompletionOutside(),
        machine.NoReconciliation(),
        machine.WrittenApart(),
    ],
    ids=lambda variant: type(variant).__name__,
)
def test_the_model_catches_what_is_broken(sqlite_engine: Engine, variant: Variant):
    """Each way of doing it almost right is found out."""
    with pytest.raises(AssertionError, match=r"twice|disagree|left|never asked for"):
        check(sqlite_engine, variant, examples=400)


def test_the_model_catches_a_fence_that_only_looks(postgres_engine: Engine):
    """At REPEATABLE READ a plain read goes on seeing the claim that was lost."""
    with pytest.raises(AssertionError, match=r"twice|disagree"):
        check(postgres_engine, machine.FenceByPlainRead(), examples=400)
