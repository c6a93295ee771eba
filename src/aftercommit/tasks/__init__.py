"""What a task is: its definition and options, what may cross to it, and when it is tried again."""

from aftercommit.tasks.current import CurrentRun, current_run
from aftercommit.tasks.definition import Task, TaskSettings
from aftercommit.tasks.ends import Discard, RetryLater
from aftercommit.tasks.retry import Retry
from aftercommit.tasks.tick import Tick

__all__ = ["CurrentRun", "Discard", "Retry", "RetryLater", "Task", "TaskSettings", "Tick", "current_run"]
