"""The work, the same for everybody: one row, loaded by its key and changed."""

import os
from time import perf_counter_ns

from sqlalchemy import BigInteger, Engine, create_engine, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

URL = "BENCHMARK_URL"
KEYS = "BENCHMARK_KEYS"
WIDTH = "BENCHMARK_WIDTH"


class Base(DeclarativeBase):
    """The application's own table."""


class Item(Base):
    """What a task changes.

    Attributes:
        id: From 1, without gaps where the rows were there before.
        changed: How often.
        begun: When the task that changed it last began, in nanoseconds of this machine's monotonic clock.
    """

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    changed: Mapped[int] = mapped_column(default=0)
    begun: Mapped[int | None] = mapped_column(BigInteger)


def change(session: Session, key: int) -> None:
    """Do the work; the caller commits."""
    begun = perf_counter_ns()
    item = session.get_one(Item, key)
    item.changed += 1
    item.begun = begun


async def async_change(session: AsyncSession, key: int) -> None:
    """Do the work; the caller commits."""
    begun = perf_counter_ns()
    item = await session.get_one(Item, key)
    item.changed += 1
    item.begun = begun


def url(driver: str | None = None) -> str:
    """Return the database's URL, as given or with another driver; for libpq if that is empty."""
    given = os.environ[URL]
    if driver is None:
        return given
    return given.replace("+asyncpg", f"+{driver}" if driver else "").replace("+psycopg", f"+{driver}" if driver else "")


def keys() -> int:
    """Return how many rows there are to change."""
    return int(os.environ[KEYS])


def width() -> int:
    """Return how many tasks may run at once, each with its connection."""
    return int(os.environ[WIDTH])


def engine(driver: str | None = None) -> Engine:
    """Make an engine with a connection for each task."""
    made = create_engine(url(driver), pool_size=width(), max_overflow=0)
    if made.dialect.name == "sqlite":
        event.listen(made, "connect", _set_up_sqlite)
    return made


def async_engine(driver: str | None = None) -> AsyncEngine:
    """Make an async engine with a connection for each task."""
    made = create_async_engine(url(driver), pool_size=width(), max_overflow=0)
    if made.dialect.name == "sqlite":
        event.listen(made.sync_engine, "connect", _set_up_sqlite)
    return made


def _set_up_sqlite(connection: object, _record: object) -> None:
    """Make SQLite fit for more than one writer, as every guide says."""
    cursor = connection.cursor()  # type: ignore[attr-defined]  # a driver's connection
    for pragma in ("journal_mode = WAL", "busy_timeout = 30000", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def prepare(engine: Engine, rows: int) -> None:
    """Make the table, with *rows* in it."""
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        if rows:
            connection.execute(insert(Item), [{"id": key, "changed": 0} for key in range(1, rows + 1)])


def changed(engine: Engine) -> int:
    """Return how many rows have been changed."""
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).where(Item.changed > 0)) or 0


def changed_wrongly(engine: Engine) -> int:
    """Return how many rows have been changed more often than once."""
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).where(Item.changed > 1)) or 0
