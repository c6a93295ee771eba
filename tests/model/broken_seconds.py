"""Ways of fencing a run, and of taking its connection, that are almost right."""

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.orm import Session

from aftercommit.commits import hooks
from aftercommit.commits.fences import Fence
from aftercommit.pools.gate import GatedConnection
from aftercommit.runner import outcome
from aftercommit.runner.run import Run
from tests.model.checking import Change, replacing


class Commits:
    """What the machine tells of the COMMIT that comes.

    Attributes:
        by_session: Whether it is the run's own session that commits.
    """

    by_session = False


@contextmanager
def _any_session_ends_the_fence() -> Iterator[None]:
    def end(session: Session, transaction: Any) -> None:
        bind = session.bind
        if transaction.parent is None and not transaction.nested and isinstance(bind, Connection):
            hook = hooks.find_connection_hook(bind)
            if hook is not None:
                hook.fences.clear()

    sa.event.listen(Session, "after_transaction_end", end)
    try:
        yield
    finally:
        sa.event.remove(Session, "after_transaction_end", end)


def _only_its_session_is_fenced() -> AbstractContextManager[Any]:
    honest = Fence.committing

    def committing(fence: Fence, connection: Connection) -> None:
        if Commits.by_session:
            honest(fence, connection)

    return mock.patch.object(Fence, "committing", committing)


def _fenced_once() -> AbstractContextManager[Any]:
    honest = Fence.take
    seen: set[int] = set()

    def take_once(fence: Fence, connection: Connection) -> None:
        if id(fence.fenced) not in seen:
            seen.add(id(fence.fenced))
            KEPT.append(fence.fenced)
            honest(fence, connection)

    return mock.patch.object(Fence, "take", take_once)


KEPT: list[Any] = []
"""So that no id is given twice."""


def _roll_back_from_outside(connection: GatedConnection) -> bool:
    connection.expects_transaction = False
    sqlite3.Connection.rollback(connection)
    return True


def _count_no_refunds(run: Run) -> BaseException | None:
    return None if run.attempt <= run.max_attempts else run.in_vain()


BROKEN: dict[str, Change] = {
    "the end of any session ends the fence": _any_session_ends_the_fence,
    "only its own session is fenced": _only_its_session_is_fenced,
    "the first transaction alone is fenced": _fenced_once,
    "claims in vain are not counted": replacing(outcome, "worn_out", _count_no_refunds),
}
BROKEN_ON_SQLITE: dict[str, Change] = {
    **BROKEN,
    "what is taken is only rolled back": replacing(GatedConnection, "take", _roll_back_from_outside),
}
