"""The soak's application: a ``Database``, a way to write a task once for both flavours, and ways to break it.

``SOAK_BROKEN`` in the environment breaks the application on purpose, with public names only, each time so that it
behaves as the library would with that fault: the soak must find each of them within seconds.
"""

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from aftercommit import Database, PoolSettings, Retry, Task
from benchmarks.soak.pooler import driver_options
from benchmarks.soak.tables import effect

BROKEN = os.environ.get("SOAK_BROKEN", "")
VARIANTS = {
    "fence": "effects are committed unfenced, by a COMMIT sent as text",
    "isolation": "tasks run at READ COMMITTED, where counting by reading and writing loses updates",
    "on_failure": "on_failure counts in a transaction of its own, at READ COMMITTED",
    "key": "a keyed task is handed over before its row is committed",
    "early": "tasks are handed over in a transaction of their own, before the request's commit",
    "late": "tasks are handed over in a transaction of their own, after the request's commit",
}
"""What ``SOAK_BROKEN`` may be, and what it breaks."""

PATIENT = Retry(attempts=1_000_000, base=0.05, cap=0.5)
GRACE, HEARTBEAT, SILENT_AFTER = 1.0, 0.4, 2.0
Body = Callable[[Session, str], None]


class Flaky(Exception):  # it is what the task is
    """Passes at the third attempt."""


class Declined(Exception):  # it is what happened
    """Never passes."""


class Shop:
    """The application on one driver.

    Args:
        url: Of the database, by the driver under test.
        notify_url: Past the pooler, if there is one.

    Attributes:
        db: The database.
        is_async: Whether its tasks and requests are ``async def``.
        tasks: By name.
        outside: A plain engine on the same database.
    """

    def __init__(self, url: str, *, notify_url: str | None = None) -> None:
        self.is_async = any(each in url for each in ("asyncpg", "aiosqlite"))
        self.is_sqlite = url.startswith("sqlite")
        self.db = Database(
            url,
            heartbeat=HEARTBEAT,
            silent_after=SILENT_AFTER,
            pools={"default": PoolSettings(max_overflow=2, concurrency=5, pool_timeout=10.0)},
            notify_url=notify_url,
            **(driver_options("asyncpg" if self.is_async else "psycopg") if notify_url is not None else {}),
        )
        self.tasks: dict[str, Task[..., Any]] = {}
        self.outside = sa.create_engine(url.replace("asyncpg", "psycopg").replace("aiosqlite", "pysqlite"))
        is_level_broken = BROKEN == "isolation" and not self.is_sqlite
        self._level = "READ COMMITTED" if is_level_broken else None
        engine = self.db.async_engine().sync_engine if self.is_async else self.db.engine()
        sa.event.listen(engine, "commit", busy)

    def task(self, **options: Any) -> Callable[[Body], Body]:
        """Declare a task of a body that is written for a ``Session``, for the flavour under test."""
        given = {"retry": PATIENT, "on_failure": self.on_failure, "isolation_level": self._level, **options}

        def decorate(body: Body) -> Body:
            def whole(session: Session, label: str) -> None:
                body(session, label)
                if BROKEN == "fence":
                    session.execute(sa.text("COMMIT"))
                    doze(0.3, is_async=self.is_async)

            def plain(session: Session, label: str) -> None:
                whole(session, label)

            async def native(session: AsyncSession, label: str) -> None:
                await session.run_sync(whole, label)

            declare: Any = self.db.task(name=body.__name__, **given)
            self.tasks[body.__name__] = declare(native if self.is_async else plain)
            return body

        return decorate

    def handler(self, event_type: type[Any], **options: Any) -> Callable[[Callable[[Session, Any], None]], None]:
        """Declare a handler of an event in the same way."""

        def decorate(body: Callable[[Session, Any], None]) -> None:
            def plain(session: Session, event: Any) -> None:
                body(session, event)

            async def native(session: AsyncSession, event: Any) -> None:
                await session.run_sync(body, event)

            chosen: Any = native if self.is_async else plain
            chosen.__annotations__["event"] = event_type
            given = {"retry": PATIENT, "on_failure": self.on_failure, "isolation_level": self._level, **options}
            self.db.on(event_type, name=body.__name__, **given)(chosen)

        return decorate

    def hand_over(self, session: Session, name: str, label: str, **options: Any) -> Any:
        """Ask for a task within the transaction of *session*."""
        task = self.tasks[name]
        chosen = task.with_options(**options) if options else task

        def apart(pause: float = 0.0) -> Any:
            time.sleep(pause)
            with Session(self.outside) as other:
                handle = self.db.after_commit(other, chosen, label)
                other.commit()
            time.sleep(0.05)
            return handle

        if BROKEN == "early" or (BROKEN == "key" and "key" in options):
            return apart()
        if BROKEN == "late":
            return sa.event.listen(session, "after_commit", lambda _: apart(0.2), once=True)
        return self.db.after_commit(session, chosen, label)

    def doze(self, seconds: float) -> None:
        """Take that long, as slow work does."""
        doze(seconds, is_async=self.is_async)

    @property
    def on_failure(self) -> Callable[..., None]:
        """What is called for every task that fails for good: it counts, too."""

        def compensate(session: Session, error: BaseException, argument: Any) -> None:  # its signature
            label = getattr(argument, "label", argument)
            if BROKEN != "on_failure":
                effect(session, label, "on_failure", counter="failures")
                return
            engine = session.get_bind()
            with Session(engine.engine.execution_options(isolation_level="READ COMMITTED")) as other:
                effect(other, label, "on_failure", counter="failures")
                other.commit()

        return compensate


def doze(seconds: float, *, is_async: bool) -> None:
    """Sleep, on the event loop where there is one."""
    if is_async:
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def busy(_connection: sa.Connection) -> None:
    """An ordinary process is sometimes busy for 30 ms, also between a request's last statement and its COMMIT."""
    if time.monotonic_ns() // 1000 % 3 == 0:
        time.sleep(0.03)
