"""Periodic tasks: a row for each schedule, fired by whoever runs tasks, one record for each tick."""

from __future__ import annotations

from aftercommit.schedules.when import Cron, Every, When

__all__ = ["Cron", "Every", "When"]
