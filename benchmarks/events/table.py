"""The rows that are counted up, and the event that says which."""

from typing import Any

from pydantic import BaseModel
from sqlalchemy import Engine, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    """The tables."""


class Account(Base):
    """What is counted up."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]


class Waiting(Base):
    """The hand-written outbox."""

    __tablename__ = "waiting"

    id: Mapped[int] = mapped_column(primary_key=True)
    payload: Mapped[str]


class OrderCreated(BaseModel):
    """The event."""

    account: int


def events_of(count: int, *, hot: bool) -> list[OrderCreated]:
    """Return *count* events: for one row, or for a row each."""
    return [OrderCreated(account=1 if hot else number) for number in range(1, count + 1)]


def fill(engine: Engine, count: int) -> None:
    """Make the rows."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Account), [{"id": number, "n": 0} for number in range(1, count + 1)])


def check(engine: Engine, count: int, *, hot: bool) -> None:
    """See that every event has taken effect, once.

    Raises:
        AssertionError: If not.
    """
    with Session(engine) as session:
        found = session.scalar(select(func.sum(Account.n))), session.scalar(select(func.max(Account.n)))
    assert found == (count, count if hot else 1), found


def new_engine(url: str, width: int) -> AsyncEngine:
    """Make an engine as a careful author does: on SQLite, every transaction takes the write lock at its beginning."""
    engine = create_async_engine(url, pool_size=width, max_overflow=0)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine.sync_engine, "connect")
        def set_up(connection: Any, _record: Any) -> None:
            connection.isolation_level = None
            cursor = connection.cursor()
            for pragma in ("journal_mode = WAL", "busy_timeout = 60000", "foreign_keys = ON"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
