"""A process that works through a batch in a durable task, and stands still where it is to be killed.

``python -m tests.crash.batch_child URL DRIVER WORKERS POINT SIZE BAD``: POINT is ``handler:<id>`` (in the handler of
that record), ``commit:<n>`` (just before the n-th COMMIT of the pool) or empty: run all that is due. SIZE is that of a
chunk, BAD the records that fail, such as ``7,31``.
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy import event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aftercommit import Database

HEARTBEAT, SILENT_AFTER = 0.2, 1.0
COUNT, SIZE, BAD = 60, 7, frozenset({7, 31, 58})


class Base(DeclarativeBase):
    """Tables of an application."""


class Record(Base):
    """What the batch works on."""

    __tablename__ = "record"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(default=0)
    marks: Mapped[int] = mapped_column(default=0)


def stand_still() -> NoReturn:
    """Say where we are, and do nothing more."""
    print("AT", sys.argv[4], flush=True)  # noqa: T201  # its test reads this
    threading.Event().wait()
    raise AssertionError


def make(
    url: str,
    *,
    is_async: bool,
    workers: int,
    point: str = "",
    size: int = SIZE,
    bad: AbstractSet[int] = BAD,
    before: Callable[[Session, Record], None] | None = None,
) -> Database:
    """The application: one task, which is one batch."""
    db = Database(url, heartbeat=HEARTBEAT, silent_after=SILENT_AFTER)

    def handle(session: Session, record: Record) -> None:
        record.n += 1
        if before is not None:
            before(session, record)
        if point == f"handler:{record.id}":
            session.flush()
            stand_still()
        if record.id in bad:
            raise ValueError("bad")

    def mark(session: Session, record: Record, error: BaseException) -> None:
        record.marks += 1

    options: dict[str, Any] = {"size": size, "workers": workers, "on_error": mark}
    if is_async:

        @db.task(name="work")
        async def async_work() -> int:
            return (await db.async_run_batch(select(Record), handle, **options)).total

    else:

        @db.task(name="work")
        def work() -> int:
            return db.run_batch(select(Record), handle, **options).total

    return db


def stop_at(db: Database, point: str, *, is_async: bool) -> None:
    """Have this process stand still at *point*."""
    kind, _, number = point.partition(":")
    if kind != "commit":
        return
    left = [int(number)]
    pool = db.async_engine("default").sync_engine if is_async else db.engine("default")

    def count(_connection: sa.Connection) -> None:
        left[0] -= 1
        if left[0] == 0:
            stand_still()

    event.listen(pool, "commit", count)


async def async_main(db: Database) -> None:
    """Run all that is due on a loop of our own."""
    async with db.running():
        await db.async_drain(60.0)


def main() -> None:
    """Do what the arguments say."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    url, driver, workers, point, size, bad = sys.argv[1:]
    is_async = driver in {"asyncpg", "aiosqlite"}
    numbers = {int(number) for number in bad.split(",") if number}
    db = make(url, is_async=is_async, workers=int(workers), point=point, size=int(size), bad=numbers)
    stop_at(db, point, is_async=is_async)
    if is_async:
        asyncio.run(async_main(db))
    else:
        with db.running():
            db.drain(60.0)
    print("DRAINED", flush=True)  # noqa: T201  # as above


if __name__ == "__main__":
    main()
    # Whatever is left must not keep the process: that is what the parent waits for.
    os._exit(0)
