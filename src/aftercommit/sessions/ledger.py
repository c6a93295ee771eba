"""What a connection will commit for the sessions on it: written at the real COMMIT, dropped at the real rollback.

The *connection's* ``commit`` event fires exactly before the real COMMIT, may execute statements, and an error in it
aborts the commit. No event of a session's does (see ``waiting``, the other half).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import ref

from sqlalchemy import Connection, Engine, create_engine, event

from aftercommit.watch.owners import CallSite

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine.base import NestedTransaction
    from sqlalchemy.orm import Session, SessionTransaction

__all__ = [
    "Entry",
    "Item",
    "Ledger",
    "Sink",
    "Track",
    "by_sink",
    "find_ledger",
    "is_on",
    "ledger_of",
    "open_savepoints",
    "report_lost",
    "watch",
]


class Entry(Protocol):
    """Something that waits for a commit."""

    @property
    def name(self) -> str:
        """What to call it in a report."""
        ...


class Sink(Protocol):
    """Who takes what waited. All are called in the thread, or greenlet, of the committing session."""

    def write(self, connection: Connection, entries: Sequence[Any], *, prompt: bool) -> None:
        """Write *entries* just before the COMMIT. *prompt*: whether ``committed`` follows right after it."""

    def committed(self, entries: Sequence[Any]) -> None:
        """The COMMIT of what was written is done."""

    def unsettled(self, entries: Sequence[Any], connection: Connection) -> None:
        """What was written is being committed by somebody else's hand; its end cannot be seen from here."""

    def dropped(self, entries: Sequence[Any]) -> None:
        """The transaction was rolled back, perhaps after the entries were written."""

    def lost(self, entries: Sequence[Any], lines: Sequence[CallSite | None]) -> None:
        """The session was closed without a commit: these will never be."""


@dataclass(eq=False, slots=True)
class Item:
    """One hand-over.

    Attributes:
        transaction: The (nested) transaction of the session that asked for it.
        sink: Who takes it.
        entry: What waits.
        line: Where it was asked for.
        bind: Where it is to be written.
        asked_during: The exception that was being handled then.
        savepoints: Those of the connection that were open then, by name.
        is_undone: Whether one of them was rolled back since.
        is_written: Whether the sink has written it.
    """

    transaction: SessionTransaction
    sink: Sink
    entry: Entry
    line: CallSite | None
    bind: Engine | Connection
    asked_during: BaseException | None
    savepoints: tuple[str, ...] = ()
    is_undone: bool = False
    is_written: bool = False


@dataclass(eq=False, slots=True, weakref_slot=True)
class Track:
    """What one session is waiting with, for as long as its transaction lasts.

    Attributes:
        session: The session.
        items: What waits.
        forgotten: What waited under savepoints that were neither released nor rolled back.
        connections: The connections of its transaction.
        committing: How many of its commits, savepoints included, are under way.
        released: Its nested transactions that were released and have not ended yet.
        undone: Those that were rolled back and have not ended yet.
        is_committed: Whether the transaction has committed, and is about to end.
        is_rolled_back: Whether somebody rolled it back on purpose.
        unwinding: The exception during which an ``AsyncSession`` was closed.
    """

    session: ref[Session]
    items: list[Item] = field(default_factory=list)
    forgotten: list[Item] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    committing: int = 0
    released: set[SessionTransaction] = field(default_factory=set)
    undone: set[SessionTransaction] = field(default_factory=set)
    is_committed: bool = False
    is_rolled_back: bool = False
    unwinding: BaseException | None = None

    def __del__(self) -> None:
        """Report what a session held that was dropped without being closed: SQLAlchemy says nothing then."""
        if self.items and not self.is_rolled_back:
            report_lost(self.items)

    @property
    def is_closing(self) -> bool:
        """Whether the session is being closed: that rolls back too, but nobody meant to."""
        session = self.session()
        return session is None or session.get_transaction() is None

    def connection_on(self, bind: Engine | Connection) -> Connection | None:
        """The connection of its transaction that goes to *bind*, if there is one yet."""
        return next((each for each in self.connections if is_on(each, bind)), None)


@dataclass(eq=False, slots=True)
class Ledger:
    """What one connection will commit: for the sessions that began on it, and for those that have gone.

    Attributes:
        tracks: Of the sessions that wait for it.
        confirmed: What joined sessions committed: it waits for the outer transaction.
        is_simulated: Whether the commit of a joined session counts as the real one (tests).
        at_commit: Called before each COMMIT, behind everything that is written then.
    """

    tracks: list[Track] = field(default_factory=list)
    confirmed: list[Item] = field(default_factory=list)
    is_simulated: bool = False
    at_commit: Callable[[Connection], None] | None = None

    def attach(self, track: Track) -> None:
        """Have *track* wait for this connection."""
        if track not in self.tracks:
            self.tracks.append(track)


# A connection has no `info` of its own, and a weak dictionary would never let go of it: what waits refers to the
# connection that it waits for. As its attribute, the two are one cycle, which the garbage collector takes away whole.
_LEDGER: Final = "_aftercommit_ledger"


def find_ledger(connection: Connection) -> Ledger | None:
    """The ledger of *connection*, if anything ever waited for it."""
    # Not by `getattr`: whatever stands for a connection in a test may have every attribute.
    return vars(connection).get(_LEDGER)


def ledger_of(connection: Connection) -> Ledger:
    """The ledger of *connection*; its commits and rollbacks are seen from now on."""
    ledger = find_ledger(connection)
    if ledger is None:
        ledger = Ledger()
        setattr(connection, _LEDGER, ledger)
        if not isinstance(connection, WatchedConnection):
            _listen(connection)
    return ledger


class WatchedConnection(Connection):
    """A connection of an engine of ours, which need not be listened to for its commits and rollbacks to be seen.

    What is overridden is not public, so ``watch`` tries it first; the events that come at the same moments are, but one
    listener makes each connection look for listeners at every step (see ``pools.steps``).
    """

    def _commit_impl(self) -> None:
        _on_commit(self)
        super()._commit_impl()

    def _rollback_impl(self) -> None:
        _on_rollback(self)
        super()._rollback_impl()

    def _rollback_to_savepoint_impl(self, name: str) -> None:
        _on_rollback_savepoint(self, name, None)
        super()._rollback_to_savepoint_impl(name)


def watch(engine: Engine) -> None:
    """See to it that the connections of an engine of ours need not be listened to, one by one."""
    if _is_called():
        engine._connection_cls = WatchedConnection  # noqa: SLF001  # tried, see WatchedConnection


@cache
def _is_called() -> bool:
    """Whether this SQLAlchemy calls what ``WatchedConnection`` overrides, when it should."""
    seen: list[str] = []

    class Probe(Connection):
        def _commit_impl(self) -> None:
            seen.append("commit")
            super()._commit_impl()

        def _rollback_impl(self) -> None:
            seen.append("rollback")
            super()._rollback_impl()

        def _rollback_to_savepoint_impl(self, name: str) -> None:
            seen.append("rollback to savepoint")
            super()._rollback_to_savepoint_impl(name)

    engine = create_engine("sqlite://")
    engine._connection_cls = Probe  # noqa: SLF001  # that is what is tried
    try:
        with engine.connect() as connection:
            for step in ("commit", "rollback", "rollback to savepoint"):
                root = connection.begin()
                if step == "rollback to savepoint":
                    connection.begin_nested().rollback()
                (root.commit if step == "commit" else root.rollback)()
    except (AttributeError, TypeError):
        return False
    finally:
        engine.dispose()
    return seen == ["commit", "rollback", "rollback to savepoint", "rollback"]


def _listen(connection: Connection) -> None:
    event.listen(connection, "commit", _on_commit)
    event.listen(connection, "rollback", _on_rollback)
    event.listen(connection, "rollback_savepoint", _on_rollback_savepoint)


def _on_commit(connection: Connection) -> None:
    ledger = find_ledger(connection)
    if ledger is None:
        return
    if not ledger.is_simulated:
        _write(ledger, connection)
    if ledger.at_commit is not None:
        ledger.at_commit(connection)


def _write(ledger: Ledger, connection: Connection) -> None:
    passed_on, ledger.confirmed = ledger.confirmed, []
    prompt: list[Item] = []
    for track in ledger.tracks:
        waiting = [
            each for each in track.items if not (each.is_written or each.is_undone) and is_on(connection, each.bind)
        ]
        if track.committing:
            prompt += waiting
        elif connection in track.connections:
            # Committed through the connection, past the session: nobody will tell the session that it happened.
            track.items = [each for each in track.items if each not in waiting]
            passed_on += waiting
    if prompt:
        # Marked first: if the writing fails, the commit fails, and these are dropped with what they had taken.
        for item in prompt:
            item.is_written = True
        by_sink(prompt, lambda sink, entries: sink.write(connection, entries, prompt=True))
    if passed_on:
        by_sink(passed_on, lambda sink, entries: sink.write(connection, entries, prompt=False))
        by_sink(passed_on, lambda sink, entries: sink.unsettled(entries, connection))


def _on_rollback(connection: Connection) -> None:
    ledger = find_ledger(connection)
    if ledger is None:
        return
    gone, ledger.confirmed = ledger.confirmed, []
    for track in ledger.tracks:
        if connection in track.connections and not track.is_closing:
            track.is_rolled_back = True
    by_sink(gone, lambda sink, entries: sink.dropped(entries))


def _on_rollback_savepoint(connection: Connection, name: str, _context: None) -> None:
    ledger = find_ledger(connection)
    if ledger is None:
        return
    gone = [item for item in ledger.confirmed if name in item.savepoints]
    ledger.confirmed = [item for item in ledger.confirmed if name not in item.savepoints]
    by_sink(gone, lambda sink, entries: sink.dropped(entries))
    for track in ledger.tracks:
        if not track.is_closing:
            for item in track.items:
                item.is_undone = item.is_undone or (name in item.savepoints and is_on(connection, item.bind))


def open_savepoints(connection: Connection) -> tuple[str, ...]:
    """Names of the savepoints that are open on *connection*, whoever made them."""
    names: list[str] = []
    nested: NestedTransaction | None = connection.get_nested_transaction()
    while nested is not None:
        # No public name tells which savepoint an event is about (2.0 and 2.1); its name is in this attribute.
        names.append(nested._savepoint)  # noqa: SLF001
        nested = nested._previous_nested  # noqa: SLF001
    return tuple(names)


def is_on(connection: Connection, bind: Engine | Connection) -> bool:
    """Whether *connection* is where a session goes that is bound to *bind*."""
    if isinstance(bind, Connection):
        return connection is bind
    return connection.engine is bind or connection.engine.pool is bind.pool


def by_sink(items: Sequence[Item], call: Callable[[Sink, Sequence[Any]], None]) -> None:
    """Tell each sink of its own."""
    sinks: dict[Sink, list[Any]] = {}
    for item in items:
        sinks.setdefault(item.sink, []).append(item.entry)
    for sink, entries in sinks.items():
        call(sink, entries)


def report_lost(items: Sequence[Item]) -> None:
    """Tell each sink that its own will never be, and where they were asked for."""
    sinks: dict[Sink, list[Item]] = {}
    for item in items:
        sinks.setdefault(item.sink, []).append(item)
    for sink, mine in sinks.items():
        sink.lost([item.entry for item in mine], [item.line for item in mine])
