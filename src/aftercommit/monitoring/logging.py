"""Tells the log what happens to tasks, and every line that a task writes whose it is.

```python
handler = logging.StreamHandler()
handler.addFilter(TaskContextFilter())
handler.setFormatter(logging.Formatter("%(levelname)s %(task)s %(task_id)s %(attempt)s %(message)s"))
```

Users of structlog need none of this: ``task``, ``task_id`` and ``attempt`` are among its context variables while a
task runs, with what the request had bound.
"""

from __future__ import annotations

import logging

from aftercommit import signals
from aftercommit.tasks.context import carry
from aftercommit.tasks.current import current_run
from aftercommit.wording import told, without_values

__all__ = ["TaskContextFilter", "carry", "log_signals"]

logger = logging.getLogger("aftercommit.tasks")
pools = logging.getLogger("aftercommit.pools")
sessions = logging.getLogger("aftercommit.sessions")


class TaskContextFilter(logging.Filter):
    """Gives every record ``task``, ``task_id`` and ``attempt``, so that a format may name them; it keeps all records.

    Add it to handlers: a filter of a logger does not see what other loggers pass on. Outside of tasks the three are
    None. Lines of ``aftercommit.tasks`` have them already.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whose record it is."""
        if not hasattr(record, "task_id"):
            run = current_run()
            record.task = None if run is None else run.name
            record.task_id = None if run is None else str(run.id)
            record.attempt = None if run is None else run.attempt
        return True


def log_signals() -> None:
    """Subscribe; ``import aftercommit`` does so. What it says is chosen by the levels of ``aftercommit.tasks``."""
    signals.subscribe(signals.TaskFailed)(_failed)
    signals.subscribe(signals.TaskDiscarded)(_discarded)
    signals.subscribe(signals.TaskPostponed)(_postponed)
    signals.subscribe(signals.TaskRetried)(_retried)
    signals.subscribe(signals.TaskGivenBack)(_given_back)
    signals.subscribe(signals.TaskSucceeded)(_succeeded)
    signals.subscribe(signals.TaskStarted)(_started)
    signals.subscribe(signals.ConnectionHeld)(_held)
    signals.subscribe(signals.ConnectionReturned)(_returned)
    signals.subscribe(signals.SessionLeaked)(_leaked)


def _failed(signal: signals.TaskFailed) -> None:
    if signal.expected:
        logger.info(
            "Task %r (%s, attempt %d) failed as expected after %.3f s: %s",
            signal.task, signal.id, signal.attempt, signal.seconds, told(signal.error), extra=_extra(signal),
        )  # fmt: skip
        return
    logger.error(
        "Task %r (%s, attempt %d) failed for good after %.3f s: %s",
        signal.task, signal.id, signal.attempt, signal.seconds, told(signal.error),
        exc_info=without_values(signal.error), extra=_extra(signal),
    )  # fmt: skip


def _retried(signal: signals.TaskRetried) -> None:
    # A repeat in place after a conflict is how exact results come about, and no news.
    level = logging.DEBUG if signal.in_place else logging.WARNING
    if not logger.isEnabledFor(level):
        return
    logger.log(
        level, "Task %r (%s, attempt %d) will be tried again in %.3f s: %s",
        signal.task, signal.id, signal.attempt, signal.delay, told(signal.error),
        extra=_extra(signal),
    )  # fmt: skip


def _discarded(signal: signals.TaskDiscarded) -> None:
    logger.info(
        "Task %r (%s, attempt %d) was discarded after %.3f s: %s",
        signal.task, signal.id, signal.attempt, signal.seconds, signal.reason, extra=_extra(signal),
    )  # fmt: skip


def _postponed(signal: signals.TaskPostponed) -> None:
    logger.info(
        "Task %r (%s, attempt %d) will be run again in %.3f s: %s",
        signal.task, signal.id, signal.attempt, signal.delay, signal.reason, extra=_extra(signal),
    )  # fmt: skip


def _given_back(signal: signals.TaskGivenBack) -> None:
    logger.info(
        "Task %r (%s, attempt %d) is queued again: %s", signal.task, signal.id, signal.attempt, signal.reason,
        extra=_extra(signal),
    )  # fmt: skip


def _succeeded(signal: signals.TaskSucceeded) -> None:
    if not logger.isEnabledFor(logging.DEBUG):
        # Asked here, because what follows would be put together for nobody, with each task.
        return
    logger.debug(
        "Task %r (%s, attempt %d) succeeded after %.3f s", signal.task, signal.id, signal.attempt, signal.seconds,
        extra=_extra(signal),
    )  # fmt: skip


def _started(signal: signals.TaskStarted) -> None:
    if not logger.isEnabledFor(logging.DEBUG):
        return
    logger.debug(
        "Task %r (%s, attempt %d) starts, %.3f s after it was due", signal.task, signal.id, signal.attempt,
        signal.waited, extra=_extra(signal),
    )  # fmt: skip


def _held(signal: signals.ConnectionHeld) -> None:
    doing = "" if signal.statement is None else f"; its last statement is {signal.statement!r}"
    if signal.idle is not None:
        doing += (
            f", done {signal.idle:.1f} s ago: the transaction is idle. Commit before slow work outside the database"
        )
    if signal.locked:
        doing += ". It holds SQLite's write lock, for which everybody else who writes is waiting"
    pools.warning(
        "A connection of pool %r has been held for %.1f s by %s%s", signal.pool, signal.seconds, signal.owner, doing
    )


def _returned(signal: signals.ConnectionReturned) -> None:
    pools.warning(
        "The connection of pool %r that %s held came back after %.1f s", signal.pool, signal.owner, signal.seconds
    )


def _leaked(signal: signals.SessionLeaked) -> None:
    sessions.error(
        "A session of pool %r was dropped without being ended, %.1f s after it was opened by %s%s. It is rolled back, "
        "and what it wrote is lost. Open it with `with db.session() as session:` (or `async with db.async_session()`), "
        "which ends it on every path",
        signal.pool, signal.seconds, signal.owner, "" if signal.line is None else f" at {signal.line}",
    )  # fmt: skip


def _extra(signal: signals.RunSignal) -> dict[str, object]:
    return {"task": signal.task, "task_id": str(signal.id), "attempt": signal.attempt}
