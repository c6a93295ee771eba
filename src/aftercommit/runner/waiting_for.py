"""``db.wait_for`` and its twin: until a task has ended."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING

from aftercommit.errors import ConfigurationError, TaskStateError
from aftercommit.runner.following import Followed
from aftercommit.tasks.current import current_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from sqlalchemy import Connection

    from aftercommit.records.states import TaskState
    from aftercommit.records.tables import TaskRecord
    from aftercommit.runner.following import Following

__all__ = ["async_wait_for", "ended_record", "reading", "wait_for"]


class _Wait:
    """One who waits for the end of one task."""

    def __init__(self, id: UUID, is_sqlite: bool, wake: Callable[[], None]) -> None:  # noqa: FBT001
        self.id = id
        self._is_sqlite = is_sqlite
        self._wake = wake
        self._run = current_run()
        self.state: TaskState | None = None
        self.refusal: Exception | None = None
        self.followed = Followed(id, self._told, self._stopped, is_urgent=True)

    def _told(self, state: TaskState | None) -> None:
        self.state = state
        if state is None:
            self.refusal = TaskStateError(
                f"Cannot wait for {self.id}: there is no such task. Its hand-over has not been committed, and it "
                "starts only then: wait behind the commit, outside of the session's `with`. Or its record was deleted."
            )
        elif not state.has_ended:
            self.refusal = self._refusal(state)
        if state is None or state.has_ended or self.refusal is not None:
            self._wake()

    def _refusal(self, state: TaskState) -> Exception | None:
        run = self._run
        if run is None:
            return None
        pool = run.pool
        if state.pool != pool and not self._is_sqlite:
            return None
        because = (
            "it may need SQLite's write lock" if state.pool != pool else f"it may need this very place of {pool!r}"
        )
        return ConfigurationError(
            f"Task {run.name!r} cannot wait for task {state.task!r} ({self.id}): {because}, and both would wait for "
            "ever. Hand over what comes next at the end of that task, or on its event."
        )

    def _stopped(self) -> None:
        self.refusal = TimeoutError(f"{self._told_so_far()} when this process stopped.")
        self._wake()

    def timed_out(self, timeout: float) -> TimeoutError:
        return TimeoutError(f"{self._told_so_far()} after {timeout:g} s. Wait for longer, or look at it later.")

    def _told_so_far(self) -> str:
        state = self.state
        if state is None:
            return f"Nothing was seen of task {self.id}"
        progress = "" if state.progress_done is None else f", progress {state.progress_done}"
        total = "" if state.progress_total is None else f" of {state.progress_total}"
        return (
            f"Task {state.task!r} ({self.id}) was still {state.state}, attempt {state.attempt} of "
            f"{state.max_attempts}{progress}{total},"
        )


def wait_for(following: Following, id: UUID, timeout: float, *, is_sqlite: bool) -> TaskRecord:
    """Wait in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise ConfigurationError(
            "db.wait_for on an event loop would keep it from turning, and with it what is waited for. Write "
            "await db.async_wait_for(…)."
        )
    _check(timeout)
    ended = threading.Event()
    wait = _Wait(id, is_sqlite, ended.set)
    following.add(wait.followed)
    try:
        if not ended.wait(timeout):
            raise wait.timed_out(timeout)
        if wait.refusal is not None:
            raise wait.refusal
        return ended_record(following.submit(reading(id)).result(timeout), id)
    finally:
        following.remove(wait.followed)


async def async_wait_for(
    following: Following,
    id: UUID,
    timeout: float,  # noqa: ASYNC109  # of the call, as the user gives it
    *,
    is_sqlite: bool,
) -> TaskRecord:
    """Wait on this event loop."""
    _check(timeout)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
            loop.call_soon_threadsafe(ended.set)

    wait = _Wait(id, is_sqlite, wake)
    following.add(wait.followed)
    try:
        try:
            async with asyncio.timeout(timeout):
                await ended.wait()
        except TimeoutError:
            raise wait.timed_out(timeout) from None
        if wait.refusal is not None:
            raise wait.refusal
        return ended_record(await asyncio.wrap_future(following.submit(reading(id))), id)
    finally:
        following.remove(wait.followed)


def _check(timeout: object) -> None:
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise ConfigurationError(f"timeout={timeout!r}: give a positive number of seconds.")


def reading(id: UUID) -> Callable[[Connection], TaskRecord | None]:
    """Work for a connection: read the record."""
    from aftercommit.records.states import record_of  # mapping the tables takes time that an import must not

    return lambda connection: record_of(connection, id)


def ended_record(record: TaskRecord | None, id: UUID) -> TaskRecord:
    """Return the record, which must be there.

    Raises:
        TaskStateError: If it is not.
    """
    if record is None:
        raise TaskStateError(f"There is no task {id}: its hand-over was not committed, or its record was deleted.")
    return record
