"""Who runs tasks here: claim, run, finish, rescue, drain."""

from aftercommit.runner.outbox import Outbox, TaskHandle, Wanted
from aftercommit.runner.runner import Pace, Runner

__all__ = ["Outbox", "Pace", "Runner", "TaskHandle", "Wanted"]
