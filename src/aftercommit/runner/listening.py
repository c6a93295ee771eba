"""Who tells other processes of work, and who listens to them: NOTIFY and LISTEN on PostgreSQL.

Both only save time. What is not heard is found by polling.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from aftercommit.pools import network
from aftercommit.pools.options import connect_args, engine_url
from aftercommit.records import notifying
from aftercommit.runner.bookkeeper import Bookkeeper
from aftercommit.wording import told, without_values

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from aftercommit.pools import Pools

__all__ = ["Herald", "Listener"]

logger = logging.getLogger(__name__)

_BETWEEN_NEWS: Final = 0.02
"""Seconds: what others wait for at most to hear of work, and how often everybody is woken at most."""
_ECHO_SECONDS: Final = 5.0
_CONNECTING_SECONDS: Final = 2.0
_AGAIN_SECONDS: Final = (1.0, 30.0)


class Herald:
    """Tells other processes that something was queued: off the write path, and many at once.

    Args:
        books: Where it is sent from; woken when there is something to send. None: a bookkeeper of its own, for a
            process that only hands over.
        pools: For that one.
    """

    def __init__(self, books: Bookkeeper | None, pools: Pools) -> None:
        self._books = books or Bookkeeper(pools, self._round)
        self._is_mute = pools.is_sqlite
        self._lock = threading.Lock()
        self._pools: set[str] = set()
        self._look = False
        self._not_before = 0.0

    def start(self) -> None:
        """Start its own bookkeeper."""
        if not self._is_mute:
            self._books.start()

    def stop(self) -> None:
        """Send what is left, and stop its own bookkeeper."""
        if not self._is_mute:
            self._books.submit(self._send)
            self._books.stop(5.0)

    def tell(self, pool: str) -> None:
        """Have it said soon that *pool* has something queued. No I/O."""
        if self._is_mute:
            return
        with self._lock:
            is_new = pool not in self._pools
            self._pools.add(pool)
        if is_new:
            self._books.wake()

    def call(self) -> None:
        """Have it said soon that something else was changed: everybody is to look. No I/O."""
        if self._is_mute:
            return
        with self._lock:
            is_new, self._look = not self._look, True
        if is_new:
            self._books.wake()

    def due(self) -> float | None:
        """Seconds until there is something to send; None if there is nothing."""
        with self._lock:
            return max(0.0, self._not_before - time.monotonic()) if self._pools or self._look else None

    def send(self) -> None:
        """Send what there is; on the bookkeeping thread."""
        self._books.execute(self._send)

    def _send(self, connection: Any) -> None:
        with self._lock:
            pools, self._pools = self._pools, set()
            look, self._look = self._look, False
            self._not_before = time.monotonic() + _BETWEEN_NEWS
        if pools or look:
            notifying.notify(connection, pools, look=look)

    def _round(self) -> float:
        due = self.due()
        if due == 0.0:
            try:
                self.send()
            except Exception as exc:  # whatever it was, they will find it
                logger.debug("Other processes could not be told; they will poll", exc_info=without_values(exc))
            due = self.due()
        return 3600.0 if due is None else due


class Listener:
    """Listens on a connection of its own, in the runner's event loop.

    Trusted only once it has heard itself: through a transaction pooler LISTEN is accepted, and nothing ever comes.

    Args:
        url: Where to listen.
        connect_args: The application's own, for its async engines.
        heard: Called with each piece of news.
    """

    def __init__(self, url: URL, connect_args: Mapping[str, Any], heard: Callable[[notifying.News], None]) -> None:
        self._url = url
        self._connect_args = connect_args
        self._heard = heard
        self._echo = uuid4().hex
        self._echoed = asyncio.Event()
        self._hearing = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.is_trusted = False

    def start(self) -> None:
        """Start listening; a database that cannot be reached is tried again for ever."""
        self._task = asyncio.create_task(self._listen(), name="aftercommit:listener")

    async def stop(self) -> None:
        """Stop, and close the connection."""
        task, self._task = self._task, None
        self.is_trusted = False
        self._stopping.set()
        if task is None:
            return
        # Not cancelled, unless it takes too long: a connection that is just being opened would be left open.
        await asyncio.wait({task}, timeout=_CONNECTING_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _listen(self) -> None:
        delay, longest = _AGAIN_SECONDS
        url = engine_url(self._url)
        options = connect_args("aftercommit:listener", self._url, self._connect_args)
        while not self._stopping.is_set():
            engine = create_async_engine(url, poolclass=NullPool, connect_args=options)
            network.set_up(engine.sync_engine)
            try:
                async with engine.connect() as connection:
                    # Not the engine: SQLAlchemy's first questions stay in a transaction, or they would fail on asyncpg
                    # behind a pooler, and SQLAlchemy 2.0 then leaves the connection open.
                    await connection.execution_options(isolation_level="AUTOCOMMIT")
                    await self._hear(connection, engine)
            except Exception as exc:  # noqa: BLE001  # whatever it was, polling goes on, and so does this
                logger.log(
                    logging.INFO if self.is_trusted else logging.DEBUG,
                    "Listening to other processes was cut off (%s); polling goes on", told(exc),
                )  # fmt: skip
            finally:
                await engine.dispose()
            delay = _AGAIN_SECONDS[0] if self.is_trusted else min(delay * 2, longest)
            self.is_trusted = False
            await self._first(self._stopping.wait(), seconds=delay)

    async def _hear(self, connection: AsyncConnection, engine: AsyncEngine) -> None:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await connection.exec_driver_sql(f"LISTEN {notifying.CHANNEL}")
        self._echoed.clear()
        self._hearing.clear()
        hearing = asyncio.create_task(self._by_driver(driver), name="aftercommit:hearing")
        try:
            # asyncpg drops what comes before it knows whom to tell.
            await self._first(self._hearing.wait(), hearing)
            await self._try_echo(engine, hearing)
            await self._first(self._stopping.wait(), hearing)
            if hearing.done():
                # The connection was lost, and this says how.
                hearing.result()
        finally:
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)

    async def _first(
        self, waiting: Coroutine[Any, Any, Any], *others: asyncio.Task[Any], seconds: float | None = None
    ) -> None:
        """Wait for one thing or another."""
        task = asyncio.create_task(waiting)
        try:
            await asyncio.wait({task, *others}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _by_driver(self, driver: Any) -> None:
        """Hand on what comes, until the connection is lost, which raises."""
        if hasattr(driver, "notifies"):
            self._hearing.set()
            async for each in driver.notifies():
                self._take(each.payload)
            raise ConnectionError("the connection was closed")
        lost = asyncio.Event()
        driver.add_termination_listener(lambda _: lost.set())
        await driver.add_listener(notifying.CHANNEL, lambda _c, _p, _ch, payload: self._take(payload))
        self._hearing.set()
        await lost.wait()
        raise ConnectionError("the connection was closed")

    def _take(self, payload: str) -> None:
        news = notifying.read(payload)
        if news.echo == self._echo:
            self._echoed.set()
        self._heard(news)

    async def _try_echo(self, engine: AsyncEngine, hearing: asyncio.Task[None]) -> None:
        """Speak to ourselves, by another connection; without an answer nothing is believed."""
        async with engine.begin() as other:
            await other.run_sync(notifying.notify, (), echo=self._echo)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await self._first(self._echoed.wait(), hearing, stopping, seconds=_ECHO_SECONDS)
        finally:
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)
        self.is_trusted = self._echoed.is_set()
        if not (self.is_trusted or hearing.done() or self._stopping.is_set()):
            logger.info(
                "LISTEN brings nothing here, as behind a transaction pooler: this process looks for work of others "
                "every few seconds. Give Database(…, notify_url=…) a URL that goes past the pooler."
            )
