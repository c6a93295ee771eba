"""Background work for FastAPI and SQLAlchemy that starts after the commit, in a session of its own.

What most users import. ``aftercommit.fastapi`` has the dependencies, ``aftercommit.testing`` what tests need,
``aftercommit.errors`` every error.
"""

from aftercommit import errors, signals
from aftercommit.database import Database
from aftercommit.errors import AfterCommitError
from aftercommit.monitoring.logging import log_signals
from aftercommit.pools import PoolSettings
from aftercommit.records import TaskRecord
from aftercommit.runner import TaskHandle
from aftercommit.tasks import CurrentRun, Retry, Task, current_run

__all__ = [
    "AfterCommitError",
    "CurrentRun",
    "Database",
    "PoolSettings",
    "Retry",
    "Task",
    "TaskHandle",
    "TaskRecord",
    "current_run",
    "errors",
    "signals",
]

log_signals()
