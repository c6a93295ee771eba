"""What waits for the real commit of somebody's transaction, and what becomes of it.

SQLAlchemy's session events are not the transaction: ``after_commit`` fires for every savepoint, and for a session
joined to an outer transaction long before that one commits. The *connection's* ``commit`` event fires exactly
before the real COMMIT, may execute statements, and an error in it aborts the commit. So:

- what is handed over waits in the session, under the (nested) transaction that asked for it;
- a savepoint that is rolled back takes its own with it, one that is released passes them to its parent;
- a joined session's commit passes them on to the connection;
- at the connection's commit they are written, in the same transaction.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from aftercommit.errors import HandOverError
from aftercommit.sessions.owner import Line, user_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine.base import NestedTransaction
    from sqlalchemy.orm import SessionTransaction

__all__ = [
    "Entry",
    "Sink",
    "at_every_commit",
    "simulate_commits",
    "simulates_commits",
    "sync_session_of",
    "wait_for_commit",
    "watch",
]

logger = logging.getLogger(__name__)

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]


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

    def lost(self, entries: Sequence[Any], lines: Sequence[Line | None]) -> None:
        """The session was closed without a commit: these will never be."""


@dataclass(eq=False, slots=True)
class _Item:
    transaction: SessionTransaction
    sink: Sink
    entry: Entry
    line: Line | None
    bind: Engine | Connection
    asked_during: BaseException | None
    written: bool = False
    savepoints: tuple[str, ...] = ()


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Track:
    """What one session is waiting with, for as long as its transaction lasts."""

    items: list[_Item] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    committing: int = 0
    committed: set[SessionTransaction] = field(default_factory=set)
    rolled_back: bool = False

    def __del__(self) -> None:
        # The session was dropped without being closed: SQLAlchemy says nothing then.
        if self.items and not self.rolled_back:
            _report_lost(self.items)


@dataclass(eq=False, slots=True)
class _Ledger:
    """What one connection will commit: for the sessions that began on it, and for those that have gone."""

    tracks: list[_Track] = field(default_factory=list)
    confirmed: list[_Item] = field(default_factory=list)
    simulated: bool = False
    at_commit: Callable[[Connection], None] | None = None


_TRACK: Final = "aftercommit.waiting"
_HOOKS: Final = "aftercommit.at_every_commit"
_ledgers: WeakKeyDictionary[Connection, _Ledger] = WeakKeyDictionary()
_WATCHED: Final = "aftercommit_watched"  # an execution option: a connection inherits its engine's


# --- what others call -------------------------------------------------------------------------------------------


def sync_session_of(session: AnySession) -> Session:
    """The plain ``Session`` behind any kind of session.

    Raises:
        HandOverError: If it is none.
    """
    if isinstance(session, (scoped_session, async_scoped_session)):
        session = session()
    if isinstance(session, AsyncSession):
        return session.sync_session
    if isinstance(session, Session):
        return session
    raise HandOverError(
        f"after_commit needs the session whose commit the task waits for, and got {type(session).__name__}. "
        "Write db.after_commit(session, task, …) with a Session, an AsyncSession or a scoped_session."
    )


def wait_for_commit(session: Session, sink: Sink, entry: Entry, bind: Engine | Connection) -> None:
    """Have *sink* write *entry* at the real commit of the transaction that *session* is in now.

    Begins the session's transaction if there is none, as ``session.add`` does, so that its end is seen. No I/O.

    Args:
        session: Anybody's session.
        sink: Who takes it.
        entry: What waits.
        bind: Where the session would write it.
    """
    if not session.in_transaction():
        session.begin()
    track = _track_of(session)
    transaction = session.get_nested_transaction() or session.get_transaction()
    assert transaction is not None  # noqa: S101  # begun above
    track.items.append(_Item(transaction, sink, entry, user_line(), bind, sys.exception()))
    for connection in track.connections:
        if _is_on(connection, bind):
            _attach(track, connection)


def watch(engine: Engine) -> None:
    """Listen on a whole engine of ours, once, rather than on each of its connections."""
    engine.update_execution_options(**{_WATCHED: True})
    _listen(engine)


def at_every_commit(
    session: Session, *, begun: Callable[[Connection], None], committing: Callable[[Connection], None]
) -> None:
    """Have every transaction of *session* watched.

    Args:
        session: A session of ours.
        begun: Called with its connection once a transaction has begun.
        committing: Called with its connection before each COMMIT, behind everything else that is written then;
            what it raises aborts the commit.
    """
    session.info[_HOOKS] = (begun, committing)


def simulates_commits(connection: Connection) -> bool:
    """Whether ``simulate_commits`` was called for it."""
    ledger = _ledgers.get(connection)
    return ledger is not None and ledger.simulated


def simulate_commits(connection: Connection) -> None:
    """Take the commit of a session joined to *connection* for the real one: the test will roll it back."""
    _ledger_of(connection).simulated = True


# --- the session's side -----------------------------------------------------------------------------------------


def _track_of(session: Session) -> _Track:
    track = session.info.get(_TRACK)
    if track is None:
        track = session.info[_TRACK] = _Track()
    return track


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    track = _track_of(session)
    if connection not in track.connections:
        track.connections.append(connection)
    if track.items and any(_is_on(connection, item.bind) for item in track.items):
        _attach(track, connection)
    hooks = session.info.get(_HOOKS)
    if hooks is not None and transaction.parent is None:
        begun, committing = hooks
        _ledger_of(connection).at_commit = committing
        begun(connection)


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    track = _track_of(session)
    track.committing += 1
    for item in track.items:
        if not any(_is_on(connection, item.bind) for connection in track.connections):
            # Nothing has been read or written yet, so there is no transaction on the server to wait for.
            session.connection(bind_arguments={"bind": item.bind})
    if _HOOKS in session.info and session.get_nested_transaction() is None:
        for connection in track.connections:
            ledger = _ledgers.get(connection)
            if ledger is not None and ledger.simulated and ledger.at_commit is not None:
                # This one's commit is only the release of a savepoint, and no event of the connection's.
                session.flush()
                ledger.at_commit(connection)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    track: _Track | None = session.info.get(_TRACK)
    if track is None:
        return
    track.committing -= 1
    nested = session.get_nested_transaction()
    if nested is not None:
        track.committed.add(nested)
        return
    items, track.items = track.items, []
    written = [item for item in items if item.written]
    if written:
        _by_sink(written, lambda sink, entries: sink.committed(entries))
    if len(written) < len(items):
        _pass_on(track, [item for item in items if not item.written])


@event.listens_for(Session, "after_rollback")
def _after_rollback(session: Session) -> None:
    track: _Track | None = session.info.get(_TRACK)
    if track is not None:
        track.committing = 0
        track.rolled_back = track.rolled_back or session.get_nested_transaction() is None


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    track: _Track | None = session.info.get(_TRACK)
    if track is None:
        return
    if transaction.nested:
        _end_nested(track, transaction)
    elif transaction.parent is None:
        del session.info[_TRACK]
        items, track.items = track.items, []
        for connection in track.connections:
            ledger = _ledgers.get(connection)
            if ledger is not None:
                ledger.at_commit = None
                if track in ledger.tracks:
                    ledger.tracks.remove(track)
        if items:
            _end_root(track, items)


def _end_nested(track: _Track, transaction: SessionTransaction) -> None:
    mine = [item for item in track.items if item.transaction is transaction]
    if transaction in track.committed:
        track.committed.discard(transaction)
        parent = transaction.parent
        while parent is not None and not parent.nested and parent.parent is not None:
            parent = parent.parent
        for item in mine:
            item.transaction = parent  # type: ignore[assignment]  # a nested transaction has a parent
        return
    track.items = [item for item in track.items if item.transaction is not transaction]
    if mine:
        _by_sink(mine, lambda sink, entries: sink.dropped(entries))


def _end_root(track: _Track, items: list[_Item]) -> None:
    """The transaction ended and these are still here: rolled back, or forgotten."""
    written = [item for item in items if item.written]
    if written or track.rolled_back:
        _by_sink(items, lambda sink, entries: sink.dropped(entries))
        return
    # Closed by an error that passed through: that is a rollback, too.
    error = sys.exception()
    if error is not None and all(item.asked_during is not error for item in items):
        _by_sink(items, lambda sink, entries: sink.dropped(entries))
    else:
        _report_lost(items)


def _pass_on(track: _Track, items: list[_Item]) -> None:
    """A joined session committed: from here on its outer transaction decides."""
    for item in items:
        connection = next((each for each in track.connections if _is_on(each, item.bind)), None)
        ledger = None if connection is None else _ledgers.get(connection)
        if connection is None or ledger is None:
            _report_lost([item])
        elif ledger.simulated:
            item.sink.write(connection, [item.entry], prompt=False)
            item.sink.committed([item.entry])
        else:
            item.savepoints = _open_savepoints(connection)
            ledger.confirmed.append(item)


# --- the connection's side --------------------------------------------------------------------------------------


def _ledger_of(connection: Connection) -> _Ledger:
    ledger = _ledgers.get(connection)
    if ledger is None:
        ledger = _ledgers[connection] = _Ledger()
        if not connection.get_execution_options().get(_WATCHED):
            _listen(connection)
    return ledger


def _attach(track: _Track, connection: Connection) -> None:
    ledger = _ledger_of(connection)
    if track not in ledger.tracks:
        ledger.tracks.append(track)


def _listen(target: Engine | Connection) -> None:
    event.listen(target, "commit", _on_commit)
    event.listen(target, "rollback", _on_rollback)
    event.listen(target, "rollback_savepoint", _on_rollback_savepoint)


def _on_commit(connection: Connection) -> None:
    ledger = _ledgers.get(connection)
    if ledger is None:
        return
    if not ledger.simulated:
        _write(ledger, connection)
    if ledger.at_commit is not None:
        ledger.at_commit(connection)


def _write(ledger: _Ledger, connection: Connection) -> None:
    passed_on, ledger.confirmed = ledger.confirmed, []
    prompt: list[_Item] = []
    for track in ledger.tracks:
        waiting = [item for item in track.items if not item.written and _is_on(connection, item.bind)]
        # Committed through the connection, past the session: nobody will tell the session that it happened.
        (prompt if track.committing > 0 else passed_on).extend(waiting)
    if prompt:
        # Marked first: if the writing fails, the commit fails, and these are dropped with what they had taken.
        for item in prompt:
            item.written = True
        _by_sink(prompt, lambda sink, entries: sink.write(connection, entries, prompt=True))
    if passed_on:
        for track in ledger.tracks:
            track.items = [item for item in track.items if item not in passed_on]
        _by_sink(passed_on, lambda sink, entries: sink.write(connection, entries, prompt=False))
        _by_sink(passed_on, lambda sink, entries: sink.unsettled(entries, connection))


def _on_rollback(connection: Connection) -> None:
    ledger = _ledgers.get(connection)
    if ledger is None:
        return
    gone, ledger.confirmed = ledger.confirmed, []
    for track in ledger.tracks:
        track.rolled_back = True
    if gone:
        _by_sink(gone, lambda sink, entries: sink.dropped(entries))


def _on_rollback_savepoint(connection: Connection, name: str, _context: None) -> None:
    ledger = _ledgers.get(connection)
    if ledger is None:
        return
    gone = [item for item in ledger.confirmed if name in item.savepoints]
    ledger.confirmed = [item for item in ledger.confirmed if name not in item.savepoints]
    if gone:
        _by_sink(gone, lambda sink, entries: sink.dropped(entries))


def _open_savepoints(connection: Connection) -> tuple[str, ...]:
    """Names of the savepoints of somebody else's making that are open around a joined session."""
    names: list[str] = []
    nested: NestedTransaction | None = connection.get_nested_transaction()
    while nested is not None:
        # No public name tells which savepoint an event is about (2.0 and 2.1); its name is in this attribute.
        names.append(nested._savepoint)  # noqa: SLF001
        nested = nested._previous_nested  # noqa: SLF001
    return tuple(names)


# --- small things -----------------------------------------------------------------------------------------------


def _is_on(connection: Connection, bind: Engine | Connection) -> bool:
    if isinstance(bind, Connection):
        return connection is bind
    return connection.engine is bind or connection.engine.pool is bind.pool


def _by_sink(items: Sequence[_Item], call: Callable[[Sink, Sequence[Any]], None]) -> None:
    sinks: dict[Sink, list[Any]] = {}
    for item in items:
        sinks.setdefault(item.sink, []).append(item.entry)
    for sink, entries in sinks.items():
        call(sink, entries)


def _report_lost(items: Sequence[_Item]) -> None:
    sinks: dict[Sink, list[_Item]] = {}
    for item in items:
        sinks.setdefault(item.sink, []).append(item)
    for sink, mine in sinks.items():
        sink.lost([item.entry for item in mine], [item.line for item in mine])
