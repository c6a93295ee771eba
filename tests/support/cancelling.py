"""Statements that a real ``pg_cancel_backend`` reaches, each at the moment that a test names."""

import threading
from collections.abc import Callable
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy import event

_SLOW = "SELECT pg_sleep(60)"
_WAITING = sa.text(
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' "
    "AND wait_event = 'PgSleep' AND pid <> pg_backend_pid()"
)


class Cancelling:
    """Has statements cancelled by the server, on every engine but *outside*.

    The statement's place is taken by one that waits, which is cancelled as soon as the server says that it waits: what
    arrives is what arrives when the statement itself is cancelled.

    Args:
        outside: Cancels.
        matches: Tells by its text whether a statement is to be cancelled.
        times: How often.
    """

    def __init__(self, outside: sa.Engine, matches: Callable[[str], bool] | str, *, times: int = 1) -> None:
        self._outside = outside
        self._matches = matches if callable(matches) else lambda statement: matches in statement
        self._left = times
        self.reached = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._cancel, daemon=True)

    def __enter__(self) -> Self:
        event.listen(sa.Engine, "do_execute", self._execute)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(sa.Engine, "do_execute", self._execute)
        self._ended.set()
        self._thread.join()

    def _execute(self, cursor: Any, statement: str, parameters: Any, context: Any) -> bool | None:
        if context.engine.url.database != self._outside.url.database or not self._matches(statement):
            return None
        with self._lock:
            if self._left <= 0:
                return None
            self._left -= 1
            self.reached += 1
        cursor.execute(_SLOW)
        return True

    def _cancel(self) -> None:
        with self._outside.connect() as connection:
            while not self._ended.wait(0.005):
                for pid in connection.execute(_WAITING).scalars().all():
                    connection.execute(sa.text("SELECT pg_cancel_backend(:pid)"), {"pid": pid})
