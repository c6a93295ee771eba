"""The end of a session is the end: any further use raises, instead of silently opening a new transaction.

SQLAlchemy lets a closed session be used again: it takes a new connection, begins a new transaction, and nobody ever
commits it. So at its end a session of ours changes its class, once, to one that refuses. That costs nothing before.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NoReturn

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit.errors import SessionEnded

if TYPE_CHECKING:
    from collections.abc import Callable

    from aftercommit.watch.owners import Owner

__all__ = ["end_for_good"]

_ENDED: Final = "_aftercommit_ended"

# What may still be read, because it opens nothing; `sync_session` is how SQLAlchemy itself gets from one to the other.
_HARMLESS: Final = frozenset(
    {
        "close",
        "rollback",
        "invalidate",
        "aclose",
        "expunge_all",
        "reset",
        "info",
        "hash_key",
        "sync_session",
        "_proxied",
    }
    | {"is_active", "in_transaction", "in_nested_transaction", "get_transaction", "get_nested_transaction"}
    | {"sync_session_class", "dispatch"}
)


def end_for_good(session: Session | AsyncSession, owner: Owner) -> None:
    """Make every further use of *session*, which is closed, raise ``SessionEnded``.

    ``rollback()`` and ``close()`` stay harmless, so that a ``finally`` of somebody else's does not fail.
    """
    sync = session.sync_session if isinstance(session, AsyncSession) else session
    vars(sync)[_ENDED] = (owner, time.monotonic())
    if sync is not session:
        _change_class(session)
    _change_class(sync)


def _change_class(session: Session | AsyncSession) -> None:
    if type(session) not in _ended_classes:
        kind: type = type(session)
        session.__class__ = _ended_class(kind)


_ended_classes: Final[set[type]] = set()


@cache
def _ended_class(kind: type[Session | AsyncSession]) -> type:
    # One base and no slots: the class of an object can only be changed for one of the same layout.
    methods = {**_sync_harmless(), **(_async_harmless() if issubclass(kind, AsyncSession) else {})}
    refusals = {"__getattribute__": _get, "__contains__": _contains, "__iter__": _iterate, "is_active": False}
    ended = type(f"Ended{kind.__name__}", (kind,), {**methods, **refusals, "__module__": __name__, "__slots__": ()})
    _ended_classes.add(ended)
    return ended


def _get(self: Any, name: str) -> Any:
    if name not in _HARMLESS and not (name.startswith("__") and name.endswith("__")):
        _refuse(self, name)
    return object.__getattribute__(self, name)


def _contains(self: Any, _instance: object) -> bool:
    _refuse(self, "in")


def _iterate(self: Any) -> NoReturn:
    _refuse(self, "iter()")


def _refuse(session: Any, operation: str) -> NoReturn:
    sync = session.sync_session if isinstance(session, AsyncSession) else session
    owner, since = vars(sync)[_ENDED]
    ago = time.monotonic() - since
    how = "async with db.async_session() as session:" if sync is not session else "with db.session() as session:"
    kind = "AsyncSession" if sync is not session else "Session"
    raise SessionEnded(
        f"{operation!r} on a session that has ended: it belonged to {owner} and ended {ago:.3f} s ago. Used again, it "
        "would silently open a new transaction that nobody commits. In a task, take a session of its own as the first "
        f"parameter (`session: {kind}`, declared with @db.task); in a streaming response, or anywhere else after "
        f"the end, open one where it is needed: `{how}`.",
        owner=str(owner),
        ended_for=ago,
        operation=operation,
    )


def _sync_harmless() -> dict[str, Callable[..., Any]]:
    def nothing(_self: object, *_args: object, **_kwargs: object) -> None:
        """Do nothing: the session has ended."""

    def false(_self: object) -> bool:
        """No: the session has ended."""
        return False

    names = ("close", "rollback", "invalidate", "expunge_all", "reset", "get_transaction", "get_nested_transaction")
    return {**dict.fromkeys(names, nothing), "in_transaction": false, "in_nested_transaction": false}


def _async_harmless() -> dict[str, Callable[..., Any]]:
    async def nothing(_self: object, *_args: object, **_kwargs: object) -> None:
        """Do nothing: the session has ended."""

    awaited = ("close", "aclose", "rollback", "invalidate", "reset")
    return dict.fromkeys(awaited, nothing)
