"""The facts that the library stands on are still facts, and with aftercommit they are none."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from hazards import crowded_pool, failing_task, fresh_session, mapped_object, request_session, restart
from hazards.counter import scenario as counter
from hazards.measure import Scenario

Facts = Mapping[str, Any]

COUNTER = counter(increments=100)

TODAY: list[tuple[Scenario, Callable[[Facts], bool]]] = [
    (request_session.SCENARIOS[0], lambda facts: facts["answer"] == 202 and facts["files"] == 0),
    (request_session.SCENARIOS[1], lambda facts: facts["status"] == "uploaded" and facts["errors"] == 0),
    (fresh_session.SCENARIOS[0], lambda facts: facts["status"] == "uploaded" and not facts["errors"]),
    (mapped_object.SCENARIOS[0], lambda facts: facts["errors"] == ["DetachedInstanceError"]),
    (mapped_object.SCENARIOS[1], lambda facts: facts["status"] == "uploaded" and not facts["errors"]),
    (failing_task.SCENARIOS[0], lambda facts: facts["completed"] == 1),
    (crowded_pool.SCENARIOS[0], lambda facts: facts["errors"] > 0),
    (COUNTER, lambda facts: facts["left"] < facts["increments"]),
    (restart.SCENARIOS[0], lambda facts: facts["answered"] == restart.REQUESTS and facts["done"] == 0),
]
SCENARIOS = [scenario for scenario, _ in TODAY]


@pytest.mark.parametrize(("scenario", "is_still_so"), TODAY, ids=[scenario.title for scenario in SCENARIOS])
def test_what_people_write_today_goes_wrong(scenario: Scenario, is_still_so: Callable[[Facts], bool], postgres_url):
    """The hazard is there on the versions installed; where it is not, the docs have to change."""
    outcome = scenario.today(postgres_url)

    assert not outcome.is_right, outcome
    assert is_still_so(outcome.facts), outcome


@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario.title for scenario in SCENARIOS])
def test_the_same_with_aftercommit_goes_right(scenario: Scenario, postgres_url):
    """What the author meant is what clients and the database see."""
    outcome = scenario.better(postgres_url)

    assert outcome.is_right, outcome


def test_a_session_is_refused_at_hand_over(postgres_url):
    """Whoever passes the session out of habit hears of it in the request, by name."""
    outcome = request_session.SCENARIOS[1].better(postgres_url)

    assert outcome.facts["refusal"] == "UnsafeArgument", outcome
