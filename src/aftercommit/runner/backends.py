"""A worker's backends on a PostgreSQL server: it lists its own, and ends those of workers that have gone silent."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

from aftercommit.pools.backends import identify, pid_told_to
from aftercommit.records import backends
from aftercommit.tasks.transient import is_disconnect
from aftercommit.wording import told, without_values

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Connection

    from aftercommit.runner.runner import Runner

__all__ = ["Backends"]

logger = logging.getLogger(__name__)

_PAUSE_SECONDS: Final = 1.0
"""Between two looks: with a NullPool, each request makes a connection."""

_RETRY_SECONDS: Final = 30.0


class Backends:
    """The backends of one worker, and of those that it sees fall silent. On the bookkeeping thread, but for one.

    Args:
        runner: The worker.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._is_changed = True
        self.is_off = False
        """Whether nothing is listed: on SQLite, and behind a pooler."""
        self._next_look = 0.0
        self._written: list[tuple[int, int]] | None = None
        self._refused: set[UUID] = set()

    def changed(self) -> bool:
        """Note, from any thread, that a connection was made; return whether a look is due sooner than it was."""
        is_news = not self._is_changed
        self._is_changed = True
        return is_news

    def rewrite(self) -> None:
        """Write the list anew: the row was, or others may have thought that we were gone."""
        self._written = None
        self._is_changed = True

    @property
    def due(self) -> float:
        """When to look next, by the monotonic clock."""
        return self._next_look if self._is_changed and not self.is_off else float("inf")

    def write_when_due(self) -> None:
        """List the backends of our connections in our row, if any was made since the last time."""
        if time.monotonic() < self.due:
            return
        if self._runner.sessions.pools.is_sqlite:
            self.is_off = True
            return
        self._next_look = time.monotonic() + _PAUSE_SECONDS
        self._is_changed = False
        try:
            self._written = self._runner.books.execute(self._write)
        except DBAPIError as exc:
            self._is_changed = True
            if is_disconnect(exc):
                raise
            # Heartbeats and claims do not depend on it.
            self._next_look = time.monotonic() + _RETRY_SECONDS
            logger.debug("The worker could not list its server processes", exc_info=without_values(exc))

    def _write(self, connection: Connection) -> list[tuple[int, int]]:
        # Noted inside: the connection that asks may have been made for this.
        noted = self._runner.sessions.pools.backends.noted()
        look = backends.look(connection, [each.pid for each in noted])
        until = time.monotonic()
        if pid_told_to(connection.connection.driver_connection) != look.own:
            # A pooler gives a backend to one client after the other: none of them is ours.
            self.is_off = True
            noted = []
        ours, again = identify(noted, look.seen, until=until)
        self._is_changed = self._is_changed or again
        listed = [(each.pid, each.began) for each in ours]
        if listed != self._written:
            backends.list_backends(connection, self._runner.id, ours, own=look.own)
        return listed

    def end_silent(self, *, silent_after: float) -> bool:
        """End the backends of workers that have gone silent; return whether there was one."""
        runner = self._runner
        if runner.sessions.pools.is_sqlite:
            return False
        try:
            found = runner.books.execute(lambda c: backends.end_silent(c, runner.id, silent_after=silent_after))
        except DBAPIError as exc:
            if is_disconnect(exc):
                raise
            # Their tasks are rescued all the same.
            logger.warning("The server processes of silent workers could not be ended: %s", told(exc))
            return False
        for worker, count in found.ended.items():
            logger.warning("Worker %s has gone silent: %d of its server processes were told to end", worker, count)
        for worker in found.refused.keys() - self._refused:
            self._refused.add(worker)
            logger.warning(
                "Worker %s has gone silent, and %d of its server processes may not be ended by this role: what they "
                "have locked stays locked until the server notices that their client is gone. GRANT this role that of "
                "the worker, or pg_signal_backend.", worker, found.refused[worker],
            )  # fmt: skip
        return bool(found.ended)
