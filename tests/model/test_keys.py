"""No hand-over under a key is lost, and no bookkeeping waits for one; what is almost right is caught."""

import pytest
from sqlalchemy import Engine

from tests.model.broken_keys import BROKEN, ON_SQLITE
from tests.model.checking import check
from tests.model.keys import KeysMachine


def test_no_hand_over_is_lost_on_sqlite(sqlite_engine: Engine):
    """Each committed row is seen by a run that starts afterwards."""
    check(KeysMachine, engine=sqlite_engine, examples=60)


def test_no_hand_over_is_lost_on_postgresql(postgres_engine: Engine):
    """The same, at each isolation, with askers that stand still before their COMMIT."""
    check(KeysMachine, engine=postgres_engine, examples=60)


@pytest.mark.parametrize("broken", ON_SQLITE)
def test_the_model_catches_what_is_broken_on_sqlite(sqlite_engine: Engine, broken: str):
    """Each way of taking a key up too eagerly loses a hand-over."""
    with pytest.raises(AssertionError, match="a hand-over was lost"):
        check(KeysMachine, engine=sqlite_engine, examples=2_000, change=BROKEN[broken])


@pytest.mark.parametrize("broken", BROKEN)
def test_the_model_catches_what_is_broken_on_postgresql(postgres_engine: Engine, broken: str):
    """Each way loses a hand-over, or waits."""
    wanted = "waited" if "waits" in broken else "a hand-over was lost"
    with pytest.raises(AssertionError, match=wanted):
        check(KeysMachine, engine=postgres_engine, examples=2_000, change=BROKEN[broken])
