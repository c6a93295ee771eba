"""A connection is taken away from a run that does not end, and its place in the pool is given to others."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection

from aftercommit.pools import sqlite
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["TakeableConnection", "all_over", "make_takeable", "take", "take_patiently"]

logger = logging.getLogger(__name__)

_SECONDS: Final = 1.0
_PAUSE: Final = 0.01


class TakeableConnection(Connection):
    """A connection that is given back by one hand only.

    Given back by its run, it may be somebody else's in the same moment: whoever takes it then would take it from him.
    """

    _leaving: threading.Lock | None = None
    _is_leaving = False

    def close(self) -> None:
        """Give it back."""
        self._leave(super().close)

    def invalidate(self, exception: BaseException | None = None) -> None:
        """Drop it."""
        self._leave(partial(super().invalidate, exception))

    def _leave(self, call: Callable[[], None]) -> None:
        # A close whose roll-back finds that the connection is lost drops it, inside.
        if self._leaving is None or self._is_leaving:
            call()
            return
        with self._leaving:
            self._is_leaving = True
            try:
                call()
            finally:
                self._is_leaving = False


def make_takeable(connection: Connection) -> None:
    """Have *connection* be one that ``take`` can take away."""
    if isinstance(connection, TakeableConnection) and connection._leaving is None:  # noqa: SLF001  # of this module
        connection._leaving = threading.Lock()  # noqa: SLF001  # of this module


def take(connection: Connection | None) -> Callable[[], bool]:
    """Take *connection* from whoever uses it: nothing that it has not committed will be.

    The pool may open another in its place. Does not wait, and never for a connection that is being given back. On
    PostgreSQL the server's own time limits end the transaction; SQLite has no server, and the write lock is
    everybody's.

    Args:
        connection: What was made takeable; of an async engine, from its event loop. None if there is none.

    Returns:
        A function that says whether its transaction is over, as far as we can end it; to be asked again if not.
    """
    leaving = getattr(connection, "_leaving", None)
    if connection is None or leaving is None or not leaving.acquire(blocking=False):
        return _nothing
    try:
        if connection.closed or connection.invalidated:
            return _nothing
        taking = sqlite.taking(connection)
        if taking is not None:
            taking.take()
        connection.detach()
    except Exception as exc:  # whatever state it is in, the run is fenced off anyway
        logger.debug("The connection of a run that hangs could not be taken", exc_info=without_values(exc))
        return _nothing
    else:
        return _nothing if taking is None else taking.take
    finally:
        leaving.release()


def take_patiently(connection: Connection | None) -> None:
    """Take *connection*, and wait a moment for its transaction to be over; not on an event loop."""
    is_over = take(connection)
    deadline = time.monotonic() + _SECONDS
    while not is_over() and time.monotonic() < deadline:
        time.sleep(_PAUSE)


async def all_over(questions: Sequence[Callable[[], bool]]) -> None:
    """Wait a moment for what was taken to be over, on an event loop."""
    deadline = time.monotonic() + _SECONDS
    # Whoever leaves a connection's gate knows nothing of an event loop.
    while any([not is_over() for is_over in questions]) and time.monotonic() < deadline:  # noqa: ASYNC110, C419  # ask all
        await asyncio.sleep(_PAUSE)


def _nothing() -> bool:
    return True
