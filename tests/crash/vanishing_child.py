"""A process that locks a row in a task or in a request, and stands still, for its network to be taken away.

``python -m tests.crash.vanishing_child URL DRIVER WHERE``: it writes ``LISTED`` when its worker has listed the backend
that holds the lock, and blocks.
"""

import logging
import os
import sys
import threading
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Counter, Workshop

HEARTBEAT, SILENT_AFTER = 0.2, 2.0
IN_A_TASK, IN_A_REQUEST, IN_A_HEARTBEAT, IDLE = "task", "request", "heartbeat", "idle"
ALL_LISTED = (
    "SELECT NOT EXISTS (SELECT 1 FROM pg_stat_activity a WHERE a.datname = current_database() "
    "AND a.application_name IN ('aftercommit:default', 'aftercommit:request', 'aftercommit:aftercommit') "
    "AND a.pid <> pg_backend_pid() AND NOT EXISTS (SELECT 1 FROM aftercommit_worker w, json_array_elements(w.backends) "
    "AS e (b) WHERE CAST(e.b ->> 0 AS integer) = a.pid)) AND EXISTS (SELECT 1 FROM aftercommit_worker w "
    "WHERE w.backends IS NOT NULL)"
)


def make(url: str, driver: str, *, stand_still: Any = None, **options: Any) -> Workshop:
    """The application: one task that counts up a row."""
    options = {"heartbeat": HEARTBEAT, "silent_after": SILENT_AFTER, **options}
    shop = Workshop(DatabaseUnderTest(url=url, driver=driver), **options)

    @shop.task()
    def count(session: Session, label: str) -> None:
        session.get_one(Counter, 1).n += 1
        session.flush()
        if stand_still is not None:
            stand_still()

    shop.count = count  # type: ignore[attr-defined]
    return shop


def wait_until_listed(shop: Workshop) -> None:
    """Wait until each backend of ours stands in the worker's row."""
    with shop.outside.connect() as connection:
        pause = threading.Event()
        for _ in range(int(TIMEOUT / 0.02)):
            if connection.scalar(sa.text(ALL_LISTED)):
                return
            pause.wait(0.02)
    raise AssertionError("not every backend was listed")


def main() -> None:
    """Do what the arguments say."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    url, driver, where = sys.argv[1:]
    locked, forever = threading.Event(), threading.Event()

    def stand_still() -> None:
        locked.set()
        forever.wait()

    shop = make(url, driver, stand_still=stand_still)

    async def hold() -> None:
        session = AsyncSession(shop.db.async_engine("request"))
        await session.execute(sa.update(Counter).values(n=Counter.n + 1))
        locked.set()
        shop.held = session  # type: ignore[attr-defined]  # or it would be collected

    with shop.running():
        if where == IN_A_TASK:
            shop.ask(shop.count, "")  # type: ignore[attr-defined]
        elif where == IN_A_REQUEST and shop.is_async:
            shop.on_loop(hold())
        elif where == IN_A_REQUEST:
            session = Session(shop.db.engine("request"))
            session.execute(sa.update(Counter).values(n=Counter.n + 1))
            locked.set()
        elif where == IN_A_HEARTBEAT:
            wait_until_listed(shop)
            runner = shop.db.runner
            assert runner is not None

            def in_between(connection: sa.Connection) -> None:
                connection.exec_driver_sql("UPDATE aftercommit_worker SET host = host")
                connection.exec_driver_sql("UPDATE counter SET n = n + 1")
                stand_still()

            runner.books.submit(in_between)
        else:
            locked.set()
        assert locked.wait(TIMEOUT)
        if where != IN_A_HEARTBEAT:
            wait_until_listed(shop)
        print("LISTED", flush=True)  # noqa: T201  # the parent reads it
        forever.wait()


if __name__ == "__main__":
    main()
    os._exit(0)
