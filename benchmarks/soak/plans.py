"""What each task must leave behind, for the books."""

from dataclasses import dataclass, field

STEPS, PIECES, ITEMS, GRAINS = 4, 10, 12, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a record of one task must have left behind.

    Attributes:
        effects: By name, how many if it succeeded.
        asks: By task, how many further records if it succeeded.
        fails: Whether it must end failed, with ``on_failure`` called.
        is_in_steps: Whether it commits in between, so that something is left of one that failed.
        is_careless: Whether its ``on_failure`` comes to a bad end itself, so that its effect may be missing.
    """

    effects: dict[str, int] = field(default_factory=dict)
    asks: dict[str, int] = field(default_factory=dict)
    fails: bool = False
    is_in_steps: bool = False
    is_careless: bool = False


PLANS: dict[str, Plan] = {
    "count": Plan(effects={"count": 1}),
    "slow": Plan(effects={f"slow{number}": 1 for number in range(PIECES)}),
    "steps": Plan(effects={f"step{number}": 1 for number in range(STEPS)}, is_in_steps=True),
    "steps_beside_others": Plan(effects={f"step{number}": 1 for number in range(STEPS)}, is_in_steps=True),
    "joined": Plan(effects={"before": 1, "beside": 3, "after": 1}),
    "reads_beside": Plan(effects={"read": 1}),
    "flaky": Plan(effects={"flaky": 1}),
    "doomed": Plan(fails=True),
    "weary": Plan(fails=True),
    "exits": Plan(fails=True, is_careless=True),
    "parent": Plan(effects={"parent": 1}, asks={"child": 2}),
    "child": Plan(effects={"child": 1}, asks={"count": 1}),
    "never": Plan(effects={"never": 0}),
    "batch": Plan(effects={"item": ITEMS - ITEMS // 5, "bad": ITEMS // 5}, is_in_steps=True),
    "twice": Plan(effects={"twice": 1}),
    "named": Plan(effects={"named": 1}),
    "scoped": Plan(effects={"part1": 1, "part2": 1}, is_in_steps=True),
    "second": Plan(effects={"second": 1}),
    "overrun": Plan(fails=True),
    "grind": Plan(effects={"grain": GRAINS}),
    "hang": Plan(effects={"hang": 1}),
    "tally": Plan(effects={"tally": 1}),
    "mail": Plan(effects={"mail": 1}),
}
