"""Read by type checkers only: every line that ends in ``# refused`` is an error, for both of them, and no other is."""

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlmodel import Session as SQLModelSession

from aftercommit import Database, Retry

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
