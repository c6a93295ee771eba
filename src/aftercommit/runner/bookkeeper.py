"""Short transactions of the library's own, on a thread and a connection of their own.

A blocked event loop, a full pool, a task that hangs: none of them may hold up a heartbeat, a claim or a rescue.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import create_engine, event

from aftercommit.pools import network
from aftercommit.pools.pools import BOOKKEEPING, Pool
from aftercommit.pools.sqlite import AUTOCOMMIT, be_impatient
from aftercommit.pools.views import LEVEL, async_view_of, view_of
from aftercommit.tasks.transient import is_disconnect
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Engine

    from aftercommit.pools import Pools

__all__ = ["Bookkeeper", "BooksClosed"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LONG: Final = 3600.0
_LOCK_SECONDS: Final = 0.5
_LIMIT_WAITS_HERE: Final = "SET LOCAL lock_timeout = 1000"


class BooksClosed(RuntimeError):
    """The bookkeeping thread has ended, so that nothing can be written by it any more."""


class Bookkeeper:
    """One thread that runs what it is given, and between jobs a round of its owner's.

    Args:
        pools: Where its connection comes from.
        round: Called on the thread whenever something was asked for or a round is due; returns the seconds until
            the next one.
        between: Called between two jobs, for what must not wait for all of them.
    """

    def __init__(
        self,
        pools: Pools,
        round: Callable[[], float] | None = None,  # noqa: A002
        *,
        between: Callable[[], None] | None = None,
    ) -> None:
        self._pools = pools
        # Nobody else's, so that db.async_dispose() on the application's loop leaves alone what belongs to this one.
        self._pool = Pool(BOOKKEEPING, pools[BOOKKEEPING].settings, pools)
        self._round = round
        self._between = between
        self._is_direct = False
        self._is_limited = False
        self._listened: Engine | None = None
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Callable[[Connection], Any], Future[Any]]] = deque()
        self._woken = False
        self._stopping = False
        self._given_up = False
        self._ended = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.Runner | None = None
        self._connection: Connection | None = None

    @property
    def is_direct(self) -> bool:
        """Whether no pooler is known to stand between us and the server."""
        return self._is_direct

    @is_direct.setter
    def is_direct(self, is_direct: bool) -> None:
        if is_direct and not self._is_direct:
            # The next connection is made with its limit, see _connecting.
            self._is_limited = False
            if self._loop is None:
                self._engine.dispose()
            else:
                # The connections alone: a new engine would ask the server what it is once more.
                self._loop.run(self._pool.async_engine.dispose())
        self._is_direct = is_direct

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._serve, name="aftercommit-bookkeeper", daemon=True)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Finish what was asked for, close the connection, and end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
            connection = self._connection
            if self._thread.is_alive() and connection is not None:
                # The server does not answer, and there are those who wait for what it was asked.
                self._given_up = True
                network.cut(connection)
                self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        """Whether it takes jobs."""
        return self._thread is not None and not self._stopping and not self._ended

    def wake(self) -> None:
        """Have a round made soon."""
        if self._woken:
            # The thread has not even looked at the last time.
            return
        with self._wake:
            self._woken = True
            self._wake.notify()

    def submit(self, work: Callable[[Connection], T]) -> Future[T]:
        """Have ``work(connection)`` run in a transaction, on the thread."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping or self._ended or self._thread is None:
                future.set_exception(BooksClosed("the runner has stopped"))
                return future
            self._jobs.append((work, future))
            self._wake.notify()
        return future

    def call(self, work: Callable[[Connection], T]) -> T:
        """Run ``work(connection)`` in a transaction and wait for it; from any thread, its own included."""
        if threading.current_thread() is self._thread:
            return self.execute(work)
        return self.submit(work).result()

    @property
    def is_asyncpg(self) -> bool:
        """Whether it has a small event loop of its own, for a driver that knows no sync calls."""
        return self._pools.is_async_only and not self._pools.is_sqlite

    async def async_call(self, work: Callable[[Connection], T]) -> T:
        """The same, from an event loop."""
        return await asyncio.wrap_future(self.submit(work))

    def execute(self, work: Callable[[Connection], T], *, autocommit: bool = False) -> T:
        """Run ``work(connection)`` now, on the bookkeeping thread only.

        Args:
            work: What to do.
            autocommit: Whether each statement may stand by itself, and so needs no BEGIN and no COMMIT.
        """
        done: list[bool] = []

        def work_once(connection: Connection) -> T:
            self._connection = connection
            result = work(connection)
            done.append(True)
            return result

        try:
            return self._execute(work_once, autocommit=autocommit)
        except Exception as exc:
            # The connection sat idle, and somebody closed it meanwhile: nothing was done yet, or was rolled back.
            if done or self._stopping or not is_disconnect(exc):
                raise
            self._drop_connections()
            return self._execute(work_once, autocommit=autocommit)
        finally:
            self._connection = None

    def _drop_connections(self) -> None:
        """A demoted primary goes on answering: its connections are no use, and the pool does not know it."""
        if self._loop is None:
            self._engine.dispose()
        else:
            self._loop.run(self._pool.async_dispose())

    def _execute(self, work: Callable[[Connection], T], *, autocommit: bool) -> T:
        if self._pools.is_sqlite:
            engine = view_of(self._engine, **{AUTOCOMMIT: True}) if autocommit else self._engine
            with engine.begin() as connection:
                return work(connection)
        # A pooler gives each transaction to another server: what limits the waiting for locks must be said in it, and
        # so there must be one. asyncpg even prepares first and executes then.
        autocommit = autocommit and self._is_limited
        engine = self._engine if self._loop is None else self._pool.async_engine.sync_engine
        if engine is not self._listened:
            # An async engine that was disposed is replaced.
            self._listened = engine
            network.before_connecting(engine, self._connecting)
        # Whatever the server's default: at a level with snapshots these would fail where they should wait and look.
        options = {LEVEL: "AUTOCOMMIT" if autocommit else "READ COMMITTED"}

        def work_in_time(connection: Connection) -> T:
            if not self._is_limited:
                connection.exec_driver_sql(_LIMIT_WAITS_HERE)
            return work(connection)

        if self._loop is None:
            with view_of(self._engine, **options).begin() as connection:
                return work_in_time(connection)

        async def run() -> T:
            async with async_view_of(self._pool.async_engine, **options).begin() as connection:
                return await connection.run_sync(work_in_time)

        return self._loop.run(run())

    def _serve(self) -> None:
        delay = 0.0
        try:
            self._open()
            while True:
                with self._wake:
                    if not (self._jobs or self._woken or self._stopping):
                        self._wake.wait(min(delay, _LONG))
                    if self._stopping and not self._jobs:
                        return
                    jobs = list(self._jobs)
                    self._jobs.clear()
                    self._woken = False
                for work, future in jobs:
                    self._do(work, future)
                    if self._between is not None:
                        self._between()
                delay = self._make_round()
        finally:
            self._close()

    def _do(self, work: Callable[[Connection], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if self._given_up:
            future.set_exception(BooksClosed("the database did not answer, and the runner has stopped"))
            return
        try:
            result = self.execute(work)
        except BaseException as exc:  # noqa: BLE001  # it is the caller's
            future.set_exception(exc)
        else:
            future.set_result(result)

    def _make_round(self) -> float:
        if self._round is None or self._stopping:
            return _LONG
        try:
            return self._round()
        except Exception as exc:
            # The thread is what keeps the worker alive for others: whatever it was, it must not end it.
            logger.error(  # noqa: TRY400  # without values
                "A round of the bookkeeping failed; it is made again in a second", exc_info=without_values(exc)
            )
            return 1.0

    def _open(self) -> None:
        pools = self._pools
        if not pools.is_async_only:
            self._engine = self._pool.engine
        elif pools.is_sqlite:
            # Python brings the sync driver along.
            url = pools.flavours.given.set(drivername="sqlite+pysqlite")
            self._engine = create_engine(url, connect_args={"isolation_level": None, "timeout": 10.0}, pool_size=1)
            pools.set_up(self._engine, self._pool.settings)
        else:
            # asyncpg knows no sync calls, so this thread has a small event loop of its own.
            self._loop = asyncio.Runner()
        if pools.is_sqlite:
            # Somebody may hold SQLite's write lock for long, and this thread has more to do than to wait for it.
            event.listen(self._engine, "connect", partial(be_impatient, seconds=_LOCK_SECONDS))

    def _connecting(self, _dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
        """Have no statement of ours wait for a lock for more than a second: whoever has it may stand still for hours.

        For good where there is surely no pooler, which would refuse it; there each transaction says it for itself.
        """
        self._is_limited = self._is_direct
        if not self._is_direct:
            return
        if self._loop is None:
            parameters["options"] = f"{parameters.get('options') or ''} -c lock_timeout=1000"
        else:
            parameters["server_settings"] = {**(parameters.get("server_settings") or {}), "lock_timeout": "1000"}

    def _close(self) -> None:
        try:
            if self._loop is not None:
                self._loop.run(self._pool.async_dispose())
                self._loop.close()
            else:
                self._engine.dispose()
        except Exception as exc:  # the connection may be gone, and so are we
            logger.debug("The bookkeeping connection could not be closed", exc_info=without_values(exc))
        with self._wake:
            self._ended = True
            for _work, future in self._jobs:
                future.set_exception(BooksClosed("the runner has stopped"))
            self._jobs.clear()
