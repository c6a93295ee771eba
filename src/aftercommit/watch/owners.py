"""Who has a session, in words an operator understands."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, NamedTuple

from aftercommit.watch.call_sites import CallSite, line_of, user_line

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["CallSite", "Owner", "line_of", "serving", "user_line"]

serving: Final[ContextVar[str | None]] = ContextVar("aftercommit_serving", default=None)
"""The request that has a session of ours here: what opens another one here says so. Its name, never the session."""


class Owner(NamedTuple):
    """Who has a session; a tuple, as ``CallSite`` is.

    Attributes:
        name: A request line (``POST /files``), a task's name, or ``code``, with the request or task in which that runs,
            if it is known: ``code in POST /files``.
        line: Where it was opened, or where the endpoint or the task is defined that it was opened for.
        kind: ``"request"``, ``"task"`` or ``"code"``.
        allowed: Seconds for which it may hold a connection; None for what the pool allows.
        task_id: The record of the task.
        attempt: The task's attempt.
        doing: What of its own the task does with it (``batch of handle``); None for the run itself.
    """

    name: str
    line: CallSite | None = None
    kind: str = "code"
    allowed: float | None = None
    task_id: UUID | None = None
    attempt: int | None = None
    doing: str | None = None

    def __str__(self) -> str:
        """Who, in words, and the line behind it; made when somebody asks, and not for every run."""
        text = self.name
        if self.task_id is not None:
            text = f"task {self.name!r}, attempt {self.attempt}, id {self.task_id}"
        if self.doing is not None:
            text = f"{self.doing} in {text}"
        return text if self.line is None else f"{text} ({self.line})"
