"""Read by type checkers only: what users write, and what their editor infers. Nothing here may be an error."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, ParamSpec, TypeVar, assert_type

from pydantic import BaseModel
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from sqlmodel import Session as SQLModelSession

from aftercommit import BatchReport, Database, EventHandle, PoolSettings, Retry, Task, TaskHandle, current_run

P = ParamSpec("P")
R = TypeVar("R")
db = Database("sqlite:///app.db", pool=PoolSettings(pool_size=2), pools={"files": PoolSettings()})


class Base(DeclarativeBase):
    """Tables."""


class Order(Base):
    """A row."""

    __tablename__ = "order"
    id: Mapped[int] = mapped_column(primary_key=True)


# --- tasks ------------------------------------------------------------------------------------------------------


@db.task
def plain(session: Session, order: Order, note: str = "", *, urgent: bool = False) -> int:
    """A task with a session."""
    return 1


@db.task
async def asynchronous(session: AsyncSession, order: Order) -> str:
    """An async task."""
    return ""


@db.task
def without_session(number: int) -> None:
    """A task that needs no session."""


@db.task
async def async_without_session(number: int) -> None:
    """An async task that needs no session."""


@db.task
def annotated(session: Annotated[Session, "the run's own"], number: int) -> None:
    """As people write their dependencies."""


@db.task
def sqlmodel(session: SQLModelSession, number: int) -> None:
    """SQLModel's session is a session."""


def mark_failed(session: Session, error: BaseException, order: Order) -> None:
    """What happens when it has failed for good."""


@db.task(
    name="configured",
    aliases=("old",),
    pool="files",
    retry=Retry(attempts=2, on=(OSError,)),
    timeout=3.0,
    repeatable=True,
    isolation_level="SERIALIZABLE",
    on_failure=mark_failed,
)
def configured(session: Session, order: Order) -> None:
    """Every option."""


@db.task(durable=False)
async def configured_async(session: AsyncSession, numbers: list[int]) -> Sequence[int]:
    """Options on an async task."""
    return numbers


@db.task(pool="files")
def configured_without_session(*numbers: int) -> None:
    """Options on a task without a session."""


# --- asking for them --------------------------------------------------------------------------------------------


def ask(
    session: Session,
    async_session: AsyncSession,
    scoped: scoped_session[Session],
    async_scoped: async_scoped_session[AsyncSession],
    sqlmodel_session: SQLModelSession,
) -> None:
    """Every kind of session, every kind of task."""
    order = Order()
    assert_type(db.after_commit(session, plain, order), TaskHandle)
    db.after_commit(session, plain, order, "soon", urgent=True)
    db.after_commit(async_session, asynchronous, order)
    db.after_commit(async_session, plain, order)
    db.after_commit(scoped, without_session, 1)
    db.after_commit(async_scoped, async_without_session, number=1)
    db.after_commit(sqlmodel_session, annotated, 1)
    db.after_commit(session, sqlmodel, 1)
    db.after_commit(sessionmaker[Session]()(), configured, order)
    db.after_commit(session, configured_async, [1])
    db.after_commit(session, configured_without_session, 1, 2, 3)
    db.after_commit(session, plain.with_options(delay=3.0, key="k", priority=1), order, urgent=True)
    db.after_commit(session, plain.with_options(at=datetime.now(UTC)), order)


def result(task: Task[P, R]) -> R:
    """Whatever the task returns."""
    raise NotImplementedError


def infer(session: Session) -> None:
    """What an editor shows."""
    handle = db.after_commit(session, plain, Order())
    assert_type(handle.created, bool | None)
    assert_type(result(plain), int)
    assert_type(result(plain.with_options(key="k")), int)
    assert_type(result(asynchronous), str)
    assert_type(result(without_session), None)
    assert_type(result(async_without_session), None)
    assert_type(result(configured), None)
    assert_type(result(configured_async), Sequence[int])
    run = current_run()
    if run is not None:
        run.progress(1, 2)


# --- events -----------------------------------------------------------------------------------------------------


@dataclass
class Placed:
    """An event."""

    order: int


@dataclass
class PlacedAbroad(Placed):
    """A more special one."""

    country: str


class Paid(BaseModel):
    """An event as a model."""

    order: int


@db.on(Placed)
def keep_stock(session: Session, event: Placed) -> int:
    """A handler with a session."""
    return event.order


@db.on(Paid, name="count", pool="files", retry=Retry(attempts=2), isolation_level="READ COMMITTED", timeout=3.0)
async def count_paid(session: AsyncSession, event: Paid) -> str:
    """An async one, with options."""
    return ""


@db.on(Placed)
def tell(event: Placed) -> None:
    """One that needs no session."""


@db.on(Placed)
async def async_tell(event: Placed) -> None:
    """One that needs no session, and awaits."""


@db.on(PlacedAbroad)
def of_any_kind(session: Session, event: Placed) -> None:
    """One that would handle the more general event, too."""


@db.on(Placed)
def in_sqlmodel(session: SQLModelSession, event: Placed) -> None:
    """SQLModel's session is a session."""


def publish(session: Session, async_session: AsyncSession, scoped: scoped_session[Session]) -> None:
    """Into any kind of session, and what it gives."""
    handle = db.publish(session, Placed(order=1))
    assert_type(handle, EventHandle)
    assert_type(handle.tasks, dict[str, TaskHandle])
    db.publish(async_session, Paid(order=1), key="1")
    db.publish(scoped, Placed(order=1))
    assert_type(result(keep_stock), int)
    assert_type(result(count_paid), str)
    assert_type(result(async_tell), None)
    db.after_commit(session, keep_stock, Placed(order=1))


# --- batches ----------------------------------------------------------------------------------------------------


def settle(session: Session, order: Order) -> None:
    """A handler."""


def settle_many(session: Session, orders: list[Order]) -> None:
    """A handler of whole chunks."""


def refuse(session: Session, order: Order, error: BaseException) -> None:
    """Marks one that failed."""


def work() -> None:
    """Every kind of source."""
    report = db.run_batch(select(Order), settle, size=50, workers=2, on_error=refuse, max_failures=3, progress=False)
    assert_type(report, BatchReport)
    assert_type(report.failures[0].error, BaseException)
    db.run_batch(select(Order), settle_many, per_chunk=True)
    db.run_batch([1, 2], settle, entity=Order)
    db.run_batch((n for n in range(3)), lambda session, n: None, progress=lambda done, total: None)


async def async_work(numbers: AsyncIterator[int]) -> None:
    """Its async twin."""

    async def handle(session: AsyncSession, number: int) -> None: ...

    assert_type(await db.async_run_batch(numbers, handle), BatchReport)
    await db.async_run_batch(select(Order), settle)


# --- sessions and engines ---------------------------------------------------------------------------------------


def open_sync() -> None:
    """A session for ``with``."""
    assert_type(db.session(), AbstractContextManager[Session])
    with db.session("files") as session:
        assert_type(session, Session)
    assert_type(db.engine(), Engine)


async def open_async() -> None:
    """Its async twin."""
    assert_type(db.async_session(), AbstractAsyncContextManager[AsyncSession])
    async with db.async_session() as session:
        assert_type(session, AsyncSession)
    assert_type(db.async_engine("files"), AsyncEngine)
