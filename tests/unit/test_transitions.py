"""What becomes of hand-overs, decided without a database: every one ends exactly once, and as its transactions did."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aftercommit.commits import transitions as to
from aftercommit.commits.pending import Pending, Phase


def here(_item: Pending) -> bool:
    """Everything goes to the one connection."""
    return True


def pending(scope: object, entry: object = "x", **options: Any) -> Pending:
    """A hand-over."""
    return Pending(scope, None, entry, **options)  # type: ignore[arg-type]


@dataclass
class Story:
    """One session's transaction, told step by step, and beside it what each hand-over has to come to.

    The savepoints are a stack; scope 0 is the transaction itself.
    """

    state: to.SessionState = field(default_factory=to.SessionState)
    stack: list[int] = field(default_factory=lambda: [0])
    scopes: int = 0
    items: int = 0
    scope_of: dict[int, int] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    forgotten: set[int] = field(default_factory=set)

    def hand_over(self) -> None:
        """Hand something over where the story is now."""
        self.state = to.hand_over(self.state, [pending(self.stack[-1], self.items)])
        self.scope_of[self.items] = self.stack[-1]
        self.items += 1

    def savepoint(self) -> None:
        """Open one."""
        self.scopes += 1
        self.stack.append(self.scopes)

    def end_savepoint(self, how: str) -> None:
        """End the innermost one: released, rolled back, or closed under it."""
        if len(self.stack) == 1:
            return
        scope = self.stack.pop()
        mine = {item for item, its in self.scope_of.items() if its == scope}
        if how == "release":
            self.state = to.release(self.state, scope)
            self.scope_of.update(dict.fromkeys(mine, self.stack[-1]))
        elif how == "roll back":
            self.state = to.roll_back(self.state, scope)
        self.state, effects = to.end_nested(self.state, scope, self.stack[-1])
        if how != "release":
            for item in mine:
                del self.scope_of[item]
        if how == "roll back":
            self.dropped += sorted(mine)
        elif how == "close":
            self.forgotten |= mine
        assert sorted(entries(effects.dropped)) == (sorted(mine) if how == "roll back" else [])


def entries(items: tuple[Pending, ...]) -> list[Any]:
    """What waited."""
    return [each.entry for each in items]


steps = st.lists(st.sampled_from(["hand over", "savepoint", "release", "roll back", "close"]), max_size=40)


def told(names: list[str]) -> Story:
    """Tell a story."""
    story = Story()
    for name in names:
        if name == "hand over":
            story.hand_over()
        elif name == "savepoint":
            story.savepoint()
        else:
            story.end_savepoint(name)
    return story


def finish_savepoints(story: Story) -> None:
    """A commit releases what is open."""
    while len(story.stack) > 1:
        story.end_savepoint("release")


@given(steps)
def test_a_commit_starts_what_no_savepoint_took_back(names: list[str]) -> None:
    """Committed are those whose savepoints were all released; each other one is dropped; none is told of twice."""
    story = told(names)
    finish_savepoints(story)

    story.state, written = to.write(story.state, here, owns_commit=True)
    story.state, effects = to.commit_root(story.state)
    end = to.end_root(story.state, None)

    assert sorted(entries(written)) == sorted(entries(effects.committed)) == sorted(story.scope_of)
    assert (effects.joined, end.lost) == ((), ())
    assert set(entries(end.dropped)) == story.forgotten
    once = Counter([*entries(effects.committed), *entries(effects.dropped), *entries(end.dropped), *story.dropped])
    assert once == Counter(range(story.items))


@given(steps, st.booleans())
def test_a_transaction_that_does_not_commit_starts_nothing(names: list[str], on_purpose: bool) -> None:
    """Rolled back on purpose, all are dropped; merely closed, they are lost work; none is told of twice."""
    story = told(names)
    while len(story.stack) > 1:
        story.end_savepoint("close")

    if on_purpose:
        story.state = to.roll_back(story.state, None)
    end = to.end_root(story.state, None)

    left = set(story.scope_of) | story.forgotten
    assert set(entries(end.dropped if on_purpose else end.lost)) == left
    assert (end.lost if on_purpose else end.dropped) == ()
    assert (end.committed, end.joined) == ((), ())
    assert Counter([*entries(end.dropped), *entries(end.lost), *story.dropped]) == Counter(range(story.items))


@given(steps)
def test_a_joined_session_passes_on_what_it_committed(names: list[str]) -> None:
    """Without a COMMIT of its own, what it did not take back waits for the outer transaction and its savepoints."""
    story = told(names)
    finish_savepoints(story)

    story.state, effects = to.commit_root(story.state)
    outer = to.join(to.ConnectionState(), effects.joined, ("sp",))
    after_other, kept = to.roll_back_joined(outer, "another")
    after_own, gone = to.roll_back_joined(outer, "sp")
    _, written = to.write_joined(after_other)

    assert sorted(entries(written)) == sorted(story.scope_of)
    assert kept.dropped == ()
    assert (sorted(entries(gone.dropped)), after_own.joined) == (sorted(story.scope_of), ())


@given(steps)
def test_a_commit_past_the_session_lets_go_of_what_it_wrote(names: list[str]) -> None:
    """The session hears of nothing, so nothing of these may be told of once more when it ends."""
    story = told(names)

    story.state, written = to.write(story.state, here, owns_commit=False)
    again = to.write(story.state, here, owns_commit=False)[1]
    end = to.end_root(story.state, None)

    assert sorted(entries(written)) == sorted(story.scope_of)
    assert again == ()
    assert set(entries(end.lost)) == story.forgotten


@given(steps)
def test_a_failed_commit_drops_what_it_had_written(names: list[str]) -> None:
    """It is marked before it is written, and its places are given back: it is never lost work."""
    story = told(names)
    finish_savepoints(story)
    story.state, written = to.write(story.state, here, owns_commit=True)

    end = to.end_root(story.state, None)

    assert all(each.phase is Phase.WRITTEN for each in written)
    assert set(entries(written)) <= set(entries(end.dropped))


def test_a_commit_that_failed_loses_nothing_in_silence() -> None:
    """Asked for, it told why it failed; a session that is closed behind that has forgotten nothing."""
    state = to.try_commit(to.hand_over(to.SessionState(), [pending(0)]))

    assert len(to.end_root(state, None).dropped) == 1


def test_an_exception_that_was_handled_already_is_no_reason() -> None:
    """Handed over in an ``except`` and then closed without a commit, it is lost; closed by a new error, it is gone."""
    error, other = ValueError(), ValueError()
    state = to.hand_over(to.SessionState(), [pending(0, asked_during=error)])

    assert len(to.end_root(state, error).lost) == 1
    assert len(to.end_root(state, other).dropped) == 1
    assert len(to.end_root(state, None).lost) == 1


def test_a_savepoint_of_core_takes_its_own_with_it() -> None:
    """What was handed over inside is neither written nor lost."""
    state = to.hand_over(to.SessionState(), [pending(0, "in", savepoints=("sp",)), pending(0, "out")])

    state = to.roll_back_savepoint(state, "sp", here)
    state, written = to.write(state, here, owns_commit=True)
    state, effects = to.commit_root(state)

    assert entries(written) == entries(effects.committed) == ["out"]
    assert entries(effects.dropped) == ["in"]


def test_only_what_goes_to_the_connection_is_written_there() -> None:
    """A session on two binds writes each where it belongs."""
    state = to.hand_over(to.SessionState(), [pending(0, 1, bind="a"), pending(0, 2, bind="b")])

    state, written = to.write(state, lambda item: item.bind == "b", owns_commit=True)

    assert entries(written) == [2]
    assert [each.phase for each in state.pending] == [Phase.WAITING, Phase.WRITTEN]
