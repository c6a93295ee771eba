"""``db.stats()``: how the pools and the tasks of this process stand, and what was last seen of all processes.

Everything here is read from memory. Figures that belong together are read one after the other while others work: a
task that ends in between may be missing in both places, or stand in both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import QueuePool

from aftercommit.pools.pools import REQUEST
from aftercommit.records.sweeping import ClusterTask
from aftercommit.sessions import Owner
from aftercommit.watch.holders import shortened
from aftercommit.watch.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from uuid import UUID

    from aftercommit.pools import Pool, Pools
    from aftercommit.runner import Runner
    from aftercommit.runner.lanes import Lane
    from aftercommit.tasks import Task
    from aftercommit.watch.holders import HeldConnection

__all__ = ["ClusterStats", "ClusterTask", "Holder", "PoolStats", "Stats", "TaskStats", "Timing", "snapshot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Somebody who has a connection.

    Attributes:
        owner: A request line (``POST /files``), the name of a task, or where the connection was taken by code.
        kind: ``"request"``, ``"task"`` or ``"code"``.
        seconds: For how long so far.
        idle: Seconds for which its transaction has been open with nothing running in it; None while a statement runs,
            and outside a transaction.
        locked: Whether it holds SQLite's write lock.
        statement: The statement that was run last, without its values; None before the first.
        line: Where the session was opened, or where the endpoint or the task is defined, as ``"file:line in
            function"``; None where that is not known.
        task_id: The id of the task's record.
        attempt: The task's attempt; 1 is the first.
    """

    owner: str
    kind: str
    seconds: float
    idle: float | None
    locked: bool
    statement: str | None
    line: str | None
    task_id: UUID | None
    attempt: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """One pool in this process, both flavours added up.

    Attributes:
        name: Its name.
        size: Connections that may be kept open.
        max_overflow: Connections that may be opened beyond that.
        in_use: Connections that somebody has.
        idle: Connections that are open, and nobody has.
        overflow: Connections that are open beyond ``size``.
        waiting: How many wait for a connection now.
        waits: How long those waited who had to; whoever got one at once is not measured.
        exhausted: How often somebody got none: ``PoolExhausted``.
        holders: Who has a connection, the longest first.
        width: How many tasks may run at once in one process; 0 for "request".
        running: Tasks that have a place now.
        backlog: Tasks that this process has taken and that wait for a place.
        is_paused: Whether the pool is paused, as far as this process knows.
    """

    name: str
    size: int
    max_overflow: int
    in_use: int
    idle: int
    overflow: int
    waiting: int
    waits: Timing
    exhausted: int
    holders: tuple[Holder, ...]
    width: int
    running: int
    backlog: int
    is_paused: bool

    @property
    def longest(self) -> Holder | None:
        """Who has had a connection for the longest time."""
        return self.holders[0] if self.holders else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStats:
    """One task in this process, since it started.

    Attributes:
        name: Its name; what runs under an alias is counted here.
        pool: The pool it runs in.
        queued: Runs that this process has taken and that wait for a place.
        running: Runs that have a place now.
        done: Runs that succeeded.
        failed: Runs that failed for good.
        retried: Attempts that failed, and that another follows.
        conflicts: Repeats that cost no attempt: after conflicts with others, of the whole run or of a batch's chunk.
        given_back: Runs that a stop interrupted, or that had not begun then, and that were queued again.
        expected: Runs that failed in a way that ``@db.task(expected=…)`` names; not among ``failed``.
        discarded: Runs that ended with ``Discard``.
        postponed: Runs that ended with ``RetryLater``.
        run: How long runs took, from their start here to their end, repeats in place included.
        wait: How long runs had been due when they began.
    """

    name: str
    pool: str
    queued: int
    running: int
    done: int
    failed: int
    retried: int
    conflicts: int
    given_back: int
    expected: int
    discarded: int
    postponed: int
    run: Timing
    wait: Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStats:
    """What was last seen of all processes together, in the database.

    Attributes:
        age: How many seconds ago that was.
        workers: Processes that ran tasks and were heard of within ``silent_after``.
        tasks: By the name that the records carry: aliases, and names that this process does not know, too.
        schedules_overdue: Schedules that had been due for more than two minutes, and that nobody has fired.
    """

    age: float
    workers: int
    tasks: Mapping[str, ClusterTask]
    schedules_overdue: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """How one ``Database`` stands, in this process and as far as it knows of others.

    Attributes:
        pools: Every pool, by name.
        tasks: Every task that is declared, by name.
        cluster: What was last seen of all processes; None where no runner has looked: none is alive in this process,
            it has only begun, or there are no durable tasks.
    """

    pools: Mapping[str, PoolStats]
    tasks: Mapping[str, TaskStats]
    cluster: ClusterStats | None


def snapshot(pools: Pools, tasks: Collection[Task[Any, Any]], runner: Runner | None) -> Stats:
    """Read the figures of one database.

    Args:
        pools: Its pools.
        tasks: Its tasks.
        runner: What runs them here, if anything does.
    """
    lanes = {} if runner is None else runner.lanes
    running: dict[str, int] = {}
    queued: dict[str, int] = {}
    of_pools = {}
    for name in pools.names:
        lane = lanes.get(name)
        active, backlog = ([], []) if lane is None else lane.look()
        for run in active:
            running[run.name] = running.get(run.name, 0) + 1
        for run in backlog:
            queued[run.name] = queued.get(run.name, 0) + 1
        of_pools[name] = _pool(pools[name], lane, running=len(active), backlog=len(backlog))
    of_tasks = {
        task.name: _task(task, queued=queued.get(task.name, 0), running=running.get(task.name, 0)) for task in tasks
    }
    return Stats(pools=of_pools, tasks=of_tasks, cluster=_cluster(runner))


def _pool(pool: Pool, lane: Lane | None, *, running: int, backlog: int) -> PoolStats:
    register, settings, now = pool.register, pool.settings, time.monotonic()
    holds = register.holds()
    engines = [engine.pool for engine in pool.opened]
    queues = [each for each in engines if isinstance(each, QueuePool)]
    flavours = max(1, len(engines))
    return PoolStats(
        name=pool.name,
        size=settings.pool_size * flavours,
        max_overflow=settings.max_overflow * flavours,
        in_use=len(holds),
        idle=sum(each.checkedin() for each in queues),
        overflow=sum(max(0, each.overflow()) for each in queues),
        waiting=register.waiting,
        waits=register.waits.read(),
        exhausted=register.exhaustions,
        holders=tuple(_holder(each, now) for each in holds),
        width=0 if pool.name == REQUEST else settings.width,
        running=running,
        backlog=backlog,
        is_paused=lane is not None and lane.is_paused,
    )


def _holder(hold: HeldConnection, now: float) -> Holder:
    owner, statement = hold.owner, hold.statement
    who = owner if isinstance(owner, Owner) else Owner(str(owner), hold.line)
    return Holder(
        owner=who.name,
        kind=who.kind,
        seconds=now - hold.since,
        idle=hold.idle(now),
        locked=hold.locked(now) is not None,
        statement=None if statement is None else shortened(statement),
        line=None if who.line is None else str(who.line),
        task_id=who.task_id,
        attempt=who.attempt,
    )


def _task(task: Task[Any, Any], *, queued: int, running: int) -> TaskStats:
    figures, counts = task.figures, task.figures.counts()
    return TaskStats(
        name=task.name,
        pool=task.settings.pool,
        queued=queued,
        running=running,
        done=counts.done,
        failed=counts.failed,
        retried=counts.retried,
        conflicts=counts.conflicts,
        given_back=counts.given_back,
        expected=counts.expected,
        discarded=counts.discarded,
        postponed=counts.postponed,
        run=figures.run.read(),
        wait=figures.wait.read(),
    )


def _cluster(runner: Runner | None) -> ClusterStats | None:
    seen = None if runner is None else runner.rounds.last_sweep()
    if seen is None:
        return None
    found, at = seen
    return ClusterStats(
        age=max(0.0, time.monotonic() - at),
        workers=found.workers,
        tasks=dict(found.tasks),
        schedules_overdue=found.overdue,
    )
