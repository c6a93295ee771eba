"""The private names of SQLAlchemy's that the commit leans on: all of them, and what each is good for.

=====================================================  ==============================================================
``SessionTransaction._connections``                    which connections a transaction had before its first hand-over
``SessionTransaction._current_fn``                     whether it is the session that commits, or somebody past it
``NestedTransaction._savepoint``, ``_previous_nested`` which savepoints are open
``Connection._commit_impl`` and its like, overridden   the moment before the real COMMIT, without a listener
=====================================================  ==============================================================

The first four are tried before anything leans on them (``check``), and a release that has them no more is refused with
an error that says so. What is overridden is tried, too (``calls_overrides``): where it is not called, public events do
the same, and cost more.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy
from sqlalchemy import Connection, create_engine
from sqlalchemy.orm import Session

from aftercommit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.engine.base import NestedTransaction
    from sqlalchemy.orm import SessionTransaction

__all__ = [
    "Taken",
    "calls_overrides",
    "check",
    "connections_of",
    "is_committing",
    "open_savepoints",
    "without_iteration",
]

_COMMITTING: Final = frozenset({"commit", "_prepare_impl"})


class Taken(NamedTuple):
    """A connection of a session's transaction.

    Attributes:
        connection: The connection.
        is_own: Whether the session commits it; False where it has joined somebody else's transaction.
    """

    connection: Connection
    is_own: bool


def connections_of(root: SessionTransaction) -> list[Taken]:
    """The connections of a session's outermost transaction, in the order in which it took them."""
    found: dict[Connection, Taken] = {}
    for connection, transaction, should_commit, _ in root._connections.values():  # noqa: SLF001  # see above
        is_root = connection.get_transaction() is transaction
        found[connection] = Taken(connection, is_own=bool(should_commit) and is_root)
    return list(found.values())


def is_committing(root: SessionTransaction) -> bool:
    """Whether the session's outermost transaction is being committed by the session."""
    function = root._current_fn  # noqa: SLF001  # see above
    return function is not None and function.__name__ in _COMMITTING


def open_savepoints(connection: Connection) -> tuple[str, ...]:
    """Names of the savepoints that are open on *connection*, whoever made them."""
    names: list[str] = []
    nested: NestedTransaction | None = connection.get_nested_transaction()
    while nested is not None:
        names.append(nested._savepoint)  # noqa: SLF001  # see above
        nested = nested._previous_nested  # noqa: SLF001  # see above
    return tuple(names)


def without_iteration(session: Session, names: Iterable[str]) -> None:
    """Let listeners be added to *session* even from inside of one: the list at hand is left to whoever reads it."""
    for name in names:
        listeners: Any = getattr(session.dispatch, name)
        if isinstance(getattr(listeners, "listeners", None), deque):
            listeners.listeners = deque(listeners.listeners)


@cache
def check() -> None:
    """Try the names above, once.

    Raises:
        ConfigurationError: If the SQLAlchemy that is installed has them no more.
    """
    seen: list[bool] = []
    engine = create_engine("sqlite://")
    try:
        with Session(engine) as session:
            connection = session.connection()
            session.begin_nested()
            session.connection()
            root = session.get_transaction()
            assert root is not None  # noqa: S101  # begun above
            sqlalchemy.event.listen(connection, "commit", lambda _: seen.append(is_committing(root)))
            found = [*connections_of(root), *open_savepoints(connection), is_committing(root)]
            session.commit()
        works = len(found) == 3 and found[0] == Taken(connection, is_own=True) and (found[2], seen) == (False, [True])  # noqa: PLR2004
    except (AttributeError, TypeError, ValueError) as exc:
        raise _unknown() from exc
    finally:
        engine.dispose()
    if not works:
        raise _unknown()


def _unknown() -> ConfigurationError:
    return ConfigurationError(
        f"aftercommit does not know SQLAlchemy {sqlalchemy.__version__}: how a session keeps its connections, or its "
        "commit, has changed there, so that tasks could start too early or never. Use the newest aftercommit, or an "
        "SQLAlchemy that it names as supported."
    )


@cache
def calls_overrides() -> bool:
    """Whether this SQLAlchemy calls what ``hooks.WatchedConnection`` overrides, when it should."""
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
