"""A runner for the length of a ``with`` or an ``async with``."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from aftercommit.errors import ConfigurationError
from aftercommit.pools.pools import REQUEST
from aftercommit.runner.budgeting import check_budget, check_processes
from aftercommit.runner.listening import Herald
from aftercommit.watch.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from sqlalchemy import Connection, MetaData

    from aftercommit.pools.budget import Share
    from aftercommit.runner.following import Following
    from aftercommit.runner.outbox import Outbox
    from aftercommit.runner.rounds import Pace
    from aftercommit.runner.runner import Runner
    from aftercommit.sessions import SessionFactory

__all__ = ["Running"]

T = TypeVar("T")


class _Home(Protocol):
    """What a runner needs of its ``Database``."""

    outbox: Outbox
    sessions: SessionFactory
    following: Following

    def new_runner(self, pools: Sequence[str]) -> Runner:
        """Make one."""
        ...

    async def prepare_tables(self, *, create: bool | MetaData | None) -> bool:
        """Make or check the tables; whether there are any."""
        ...

    @property
    def pace(self) -> Pace:
        """How often workers look around."""
        ...

    def shares(self, runs: Sequence[str]) -> tuple[Share, ...]:
        """What one process may open."""
        ...

    async def async_call_anyhow(self, work: Callable[[Connection], T]) -> T:
        """Run ``work(connection)`` in a transaction."""
        ...


class Running:
    """Runs tasks while it is open. Async tasks run on the loop of ``async with``, or on one of its own.

    Args:
        home: The database.
        pools: Whose tasks run here; with none, nothing is started.
        grace: Seconds that running tasks get at the end.
        create_tables: Whether to make our tables first; None for SQLite only; a ``MetaData``: its tables as well.
        processes: How many processes share the server's connections; None to count them.
        strict: Whether to refuse to start where they may open more than it allows.
    """

    def __init__(
        self,
        home: _Home,
        pools: Sequence[str],
        *,
        grace: float,
        create_tables: bool | MetaData | None,
        processes: int | None,
        strict: bool,
    ) -> None:
        check_processes(processes)
        self._home = home
        self.pools = pools
        self._grace = grace
        self._create_tables = create_tables
        self._processes = processes
        self._strict = strict
        self._runner: Runner | None = None
        self._herald: Herald | None = None
        self._watchdog: Watchdog | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> None:
        """Start."""
        outbox = self._home.outbox
        durable = await self._home.prepare_tables(create=self._create_tables)
        if outbox.started is not None:
            # Replaced by a test.
            return
        check = partial(
            check_budget, self._home, self.pools, has_tables=durable, processes=self._processes, strict=self._strict
        )
        if not self.pools:
            await check()
            self._hand_over_only(durable=durable)
            self._watch()
            return
        if outbox.runner is not None:
            raise ConfigurationError(
                "The runner of this Database is running already in this process. One is enough: leave out the second "
                "db.running(), or the second install(app, db)."
            )
        runner = self._home.new_runner(self.pools)
        try:
            await runner.start(durable=durable, check=check)
        except BaseException:
            await asyncio.to_thread(runner.books.stop, 5.0)
            raise
        self._runner = runner
        outbox.runner = runner
        self._watch()

    async def __aexit__(self, *_: object) -> None:
        """Stop in order."""
        # First: what waits or streams must not keep the process for as long as it would like to.
        await asyncio.to_thread(self._home.following.stop)
        herald, self._herald = self._herald, None
        if herald is not None:
            self._home.outbox.herald = None
            await asyncio.to_thread(herald.stop)
        runner, self._runner = self._runner, None
        try:
            if runner is not None:
                await runner.stop(grace=self._grace)
        finally:
            if runner is not None:
                self._home.outbox.runner = None
            watchdog, self._watchdog = self._watchdog, None
            if watchdog is not None:
                await asyncio.to_thread(watchdog.stop)

    def _watch(self) -> None:
        self._watchdog = Watchdog(self._home.sessions.pools.report_late)
        self._watchdog.start()

    def _hand_over_only(self, *, durable: bool) -> None:
        """Tell other processes of what is queued here; they would find it by polling, only later."""
        if durable and self._home.outbox.herald is None:
            herald = Herald(None, self._home.sessions.pools)
            herald.start()
            self._herald = self._home.outbox.herald = herald

    def __enter__(self) -> None:
        """Start, with an event loop on a thread of its own for async tasks."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="aftercommit-loop", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._enter_own_loop(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop in order, and end the loop."""
        assert self._loop is not None  # noqa: S101  # made by __enter__
        try:
            asyncio.run_coroutine_threadsafe(self._leave_own_loop(), self._loop).result()
        finally:
            self._end_loop()

    async def _enter_own_loop(self) -> None:
        await self.__aenter__()
        if self._home.sessions.is_async_only and self._home.outbox.started is None:
            # The tables were looked at from this loop, and whoever opens a session will do so on another.
            await self._home.sessions.pools[REQUEST].async_dispose()

    async def _leave_own_loop(self) -> None:
        try:
            await self.__aexit__()
        finally:
            # Their connections belong to this loop, and nobody could close them after it.
            for name in self.pools:
                await self._home.sessions.pools[name].async_dispose()

    def _end_loop(self) -> None:
        loop, thread = self._loop, self._thread
        assert loop is not None  # noqa: S101  # made by __enter__
        assert thread is not None  # noqa: S101  # made by __enter__
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
