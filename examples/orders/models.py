"""The database, and what is kept in it: files and their orders."""

import os
from datetime import UTC, date, datetime
from pathlib import Path
from uuid import UUID

from sqlalchemy import JSON, BigInteger, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aftercommit import Database, PoolSettings

DATA = Path(os.environ.get("AFTERCOMMIT_DEMO_DIR", Path(__file__).parents[2] / "var" / "orders"))
DATA.mkdir(parents=True, exist_ok=True)
db = Database(
    os.environ.get("AFTERCOMMIT_DEMO_URL", f"sqlite:///{DATA / 'orders.db'}"),
    pools={"files": PoolSettings(pool_size=2)},  # two files at once, on connections of their own
    heartbeat=1.0,
    silent_after=5.0,  # a file whose process was killed goes on after five seconds instead of thirty
)


class Base(DeclarativeBase):
    """Base of the tables."""


class OrderFile(Base):
    """An uploaded file, and what became of it."""

    __tablename__ = "order_file"
    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[UUID]
    name: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    uploaded_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC).replace(tzinfo=None))
    status: Mapped[str] = mapped_column(default="queued")  # then processing, then completed or failed
    reason: Mapped[str | None]
    orders: Mapped[int] = mapped_column(default=0)
    cents: Mapped[int] = mapped_column(BigInteger, default=0)
    refused: Mapped[int] = mapped_column(default=0)
    refusals: Mapped[list[list[int | str]]] = mapped_column(JSON, default=list)  # line and reason, of the first 100


class Order(Base):
    """A line of a file."""

    __tablename__ = "order_line"
    file_id: Mapped[int] = mapped_column(ForeignKey(OrderFile.id), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]
    ordered_on: Mapped[date]
    customer: Mapped[str]
    product: Mapped[str]
    quantity: Mapped[int]
    cents: Mapped[int] = mapped_column(BigInteger)
