"""What waits for a commit, and who is told what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from sqlalchemy import Connection

    from aftercommit.watch.call_sites import CallSite

__all__ = ["Entry", "Pending", "Phase", "TransactionListener", "by_listener", "report_lost"]


class Entry(Protocol):
    """Something that waits for a commit."""

    @property
    def name(self) -> str:
        """What to call it in a report."""
        ...


class TransactionListener(Protocol):
    """Who takes what waited. All are called in the thread, or greenlet, of the committing session."""

    def write(self, connection: Connection, entries: Sequence[Any], *, owns_commit: bool) -> None:
        """Write *entries* just before the COMMIT.

        Args:
            connection: In the transaction that is about to be committed.
            entries: What waited for it.
            owns_commit: Whether the session commits that handed them over, so that ``committed`` follows right after
                it. False for what was joined to somebody else's transaction.
        """

    def committed(self, entries: Sequence[Any]) -> None:
        """The COMMIT of what was written is done."""

    def outcome_unknown(self, entries: Sequence[Any], connection: Connection) -> None:
        """What was written is being committed past its session, whose end cannot be seen from here."""

    def dropped(self, entries: Sequence[Any]) -> None:
        """The transaction was rolled back, perhaps after the entries were written."""

    def lost(self, entries: Sequence[Any], lines: Sequence[CallSite | None]) -> None:
        """The session was closed without a commit: these will never be."""


class Phase(Enum):
    """How far one hand-over has come."""

    WAITING = "waiting"
    WRITTEN = "written"
    """In the transaction that is being committed."""
    UNDONE = "undone"
    """A savepoint of the connection, made past the session, was rolled back with it."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Pending:
    """One hand-over that waits for a commit.

    Attributes:
        scope: The (nested) transaction of the session that asked for it.
        listener: Who takes it.
        entry: What waits.
        bind: Where it is to be written.
        line: Where it was asked for.
        asked_during: The exception that was being handled then.
        savepoints: Those of the connection that were open then, by name.
        phase: How far it has come.
    """

    scope: Hashable
    listener: TransactionListener
    entry: Entry
    bind: Any = None
    line: CallSite | None = None
    asked_during: BaseException | None = None
    savepoints: tuple[str, ...] = ()
    phase: Phase = Phase.WAITING


def by_listener(items: Sequence[Pending], call: Callable[[TransactionListener, Sequence[Any]], None]) -> None:
    """Tell each listener of its own."""
    listeners: dict[TransactionListener, list[Any]] = {}
    for item in items:
        listeners.setdefault(item.listener, []).append(item.entry)
    for listener, entries in listeners.items():
        call(listener, entries)


def report_lost(items: Sequence[Pending]) -> None:
    """Tell each listener that its own will never be, and where they were asked for."""
    listeners: dict[TransactionListener, list[Pending]] = {}
    for item in items:
        listeners.setdefault(item.listener, []).append(item)
    for listener, mine in listeners.items():
        listener.lost([item.entry for item in mine], [item.line for item in mine])
