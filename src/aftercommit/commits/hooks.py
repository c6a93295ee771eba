"""Sees the commit of somebody's transaction, and everything that may come before or instead of it.

SQLAlchemy's session events are not the transaction: ``after_commit`` fires for every savepoint, and for a session
joined to an outer transaction long before that one commits. The *connection's* ``commit`` event fires exactly before
the real COMMIT, may execute statements, and an error in it aborts the commit. So both are listened to: the session says
what belongs to its transaction, the connection says when that is committed, and ``transitions`` what follows.

Nothing is put on the class ``Session``: a session is listened to from its first hand-over on, and those of the factory
by way of the class that it makes.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.ext.asyncio import async_session as proxy_of
from sqlalchemy.orm import Session, scoped_session

from aftercommit.commits import transitions as to
from aftercommit.commits.fences import Fence, Fenced, is_on
from aftercommit.commits.pending import Entry, Pending, Phase, TransactionListener, by_listener, report_lost
from aftercommit.errors import HandOverError
from aftercommit.pools.taking import TakeableConnection
from aftercommit.pools.urls import render
from aftercommit.watch import private_names
from aftercommit.watch.call_sites import user_line
from aftercommit.watch.private_names import open_savepoints

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy.orm import SessionTransaction

__all__ = [
    "WatchedConnection",
    "autocommits",
    "fence_commits",
    "listen",
    "simulate_commits",
    "simulates_commits",
    "sync_session_of",
    "wait_for_commit",
    "watch",
]

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]

# Attributes, and not keys in the public `info`: that one is the application's. A weak dictionary would never let go:
# what waits refers to the connection that it waits for, and as an attribute the two are one cycle that is collected.
_HOOK: Final = "_aftercommit_hook"
_FENCE: Final = "_aftercommit_fence"
_LISTENS: Final = "_aftercommit_listens"


class SessionHook:
    """What one session is waiting with, for as long as its transaction lasts.

    Attributes:
        session: The session.
        connections: The connections of its transaction.
        unwinding: The exception during which an ``AsyncSession`` was closed.
    """

    __slots__ = ("__weakref__", "_binds", "_new", "_state", "connections", "session", "unwinding")

    def __init__(self, session: Session, root: SessionTransaction) -> None:
        self.session = ref(session)
        self.connections = [each.connection for each in private_names.connections_of(root)]
        self.unwinding: BaseException | None = None
        self._state = to.SessionState()
        self._new: list[Pending] = []
        self._binds: list[Engine | Connection] = []

    def __del__(self) -> None:
        """Report what a session held that was dropped without being closed: SQLAlchemy says nothing then."""
        state = self.state
        if not state.pending:
            return
        if state.is_rolled_back:
            by_listener(state.pending, lambda listener, entries: listener.dropped(entries))
        else:
            report_lost(state.pending)

    @property
    def state(self) -> to.SessionState:
        """What is known of it, as ``transitions`` has it."""
        if self._new:
            # Not at each hand-over: there may be a hundred thousand.
            self._state, self._new = to.hand_over(self._state, self._new), []
        return self._state

    @state.setter
    def state(self, state: to.SessionState) -> None:
        self._state = state

    @property
    def is_closing(self) -> bool:
        """Whether the session is being closed: that rolls back too, but nobody meant to."""
        session = self.session()
        return session is None or session.get_transaction() is None

    @property
    def owns_commit(self) -> bool:
        """Whether it is the session that is committing."""
        session = self.session()
        root = None if session is None else session.get_transaction()
        return root is not None and private_names.is_committing(root)

    def connection_on(self, bind: Engine | Connection) -> Connection | None:
        """The connection of its transaction that goes to *bind*, if there is one yet."""
        return next((each for each in self.connections if is_on(each, bind)), None)

    def add(self, item: Pending) -> None:
        """*item* waits from now on."""
        self._new.append(item)
        if item.bind not in self._binds:
            self._binds.append(item.bind)
            self.attach()

    def take(self, connection: Connection) -> None:
        """Its transaction has begun on *connection*."""
        if connection not in self.connections:
            self.connections.append(connection)
            self.attach()

    def attach(self) -> None:
        """Have its connections tell of their commits: all, if there are several, because any may be the first."""
        connections = {*self.connections, *(bind for bind in self._binds if isinstance(bind, Connection))}
        several = len(connections) > 1
        for connection in connections:
            if several or any(is_on(connection, bind) for bind in self._binds):
                sessions = connection_hook_of(connection).sessions
                if self not in sessions:
                    sessions.append(self)

    def detach(self) -> None:
        """Its transaction has ended."""
        for connection in {*self.connections, *(bind for bind in self._binds if isinstance(bind, Connection))}:
            hook = find_connection_hook(connection)
            if hook is not None and self in hook.sessions:
                hook.sessions.remove(self)


class ConnectionHook:
    """What one connection will commit, and what its commits must hold.

    Attributes:
        sessions: Those that wait for it.
        state: What joined sessions passed on, as ``transitions`` has it.
        is_simulated: Whether the commit of a joined session counts as the real one (tests).
        fences: Of the sessions of ours that are in a transaction on it.
    """

    __slots__ = ("fences", "is_simulated", "sessions", "state")

    def __init__(self) -> None:
        self.sessions: list[SessionHook] = []
        self.state = to.ConnectionState()
        self.is_simulated = False
        self.fences: list[Fence] = []


# --- what others call -----------------------------------------------------------------------------------------------


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


def wait_for_commit(session: Session, listener: TransactionListener, entry: Entry, bind: Engine | Connection) -> None:
    """Have *listener* write *entry* at the real commit of the transaction that *session* is in now.

    Begins the session's transaction if there is none, as ``session.add`` does, so that its end is seen. No I/O.

    Args:
        session: Anybody's session.
        listener: Who takes it.
        entry: What waits.
        bind: Where the session would write it.

    Raises:
        HandOverError: If there is no transaction to wait for, and none can be begun here.
    """
    hook = _hook_of(session)
    connection = hook.connection_on(bind)
    known = bind if isinstance(bind, Connection) else connection
    if known is not None and autocommits(known) and not simulates_commits(known):
        raise HandOverError(
            "This session's connection is in AUTOCOMMIT: there is no transaction whose commit the task could wait for. "
            "Hand over with a session that has one."
        )
    scope = session.get_nested_transaction() or session.get_transaction()
    assert scope is not None  # noqa: S101  # begun by _hook_of
    savepoints = () if known is None else open_savepoints(known)
    hook.add(Pending(scope, listener, entry, bind, user_line(), sys.exception(), savepoints))
    if connection is None and hook.owns_commit:
        # Asked for by a listener, during the commit: the look at what waits without a connection may be over.
        session.connection(bind_arguments={"bind": bind})


def fence_commits(session: Session, fenced: Fenced) -> None:
    """Have every commit of *session*, and every other one on its connection meanwhile, hold what *fenced* demands.

    Args:
        session: A new session of the factory's.
        fenced: Whose it is.
    """
    bind: Any = session.bind
    vars(session)[_FENCE] = Fence(fenced, bind)


def autocommits(bind: Engine | Connection) -> bool:
    """Whether a bind is known to be in autocommit, before anything is connected."""
    level = bind.get_execution_options().get("isolation_level")
    if level is None:
        level = private_names.isolation_level_of(bind)
    return level == "AUTOCOMMIT"


def simulates_commits(connection: Connection) -> bool:
    """Whether ``simulate_commits`` was called for it."""
    hook = find_connection_hook(connection)
    return hook is not None and hook.is_simulated


def simulate_commits(connection: Connection) -> None:
    """Take the commit of a session joined to *connection* for the real one: the test will roll it back."""
    connection_hook_of(connection).is_simulated = True


def watch(engine: Engine) -> None:
    """See to it that the connections of an engine of ours need not be listened to, one by one.

    Raises:
        ConfigurationError: If the SQLAlchemy that is installed is not known.
    """
    private_names.check()
    # Without the overrides its commits are listened to, and it can be taken from a run that hangs all the same.
    kind = WatchedConnection if private_names.calls_overrides() else TakeableConnection
    engine._connection_cls = kind  # noqa: SLF001  # tried, see private_names


def listen(target: Session | type[Session]) -> None:
    """Listen to a session, or to all of a class of ours, for what its transactions come to."""
    for name, listener in _LISTENERS.items():
        event.listen(target, name, listener)
    setattr(target, _LISTENS, True)


# --- a connection -----------------------------------------------------------------------------------------------


def find_connection_hook(connection: Connection) -> ConnectionHook | None:
    """The hook of *connection*, if anything ever waited for it."""
    hook: ConnectionHook | None = connection.__dict__.get(_HOOK)
    return hook


def connection_hook_of(connection: Connection) -> ConnectionHook:
    """The hook of *connection*; its commits and rollbacks are seen from now on."""
    hook = find_connection_hook(connection)
    if hook is None:
        hook = connection.__dict__[_HOOK] = ConnectionHook()
        if not isinstance(connection, WatchedConnection):
            event.listen(connection, "commit", _on_commit)
            event.listen(connection, "rollback", _on_rollback)
            event.listen(connection, "rollback_savepoint", _on_rollback_savepoint)
    return hook


class WatchedConnection(TakeableConnection):
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


def _on_commit(connection: Connection) -> None:
    hook = find_connection_hook(connection)
    if hook is None:
        return
    past: list[Pending] = []
    try:
        if not hook.is_simulated:
            _write(hook, connection, past)
        for fence in tuple(hook.fences):
            fence.committing(connection)
        for session in tuple(hook.sessions):
            if len(session.connections) > 1:
                _commit_others_first(session, connection)
    except BaseException:
        _abort(connection)
        by_listener(past, lambda listener, entries: listener.dropped(entries))
        raise
    by_listener(past, lambda listener, entries: listener.outcome_unknown(entries, connection))


def _abort(connection: Connection) -> None:
    """Roll back what will not be committed, at once.

    A session that is closed behind a failed COMMIT, without a rollback, gives its connection back to the pool still in
    that transaction (SQLAlchemy 2.0 and 2.1): whoever has it next would commit what was refused here.
    """
    dialect: Any = connection.dialect
    with suppress(Exception):
        # SQLAlchemy goes on to take the transaction for one that needs a rollback, which is then empty.
        dialect.do_rollback(connection.connection)


def _write(hook: ConnectionHook, connection: Connection, past: list[Pending]) -> None:
    """Write what waits; put into *past* what is committed past its session, which will not be told."""
    hook.state, joined = to.write_joined(hook.state)
    own: list[Pending] = []
    past.extend(joined)
    for session in hook.sessions:
        owns_commit = session.owns_commit
        if not owns_commit and connection not in session.connections:
            continue
        session.state, chosen = to.write(
            session.state, lambda item: is_on(connection, item.bind), owns_commit=owns_commit
        )
        # Committed through the connection, past the session, nobody will tell the session that it happened.
        (own if owns_commit else past).extend(chosen)
    if own:
        by_listener(own, lambda listener, entries: listener.write(connection, entries, owns_commit=True))
    if past:
        by_listener(past, lambda listener, entries: listener.write(connection, entries, owns_commit=False))


def _commit_others_first(hook: SessionHook, connection: Connection) -> None:
    """A session that commits on several connections: where tasks are written, the COMMIT comes last.

    SQLAlchemy commits them in no order in particular. If one failed behind the one with the tasks, these would stand
    for work that never was; the other way round the whole commit fails, and there are no tasks.
    """
    if not any(each.phase is Phase.WRITTEN and is_on(connection, each.bind) for each in hook.state.pending):
        return
    session = hook.session()
    root = None if session is None else session.get_transaction()
    if root is None:
        return
    for other, is_own in private_names.connections_of(root):
        if other is connection or not is_own:
            continue
        if any(is_on(other, each.bind) for each in hook.state.pending):
            raise HandOverError(
                f"This session has handed tasks over to two databases ({render(connection.engine.url)} and "
                f"{render(other.engine.url)}), and commits on both: if one of the commits failed, the tasks of the "
                "other would stand for work that never was. Rolled back. Take a session for each database, and hand "
                "its own tasks over in each."
            )
        if other.get_transaction() is not None:
            # By the driver: SQLAlchemy's transaction goes on until the session commits it, too, which is then empty.
            _commit_by_driver(other)


def _commit_by_driver(connection: Connection) -> None:
    dialect: Any = connection.dialect
    try:
        dialect.do_commit(connection.connection)
    except dialect.loaded_dbapi.Error as exc:
        raise DBAPIError.instance(
            None, None, exc, dialect.loaded_dbapi.Error, hide_parameters=True, dialect=dialect
        ) from exc


def _on_rollback(connection: Connection) -> None:
    hook = find_connection_hook(connection)
    if hook is None:
        return
    hook.state, effects = to.roll_back_connection(hook.state)
    for session in hook.sessions:
        if connection in session.connections and not session.is_closing:
            session.state = to.roll_back(session.state, None)
    by_listener(effects.dropped, lambda listener, entries: listener.dropped(entries))
    for fence in tuple(hook.fences):
        fence.rolled_back(connection)


def _on_rollback_savepoint(connection: Connection, name: str, _context: None) -> None:
    hook = find_connection_hook(connection)
    if hook is None:
        return
    hook.state, effects = to.roll_back_joined(hook.state, name)
    by_listener(effects.dropped, lambda listener, entries: listener.dropped(entries))
    for session in hook.sessions:
        if not session.is_closing:
            session.state = to.roll_back_savepoint(session.state, name, lambda item: is_on(connection, item.bind))


# --- a session's events ---------------------------------------------------------------------------------------------


def _hook_of(session: Session) -> SessionHook:
    """The hook of the transaction that *session* is in, or begins now."""
    if not session.in_transaction():
        if not getattr(session, "autobegin", True):
            raise HandOverError(
                "This session does not begin by itself (autobegin=False), and no transaction has begun: there is no "
                "commit that the task could wait for. Hand over after session.begin(), inside the transaction."
            )
        session.begin()
    hook: SessionHook | None = vars(session).get(_HOOK)
    if hook is None:
        private_names.check()
        if not getattr(session, _LISTENS, False):
            private_names.without_iteration(session, _LISTENERS)
            listen(session)
        root = session.get_transaction()
        assert root is not None  # noqa: S101  # begun above
        hook = vars(session)[_HOOK] = SessionHook(session, root)
        _see_unwinding(session, hook)
    return hook


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    own = vars(session)
    hook: SessionHook | None = own.get(_HOOK)
    if hook is not None:
        hook.take(connection)
    fence: Fence | None = own.get(_FENCE)
    if fence is not None and transaction.parent is None:
        fences = connection_hook_of(connection).fences
        if fence not in fences:
            fences.append(fence)
        fence.take(connection)


def _before_commit(session: Session) -> None:
    own = vars(session)
    hook: SessionHook | None = own.get(_HOOK)
    if hook is not None:
        if hook.owns_commit:
            hook.state = to.try_commit(hook.state)
        for bind in {each.bind: None for each in hook.state.pending}:
            if hook.connection_on(bind) is None:
                # Nothing has been read or written yet, so there is no transaction on the server to wait for.
                session.connection(bind_arguments={"bind": bind})
    fence: Fence | None = own.get(_FENCE)
    if fence is not None:
        _fence_session(session, fence)


def _fence_session(session: Session, fence: Fence) -> None:
    root = session.get_transaction()
    if root is None or not private_names.is_committing(root):
        # A savepoint is released.
        return
    if fence.connection is None:
        # It has sent nothing, and its commit must hold all the same what every commit of it holds.
        session.connection(bind_arguments={"bind": fence.bind})
    connection = fence.connection
    if connection is None:
        return
    if isinstance(session.bind, Connection):
        # Joined to a test's connection: what is written must be there to be seen.
        session.flush()
    if simulates_commits(connection):
        # This one's commit is only the release of a savepoint, and no event of the connection's.
        fence.committing(connection)


def _after_commit(session: Session) -> None:
    hook: SessionHook | None = vars(session).get(_HOOK)
    if hook is None:
        return
    nested = session.get_nested_transaction()
    if nested is not None:
        hook.state = to.release(hook.state, nested)
        return
    hook.state, effects = to.commit_root(hook.state)
    by_listener(effects.committed, lambda listener, entries: listener.committed(entries))
    by_listener(effects.dropped, lambda listener, entries: listener.dropped(entries))
    by_connection: dict[Connection | None, list[Pending]] = {}
    for item in effects.joined:
        by_connection.setdefault(hook.connection_on(item.bind), []).append(item)
    for connection, items in by_connection.items():
        _pass_on(connection, items)


def _pass_on(connection: Connection | None, items: list[Pending]) -> None:
    """A joined session committed: from here on its outer transaction decides."""
    outer = None if connection is None else find_connection_hook(connection)
    if connection is None or outer is None:
        report_lost(items)
    elif outer.is_simulated:
        by_listener(items, lambda listener, entries: listener.write(connection, entries, owns_commit=False))
        by_listener(items, lambda listener, entries: listener.committed(entries))
    else:
        outer.state = to.join(outer.state, items, open_savepoints(connection))


def _after_rollback(session: Session) -> None:
    hook: SessionHook | None = vars(session).get(_HOOK)
    if hook is not None:
        hook.state = to.roll_back(hook.state, session.get_nested_transaction())


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    own = vars(session)
    hook: SessionHook | None = own.get(_HOOK)
    if transaction.nested:
        if hook is not None:
            hook.state, effects = to.end_nested(hook.state, transaction, _around(transaction))
            by_listener(effects.dropped, lambda listener, entries: listener.dropped(entries))
    elif transaction.parent is None:
        fence: Fence | None = own.get(_FENCE)
        if fence is not None:
            for connection in fence.release():
                with suppress(ValueError):
                    connection_hook_of(connection).fences.remove(fence)
        if hook is not None:
            _end_root(session, hook)


def _around(transaction: SessionTransaction) -> SessionTransaction | None:
    """The (nested) transaction around a nested one, past those of flushes."""
    parent = transaction.parent
    while parent is not None and not parent.nested and parent.parent is not None:
        parent = parent.parent
    return parent


def _end_root(session: Session, hook: SessionHook) -> None:
    del vars(session)[_HOOK]
    _see_unwinding_no_more(session)
    hook.detach()
    effects = to.end_root(hook.state, hook.unwinding or sys.exception())
    hook.state = to.SessionState()
    by_listener(effects.dropped, lambda listener, entries: listener.dropped(entries))
    report_lost(effects.lost)


_LISTENERS: Final[dict[str, Callable[..., None]]] = {
    "after_begin": _after_begin,
    "before_commit": _before_commit,
    "after_commit": _after_commit,
    "after_rollback": _after_rollback,
    "after_transaction_end": _after_transaction_end,
}


# --- an AsyncSession that is closed by an error ---------------------------------------------------------------------


def _see_unwinding(session: Session, hook: SessionHook) -> None:
    """Have the close of the ``AsyncSession`` over *session*, if there is one, say during which exception it came.

    SQLAlchemy closes it in a greenlet, and behind ``async with`` in a task, too: the exception cannot be seen there,
    and no event or attribute has it, only the place where ``close()`` is called. So this one method is replaced on this
    one session, from its hand-over to the end of that transaction.
    """
    proxy = proxy_of(session)
    if proxy is None or "close" in vars(proxy):
        return
    close = proxy.close

    def see_and_close() -> Coroutine[Any, Any, None]:
        hook.unwinding = sys.exception()
        return close()

    proxy.close = see_and_close  # type: ignore[method-assign]  # until the transaction ends


def _see_unwinding_no_more(session: Session) -> None:
    proxy = proxy_of(session)
    if proxy is not None:
        vars(proxy).pop("close", None)
