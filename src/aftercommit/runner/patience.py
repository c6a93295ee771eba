"""A start waits for whoever is in its way: SQLite's file may be busy for longer than one transaction is patient."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, TypeVar

from sqlalchemy.exc import DBAPIError

from aftercommit.tasks.transient import Fault, fault_of
from aftercommit.wording import told

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["in_the_end"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS: Final = 60.0
_TOLD_AFTER: Final = 10.0


async def in_the_end(work: Callable[[], Awaitable[T]]) -> T:
    """Await ``work()`` again, for up to a minute, for as long as another transaction is in its way.

    Each try waits for the lock itself, so there is no pause between them.

    Args:
        work: A transaction, which does no harm if it is begun again.
    """
    since = time.monotonic()
    is_told = False
    while True:
        try:
            return await work()
        except DBAPIError as exc:
            waited = time.monotonic() - since
            if fault_of(exc) is not Fault.CONFLICT or waited > _SECONDS:
                raise
            if waited > _TOLD_AFTER and not is_told:
                is_told = True
                logger.warning(
                    "The start has waited for %.0f s for others to release the database: %s", waited, told(exc)
                )
