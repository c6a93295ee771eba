"""``Database``: the one object a user makes. It holds the rooms together."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar, overload
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Connection, Engine, MetaData, event, inspect
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from aftercommit import signals
from aftercommit.batches import BatchReport
from aftercommit.commits import autocommits, sync_session_of, wait_for_commit, watch
from aftercommit.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    HandOverError,
    RunnerNotRunning,
    ScheduleError,
    SchemaError,
    TaskDefinitionError,
    TaskStateError,
)
from aftercommit.events.handlers import Handlers, Handles, as_task_function, check_event_type
from aftercommit.events.publishing import EventHandle, Unhandled, UnhandledSink, new_event
from aftercommit.plain import indented
from aftercommit.pools import Pools, PoolSettings
from aftercommit.pools.budget import Share, shares
from aftercommit.pools.pools import BOOKKEEPING, REQUEST
from aftercommit.pools.settings import check_isolation_level
from aftercommit.pools.sqlite import IMMEDIATE
from aftercommit.pools.steps import steps_of
from aftercommit.pools.urls import flavours, identity, is_sqlite, render
from aftercommit.pools.views import async_view_of, view_of
from aftercommit.records import moves, pausing, schema
from aftercommit.records.ids import uuid7
from aftercommit.records.missing import explain_missing_table
from aftercommit.runner import Outbox, Pace, Runner, TaskHandle, Wanted, waiting_for
from aftercommit.runner.following import Following
from aftercommit.runner.patience import in_the_end
from aftercommit.runner.run import note_fault, stop_at_statement
from aftercommit.runner.running import Running
from aftercommit.runner.surroundings import Surroundings
from aftercommit.schedules.registry import Declared, Registry
from aftercommit.schedules.scheduler import Scheduler
from aftercommit.schedules.when import Cron, Every, When
from aftercommit.sessions import Owner, SessionFactory, serving, user_line
from aftercommit.stats import Stats, snapshot
from aftercommit.tasks import Retry, Task, TaskSettings, current_run
from aftercommit.tasks import context as carried
from aftercommit.tasks.definition import define, task_name
from aftercommit.tasks.options import check_by
from aftercommit.tasks.schemas import refuse_translated
from aftercommit.tasks.transient import Fault, describe, fault_of
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import scoped_session

    from aftercommit.pools.urls import Flavour
    from aftercommit.records.happenings import NewEvent
    from aftercommit.records.tables import ScheduleRecord, TaskRecord

__all__ = ["Database"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Session)
A = TypeVar("A", bound=AsyncSession)
T = TypeVar("T")
E = TypeVar("E")
F = TypeVar("F", bound=Callable[..., Any])

AnySession = "Session | AsyncSession | scoped_session[Any]"
DEFAULT: Final = "default"
_DEFAULTS: Final = {REQUEST: PoolSettings(max_overflow=5), DEFAULT: PoolSettings()}
# Not pinged: whoever is idle for longer than a second would send two statements for each. It tries again instead.
_BOOKS: Final = PoolSettings(pool_size=1, max_overflow=1, pool_pre_ping=False)


class Database:
    """One database: its pools, its sessions, and the background tasks that run against it.

    Args:
        url: ``sqlite:///app.db``, ``postgresql://…`` (psycopg 3), ``postgresql+asyncpg://…``, a ``URL``, or a callable
            that returns one, called when the first engine opens.
        pool: Settings of the "request" pool.
        pools: Settings per kind of task. "request" and "default" are always there.
        engine_options: For ``create_engine``; what belongs to a pool is in ``PoolSettings``.
        async_engine_options: For ``create_async_engine``.
        session_options: For every session, such as ``{"autoflush": False}``.
        session_class: ``Session`` or a subclass of it; SQLModel's, for example.
        async_session_class: ``AsyncSession`` or a subclass of it.
        max_argument_bytes: The most that a task's arguments may take as JSON.
        heartbeat: Seconds between the heartbeats of a process that runs tasks.
        silent_after: Seconds without a heartbeat after which a process's tasks are given to others.
        keep_finished: Seconds for which finished records are kept; None for ever.
        notify_url: Where PostgreSQL is reached past a transaction pooler, for LISTEN; None for *url*. Where LISTEN
            does not work, other processes' tasks are found by polling.

    Raises:
        ConfigurationError: For what cannot be, now and not at the first request.
    """

    def __init__(
        self,
        url: str | URL | Callable[[], str | URL],
        *,
        pool: PoolSettings | None = None,
        pools: Mapping[str, PoolSettings] | None = None,
        engine_options: Mapping[str, Any] | None = None,
        async_engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        session_class: type[Session] = Session,
        async_session_class: type[AsyncSession] = AsyncSession,
        max_argument_bytes: int = 64 * 1024,
        heartbeat: float = 5.0,
        silent_after: float = 30.0,
        keep_finished: float | None = 7 * 24 * 3600.0,
        notify_url: str | URL | None = None,
    ) -> None:
        self._settings = _pool_settings(pool, pools or {})
        if not 0 < heartbeat <= silent_after / 3:
            raise ConfigurationError(
                f"heartbeat={heartbeat}, silent_after={silent_after}: a worker must be able to miss a heartbeat or two "
                "before it counts as silent. Make silent_after at least three times heartbeat."
            )
        self._options = {"engine_options": engine_options or {}, "async_engine_options": async_engine_options or {}}
        made = self.make_pools(url)
        self.sessions = SessionFactory(
            made, session_class=session_class, async_session_class=async_session_class, options=session_options or {}
        )
        self.outbox = Outbox()
        self.following = Following(self._pools)
        self._notify_url = None if notify_url is None else _listening(notify_url)
        self._pace = Pace(heartbeat=heartbeat, silent_after=silent_after, keep=keep_finished)
        self.max_argument_bytes = max_argument_bytes
        self._tasks: dict[str, Task[Any, Any]] = {}
        self._handlers = Handlers()
        self.surroundings = Surroundings()
        self._unhandled = UnhandledSink(self.outbox.lost)
        self.schedules = Registry()
        self._lock = threading.Lock()
        self._ours: WeakKeyDictionary[Engine, bool] = WeakKeyDictionary()
        self.expects_runner = False
        self.flavours_of_requests: Callable[[], set[Flavour]] = set
        """Which flavours the endpoints use, as far as that is known."""
        self._warned_no_runner = False

    def __repr__(self) -> str:
        """Where it is, without the password, if that is known yet."""
        return f"Database({self._pools.shown!r})"

    # --- connections and sessions -------------------------------------------------------------------------------

    @property
    def _pools(self) -> Pools:
        return self.sessions.pools

    def make_pools(self, url: str | URL | Callable[[], str | URL], **options: Any) -> Pools:
        """Make the pools of this database's settings for *url*."""
        return Pools(url, {**self._settings, BOOKKEEPING: _BOOKS}, **{**self._options, **options}, set_up=_set_up)

    @property
    def pool_settings(self) -> Mapping[str, PoolSettings]:
        """The settings of every pool, by name."""
        return MappingProxyType(self._settings)

    def shares(self, runs: Sequence[str]) -> tuple[Share, ...]:
        """How many connections a process that runs these pools may open, pool by pool."""
        flavours: dict[str, set[Flavour]] = {REQUEST: self.flavours_of_requests()}
        is_async_only = self._pools.is_async_only
        for task in set(self._tasks.values()):
            flavours.setdefault(task.settings.pool, set()).add("async" if task.is_async or is_async_only else "sync")
        return shares(
            {**self._settings, BOOKKEEPING: _BOOKS},
            runs=runs,
            flavours=flavours,
            listens=bool(runs) and not self._pools.is_sqlite,
        )

    def session(self, pool: str = REQUEST) -> AbstractContextManager[Session]:
        """A session for ``with``: committed on success, rolled back on error, ended in any case.

        Used after its end, it raises ``SessionEnded``.
        """
        return self.sessions.scope(pool, _owner())

    def async_session(self, pool: str = REQUEST) -> AbstractAsyncContextManager[AsyncSession]:
        """An async session for ``async with``: committed on success, rolled back on error or cancellation, ended."""
        return self.sessions.async_scope(pool, _owner())

    def engine(self, pool: str = REQUEST) -> Engine:
        """SQLAlchemy's engine of *pool*, for Alembic and ``create_all``."""
        return self._pools[pool].engine

    def async_engine(self, pool: str = REQUEST) -> AsyncEngine:
        """SQLAlchemy's async engine of *pool*."""
        return self._pools[pool].async_engine

    def dispose(self) -> None:
        """Close every pool's connections; what is in use closes when it comes back."""
        self.following.stop()
        self._pools.dispose()

    async def async_dispose(self) -> None:
        """Close every pool's connections, of both flavours."""
        await asyncio.to_thread(self.following.stop)
        await self._pools.async_dispose()

    # --- tables -------------------------------------------------------------------------------------------------

    def create_tables(self, connection: Connection | None = None, *, also: MetaData | None = None) -> None:
        """Make the ``aftercommit_*`` tables; harmless where they stand, and safe to call from several processes.

        Args:
            connection: Whose transaction they are made in, such as ``op.get_bind()`` in a migration of Alembic's; by
                default they are made, and committed, on one of our own.
            also: The application's own tables, made along with them: ``Base.metadata``.
        """
        if connection is not None:
            schema.create_tables(connection, also)
        else:
            self._call(partial(schema.create_tables, also=also))

    async def async_create_tables(self, *, also: MetaData | None = None) -> None:
        """Make the ``aftercommit_*`` tables; harmless where they stand, and safe to call from several processes."""
        await self._async_call(partial(schema.create_tables, also=also))

    async def prepare_tables(self, *, create: bool | MetaData | None) -> bool:
        """At start-up: make the tables or check them; return whether there are any.

        Args:
            create: Whether to make them; None for SQLite only; a ``MetaData``: make them, and its tables, too.

        Raises:
            DatabaseUnavailable: If the database cannot be reached.
            SchemaError: If durable tasks are declared and the tables are missing or too old.
        """
        also = create if isinstance(create, MetaData) else None
        if also is not None or create is True or (create is None and self._pools.is_sqlite):
            await self._at_start(partial(schema.create_tables, also=also))
            return True
        problem = await self._at_start(schema.schema_problem)
        if problem is None:
            return True
        if not any(task.settings.durable for task in self._tasks.values()):
            return False
        raise SchemaError(
            f"{render(self._pools.flavours.given)}: {problem}. Durable tasks are kept there. Run `aftercommit schema "
            "--apply`, or call db.create_tables() in a migration, or write install(app, db, create_tables=True)."
        )

    async def _at_start(self, work: Callable[[Connection], T]) -> T:
        try:
            return await in_the_end(partial(self.async_call_anyhow, work))
        except Exception as exc:
            if fault_of(exc) is not Fault.CONNECTION:
                raise
            reason = indented(str(without_values(getattr(exc, "orig", None) or exc)).strip()) or describe(exc)
            raise DatabaseUnavailable(
                f"{render(self._pools.flavours.given)} cannot be reached: {reason}. Nothing was started, because "
                "nobody would see that it cannot work. Start it again when the database answers; whatever supervises "
                "processes (systemd, Docker, Kubernetes) does that by itself."
            ) from exc

    # --- tasks --------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> Mapping[str, Task[Any, Any]]:
        """Every task, by name and alias."""
        return MappingProxyType(self._tasks)

    @overload
    def task(self, function: Callable[Concatenate[A, P], Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def task(self, function: Callable[Concatenate[S, P], R], /) -> Task[P, R]: ...
    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        pool: str = DEFAULT,
        retry: Retry | None = None,
        timeout: float | None = None,
        durable: bool = True,
        repeatable: bool = False,
        isolation_level: str | None = None,
        on_failure: Callable[..., Any] | None = None,
        expected: type[Exception] | Sequence[type[Exception]] = (),
        schedule: When | Sequence[When] = (),
    ) -> _Decorator: ...
    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        pool: str = DEFAULT,
        retry: Retry | None = None,
        timeout: float | None = None,
        durable: bool = True,
        repeatable: bool = False,
        isolation_level: str | None = None,
        on_failure: Callable[..., Any] | None = None,
        expected: type[Exception] | Sequence[type[Exception]] = (),
        schedule: When | Sequence[When] = (),
    ) -> Any:
        """Declare a function as a background task.

        Its first parameter, if annotated ``Session`` (``def``) or ``AsyncSession`` (``async def``), is a session of
        the run's own; the rest are its arguments. The last commit is made for it, together with the note that it is
        done.

        Args:
            function: The function; left out with arguments.
            name: What records call it; the function's bare name by default.
            aliases: Former names, under which records may still wait.
            pool: The pool whose connections, threads and limit it uses.
            retry: How often it is tried, and for which errors of the application; ``Retry()`` by default.
            timeout: Seconds for one attempt; None for no limit.
            durable: Kept as a row of the same database and transaction. False: in memory, lost with the process.
            repeatable: Whether it may run again from the top after a commit of its own.
            isolation_level: Of its transactions, instead of the pool's.
            on_failure: Called as ``on_failure(session, error, *args, **kwargs)`` when it has failed for good, in a
                fresh session and in the transaction that records the failure.
            expected: Errors that are outcomes which the application knows: recorded as ``failed``, in one line, and
                logged as info.
            schedule: When it is due again and again: a ``Cron`` or ``Every``, or several.

        Raises:
            TaskDefinitionError: If the function cannot be a task, or its name is taken.
            ScheduleError: If it cannot be scheduled, or the schedule's name is taken.
            ConfigurationError: If there is no such pool.
        """

        def decorate(function: Callable[..., Any]) -> Task[Any, Any]:
            settings = TaskSettings(
                name=task_name(function, name),
                aliases=tuple(aliases),
                pool=pool,
                retry=retry or Retry(),
                timeout=timeout,
                durable=durable,
                repeatable=repeatable,
                isolation_level=isolation_level,
                on_failure=on_failure,
                expected=(expected,) if isinstance(expected, type) else tuple(expected),
            )
            task = self._register(define(function, settings, database=self))
            for each in (schedule,) if isinstance(schedule, (Cron, Every)) else tuple(schedule):
                self.schedules.add(Declared(when=each, task=task, kwargs={}))
            return task

        if pool == REQUEST:
            raise ConfigurationError(
                "pool='request' serves the endpoints: a task in it would make requests wait. Use 'default', or one of "
                "its own: Database(…, pools={'files': PoolSettings()})."
            )
        if pool not in self._settings:
            raise ConfigurationError(
                f"There is no pool {pool!r}; this database has {', '.join(sorted(self._settings))}. "
                f"Write Database(…, pools={{{pool!r}: PoolSettings()}})."
            )
        if isolation_level is not None:
            check_isolation_level(isolation_level)
        return decorate if function is None else decorate(function)

    def after_commit(
        self,
        session: Session | AsyncSession | scoped_session[Any] | Any,
        task: Task[P, Any],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> TaskHandle:
        """Have *task* run once the transaction that *session* is in has really committed; rolled back, it never was.

        Not awaited and without I/O; begins the session's transaction, as ``session.add`` does.

        Args:
            session: A ``Session``, ``AsyncSession`` or ``scoped_session``, ours or anybody's, on this database.
            task: A task of this ``Database``.
            *args: Its arguments, without the session. Rows cross by identity where they are annotated as such.
            **kwargs: The same.

        Returns:
            A handle: ``id`` now, ``created`` after the commit.

        Raises:
            UnsafeArgument: If an argument cannot cross.
            HandOverError: If the task could never start from here.
        """
        if isinstance(session, Task):
            raise HandOverError(
                f"db.after_commit needs the session first, whose commit the task waits for: db.after_commit(session, "
                f"{session.name}, …)."
            )
        if not isinstance(task, Task):
            raise HandOverError(
                f"after_commit needs a task, and got {getattr(task, '__name__', type(task).__name__)!r}. Declare it "
                "with "
                "@db.task, and pass its arguments behind it: after_commit(task, argument)."
            )
        if task.database is not self:
            raise HandOverError(
                f"{task!r} belongs to another Database. Its record would be written where nobody looks for it: hand it "
                "over with that Database's after_commit and one of its sessions."
            )
        plain = sync_session_of(session)
        return self._hand_over(plain, self._bind_of(plain), task, args, kwargs)

    def _hand_over(
        self,
        plain: Session,
        bind: Engine | Connection,
        task: Task[Any, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        event: NewEvent | None = None,
    ) -> TaskHandle:
        self._check_flavour(task)
        if not task.settings.durable:
            self._check_memory(task)
        elif self.outbox.runner is None:
            self._note_no_runner(task)
        refuse_translated(task, bind, self._options.values())
        handed = task.arguments.hand_over(plain, args, kwargs, max_bytes=self.max_argument_bytes)
        handle = TaskHandle(uuid7())
        run = current_run()
        entry = Wanted(
            task=task,
            handed=handed,
            handle=handle,
            parent=None if run is None else run.id,
            context=carried.capture(task.name, handle.id, task.settings.pool),
            event=event,
        )
        wait_for_commit(plain, self.outbox, entry, bind)
        return handle

    # --- running ------------------------------------------------------------------------------------------------

    @property
    def runner(self) -> Runner | None:
        """The runner of this process, while it runs."""
        return self.outbox.runner

    @property
    def pace(self) -> Pace:
        """How often a process that runs tasks looks around, and for how long records are kept."""
        return self._pace

    def running(
        self,
        *,
        runs: Sequence[str] | None = None,
        grace: float = 15.0,
        create_tables: bool | MetaData | None = None,
        processes: int | None = None,
        strict: bool = False,
    ) -> Running:
        """Run tasks for the length of a ``with`` or an ``async with``, outside FastAPI.

        Args:
            runs: The pools whose tasks run here; None for all, ``()`` for none.
            grace: Seconds that running tasks get at the end.
            create_tables: Whether to make our tables first; None for SQLite only; ``Base.metadata``: the application's
                own as well.
            processes: How many processes, on all machines, share the server's connections; None to count this one and
                the live workers.
            strict: Whether to raise, instead of a warning, where they may open more connections than the server
                allows.

        Raises:
            PoolBudgetError: When it is entered, if *strict*.
        """
        return Running(
            self,
            self._runs(runs),
            grace=grace,
            create_tables=create_tables,
            processes=processes,
            strict=strict,
        )

    def new_runner(self, pools: Sequence[str]) -> Runner:
        """Make a runner for *pools*.

        Raises:
            TaskDefinitionError: If a task's annotations name what cannot cross: at the start, and not when it is asked
                for.
        """
        for task in set(self._tasks.values()):
            task.arguments.prepare()
        runner = Runner(self.sessions, self._tasks, pools, self._pace, notify_url=self._notify_url)
        runner.declared = self.schedules.declared.keys()
        runner.duties.append(
            Scheduler(
                runner.books,
                self.schedules,
                self._tasks,
                expect=runner.expect,
                max_bytes=self.max_argument_bytes,
                keep=self._pace.keep,
                worker=runner.id,
            )
        )
        return runner

    def drain(self, timeout: float = 30.0) -> None:
        """Run, or wait for, all that is due, then return; for scripts and tests.

        Args:
            timeout: Seconds.

        Raises:
            TimeoutError: If something is left then.
            ConfigurationError: On the event loop that runs the tasks, where it could never end.
        """
        if self.outbox.replaced_by is not None:
            self.outbox.replaced_by.run()
            return
        runner = self.outbox.runner
        if runner is None:
            with self._running_to_drain():
                self.drain(timeout)
            return
        runner.refuse_own_loop()
        runner.drain(timeout)

    async def async_drain(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109  # waits in a thread, for a condition
        """Run, or wait for, all that is due, then return.

        Args:
            timeout: Seconds.

        Raises:
            TimeoutError: If something is left then.
        """
        if self.outbox.replaced_by is not None:
            await self.outbox.replaced_by.async_run()
            return
        runner = self.outbox.runner
        if runner is None:
            async with self._running_to_drain():
                await self.async_drain(timeout)
            return
        await asyncio.to_thread(runner.drain, timeout)

    def _running_to_drain(self) -> Running:
        running = self.running()
        if not running.pools:
            raise ConfigurationError(
                "Nothing can be drained: AFTERCOMMIT_RUNS=none says that this process runs no tasks. Unset it, or "
                "drain in a process that runs them."
            )
        return running

    def stats(self) -> Stats:
        """How the pools and tasks of this process stand, and what a runner here last saw of all processes.

        Read from memory, without a connection and without waiting.
        """
        return snapshot(self._pools, set(self._tasks.values()), self.outbox.runner)

    def around(self, function: F, /) -> F:
        """Have every run take place where the generator function *function* yields: a tenant, a role, a flag.

        ``def tenant(run, session): …; yield`` for ``def`` tasks, ``async def`` for ``async def`` tasks; called with
        ``current_run()`` and the run's session, in its transaction, before rows are loaded; what it raises fails the
        run. Several nest in the order of their declaration. ``on_failure`` and handlers of events are inside, too.

        Raises:
            TaskDefinitionError: If it is no generator function of two arguments.
        """
        return self.surroundings.add(function)

    # --- events -------------------------------------------------------------------------------------------------

    def on(
        self,
        event_type: type[E],
        /,
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        pool: str = DEFAULT,
        retry: Retry | None = None,
        timeout: float | None = None,
        repeatable: bool = False,
        isolation_level: str | None = None,
        on_failure: Callable[..., Any] | None = None,
    ) -> Handles[E]:
        """Declare a function as a handler of an event: a durable task for each event that is published.

        It takes ``(session, event)`` or ``(event)``. Each handler of an event has its own record, its own retries,
        and takes effect exactly once, whatever becomes of the others.

        Args:
            event_type: The event's class, a Pydantic model or a dataclass. Subclasses are events of their own.
            name: What records call the handler; the function's bare name by default.
            aliases: Former names, under which events may still wait.
            pool: The pool whose connections, threads and limit it uses.
            retry: How often it is tried, and for which errors of the application.
            timeout: Seconds for one attempt.
            repeatable: Whether it may run again from the top after a commit of its own.
            isolation_level: Of its transactions, instead of the pool's.
            on_failure: Called as ``on_failure(session, error, event)`` when it has failed for good.

        Raises:
            TaskDefinitionError: If this can be no handler, or its name is taken.
            ConfigurationError: If there is no such pool.
        """
        check_event_type(event_type)

        def decorate(function: Callable[..., Any], /) -> Any:
            declare = self.task(
                name=name,
                aliases=aliases,
                pool=pool,
                retry=retry,
                timeout=timeout,
                repeatable=repeatable,
                isolation_level=isolation_level,
                on_failure=on_failure,
            )
            task: Task[..., Any] = declare(as_task_function(function, event_type))
            self._handlers.add(event_type, task)
            return task

        return decorate

    def publish(
        self, session: Session | AsyncSession | scoped_session[Any] | Any, event: object, key: str | None = None
    ) -> EventHandle:
        """Have every handler of *event* that this process knows run once the session's transaction has committed.

        One durable task for each handler is written in that transaction, with the tasks that it asks for. Rolled
        back, the event never was. An event that nobody handles is legal.

        Args:
            session: As for ``after_commit``.
            event: An instance of a Pydantic model or a dataclass.
            key: Makes publishing idempotent: for as long as events are kept (``keep_finished``), a second one of this
                class and key does nothing, also if both are published at once.

        Returns:
            The event's id, and the handle of each handler's task.

        Raises:
            UnsafeArgument: If the event cannot cross as JSON.
            HandOverError: If it could never be handled from here.
        """
        handlers = self._handlers.of(event)
        row = new_event(event, key)
        plain = sync_session_of(session)
        bind = self._bind_of(plain)
        if row is not None and not handlers:
            wait_for_commit(plain, self._unhandled, Unhandled(row), bind)
        tasks = {task.name: self._hand_over(plain, bind, task, (event,), {}, event=row) for task in handlers}
        return EventHandle(uuid7() if row is None else row.id, tasks)

    # --- schedules ----------------------------------------------------------------------------------------------

    def schedule(self, when: When, task: Task[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Declare that *task* is due again and again; written to the database when a process that runs tasks starts.

        Args:
            when: A ``Cron`` or an ``Every``; its name is the task's unless it has one.
            task: A durable task of this ``Database``; ``with_options(priority=…)`` goes along.
            *args: What crosses to each run; rows cannot, because there is no session yet.
            **kwargs: The same.

        Raises:
            ScheduleError: If the task cannot be scheduled, or the name is taken.
        """
        self._check_scheduled(task)
        self.schedules.add(Declared(when=when, task=task, args=args, kwargs=kwargs))

    def create_schedule(
        self,
        session: Session | scoped_session[Any],
        when: When,
        task: Task[P, Any],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> ScheduleRecord:
        """Make a schedule in *session*'s transaction: it exists if and only if that commits. Flushes.

        Args:
            session: As for ``after_commit``, of the sync kind.
            when: A ``Cron`` or an ``Every``, with a name of its own.
            task: A durable task of this ``Database``.
            *args: What crosses to each run; rows by identity.
            **kwargs: The same.

        Raises:
            ScheduleError: If there is one of that name, or it cannot be.
            UnsafeArgument: If an argument cannot cross.
        """
        self._check_scheduled(task)
        return self._change_schedule(
            session,
            "made",
            when.name or task.name,
            partial(self._create_schedule, Declared(when=when, task=task, args=args, kwargs=kwargs)),
        )

    async def async_create_schedule(
        self, session: AsyncSession, when: When, task: Task[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> ScheduleRecord:
        """Make a schedule in *session*'s transaction: it exists if and only if that commits. Flushes."""
        return await session.run_sync(lambda plain: self.create_schedule(plain, when, task, *args, **kwargs))

    def update_schedule(self, session: Session | scoped_session[Any], name: str, when: When) -> ScheduleRecord:
        """Have a schedule that was made as data be due at other times, in *session*'s transaction. Flushes.

        Raises:
            ScheduleStateError: If there is none of that name, or the code declares it.
        """
        from aftercommit.schedules import operations

        return self._change_schedule(
            session, "changed", name, lambda plain, bind: operations.update(plain, bind, name, when)
        )

    async def async_update_schedule(self, session: AsyncSession, name: str, when: When) -> ScheduleRecord:
        """Have a schedule that was made as data be due at other times, in *session*'s transaction. Flushes."""
        return await session.run_sync(lambda plain: self.update_schedule(plain, name, when))

    def delete_schedule(self, session: Session | scoped_session[Any], name: str) -> None:
        """Delete a schedule that was made as data, in *session*'s transaction; what it asked for stays. Flushes.

        Raises:
            ScheduleStateError: If there is none of that name, or the code declares it.
        """
        from aftercommit.schedules import operations

        self._change_schedule(session, "deleted", name, lambda plain, bind: operations.delete(plain, bind, name))

    async def async_delete_schedule(self, session: AsyncSession, name: str) -> None:
        """Delete a schedule that was made as data, in *session*'s transaction; what it asked for stays. Flushes."""
        await session.run_sync(lambda plain: self.delete_schedule(plain, name))

    def pause_schedule(self, name: str, *, by: str | None = None) -> None:
        """Fire nothing of a schedule, in any process, until it is resumed; its ticks meanwhile are not missed.

        Args:
            name: The schedule's name.
            by: Who asks, for the record.

        Raises:
            ScheduleStateError: If there is none of that name, or it is paused already.
        """
        self._call(self._pausing_schedule(name, by))
        self._told_schedule(name, "paused", by)

    async def async_pause_schedule(self, name: str, *, by: str | None = None) -> None:
        """Fire nothing of a schedule, in any process, until it is resumed; its ticks meanwhile are not missed."""
        await self._async_call(self._pausing_schedule(name, by))
        self._told_schedule(name, "paused", by)

    def resume_schedule(self, name: str, *, catch_up: bool = False, by: str | None = None) -> None:
        """Fire a schedule again, from its next tick on.

        Args:
            name: The schedule's name.
            catch_up: Whether the ticks of the pause count as missed.
            by: Who asks.

        Raises:
            ScheduleStateError: If there is none of that name, or it is not paused.
        """
        self._call(self._resuming_schedule(name, catch_up=catch_up))
        self._told_schedule(name, "resumed", by)

    async def async_resume_schedule(self, name: str, *, catch_up: bool = False, by: str | None = None) -> None:
        """Fire a schedule again, from its next tick on."""
        await self._async_call(self._resuming_schedule(name, catch_up=catch_up))
        self._told_schedule(name, "resumed", by)

    def trigger_schedule(self, name: str, *, by: str | None = None) -> UUID:
        """Run a schedule's task now, beside its ticks; return the id of the record.

        Raises:
            ScheduleStateError: If there is none of that name, or this process does not know its task.
        """
        return self._triggered(name, by, self._call(self._triggering(name)))

    async def async_trigger_schedule(self, name: str, *, by: str | None = None) -> UUID:
        """Run a schedule's task now, beside its ticks; return the id of the record."""
        return self._triggered(name, by, await self._async_call(self._triggering(name)))

    # --- batches ------------------------------------------------------------------------------------------------

    def run_batch(
        self,
        source: Any,
        handler: Callable[[Any, Any], Any],
        *,
        size: int = 100,
        workers: int = 1,
        pool: str = DEFAULT,
        entity: type | None = None,
        on_error: Callable[[Any, Any, Any], Any] | None = None,
        max_failures: int | None = None,
        per_chunk: bool = False,
        progress: bool | Callable[[int, int | None], None] | None = None,
    ) -> BatchReport:
        """Call ``handler(session, item)`` for every record of *source*, in chunks of one transaction each.

        A chunk is first run plain. If a record fails, it is rolled back and run again record by record, each in a
        savepoint, so that a bad record costs nothing to the others. Conflicts and lost connections repeat the chunk.
        Inside a durable task the position is saved in each chunk's own commit: however it is interrupted, the batch
        goes on behind the last chunk that was committed.

        Args:
            source: A ``Select`` of a mapped class, read page by page on the primary key; a ``Select`` of exactly that
                key, for handlers that need no loaded row; keys of *entity*; or any values, a generator too. Inside a
                task it must give the same values in the same order each time.
            handler: Called with the chunk's session and the row (or value).
            size: Records in a chunk, 1 to 10 000.
            workers: Chunks at once, each in a place of the pool.
            pool: Whose connections it uses; inside a task always the task's.
            entity: The class that the keys in *source* are of. A key without a row is a failure of that record.
            on_error: Called as ``on_error(session, item, error)`` for a record that failed, to mark it in the
                transaction of its chunk; for a key without a row, *item* is the key.
            max_failures: More failures than this, counted since this call, stop the batch.
            per_chunk: Whether the handler takes a list of a chunk's records at once, for set-based work. After a
                failure it is called with lists of one.
            progress: True for a bar on the terminal, False for nothing, a function of ``(done, total)``; by default
                a bar on a terminal where rich is installed, and the task's record inside a task.

        Returns:
            What was done: ``total == succeeded + failed``.

        Raises:
            BatchStopped: If more than *max_failures* records failed.
            BatchError: If the handler ends its chunk's transaction, ``on_error`` fails, or the task's own session is
                in a transaction.
            ConfigurationError: For what cannot be meant.
        """
        from aftercommit.batches import (  # they need Pydantic, which takes as long to import as all the rest
            batch,
            options,
        )

        chosen = options.Options(
            size=size,
            workers=workers,
            pool=pool,
            entity=entity,
            on_error=on_error,
            max_failures=max_failures,
            per_chunk=per_chunk,
            progress=progress,
        )
        return batch.run_batch(self, source, handler, chosen)

    async def async_run_batch(
        self,
        source: Any,
        handler: Callable[[Any, Any], Any],
        *,
        size: int = 100,
        workers: int = 1,
        pool: str = DEFAULT,
        entity: type | None = None,
        on_error: Callable[[Any, Any, Any], Any] | None = None,
        max_failures: int | None = None,
        per_chunk: bool = False,
        progress: bool | Callable[[int, int | None], None] | None = None,
    ) -> BatchReport:
        """Do what ``run_batch`` does, on async sessions; *source* may be an async generator, too.

        An ``async def`` handler (or ``on_error``) is given an ``AsyncSession``, a ``def`` one the ``Session`` behind
        it. Lanes run side by side on this event loop.
        """
        from aftercommit.batches import (  # they need Pydantic, which takes as long to import as all the rest
            batch,
            options,
        )

        chosen = options.Options(
            size=size,
            workers=workers,
            pool=pool,
            entity=entity,
            on_error=on_error,
            max_failures=max_failures,
            per_chunk=per_chunk,
            progress=progress,
        )
        return await batch.async_run_batch(self, source, handler, chosen)

    # --- by hand ------------------------------------------------------------------------------------------------

    def cancel(self, id: UUID, *, by: str | None = None) -> None:
        """Cancel a task that is queued or running; a running one is stopped and can commit nothing more.

        An ``async def`` is cancelled where it awaits, a ``def`` raises at its next statement or commit; at once in this
        process and where NOTIFY is heard, with the next heartbeat elsewhere. ``on_failure`` is not called.

        Args:
            id: The task's id.
            by: Who asks, for the record, the log and the signals; at most 255 characters.

        Raises:
            TaskStateError: If there is no such task, or it has ended.
        """
        check_by(by)
        self._cancelled(id, by, self._call(lambda connection: moves.cancel(connection, id, by=by)))

    async def async_cancel(self, id: UUID, *, by: str | None = None) -> None:
        """Cancel a task that is queued or running; a running one is stopped and can commit nothing more."""
        check_by(by)
        self._cancelled(id, by, await self._async_call(lambda connection: moves.cancel(connection, id, by=by)))

    def retry(self, id: UUID) -> None:
        """Queue a task that failed or was cancelled once more, with all its attempts.

        Raises:
            TaskStateError: If there is no such task, or it is in another state.
        """
        self._retried(id, self._call(lambda connection: moves.retry(connection, id)))

    async def async_retry(self, id: UUID) -> None:
        """Queue a task that failed or was cancelled once more, with all its attempts."""
        self._retried(id, await self._async_call(lambda connection: moves.retry(connection, id)))

    def wait_for(self, id: UUID, timeout: float = 30.0) -> TaskRecord:
        """Wait until a task has ended, and return its record; for scripts, tests and commands.

        Args:
            id: The task's id; its hand-over must have been committed.
            timeout: Seconds.

        Raises:
            TimeoutError: If it has not ended then, or the process stops; the message says how it stands.
            TaskStateError: If there is no such task, as before the commit of its hand-over.
            ConfigurationError: On an event loop, and in a task whose place the other one may need.
        """
        if self.outbox.replaced_by is not None:
            self.outbox.replaced_by.run()
            return waiting_for.ended_record(self._call(waiting_for.reading(id)), id)
        return waiting_for.wait_for(self.following, id, timeout, is_sqlite=self._pools.is_sqlite)

    async def async_wait_for(self, id: UUID, timeout: float = 30.0) -> TaskRecord:  # noqa: ASYNC109  # as its twin
        """Wait until a task has ended, and return its record."""
        if self.outbox.replaced_by is not None:
            await self.outbox.replaced_by.async_run()
            return waiting_for.ended_record(await self.async_call_anyhow(waiting_for.reading(id)), id)
        return await waiting_for.async_wait_for(self.following, id, timeout, is_sqlite=self._pools.is_sqlite)

    def pause(self, pool: str) -> None:
        """Have nobody start tasks of *pool*, in any process, until ``resume``; those that run go on.

        Workers notice within seconds.
        """
        self._call(self._pausing(pausing.pause, pool))
        self._look()

    async def async_pause(self, pool: str) -> None:
        """Have nobody start tasks of *pool*, in any process, until ``resume``; those that run go on."""
        await self._async_call(self._pausing(pausing.pause, pool))
        self._look()

    def resume(self, pool: str) -> None:
        """Have tasks of *pool* started again."""
        self._call(self._pausing(pausing.resume, pool))
        self._look()

    async def async_resume(self, pool: str) -> None:
        """Have tasks of *pool* started again."""
        await self._async_call(self._pausing(pausing.resume, pool))
        self._look()

    # --- below --------------------------------------------------------------------------------------------------

    def _cancelled(self, id: UUID, by: str | None, done: bool) -> None:  # noqa: FBT001  # the statement's answer
        if not done:
            raise TaskStateError(f"Cannot cancel {id}: there is no task of this id that is queued or running.")
        signals.emit(signals.TasksCancelled(ids=(id,), by=by))
        if self.outbox.runner is not None:
            self.outbox.runner.cancelled(id, by)

    def _retried(self, id: UUID, done: bool) -> None:  # noqa: FBT001  # the statement's answer
        if not done:
            raise TaskStateError(f"Cannot retry {id}: there is no task of this id that is failed or cancelled.")
        signals.emit(signals.TasksRequeued(ids=(id,), reason="db.retry"))
        runner = self.outbox.runner
        if runner is not None:
            for pool in runner.lanes:
                runner.expect(pool)

    def _pausing(self, move: Callable[[Connection, str], None], pool: str) -> Callable[[Connection], None]:
        if pool == REQUEST or pool not in self._settings:
            raise ConfigurationError(
                f"There is no pool of tasks {pool!r}; this database has "
                f"{', '.join(sorted(name for name in self._settings if name != REQUEST))}."
            )

        def act(connection: Connection) -> None:
            move(connection, pool)

        return act

    def _check_scheduled(self, task: object) -> None:
        if not isinstance(task, Task):
            raise ScheduleError(
                f"A schedule needs a task, and got {getattr(task, '__name__', type(task).__name__)!r}. Declare it with "
                "@db.task, and pass its arguments behind it: db.schedule(when, task, argument)."
            )
        if task.database is not self:
            raise ScheduleError(f"{task!r} belongs to another Database: declare its schedule with that one.")

    def _create_schedule(self, declared: Declared, plain: Session, bind: Engine | Connection) -> ScheduleRecord:
        from aftercommit.schedules import operations

        run = current_run()
        return operations.create(
            plain, bind, declared, max_bytes=self.max_argument_bytes, parent=None if run is None else run.id
        )

    def _change_schedule(self, session: Any, what: str, name: str, change: Callable[[Session, Any], T]) -> T:
        from aftercommit.schedules import operations

        plain = sync_session_of(session)
        bind = self._bind_of(plain)
        done = change(plain, bind)
        wait_for_commit(plain, operations.Listening(self._told_schedule), operations.Changed(name, what), bind)
        return done

    def _pausing_schedule(self, name: str, by: str | None) -> Callable[[Connection], None]:
        from aftercommit.schedules import operations

        return lambda connection: operations.pause(connection, name, by)

    def _resuming_schedule(self, name: str, *, catch_up: bool) -> Callable[[Connection], None]:
        from aftercommit.schedules import operations

        return lambda connection: operations.resume(connection, name, catch_up=catch_up)

    def _triggering(self, name: str) -> Callable[[Connection], tuple[UUID, str]]:
        from aftercommit.schedules import operations

        return lambda connection: operations.trigger(connection, name, self._tasks)

    def _triggered(self, name: str, by: str | None, made: tuple[UUID, str]) -> UUID:
        signals.emit(signals.ScheduleChanged(schedule=name, what="triggered", by=by))
        self.outbox.tell(made[1])
        return made[0]

    def _told_schedule(self, name: str, what: str, by: str | None = None) -> None:
        signals.emit(signals.ScheduleChanged(schedule=name, what=what, by=by))
        self.outbox.look()

    def _look(self) -> None:
        if self.outbox.runner is not None:
            self.outbox.runner.look()

    def _call(self, work: Callable[[Connection], T]) -> T:
        connection = self.sessions.connection
        if isinstance(connection, Connection):
            return work(connection)
        if connection is not None:
            raise ConfigurationError(
                "The database is replaced by an AsyncConnection, which a sync call cannot use: await the async_ twin."
            )
        engine = self._pools[REQUEST].engine
        with (view_of(engine, **{IMMEDIATE: True}) if self._pools.is_sqlite else engine).begin() as opened:
            return work(opened)

    async def _async_call(self, work: Callable[[Connection], T]) -> T:
        connection = self.sessions.connection
        if isinstance(connection, Connection):
            raise ConfigurationError(
                "The database is replaced by a Connection, which an async call cannot use: call the sync twin."
            )
        if connection is not None:
            return await connection.run_sync(work)
        engine = self._pools[REQUEST].async_engine
        with_lock = async_view_of(engine, **{IMMEDIATE: True}) if self._pools.is_sqlite else engine
        async with with_lock.begin() as opened:
            return await opened.run_sync(work)

    async def async_call_anyhow(self, work: Callable[[Connection], T]) -> T:
        """Run ``work(connection)`` in a transaction, by whichever flavour the URL has."""
        if self.sessions.is_async_only:
            return await self._async_call(work)
        return await asyncio.to_thread(self._call, work)

    def _register(self, task: Task[Any, Any]) -> Task[Any, Any]:
        with self._lock:
            for name in (task.name, *task.settings.aliases):
                other = self._tasks.get(name)
                if other is not None:
                    raise TaskDefinitionError(
                        f"Two tasks are called {name!r}: {other!r} and {task.__module__}.{task.__qualname__}. "
                        "Records are "
                        "found by this name: give one another, with @db.task(name='…')."
                    )
            for name in (task.name, *task.settings.aliases):
                self._tasks[name] = task
        return task

    def _runs(self, runs: Sequence[str] | None) -> list[str]:
        told = os.environ.get("AFTERCOMMIT_RUNS")
        if told is not None and told.strip():
            runs = (
                ()
                if told.strip().lower() == "none"
                else None
                if told.strip().lower() == "all"
                else tuple(name.strip() for name in told.split(",") if name.strip())
            )
        every = [name for name in self._settings if name != REQUEST]
        if isinstance(runs, str):
            raise ConfigurationError(f"runs={runs!r}: give a sequence of pools, such as runs=({runs!r},).")
        for name in runs or ():
            if name not in every:
                raise ConfigurationError(f"runs names the pool {name!r}; this database has {', '.join(sorted(every))}.")
        return every if runs is None else list(runs)

    def _check_flavour(self, task: Task[Any, Any]) -> None:
        if task.takes is None or self.sessions.connection is not None:
            return
        # Said where the task is asked for, rather than in a log when it runs.
        self._pools.flavours.url("async" if issubclass(task.takes, AsyncSession) else "sync")

    def _check_memory(self, task: Task[Any, Any]) -> None:
        runner = self.outbox.runner
        if self.outbox.started is None and (runner is None or not runner.runs(task.settings.pool)):
            raise RunnerNotRunning(
                f"Task {task.name!r} is kept in memory (durable=False), and this process runs no tasks of pool "
                f"{task.settings.pool!r}, so it could never start. Start the runner (the application's lifespan after "
                "install(app, db), or `with db.running():`), or declare the task durable, which is the default."
            )

    def _note_no_runner(self, task: Task[Any, Any]) -> None:
        if self.expects_runner and not self._warned_no_runner and self.outbox.started is None:
            self._warned_no_runner = True
            logger.warning(
                "Task %r is queued, but no runner is alive in this process, because the application's lifespan has not "
                "run (a TestClient without `with`, an ASGITransport, a mounted sub-application). It waits in the "
                "database until a process with a runner finds it.", task.name,
            )  # fmt: skip

    def _bind_of(self, session: Session) -> Engine | Connection:
        try:
            from aftercommit.records.tables import TaskRecord

            # As SQLAlchemy itself calls it: routing by its recipe reads the mapper's class.
            bind = session.get_bind(mapper=inspect(TaskRecord))
        except UnboundExecutionError as exc:
            raise HandOverError(
                "This session has no bind for the table aftercommit_task, so the task's record could not be written in "
                "its transaction. Give the session a bind: sessionmaker(bind=engine), or "
                "binds={…, aftercommit.TaskRecord: engine}."
            ) from exc
        except Exception as exc:
            raise HandOverError(
                f"get_bind of {type(session).__qualname__} was asked where the task's record belongs, with the mapper "
                f"of aftercommit.TaskRecord, and raised {type(exc).__name__}: {exc}. Have it return the engine of the "
                "database that the tasks are in."
            ) from exc
        if session.twophase:
            raise HandOverError(
                "This session commits in two phases, and a task could start before the second. Hand over with a plain "
                "session."
            )
        if self.sessions.connection is not None and not isinstance(bind, Connection):
            raise HandOverError(
                "This session has an engine of its own, while the database is replaced by a test's connection: the "
                "task's record, and what the session writes, would go to the real database. Bind the session to that "
                "connection, or take one of db.session()."
            )
        engine = bind.engine
        known = self._ours.get(engine)
        if known is None:
            known = self._ours[engine] = self._is_ours(engine)
        if not known:
            raise HandOverError(
                f"This session is on another database ({render(engine.url)}) than this Database "
                f"({self._pools.shown}). The "
                "task's record would be written where nobody looks for it. Give Database the URL that the session's "
                "engine has, or hand over with a session of this one."
            )
        if autocommits(bind) and self.sessions.connection is None:
            raise HandOverError(
                "This session is in AUTOCOMMIT: there is no transaction whose commit the task could wait for. Hand "
                "over "
                "with a session that has one."
            )
        return bind

    def _is_ours(self, engine: Engine) -> bool:
        joined = self.sessions.connection
        if joined is not None:
            return joined.engine.url == engine.url
        return identity(engine.url) == identity(self._pools.flavours.given)

    def forget_binds(self) -> None:
        """Look at every engine anew: the database was replaced."""
        self._ours = WeakKeyDictionary()


class _Decorator:
    """What ``@db.task(…)`` returns, for type checkers."""

    @overload
    def __call__(self, function: Callable[Concatenate[A, P], Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[S, P], R], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any: ...


def _pool_settings(pool: PoolSettings | None, pools: Mapping[str, PoolSettings]) -> dict[str, PoolSettings]:
    if pool is not None and REQUEST in pools:
        raise ConfigurationError("The request pool is described twice: by pool= and by pools={'request': …}. Keep one.")
    for name, settings in pools.items():
        if name == BOOKKEEPING:
            raise ConfigurationError(f"The pool {name!r} is the library's own. Choose another name.")
        if not isinstance(settings, PoolSettings):
            raise ConfigurationError(f"pools[{name!r}] is {type(settings).__name__}: write PoolSettings(…).")
        if not 1 <= len(name) <= 40:  # noqa: PLR2004  # it becomes part of application_name, which PostgreSQL cuts at 63
            raise ConfigurationError(f"The pool name {name!r} must have 1 to 40 characters.")
    return {**_DEFAULTS, **({} if pool is None else {REQUEST: pool}), **pools}


def _listening(url: str | URL) -> URL:
    found = flavours(url)
    if is_sqlite(found.given) or found.asynchronous is None:
        raise ConfigurationError(f"notify_url={render(found.given)!r}: only PostgreSQL has LISTEN. Leave it out.")
    return found.asynchronous


def _owner() -> Owner:
    """The code that opens a session, and what it runs in."""
    run = current_run()
    where = f"task {run.name!r}, attempt {run.attempt}" if run is not None else serving.get()
    return Owner("code" if where is None else f"code in {where}", user_line(behind=1))


def _note_fault(context: Any) -> None:
    note_fault(context)
    _note_batch_fault(context)
    explain_missing_table(context)
    if fault_of(context.sqlalchemy_exception or context.original_exception) is Fault.STALE:
        # A primary no longer, or plans from before a migration: it answers, so the pool would hand it out for ever.
        context.is_disconnect = True


def _set_up(engine: Engine) -> None:
    watch(engine)
    event.listen(engine, "handle_error", _note_fault)
    # First: whoever has ended does not wait for SQLite's lock.
    steps_of(engine).before_statement.insert(0, stop_at_statement)


def _note_batch_fault(context: ExceptionContext) -> None:
    # Only a batch that runs has to know, and then its room has been imported. Another thread may be at it just now.
    note = getattr(sys.modules.get("aftercommit.batches.chunks"), "note_fault", None)
    if note is not None:
        note(context)
