"""What a task is: its definition and options, what may cross to it, and when it is tried again."""

from aftercommit.tasks.current import CurrentRun, current_run
from aftercommit.tasks.definition import Task, TaskSettings
from aftercommit.tasks.retry import Retry

__all__ = ["CurrentRun", "Retry", "Task", "TaskSettings", "current_run"]
