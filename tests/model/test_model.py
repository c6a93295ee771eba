"""The library's moves keep their promise in whatever order things happen; broken ones are caught."""

import pytest
from sqlalchemy import Engine

from tests.model import variants
from tests.model.checking import check
from tests.model.machine import Machine
from tests.model.variants import Variant


def test_exactly_once_on_sqlite(sqlite_engine: Engine):
    """Whatever happens, effects and records agree, nothing is lost and nothing happens twice."""
    check(Machine, engine=sqlite_engine, variant=Variant(), examples=60)


def test_exactly_once_on_postgresql(postgres_engine: Engine):
    """The same with runs whose snapshot is older than what became of their claim."""
    check(Machine, engine=postgres_engine, variant=Variant(), examples=60)


@pytest.mark.parametrize(
    "variant",
    [
        variants.NoFence(),
        variants.FenceWithoutClaim(),
        variants.FenceByAttempt(),
        variants.CompletionOutside(),
        variants.NoReconciliation(),
        variants.WrittenApart(),
    ],
    ids=lambda variant: type(variant).__name__,
)
def test_the_model_catches_what_is_broken(sqlite_engine: Engine, variant: Variant):
    """Each way of doing it almost right is found out."""
    with pytest.raises(AssertionError, match=r"twice|disagree|left|never asked for"):
        check(Machine, engine=sqlite_engine, variant=variant, examples=2_000)


def test_the_model_catches_a_fence_that_only_looks(postgres_engine: Engine):
    """At REPEATABLE READ a plain read goes on seeing the claim that was lost."""
    with pytest.raises(AssertionError, match=r"twice|disagree"):
        check(Machine, engine=postgres_engine, variant=variants.FenceByPlainRead(), examples=2_000)
