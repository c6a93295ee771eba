"""What becomes of the hand-overs of one session, and of one connection: decided here, without any I/O.

- What is handed over waits under the (nested) transaction that asked for it.
- A savepoint that is rolled back drops its own; one that is released passes them to its parent.
- A joined session's commit passes them on to the connection.
- At the connection's COMMIT they are written; what the session then says decides how they end.

Every hand-over ends exactly once: committed, dropped, joined to the connection, or lost.
Each function takes a state and returns the next one, with its effects where there are any. ``hooks`` calls them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aftercommit.commits.pending import Pending, Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

__all__ = [
    "ConnectionState",
    "Effects",
    "SessionState",
    "commit_root",
    "end_nested",
    "end_root",
    "hand_over",
    "join",
    "release",
    "roll_back",
    "roll_back_connection",
    "roll_back_joined",
    "roll_back_savepoint",
    "try_commit",
    "write",
    "write_joined",
]

Items = tuple[Pending, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """What one session waits with, for as long as its transaction lasts.

    Attributes:
        pending: What waits.
        forgotten: What waited under savepoints that were neither released nor rolled back.
        released: Its nested transactions that were released and have not ended yet.
        undone: Those that were rolled back and have not ended yet.
        is_tried: Whether its commit was asked for: what that fails with is told, so nothing is lost in silence.
        is_committed: Whether the transaction has committed, and is about to end.
        is_rolled_back: Whether it was rolled back on purpose.
    """

    pending: Items = ()
    forgotten: Items = ()
    released: frozenset[Hashable] = frozenset()
    undone: frozenset[Hashable] = frozenset()
    is_tried: bool = False
    is_committed: bool = False
    is_rolled_back: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionState:
    """What one connection will commit for sessions that have committed before it.

    Attributes:
        joined: What they passed on.
    """

    joined: Items = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What is to be told.

    Attributes:
        committed: These are committed.
        dropped: These never existed.
        joined: Of these, the outer transaction decides from here on.
        lost: These will never be, and nobody wanted that.
    """

    committed: Items = ()
    dropped: Items = ()
    joined: Items = ()
    lost: Items = ()


NOTHING = Effects()


# --- a session's ----------------------------------------------------------------------------------------------------


def hand_over(state: SessionState, items: Iterable[Pending]) -> SessionState:
    """*items* wait from now on."""
    return replace(state, pending=(*state.pending, *items))


def write(state: SessionState, is_here: Callable[[Pending], bool], *, owns_commit: bool) -> tuple[SessionState, Items]:
    """The COMMIT of a connection comes; return what is to be written on it.

    What is written is marked before it is tried: if that fails, the commit fails, and it is dropped with what it took.

    Args:
        state: The session's.
        is_here: Whether an item goes to that connection.
        owns_commit: Whether the session is committing. Otherwise it will not hear of it, and lets go of these.
    """
    chosen = tuple(each for each in state.pending if each.phase is Phase.WAITING and is_here(each))
    if not chosen:
        return state, ()
    if not owns_commit:
        return replace(state, pending=_without(state.pending, chosen)), chosen
    marked = {each: replace(each, phase=Phase.WRITTEN) for each in chosen}
    return replace(state, pending=tuple(marked.get(each, each) for each in state.pending)), tuple(marked.values())


def try_commit(state: SessionState) -> SessionState:
    """The session is asked to commit."""
    return state if state.is_tried else replace(state, is_tried=True)


def commit_root(state: SessionState) -> tuple[SessionState, Effects]:
    """The session says that its transaction has committed."""
    effects = Effects(
        committed=_in_phase(state.pending, Phase.WRITTEN),
        dropped=_in_phase(state.pending, Phase.UNDONE),
        joined=_in_phase(state.pending, Phase.WAITING),
    )
    return replace(state, pending=(), is_committed=True), effects


def release(state: SessionState, scope: Hashable) -> SessionState:
    """The session says that a savepoint of its own was released."""
    return replace(state, released=state.released | {scope})


def roll_back(state: SessionState, scope: Hashable | None) -> SessionState:
    """It was rolled back on purpose: the savepoint *scope*, or with None the whole transaction."""
    if scope is None:
        return replace(state, is_rolled_back=True)
    return replace(state, undone=state.undone | {scope})


def roll_back_savepoint(state: SessionState, name: str, is_here: Callable[[Pending], bool]) -> SessionState:
    """A savepoint of a connection was rolled back, whoever made it."""
    if not any(name in each.savepoints for each in state.pending):
        return state
    undone = tuple(
        replace(each, phase=Phase.UNDONE)
        if each.phase is Phase.WAITING and name in each.savepoints and is_here(each)
        else each
        for each in state.pending
    )
    return replace(state, pending=undone)


def end_nested(state: SessionState, scope: Hashable, parent: Hashable) -> tuple[SessionState, Effects]:
    """A nested transaction of the session has ended, in whatever way.

    Args:
        state: The session's.
        scope: The nested transaction.
        parent: The one around it that hand-overs wait under.
    """
    mine = tuple(each for each in state.pending if each.scope is scope)
    if scope in state.released:
        pending = tuple(replace(each, scope=parent) if each.scope is scope else each for each in state.pending)
        return replace(state, pending=pending, released=state.released - {scope}), NOTHING
    others = _without(state.pending, mine)
    if scope in state.undone:
        return replace(state, pending=others, undone=state.undone - {scope}), Effects(dropped=mine)
    # Closed under the open savepoint: what becomes of these is said by how the whole transaction ends.
    forgotten = tuple(replace(each, phase=Phase.WAITING) for each in mine)
    return replace(state, pending=others, forgotten=(*state.forgotten, *forgotten)), NOTHING


def end_root(state: SessionState, error: BaseException | None) -> Effects:
    """The transaction has ended, and what is still here was not committed: rolled back, or forgotten.

    Args:
        state: The session's.
        error: The exception that is passing through; closed by one is rolled back, too. One that was being handled at
            a hand-over already is not the reason.
    """
    items = (*state.forgotten, *state.pending)
    # A commit that went through released or rolled back what was forgotten before it.
    settled = set(state.forgotten) if state.is_committed else set[Pending]()
    is_unwound = error is not None and all(each.asked_during is not error for each in items)
    has_failed = state.is_tried and not state.is_committed
    if state.is_rolled_back or is_unwound or has_failed:
        return Effects(dropped=items)
    gone = tuple(each for each in items if each.phase is not Phase.WAITING or each in settled)
    return Effects(dropped=gone, lost=_without(items, gone))


# --- a connection's -------------------------------------------------------------------------------------------------


def join(state: ConnectionState, items: Iterable[Pending], savepoints: tuple[str, ...]) -> ConnectionState:
    """A joined session has committed: *items* wait for the outer transaction, under the *savepoints* open there."""
    return replace(state, joined=(*state.joined, *(replace(each, savepoints=savepoints) for each in items)))


def write_joined(state: ConnectionState) -> tuple[ConnectionState, Items]:
    """The COMMIT comes; return what is to be written."""
    return replace(state, joined=()), state.joined


def roll_back_connection(state: ConnectionState) -> tuple[ConnectionState, Effects]:
    """The transaction was rolled back."""
    return replace(state, joined=()), Effects(dropped=state.joined)


def roll_back_joined(state: ConnectionState, name: str) -> tuple[ConnectionState, Effects]:
    """A savepoint was rolled back."""
    gone = tuple(each for each in state.joined if name in each.savepoints)
    return replace(state, joined=_without(state.joined, gone)), Effects(dropped=gone)


def _in_phase(items: Items, phase: Phase) -> Items:
    return tuple(each for each in items if each.phase is phase)


def _without(items: Items, gone: Items) -> Items:
    left = set(gone)
    return tuple(each for each in items if each not in left)
