"""The check at start-up: may all processes together open more connections than the server allows?"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Protocol, TypeVar

from aftercommit.errors import ConfigurationError, PoolBudgetError
from aftercommit.pools.budget import Budget, Limits, Share
from aftercommit.pools.urls import render
from aftercommit.records import census, server
from aftercommit.wording import told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sqlalchemy import Connection

    from aftercommit.runner.rounds import Pace
    from aftercommit.sessions import SessionFactory

__all__ = ["check_budget", "check_processes", "expected_processes", "others"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Home(Protocol):
    """What the check needs of its ``Database``."""

    sessions: SessionFactory

    @property
    def pace(self) -> Pace:
        """How often workers look around."""
        ...

    def shares(self, runs: Sequence[str]) -> tuple[Share, ...]:
        """What one process may open."""
        ...

    async def async_call_anyhow(self, work: Callable[[Connection], T]) -> T:
        """Run ``work(connection)`` in a transaction."""
        ...


async def check_budget(
    home: _Home, runs: Sequence[str], *, has_tables: bool, processes: int | None, strict: bool
) -> None:
    """Warn if all processes together may open more connections than the server allows.

    One statement, and one more where the processes are to be counted. A server that does not answer it is no reason
    not to start.

    Args:
        home: The database.
        runs: The pools whose tasks run in this process.
        has_tables: Whether there is a table of workers to count.
        processes: How many there are; None to count this one and the live workers, or ``WEB_CONCURRENCY`` if that is
            more.
        strict: Whether to refuse to start instead.

    Raises:
        PoolBudgetError: If *strict*, and they may.
    """
    if home.sessions.pools.is_sqlite:
        return

    def look(connection: Connection) -> tuple[Limits, list[tuple[str, int]]]:
        counts = has_tables and processes is None
        found = census.live(connection, silent_after=home.pace.silent_after) if counts else []
        return server.limits(connection), found

    try:
        limits, live = await home.async_call_anyhow(look)
    except Exception as exc:  # noqa: BLE001  # whatever it was, the application can do without this answer
        logger.warning("The server did not say how many connections it allows, so they were not counted: %s", told(exc))
        return
    counted = processes or max(others(live) + 1, expected_processes())
    budget = Budget(shares=home.shares(runs), processes=counted, limits=limits)
    if not budget.is_over:
        logger.debug("Connections: %s", budget.verdict)
        return
    message = (
        f"{render(home.sessions.pools.flavours.given)}: {budget.verdict}. Under load the server refuses the rest. "
        f"{budget.advice}."
    )
    if strict:
        raise PoolBudgetError(message, processes=counted, per_process=budget.per_process, allowed=limits.allowed)
    logger.warning("There may be too many connections: %s", message)


def check_processes(processes: int | None) -> None:
    """Refuse a number of processes that cannot be meant.

    Raises:
        ConfigurationError: If it is below 1.
    """
    if processes is not None and processes < 1:
        raise ConfigurationError(
            f"processes={processes}: give how many processes of the application and of its workers there are, all "
            "machines together, or leave it out to have the live ones counted."
        )


def expected_processes() -> int:
    """Return how many processes the environment speaks of: uvicorn and gunicorn read ``WEB_CONCURRENCY``, too."""
    told = os.environ.get("WEB_CONCURRENCY", "")
    return max(1, int(told)) if told.isdecimal() else 1


def others(live: Iterable[tuple[str, int]]) -> int:
    """Count the workers that are not this process, and not dead on this machine.

    A process that was killed counts as alive for a while, and its successor must not be refused because of that.
    """
    here = socket.gethostname()[:255]
    return sum(host != here or (pid != os.getpid() and _is_alive(pid)) for host, pid in live)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
