"""The database, and what is kept in it: files with their orders and bad lines, products, customers."""

import os
from datetime import UTC, date, datetime
from pathlib import Path
from uuid import UUID

from sqlalchemy import BigInteger, ForeignKey, Integer
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aftercommit import Database, PoolSettings

DATA = Path(os.environ.get("AFTERCOMMIT_DEMO_DIR", Path(__file__).parents[2] / "var" / "orders"))
DATA.mkdir(parents=True, exist_ok=True)
STOCK = 1_000_000  # units of a product, before anybody has ordered it

db = Database(
    os.environ.get("AFTERCOMMIT_DEMO_URL", f"sqlite:///{DATA / 'orders.db'}"),
    # Connections and places of their own: files never wait for events, nor requests for either.
    pools={"files": PoolSettings(pool_size=2), "events": PoolSettings(pool_size=4)},
    heartbeat=1.0,
    silent_after=5.0,  # what a killed process was at goes on after five seconds instead of thirty
)


class Base(DeclarativeBase):
    """Base of the tables. Sums of money and units outgrow 32 bits; SQLite numbers rows only by its own type."""

    type_annotation_map = {int: BigInteger().with_variant(Integer, "sqlite")}  # noqa: RUF012  # as SQLAlchemy wants it


class OrderFile(Base):
    """An uploaded file, and what has been found in it so far."""

    __tablename__ = "order_file"
    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[UUID]
    name: Mapped[str]
    size: Mapped[int]
    uploaded_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC).replace(tzinfo=None))
    status: Mapped[str] = mapped_column(default="queued")  # then processing, then completed or failed
    reason: Mapped[str | None]  # why it failed as a whole
    lines: Mapped[int | None]  # counted at the end, apart from the orders and the bad lines
    bad_lines: Mapped[int] = mapped_column(default=0)
    orders: Mapped[int] = mapped_column(default=0)
    units: Mapped[int] = mapped_column(default=0)
    cents: Mapped[int] = mapped_column(default=0)

    @property
    def path(self) -> Path:
        """Where its content is kept."""
        return DATA / f"{self.task_id}.csv"


class Order(Base):
    """An order. Its number is unique, so that it counts once, in however many files it stands."""

    __tablename__ = "order_line"
    file_id: Mapped[int] = mapped_column(ForeignKey(OrderFile.id), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str] = mapped_column(unique=True)
    ordered_on: Mapped[date]
    customer: Mapped[str]
    product: Mapped[str]
    quantity: Mapped[int]
    cents: Mapped[int]


class BadLine(Base):
    """A line that is no order, as it stands in the file, and why."""

    __tablename__ = "bad_line"
    file_id: Mapped[int] = mapped_column(ForeignKey(OrderFile.id), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    reason: Mapped[str]
    text: Mapped[str]


class Product(Base):
    """A product's inventory, kept by a handler of `OrderCreated`."""

    __tablename__ = "product"
    code: Mapped[str] = mapped_column(primary_key=True)
    inventory: Mapped[int]
    orders: Mapped[int]
    cents: Mapped[int]


class Customer(Base):
    """A customer's statistics, kept by another."""

    __tablename__ = "customer"
    code: Mapped[str] = mapped_column(primary_key=True)
    orders: Mapped[int]
    units: Mapped[int]
    cents: Mapped[int]
    last_order: Mapped[date]
