"""What waits for the real commit of somebody's transaction, and what becomes of it.

SQLAlchemy's session events are not the transaction: ``after_commit`` fires for every savepoint, and for a session
joined to an outer transaction long before that one commits. So:

- what is handed over waits in the session, under the (nested) transaction that asked for it;
- a savepoint that is rolled back takes its own with it, one that is released passes them to its parent;
- a joined session's commit passes them on to the connection;
- at the connection's commit they are written, in the same transaction (``ledger``, the other half).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.ext.asyncio import async_session as proxy_of
from sqlalchemy.orm import Session, scoped_session

from aftercommit.errors import HandOverError
from aftercommit.sessions.ledger import (
    Entry,
    Item,
    Sink,
    Track,
    by_sink,
    find_ledger,
    ledger_of,
    open_savepoints,
    report_lost,
)
from aftercommit.watch.call_sites import user_line

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy.orm import SessionTransaction

__all__ = [
    "at_every_commit",
    "autocommits",
    "has_begun",
    "simulate_commits",
    "simulates_commits",
    "sync_session_of",
    "wait_for_commit",
]

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]

_TRACK: Final = "_aftercommit_waiting"
_HOOKS: Final = "_aftercommit_at_every_commit"


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

    Raises:
        HandOverError: If there is no transaction to wait for, and none can be begun here.
    """
    if not session.in_transaction():
        if not getattr(session, "autobegin", True):
            raise HandOverError(
                "This session does not begin by itself (autobegin=False), and no transaction has begun: there is no "
                "commit that the task could wait for. Hand over after session.begin(), inside the transaction."
            )
        session.begin()
    track = _track_of(session)
    connection = track.connection_on(bind)
    known = bind if isinstance(bind, Connection) else connection
    if known is not None and autocommits(known) and not simulates_commits(known):
        raise HandOverError(
            "This session's connection is in AUTOCOMMIT: there is no transaction whose commit the task could wait for. "
            "Hand over with a session that has one."
        )
    transaction = session.get_nested_transaction() or session.get_transaction()
    assert transaction is not None  # noqa: S101  # begun above
    savepoints = () if known is None else open_savepoints(known)
    track.items.append(Item(transaction, sink, entry, user_line(), bind, sys.exception(), savepoints))
    if known is not None:
        ledger_of(known).attach(track)
    if connection is None and track.committing:
        # Asked for by a listener, during the commit: the look at what waits without a connection may be over.
        session.connection(bind_arguments={"bind": bind})
    if len(track.items) == 1:
        _see_unwinding(session, track)


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
    vars(session)[_HOOKS] = (begun, committing)


def has_begun(session: Session) -> bool:
    """Whether the transaction that *session* is in has reached a connection."""
    track: Track | None = vars(session).get(_TRACK)
    return track is not None and bool(track.connections)


def autocommits(bind: Engine | Connection) -> bool:
    """Whether a bind is known to be in autocommit, before anything is connected."""
    level = bind.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(bind.dialect, "_on_connect_isolation_level", None)
    return level == "AUTOCOMMIT"


def simulates_commits(connection: Connection) -> bool:
    """Whether ``simulate_commits`` was called for it."""
    ledger = find_ledger(connection)
    return ledger is not None and ledger.is_simulated


def simulate_commits(connection: Connection) -> None:
    """Take the commit of a session joined to *connection* for the real one: the test will roll it back."""
    ledger_of(connection).is_simulated = True


# --- the session's events ---------------------------------------------------------------------------------------


def _track_of(session: Session) -> Track:
    track: Track | None = vars(session).get(_TRACK)
    if track is None:
        track = vars(session)[_TRACK] = Track(ref(session))
    return track


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    track = _track_of(session)
    if connection not in track.connections:
        track.connections.append(connection)
    if any(track.connection_on(item.bind) is connection for item in track.items):
        ledger_of(connection).attach(track)
    hooks = vars(session).get(_HOOKS)
    if hooks is not None and transaction.parent is None:
        begun, committing = hooks
        ledger_of(connection).at_commit = committing
        begun(connection)


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    track = _track_of(session)
    track.committing += 1
    for item in track.items:
        if track.connection_on(item.bind) is None:
            # Nothing has been read or written yet, so there is no transaction on the server to wait for.
            session.connection(bind_arguments={"bind": item.bind})
    if _HOOKS in vars(session) and session.get_nested_transaction() is None:
        if isinstance(session.bind, Connection):
            # Joined to a test's connection: what is written must be there to be seen, and perhaps it is only now that
            # the connection is used at all.
            session.flush()
        for connection in track.connections:
            ledger = find_ledger(connection)
            if ledger is not None and ledger.is_simulated and ledger.at_commit is not None:
                # This one's commit is only the release of a savepoint, and no event of the connection's.
                ledger.at_commit(connection)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    track: Track | None = vars(session).get(_TRACK)
    if track is None:
        return
    track.committing -= 1
    nested = session.get_nested_transaction()
    if nested is not None:
        track.released.add(nested)
        return
    track.is_committed = True
    items, track.items = track.items, []
    written = [item for item in items if item.is_written]
    by_sink(written, lambda sink, entries: sink.committed(entries))
    undone = [item for item in items if item.is_undone and not item.is_written]
    by_sink(undone, lambda sink, entries: sink.dropped(entries))
    _pass_on(track, [item for item in items if not item.is_written and not item.is_undone])


@event.listens_for(Session, "after_rollback")
def _after_rollback(session: Session) -> None:
    track: Track | None = vars(session).get(_TRACK)
    if track is None:
        return
    track.committing = 0
    nested = session.get_nested_transaction()
    if nested is None:
        track.is_rolled_back = True
    else:
        track.undone.add(nested)


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    track: Track | None = vars(session).get(_TRACK)
    if track is None:
        return
    if transaction.nested:
        _end_nested(track, transaction)
    elif transaction.parent is None:
        del vars(session)[_TRACK]
        _see_unwinding_no_more(session)
        for connection in track.connections:
            ledger = find_ledger(connection)
            if ledger is not None:
                ledger.at_commit = None
                if track in ledger.tracks:
                    ledger.tracks.remove(track)
        _end_root(track)


def _end_nested(track: Track, transaction: SessionTransaction) -> None:
    mine = [item for item in track.items if item.transaction is transaction]
    if transaction in track.released:
        track.released.discard(transaction)
        parent = transaction.parent
        while parent is not None and not parent.nested and parent.parent is not None:
            parent = parent.parent
        for item in mine:
            item.transaction = parent  # type: ignore[assignment]  # a nested transaction has a parent
        return
    track.items = [item for item in track.items if item.transaction is not transaction]
    if transaction in track.undone:
        track.undone.discard(transaction)
        by_sink(mine, lambda sink, entries: sink.dropped(entries))
    else:
        # Closed under the open savepoint: what becomes of these is said by how the whole transaction ends.
        for item in mine:
            item.is_undone = False
        track.forgotten += mine


def _end_root(track: Track) -> None:
    """The transaction ended, and what is still here was not committed: rolled back, or forgotten."""
    items, track.items = [*track.forgotten, *track.items], []
    if not items:
        return
    gone = [each for each in items if each.is_written or each.is_undone]
    # Closed by an error that passed through: that is a rollback, too.
    error = track.unwinding or sys.exception()
    if track.is_rolled_back or (error is not None and all(each.asked_during is not error for each in items)):
        gone = items
    elif track.is_committed:
        gone += track.forgotten
    by_sink(gone, lambda sink, entries: sink.dropped(entries))
    report_lost([each for each in items if each not in gone])


def _pass_on(track: Track, items: list[Item]) -> None:
    """A joined session committed: from here on its outer transaction decides."""
    for item in items:
        connection = track.connection_on(item.bind)
        ledger = None if connection is None else find_ledger(connection)
        if connection is None or ledger is None:
            report_lost([item])
        elif ledger.is_simulated:
            item.sink.write(connection, [item.entry], prompt=False)
            item.sink.committed([item.entry])
        else:
            item.savepoints = open_savepoints(connection)
            ledger.confirmed.append(item)


# --- an AsyncSession that is closed by an error -----------------------------------------------------------------


def _see_unwinding(session: Session, track: Track) -> None:
    """Have the close of the ``AsyncSession`` over *session*, if there is one, say during which exception it came.

    SQLAlchemy closes it in a greenlet, and behind ``async with`` in a task, too: the exception cannot be seen there,
    only where ``close()`` is called.
    """
    proxy = proxy_of(session)
    if proxy is None or "close" in vars(proxy):
        return
    close = proxy.close

    def see_and_close() -> Coroutine[Any, Any, None]:
        track.unwinding = sys.exception()
        return close()

    proxy.close = see_and_close  # type: ignore[method-assign]  # until the transaction ends


def _see_unwinding_no_more(session: Session) -> None:
    proxy = proxy_of(session)
    if proxy is not None:
        vars(proxy).pop("close", None)
