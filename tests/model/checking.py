"""What the models share: how they are run, and a variant's change to the library for as long as that takes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

__all__ = ["Change", "check", "no_change", "replacing"]

Change = Callable[[], AbstractContextManager[Any]]
"""Makes of the library, for a while, one that is almost right."""


def no_change() -> AbstractContextManager[None]:
    """The library as it is."""
    return nullcontext()


def replacing(target: Any, name: str, value: Any) -> Change:
    """Put *value* in the place of what *target* calls *name*."""
    return lambda: mock.patch.object(target, name, value)


def check(
    machine: type[RuleBasedStateMachine], *, examples: int, steps: int = 40, change: Change = no_change, **given: Any
) -> None:
    """Let everything happen, in many orders.

    Args:
        machine: All that can happen.
        examples: How many orders.
        steps: How many things in each.
        change: What is broken.
        given: What the machine needs.
    """
    kind = type("MachineUnderTest", (machine,), given)
    with change():
        run_state_machine_as_test(
            kind,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            ),
        )
