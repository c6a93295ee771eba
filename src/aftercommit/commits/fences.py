"""What every commit on a connection must hold, for as long as the session that asked for it has that connection.

A fence belongs to its session, not to whichever session on the connection ends first: it is put on the connection when
its session begins there, and taken off by nothing but the end of that session's own transaction. Meanwhile each real
COMMIT on the connection meets it, whoever causes it: a joined session, Core, or the session itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Engine

__all__ = ["Fence", "Fenced", "is_on"]


class Fenced(Protocol):
    """Whose commits are fenced."""

    def begun(self, connection: Connection) -> None:
        """A transaction of the session has begun on *connection*."""

    def begun_elsewhere(self, connection: Connection) -> None:
        """The session has begun on a connection to something else than what it is bound to, too."""

    def committing(self, connection: Connection) -> None:
        """A COMMIT comes, behind everything else that is written for it; what is raised here aborts it."""

    def committing_anywhere(self, connection: Connection, others: Sequence[Connection]) -> None:
        """A COMMIT comes on any of the session's connections: its own, and *others*."""

    def rolled_back(self, connection: Connection) -> None:
        """The transaction was rolled back; another one may begin on the same connection."""


@dataclass(eq=False, slots=True)
class Fence:
    """The fence of one session.

    Attributes:
        fenced: Whose it is.
        bind: What the session is bound to.
        connection: Where its transaction is, while there is one.
        elsewhere: Further connections of that transaction.
    """

    fenced: Fenced
    bind: Engine | Connection
    connection: Connection | None = None
    elsewhere: list[Connection] = field(default_factory=list)

    def take(self, connection: Connection) -> None:
        """The session's transaction has begun on *connection*."""
        if is_on(connection, self.bind):
            self.connection = connection
            self.fenced.begun(connection)
        else:
            self.elsewhere.append(connection)
            self.fenced.begun_elsewhere(connection)

    def committing(self, connection: Connection) -> None:
        """A COMMIT comes on *connection*."""
        if self.elsewhere and self.connection is not None:
            self.fenced.committing_anywhere(self.connection, self.elsewhere)
        if connection is self.connection:
            self.fenced.committing(connection)

    def rolled_back(self, connection: Connection) -> None:
        """The transaction on *connection* was rolled back."""
        if connection is self.connection:
            self.fenced.rolled_back(connection)

    def release(self) -> list[Connection]:
        """The session's transaction has ended; return the connections that it had."""
        connections = self.elsewhere if self.connection is None else [self.connection, *self.elsewhere]
        self.connection = None
        self.elsewhere = []
        return connections


def is_on(connection: Connection, bind: Any) -> bool:
    """Whether *connection* is where a session goes that is bound to *bind*, an engine or a connection."""
    # A connection is its own; an engine may be another view of the same pool.
    return connection is bind or connection.engine is bind or getattr(bind, "pool", None) is connection.engine.pool
