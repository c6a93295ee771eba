"""Tells the log what happens to tasks: every failure once, with its name, id and attempt."""

from __future__ import annotations

import logging

from aftercommit import signals

__all__ = ["log_signals"]

logger = logging.getLogger("aftercommit.tasks")
pools = logging.getLogger("aftercommit.pools")


def log_signals() -> None:
    """Subscribe; ``import aftercommit`` does so. What it says is chosen by the levels of ``aftercommit.tasks``."""
    signals.subscribe(signals.TaskFailed)(_failed)
    signals.subscribe(signals.TaskRetried)(_retried)
    signals.subscribe(signals.TaskGivenBack)(_given_back)
    signals.subscribe(signals.TaskSucceeded)(_succeeded)
    signals.subscribe(signals.TaskStarted)(_started)
    signals.subscribe(signals.ConnectionHeld)(_held)
    signals.subscribe(signals.ConnectionReturned)(_returned)


def _failed(signal: signals.TaskFailed) -> None:
    logger.error(
        "Task %r (%s, attempt %d) failed for good after %.3f s: %s: %s",
        signal.task, signal.id, signal.attempt, signal.seconds, type(signal.error).__name__, signal.error,
        exc_info=signal.error, extra=_extra(signal),
    )  # fmt: skip


def _retried(signal: signals.TaskRetried) -> None:
    # A repeat in place after a conflict is how exact results come about, and no news.
    level = logging.DEBUG if signal.in_place else logging.WARNING
    logger.log(
        level, "Task %r (%s, attempt %d) will be tried again in %.3f s: %s: %s",
        signal.task, signal.id, signal.attempt, signal.delay, type(signal.error).__name__, signal.error,
        extra=_extra(signal),
    )  # fmt: skip


def _given_back(signal: signals.TaskGivenBack) -> None:
    logger.info(
        "Task %r (%s, attempt %d) is queued again: %s", signal.task, signal.id, signal.attempt, signal.reason,
        extra=_extra(signal),
    )  # fmt: skip


def _succeeded(signal: signals.TaskSucceeded) -> None:
    if not logger.isEnabledFor(logging.DEBUG):
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


def _extra(signal: signals.RunSignal) -> dict[str, object]:
    return {"task": signal.task, "task_id": str(signal.id), "attempt": signal.attempt}
