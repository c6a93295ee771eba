"""Read by type checkers only: every line that ends in ``# refused`` is an error, for both of them, and no other is."""

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlmodel import Session as SQLModelSession

from aftercommit import BatchReport, Database, Retry

db = Database("sqlite:///app.db")


class Base(DeclarativeBase):
    """Tables."""


class Order(Base):
    """A row."""

    __tablename__ = "order"
    id: Mapped[int] = mapped_column(primary_key=True)


class Other(Base):
    """Another row."""

    __tablename__ = "other"
    id: Mapped[int] = mapped_column(primary_key=True)


@db.task
def plain(session: Session, order: Order, note: str = "") -> None:
    """A task."""


@db.task
async def asynchronous(session: AsyncSession, number: int) -> None:
    """An async task."""


@db.task(durable=False)
def configured(session: Session, number: int) -> None:
    """A task with options."""


@db.task
def sqlmodel(session: SQLModelSession, number: int) -> None:
    """A task with SQLModel's session."""


@db.task
def without_session(number: int) -> None:
    """A task without a session."""


def undeclared(number: int) -> None:
    """No task at all."""


def ask(session: Session, async_session: AsyncSession) -> None:
    """Wrong in every way that a type can be wrong."""
    db.after_commit(session, plain)  # refused
    db.after_commit(session, plain, Other())  # refused
    db.after_commit(session, plain, 1)  # refused
    db.after_commit(session, plain, session, Order())  # refused
    db.after_commit(session, plain, Order(), 3)  # refused
    db.after_commit(session, plain, Order(), note=3)  # refused
    db.after_commit(session, plain, Order(), nothing=3)  # refused
    db.after_commit(session, plain, Order(), "", "")  # refused
    db.after_commit(async_session, asynchronous)  # refused
    db.after_commit(async_session, asynchronous, "1")  # refused
    db.after_commit(async_session, asynchronous, async_session, 1)  # refused
    db.after_commit(session, configured, "1")  # refused
    db.after_commit(session, configured, session, 1)  # refused
    db.after_commit(session, sqlmodel, session, 1)  # refused
    db.after_commit(session, without_session, "1")  # refused
    db.after_commit(session, undeclared, 1)  # refused
    db.after_commit(session, plain.with_options(key="k"))  # refused
    db.after_commit(session, plain.with_options(key="k"), 1)  # refused
    db.after_commit(session, configured.with_options(delay=1.0), "1")  # refused
    plain.with_options(nothing=1)  # refused
    plain.with_options(delay="soon")  # refused


@db.task(nothing=True)  # refused
def unknown_option(session: Session) -> None:
    """An option that there is none of."""


@db.task(timeout="long")  # refused
def wrong_option(session: Session) -> None:
    """An option of the wrong type."""


@db.task(retry=3)  # refused
def wrong_retry(session: Session) -> None:
    """A number is no Retry."""


def use(session: Session) -> None:
    """What a session context gives is a session, and no other."""
    with db.async_session() as opened:  # refused
        del opened
    Retry(attempts="3")  # refused


# --- events -----------------------------------------------------------------------------------------------------


@dataclass
class Placed:
    """An event."""

    order: int


@dataclass
class Paid:
    """Another event."""

    order: int


@db.on(Placed)  # refused
def of_another(session: Session, event: Paid) -> None:
    """A handler of another event."""


@db.on(Placed)  # refused
async def async_of_another(session: AsyncSession, event: Paid) -> None:
    """The same, async."""


@db.on(Placed)  # refused
def alone_of_another(event: Paid) -> None:
    """The same, without a session."""


@db.on(Placed)  # refused
def wants_more(session: Session, event: Placed, more: int) -> None:
    """A handler is called with the session and the event."""


@db.on(Placed)  # refused
def wants_nothing() -> None:
    """A handler is called with the event, at least."""


@db.on(Placed)  # refused
def wrong_way_round(event: Placed, session: Session) -> None:
    """The session comes first."""


@db.on("Placed")  # refused
def by_name(session: Session, event: Placed) -> None:
    """An event is a class."""


@db.on(Placed, delay=1.0)  # refused
def unknown_handler_option(session: Session, event: Placed) -> None:
    """An option that there is none of."""


@db.on(Placed)
def right(session: Session, event: Placed) -> None:
    """A handler."""


def publish(session: Session) -> None:
    """What cannot be published, or handed over."""
    db.publish(Placed(order=1))  # refused
    db.publish(session, Placed(order=1), key=1)  # refused
    db.after_commit(session, right, Paid(order=1))  # refused
    db.after_commit(session, right, session, Placed(order=1))  # refused


# --- batches ----------------------------------------------------------------------------------------------------


def settle(session: Session, order: Order) -> None:
    """A handler."""


def work() -> None:
    """Wrong in every way that a type can be wrong."""
    db.run_batch(select(Order), lambda session: None)  # refused
    db.run_batch(select(Order), settle, size="many")  # refused
    db.run_batch(select(Order), settle, on_error=settle)  # refused
    db.run_batch([1], settle, entity="Order")  # refused
    db.run_batch([1], settle, nothing=1)  # refused
    db.run_batch(select(Order), settle, progress=lambda done: None)  # refused


async def async_work() -> None:
    """What is awaited gives a report, and nothing else does."""
    report: BatchReport = db.async_run_batch(select(Order), settle)  # refused
    del report
