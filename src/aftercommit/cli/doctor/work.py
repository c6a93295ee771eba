"""What is thought of the work: who runs it, what waits for nobody, what failed, what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aftercommit.cli.doctor.findings import Finding, Level, ago, word
from aftercommit.cli.target import option_for_tasks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from aftercommit.records.census import Failures, Kept, Queue, Tuples, Worker

__all__ = ["Census", "check_work"]

WITHIN: Final = 24 * 3600.0
"""Seconds for which a failure is news."""

_LATE: Final = 60.0
_SLACK: Final = 3600.0
_SHOWN: Final = 5
_CLEAR: Final = "DELETE FROM aftercommit_task WHERE finished_at < now() - interval '90 days';"
_CLEAR_SQLITE: Final = "DELETE FROM aftercommit_task WHERE finished_at < datetime('now', '-90 days');"


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """All that is known of the work.

    Attributes:
        workers: The processes that run tasks, silent ones among them.
        queues: What is queued, by pool and name.
        paused: The pools in which nobody starts tasks.
        held_by_nobody: How many tasks are said to be run by a worker that is no more.
        failures: What failed in the last 24 hours.
        kept: The records of tasks that have ended.
        tuples: What PostgreSQL counts in the table of tasks; None on SQLite.
        silent_after: Seconds without a heartbeat after which a worker counts as silent.
        keep: Seconds for which records are kept, or None for ever.
        names: The tasks that the code at hand knows.
        pools: The pools that have tasks in the code at hand.
        declared: The pools that the code at hand has, with and without tasks.
        where: The ``Database``, as ``module:name``.
    """

    workers: Sequence[Worker]
    queues: Sequence[Queue]
    paused: Collection[str]
    held_by_nobody: int
    failures: Sequence[Failures]
    kept: Kept
    tuples: Tuples | None
    silent_after: float
    keep: float | None
    names: Collection[str]
    pools: Collection[str]
    declared: Collection[str]
    where: str

    @property
    def live(self) -> list[Worker]:
        """The workers that have been heard of."""
        return [worker for worker in self.workers if worker.seen <= self.silent_after]

    @property
    def served(self) -> set[str]:
        """The pools that a live worker runs."""
        return {pool for worker in self.live for pool in worker.pools}

    @property
    def silent(self) -> list[Worker]:
        """The others."""
        return [worker for worker in self.workers if worker.seen > self.silent_after]


def check_work(census: Census) -> list[Finding]:
    """Judge all of it."""
    return [
        *_alive(census),
        *_silent(census),
        *_paused(census),
        *_nobody_runs(census),
        *_unknown(census),
        *_late(census),
        *_failed(census),
        *_records(census),
    ]


# --- who is there -----------------------------------------------------------------------------------------------


def _alive(census: Census) -> Iterable[Finding]:
    due = sum(queue.due for queue in census.queues)
    start = _worker(census)
    if census.live:
        shown = "; ".join(f"{w.host} {w.pid} ({', '.join(sorted(w.pools))})" for w in census.live[:_SHOWN])
        more = f"; {len(census.live) - _SHOWN} more" if len(census.live) > _SHOWN else ""
        yield Finding(check="workers", level=Level.OK, found=f"{len(census.live)} alive: {shown}{more}")
    elif due:
        oldest = max(queue.oldest for queue in census.queues)
        yield Finding(
            check="workers",
            level=Level.WRONG,
            found=f"No process runs tasks, and {_tasks(due)} due, the oldest for {ago(oldest)}",
            why="They wait until the application, or a worker, is started.",
            remedy=(start,),
        )
    else:
        yield Finding(
            check="workers",
            level=Level.NOTE,
            found="No process runs tasks at the moment, and none is due",
            why="Tasks that are asked for wait until the application, or a worker, is started.",
            remedy=(start,),
        )


def _silent(census: Census) -> Iterable[Finding]:
    for worker in census.silent:
        holds = f" and holds {_tasks(worker.running, verb=False)}" if worker.running else ""
        yield Finding(
            check="workers",
            level=_stuck(census) if worker.running else Level.NOTE,
            found=f"Worker {worker.pid} on {worker.host} has been silent for {ago(worker.seen)}{holds}",
            why="It is dead, frozen or cut off. "
            + ("A live worker gives its tasks to others; " if worker.running else "It holds nothing; ")
            + ("if this stays, look into its log." if census.live else "the next worker clears up after it."),
            remedy=(f"ps -p {worker.pid}    # on {worker.host}",)
            if census.live
            else (f"aftercommit worker {census.where}",),
        )
    if census.held_by_nobody:
        yield Finding(
            check="workers",
            level=_stuck(census),
            found=f"{_tasks(census.held_by_nobody)} said to be run by a worker that is no more",
            why="As after a restored backup. A live worker gives them to others with its next heartbeat.",
            remedy=(f"aftercommit tasks list --db {census.where} --state running",)
            if census.live
            else (f"aftercommit worker {census.where}",),
        )


def _stuck(census: Census) -> Level:
    return Level.WARNING if census.live else Level.WRONG


# --- what waits -------------------------------------------------------------------------------------------------


def _paused(census: Census) -> Iterable[Finding]:
    for pool in sorted(census.paused):
        waiting = sum(queue.queued for queue in census.queues if queue.pool == pool)
        yield Finding(
            check="pools",
            level=Level.WARNING,
            found=f"The pool {pool!r} is paused, and {_tasks(waiting)} queued in it",
            why="Nobody starts tasks in it, in any process, until it is resumed.",
            remedy=(f"aftercommit pools resume {word(pool)} --db {census.where}",),
        )


def _nobody_runs(census: Census) -> Iterable[Finding]:
    if not census.live:
        return  # said already
    queued = {queue.pool for queue in census.queues}
    for pool in sorted((queued | set(census.pools)) - census.served):
        waiting = [queue for queue in census.queues if queue.pool == pool]
        due = sum(queue.due for queue in waiting)
        number = sum(queue.queued for queue in waiting)
        oldest = f", the oldest due for {ago(max(queue.oldest for queue in waiting))}" if due else ""
        yield Finding(
            check="pools",
            level=Level.WRONG if due else Level.WARNING,
            found=f"No live worker runs the pool {pool!r}, and {_tasks(number)} queued in it{oldest}",
            why="They wait until a process runs it. Look at runs=, AFTERCOMMIT_RUNS and --pools of the others."
            if pool in census.declared
            else "The code at hand has no such pool. Workers of it take what they know into the pools that they have.",
            remedy=(_start(census, pool),),
        )


def _start(census: Census, pool: str) -> str:
    """Return the line that starts a worker of the code at hand for a pool, if there is one."""
    return f"aftercommit worker {census.where}" + (f" --pools {word(pool)}" if pool in census.declared else "")


def _unknown(census: Census) -> Iterable[Finding]:
    if not census.live:
        return
    known = {name for worker in census.live for name in worker.names}
    for name in sorted({queue.task for queue in census.queues} - known):
        waiting = [queue for queue in census.queues if queue.task == name]
        number = sum(queue.queued for queue in waiting)
        oldest = max(queue.oldest for queue in waiting)
        is_here = name in census.names
        # Whoever knows no task at all was started without the modules that declare them.
        is_empty = not known or not census.names
        yield Finding(
            check="names",
            level=Level.WRONG if is_empty else Level.WARNING,
            found=f"No live worker knows the task {name!r}, and {_tasks(number)} queued"
            + (f", the oldest due for {ago(oldest)}" if oldest else ""),
            why=_why_unknown(is_here=is_here, is_empty=is_empty),
            remedy=(_worker(census),)
            if is_here
            else (
                f"aftercommit worker {census.where} {option_for_tasks(census.where)}    # the module that declares it",
                f"@db.task(aliases=({name!r},))    # if it was renamed: on the task that took its place",
                f"aftercommit tasks cancel --db {census.where} --state queued --task {word(name)}    # unwanted",
            ),
        )
    for queue in census.queues:
        runners = [worker for worker in census.live if queue.pool in worker.pools]
        if queue.task in known and runners and not any(queue.task in worker.names for worker in runners):
            yield Finding(
                check="names",
                level=Level.WARNING,
                found=f"No live worker that runs the pool {queue.pool!r} knows the task {queue.task!r}, and "
                f"{_tasks(queue.queued)} queued"
                + (f", the oldest due for {ago(queue.oldest)}" if queue.oldest else ""),
                why="Those that know it run other pools, as where two releases share the tables.",
                remedy=(_start(census, queue.pool),),
            )


def _worker(census: Census) -> str:
    """Return the line that starts a worker which knows the tasks."""
    return f"aftercommit worker {census.where}" + ("" if census.names else f" {option_for_tasks(census.where)}")


def _why_unknown(*, is_here: bool, is_empty: bool) -> str:
    if is_here and is_empty:
        return "The code at hand knows it; the workers that are alive know no task at all: they import other modules."
    if is_here:
        return "The code at hand knows it; the workers that are alive run other code, as during a deploy."
    if is_empty:
        return "It is declared in a module that is not imported here: name it with --import, here and for the worker."
    return "Nor does the code at hand: its module is not imported, or it was renamed without an alias, or taken away."


def _late(census: Census) -> Iterable[Finding]:
    """Say since when the oldest task of each pool has been due, and warn where somebody should have taken it."""
    for pool in sorted({queue.pool for queue in census.queues}):
        waiting = [queue for queue in census.queues if queue.pool == pool]
        number, due = sum(queue.queued for queue in waiting), sum(queue.due for queue in waiting)
        takers = [
            queue
            for queue in waiting
            if pool not in census.paused and any(pool in w.pools and queue.task in w.names for w in census.live)
        ]
        late = max((queue.oldest for queue in takers), default=0.0)
        oldest = f", the oldest for {ago(max(queue.oldest for queue in waiting))}" if due else ""
        found = f"Pool {pool!r}: {_tasks(number)} queued, {due} of them due{oldest}"
        if late <= _LATE:
            yield Finding(check="queue", level=Level.OK, found=found)
            continue
        yield Finding(
            check="queue",
            level=Level.WARNING,
            found=found,
            why="A live worker runs this pool and knows the name: all places are taken, or it does not keep up.",
            remedy=(
                f"aftercommit tasks list --db {census.where} --pool {word(pool)} --state running",
                f"aftercommit worker {census.where} --pools {word(pool)}    # one more",
            ),
        )


# --- what has ended ---------------------------------------------------------------------------------------------


def _failed(census: Census) -> Iterable[Finding]:
    for each in census.failures[:_SHOWN]:
        yield Finding(
            check="failures",
            level=Level.WARNING,
            found=f"{each.failed} × {each.task!r} failed for good in the last 24 hours",
            why=f"The last one says: {each.error}" if each.error else "",
            remedy=(
                f"aftercommit tasks list --db {census.where} --state failed --task {word(each.task)}",
                f"aftercommit tasks retry --db {census.where} --state failed --task {word(each.task)}",
            ),
        )
    if len(census.failures) > _SHOWN:
        yield Finding(
            check="failures",
            level=Level.WARNING,
            found=f"Tasks of {len(census.failures) - _SHOWN} more names failed for good in the last 24 hours",
            remedy=(f"aftercommit tasks list --db {census.where} --state failed",),
        )


def _records(census: Census) -> Iterable[Finding]:
    kept, keep = census.kept, census.keep
    found = f"{kept.number} finished records are kept" + (f", the oldest for {ago(kept.oldest)}" if kept.number else "")
    if keep is not None and kept.oldest > keep + _SLACK and census.live:
        yield Finding(
            check="records",
            level=Level.WARNING,
            found=f"{found}, though keep_finished is {ago(keep)}",
            why="The workers that are alive were told to keep them for longer, or do not keep up with clearing them "
            "away.",
            remedy=("Database(…, keep_finished=…)",),
        )
    elif keep is None:
        yield Finding(
            check="records",
            level=Level.NOTE,
            found=f"{found}, and keep_finished is None",
            why="Nobody clears them away but you.",
            remedy=(_CLEAR_SQLITE if census.tuples is None else _CLEAR,),
        )
    else:
        yield Finding(check="records", level=Level.OK, found=found)
    tuples = census.tuples
    # Ten times what autovacuum is told to begin at.
    if tuples is not None and tuples.dead > 10 * (1000 + 0.02 * tuples.live):
        yield Finding(
            check="bloat",
            level=Level.WARNING,
            found=f"aftercommit_task has {tuples.dead} dead rows beside {tuples.live} live ones",
            why="Autovacuum has not come by, or an old transaction keeps it from working. The queue gets slow.",
            remedy=("VACUUM (ANALYZE) aftercommit_task;",),
        )


def _tasks(number: int, *, verb: bool = True) -> str:
    one = number == 1
    return f"{number} task{'' if one else 's'}" + ((" is" if one else " are") if verb else "")
