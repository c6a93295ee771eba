"""For users' tests: another database in place of the real one, and tasks that run when the test says so.

```python
with replace(db, connection=connection) as tasks:   # an outer transaction, rolled back by the test
    client.post("/files", …)
    tasks.run()
```

Overriding FastAPI's dependencies is not enough: whoever opens a session of his own, tasks among them, would still
write to the real database. Here the ``Database`` itself is replaced.
"""

from __future__ import annotations

import asyncio
import json
import threading
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, NullPool
from sqlalchemy.ext.asyncio import AsyncConnection

from aftercommit.commits import simulate_commits
from aftercommit.errors import ConfigurationError, LostClaim
from aftercommit.pools import sqlite
from aftercommit.records import moves, schema
from aftercommit.records.ids import uuid7
from aftercommit.runner import TaskHandle, Wanted
from aftercommit.runner.around import around
from aftercommit.runner.following import Following
from aftercommit.runner.outcome import ClaimGone, Discarded, Outcome, Postponed, decide_outcome
from aftercommit.runner.recording import async_end, end
from aftercommit.runner.run import Run
from aftercommit.runner.shells import try_async, try_sync
from aftercommit.schedules.ticks import ticks_after
from aftercommit.tasks.arguments import Handed
from aftercommit.tasks.ends import expected_end
from aftercommit.tasks.retry import GiveUp, is_named

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from types import TracebackType
    from uuid import UUID

    from aftercommit.database import Database
    from aftercommit.records.writing import NewTask
    from aftercommit.schedules.registry import Declared
    from aftercommit.schedules.when import When
    from aftercommit.tasks import Task

__all__ = ["PendingTask", "Tasks", "replace", "ticks"]


def ticks(when: When, since: datetime, count: int) -> list[datetime]:
    """The next *count* ticks of a schedule later than *since*, in its time zone; pure, for a test of its expression.

    Args:
        when: A ``Cron`` or an ``Every``; the latter counts from *since* unless it has a ``start``.
        since: Any moment; aware.
        count: How many at most; fewer where the schedule ends.
    """
    return [tick.astimezone(when.zone) for tick in islice(ticks_after(when, since, since), count)]


class PendingTask:
    """A task that was handed over and committed, and has not run.

    Attributes:
        id: The record's id.
        name: The task's name.
        task: The task, with the options it was handed over with.
        arguments: What it will be called with, as JSON has it; rows by their identity.
    """

    __slots__ = ("_entry", "arguments", "id", "name", "task")

    def __init__(self, entry: Wanted) -> None:
        self._entry = entry
        self.id: UUID = entry.id
        self.name: str = entry.name
        self.task: Task[Any, Any] = entry.task
        self.arguments: Any = json.loads(entry.arguments)

    def __repr__(self) -> str:
        """Name and id."""
        return f"<pending {self.name} {self.id}>"

    def as_run(self) -> Run:
        """The run, in the test's own hands."""
        entry = self._entry
        return entry.as_run(moves.Claim(entry.id, 1, 1) if entry.task.settings.durable else None)


class Tasks:
    """What was handed over while the database is replaced."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._worker = uuid7()
        self._pending: list[PendingTask] = []
        self.stopping = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def pending(self) -> tuple[PendingTask, ...]:
        """What was committed and has not run, oldest first."""
        self._db.outbox.poll_outcome()
        return tuple(self._pending)

    def clear(self) -> None:
        """Forget what is pending: the next test begins with nothing."""
        self._pending.clear()

    @property
    def schedules(self) -> tuple[Declared, ...]:
        """The schedules that the code declares."""
        return tuple(self._db.schedules.declared.values())

    def tick(self, name: str, *, at: datetime | None = None) -> UUID:
        """Write the record of a tick of a schedule, as a runner would; ``run`` runs it. Return its id.

        Args:
            name: The schedule's name, of the code or made in the database.
            at: The tick; by default the next one that the row, or the code, has.

        Raises:
            ScheduleStateError: If there is none of that name.
        """
        return self._ticked(self.call(self._ticking(name, at)))

    async def async_tick(self, name: str, *, at: datetime | None = None) -> UUID:
        """Write the record of a tick of a schedule, as a runner would; ``async_run`` runs it. Return its id."""
        return self._ticked(await self.async_call(self._ticking(name, at)))

    def run(self) -> int:
        """Run all that is pending, here, and what that asks for in turn; return how many ran.

        In the order in which they were committed, delayed ones too: a test does not wait. Each is tried once.

        Raises:
            Exception: What a task raises; its record says ``failed``, its ``on_failure`` was called, and the rest
                stays pending. ``Discard`` and ``RetryLater`` are not raised: the record says ``cancelled``, or
                ``queued`` for later, when no ``run`` looks for it.
        """
        count = 0
        while self.pending:
            count += self._run(self._pending[0])
        return count

    async def async_run(self) -> int:
        """Run all that is pending, on this event loop, and what that asks for in turn; return how many ran.

        Sync tasks run on a thread. Otherwise as ``run``.
        """
        count = 0
        while self.pending:
            count += await self._async_run(self._pending[0])
        return count

    def took(self, entries: Sequence[Wanted]) -> None:
        """Take over what was committed."""
        self._pending += [PendingTask(entry) for entry in entries if entry.written or not entry.task.settings.durable]

    def _ticking(self, name: str, at: datetime | None) -> Callable[[Connection], NewTask]:
        from aftercommit.schedules.operations import tick_by_hand  # it maps the tables

        return partial(tick_by_hand, name=name, at=at, db=self._db)

    def _ticked(self, made: NewTask) -> UUID:
        task = self._db.tasks[made.task]
        entry = Wanted(
            task=task,
            handed=Handed([made.arguments], task=task.name, max_bytes=len(made.arguments.encode())),
            handle=TaskHandle(made.id),
            parent=None,
            context=made.context,
            arguments=made.arguments,
            written=True,
        )
        self._pending.append(PendingTask(entry))
        return made.id

    # RunContext and Bookkeeping of the shells: a task runs here as it does in a runner.

    @property
    def sessions(self) -> Any:
        """Makes sessions."""
        return self._db.sessions

    @property
    def books(self) -> Tasks:
        """Writes in the test's own place."""
        return self

    def call(self, work: Any) -> Any:
        """Run ``work(connection)`` in a transaction."""
        return self._db._call(work)  # noqa: SLF001  # what a test stands on is the database's own way

    async def async_call(self, work: Any) -> Any:
        """Run ``work(connection)`` in a transaction."""
        return await self._db.async_call_anyhow(work)

    def expect(self, pool: str) -> None:
        """Nothing: ``run`` looks by itself."""

    def leave(self, run: Run) -> None:
        """Forget a run whose end could not be recorded: the test is over anyway."""

    def _run(self, pending: PendingTask) -> bool:
        if pending.task.is_async:
            self._refuse_loop(pending)
            with asyncio.Runner() as runner:
                return runner.run(self._async_run(pending))
        run = self._taken(pending)
        if run.claim is not None and not self.call(self._claiming(run)):
            return False
        with around(run):
            error = try_sync(run, self)
            if error is not None:
                end(run, error, _step_after(run, error), self)
        if error is not None and expected_end(error) is None:
            raise error
        return True

    async def _async_run(self, pending: PendingTask) -> bool:
        if not pending.task.is_async:
            if pending.task.takes is not None:
                # Raises, if this flavour is not to be had; the task stays pending.
                self._db.sessions.scope(pending.task.settings.pool, pending.as_run().owner).end()
            self.loop = asyncio.get_running_loop()
            return await asyncio.to_thread(self._run, pending)
        self._refuse_connection(pending)
        run = self._taken(pending)
        if run.claim is not None and not await self.async_call(self._claiming(run)):
            return False
        with around(run):
            error = await try_async(run, self)
            if error is not None:
                await async_end(run, error, _step_after(run, error), self)
        if error is not None and expected_end(error) is None:
            raise error
        return True

    def _taken(self, pending: PendingTask) -> Run:
        self._pending.remove(pending)
        return pending.as_run()

    def _refuse_loop(self, pending: PendingTask) -> None:
        self._refuse_connection(pending)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        raise ConfigurationError(
            f"Task {pending.name!r} is async, and tasks.run() was called on a running event loop. "
            "Write await tasks.async_run()."
        )

    def _refuse_connection(self, pending: PendingTask) -> None:
        if isinstance(self._db.sessions.connection, Connection):
            raise ConfigurationError(
                f"Task {pending.name!r} is async, and the database is replaced by a Connection, which cannot serve it. "
                "Replace it with an AsyncConnection and write await tasks.async_run(), or with url=…."
            )

    def _claiming(self, run: Run) -> Callable[[Connection], bool]:
        return lambda connection: moves.claim_one(connection, run.id, worker=self._worker)


def _step_after(run: Run, error: BaseException) -> Outcome:
    if isinstance(error, LostClaim):
        return ClaimGone()
    outcome = decide_outcome(run, error)
    if isinstance(outcome, (Discarded, Postponed)):
        return outcome
    is_expected = is_named(error, run.task.settings.expected)
    return GiveUp(reason="a test runs a task once", expected=is_expected)


class replace:  # noqa: N801  # reads as a verb: `with replace(db, url=…) as tasks:`
    """Put another database in the place of *db*'s, for the length of a ``with`` (or an ``async with``).

    Sessions, tasks and records go there: those of requests, of tasks, and of code that opens ``db.session()`` itself.
    (``db.engine()`` is SQLAlchemy's, and with ``connection=`` stays the real one.)
    Nothing starts by itself, and ``db.drain()`` runs what is pending. At the end, tasks that were left waiting in a
    session that closed without a commit raise ``TasksNotCommitted``: the test fails.

    Args:
        db: The database that the application uses.
        url: Another database. Our tables are made there.
        connection: A connection in a transaction of the test's: every session joins it, each commit is a savepoint,
            and the test rolls everything back. An ``AsyncConnection`` for async code.

    Raises:
        ConfigurationError: If not exactly one is given, or the runner is alive.
    """

    def __init__(
        self,
        db: Database,
        *,
        url: str | URL | None = None,
        connection: Connection | AsyncConnection | None = None,
    ) -> None:
        if (url is None) == (connection is None):
            raise ConfigurationError("replace(db, …) needs either url= or connection=.")
        self._db = db
        self._url = url
        self._connection = connection

    def __enter__(self) -> Tasks:
        """Replace it."""
        if isinstance(self._connection, AsyncConnection):
            raise ConfigurationError("An AsyncConnection needs `async with replace(db, connection=…) as tasks:`.")
        tasks = self._put()
        try:
            if self._connection is not None:
                self._prepare(self._connection)
            elif self._db.sessions.is_async_only:
                with asyncio.Runner() as runner:
                    runner.run(self._db.async_create_tables())
            else:
                self._db.create_tables()
        except BaseException:
            self._put_back()
            raise
        return tasks

    async def __aenter__(self) -> Tasks:
        """Replace it."""
        tasks = self._put()
        try:
            if isinstance(self._connection, AsyncConnection):
                await self._connection.run_sync(self._prepare)
            elif self._connection is not None:
                self._prepare(self._connection)
            else:
                await self._db.prepare_tables(create=True)
        except BaseException:
            self._put_back()
            raise
        return tasks

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        """Put the real one back."""
        if self._connection is None:
            self._db.dispose()
        self._finish(error)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        """Put the real one back."""
        if self._connection is None:
            await self._db.async_dispose()
        self._finish(error)

    def _put(self) -> Tasks:
        db = self._db
        if db.runner is not None:
            raise ConfigurationError(
                "The runner of this Database is alive: tasks would start by themselves. Replace the database before "
                "the application starts (before `with TestClient(app)`)."
            )
        if db.outbox.started is not None:
            raise ConfigurationError("This Database is replaced already; one replace(…) at a time.")
        tasks = Tasks(db)
        self._sessions, self._following = db.sessions, db.following
        if self._connection is not None:
            db.sessions = db.sessions.joined_to(self._connection)
        else:
            # No connection outlives its session, so a test may use several event loops, as test clients do.
            pools = db.make_pools(
                self._url or "",
                engine_options={},
                async_engine_options={"poolclass": NullPool},
            )
            db.sessions = db.sessions.on(pools)
            db.following = Following(pools)
        db.outbox.started = tasks.took
        db.outbox.replaced_by = tasks
        db.outbox.lost_tasks.clear()
        db.forget_binds()
        return tasks

    def _prepare(self, connection: Connection) -> None:
        if not connection.in_transaction():
            raise ConfigurationError(
                "replace(db, connection=…) needs a connection in a transaction, which the test rolls back: "
                "connection.begin() first."
            )
        if connection.dialect.name == "sqlite" and not sqlite.in_transaction(connection):
            # SQLAlchemy's begin() sends nothing, and the driver does not begin for a savepoint, so that the release
            # of our first one would be a real commit.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        simulate_commits(connection)
        schema.create_tables(connection)

    def _put_back(self) -> None:
        db = self._db
        db.sessions, db.following = self._sessions, self._following
        db.outbox.started = None
        db.outbox.replaced_by = None
        db.forget_binds()

    def _finish(self, error: BaseException | None) -> None:
        lost = list(self._db.outbox.lost_tasks)
        self._db.outbox.lost_tasks.clear()
        self._put_back()
        if lost and error is None:
            raise lost[0]
