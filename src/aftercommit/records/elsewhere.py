"""A task's session that works on a second connection: it may read there, and nothing more.

A run's fence, and the note that it is done, go to its own database's connection only. Two connections are committed one
after the other: what is written on both could take effect on one of them, or on one of them twice.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

from aftercommit.errors import ConfigurationError
from aftercommit.pools.urls import render
from aftercommit.records import moves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

__all__ = ["note", "refuse_writes"]

_BEFORE: Final = "_aftercommit_before"
"""The attribute of a connection that says what it had changed when its transaction began, or that it wrote since."""
_KNOWN: Final = frozenset({"sqlite", "postgresql"})
_READS: Final = re.compile(
    r"\s*(--[^\n]*\n\s*|/\*.*?\*/\s*)*\(*\s*(select|show|explain|describe|desc|set|use|values)\b",
    re.IGNORECASE | re.DOTALL,
)


def note(connection: Connection) -> None:
    """A transaction of a task's session has begun on a second connection."""
    if connection.dialect.name in _KNOWN:
        connection.__dict__[_BEFORE] = moves.changes_so_far(connection)
        return
    # No question tells it there, so what is sent is looked at.
    is_new = _BEFORE not in connection.__dict__
    connection.__dict__[_BEFORE] = False
    if is_new:
        event.listen(connection, "before_cursor_execute", _note_statement)


def _note_statement(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
    if not _READS.match(statement):
        connection.__dict__[_BEFORE] = True


def refuse_writes(own: Connection, others: Sequence[Connection], *, task: str) -> None:
    """Raise if one of *others* has written: the commit of *own* writes, too, at least that the task is done.

    Raises:
        ConfigurationError: Naming both.
    """
    for other in others:
        if other.in_transaction() and _wrote(other):
            raise ConfigurationError(
                f"Task {task!r} wrote to two databases in one session: to {render(own.engine.url)}, where its record "
                f"is, and to {render(other.engine.url)}. They are committed one after the other, so that one could "
                "take effect without the other, or twice. Rolled back. Read there as you like; to write there, open a "
                "session of that database in the task, which is then repeated with it: use the task's id as the key "
                "that makes it idempotent."
            )


def _wrote(connection: Connection) -> bool:
    before = connection.__dict__.get(_BEFORE, 0)
    if connection.dialect.name not in _KNOWN:
        return bool(before)
    return moves.wrote_something(connection, int(before))
