"""Background work for FastAPI and SQLAlchemy that starts after the commit, in a session of its own.

What most users import. ``aftercommit.fastapi`` has the dependencies, ``aftercommit.testing`` what tests need,
``aftercommit.errors`` every error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aftercommit import errors, signals
from aftercommit.batches import BatchFailure, BatchReport
from aftercommit.database import Database
from aftercommit.errors import AfterCommitError
from aftercommit.events import EventHandle
from aftercommit.monitoring.logging import log_signals
from aftercommit.pools import PoolSettings
from aftercommit.runner import TaskHandle
from aftercommit.schedules import Cron, Every
from aftercommit.stats import ClusterStats, ClusterTask, Holder, PoolStats, Stats, TaskStats, Timing
from aftercommit.tasks import CurrentRun, Discard, Retry, RetryLater, Task, Tick, current_run

if TYPE_CHECKING:
    from aftercommit.records.tables import ScheduleRecord, TaskRecord

__all__ = [
    "AfterCommitError",
    "BatchFailure",
    "BatchReport",
    "ClusterStats",
    "ClusterTask",
    "Cron",
    "CurrentRun",
    "Database",
    "Discard",
    "EventHandle",
    "Every",
    "Holder",
    "PoolSettings",
    "PoolStats",
    "Retry",
    "RetryLater",
    "ScheduleRecord",
    "Stats",
    "Task",
    "TaskHandle",
    "TaskRecord",
    "TaskStats",
    "Tick",
    "Timing",
    "current_run",
    "errors",
    "signals",
]

log_signals()


def __getattr__(name: str) -> Any:
    """Map the tables when somebody asks for them: it takes as long as importing all the rest."""
    if name in {"ScheduleRecord", "TaskRecord"}:
        from aftercommit.records import tables

        found = globals()[name] = getattr(tables, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
