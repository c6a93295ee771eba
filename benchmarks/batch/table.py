"""The table that all sides work on, and what is done to a record."""

from collections.abc import Iterator

from sqlalchemy import Engine, event, func, insert, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

SIZE = 100
"""Records in a chunk, of the sides that go record by record."""
BAD = 37
"""Of each hundred records, the one that is bad where one per cent is: so that every chunk of a hundred has one."""


class Base(DeclarativeBase):
    """The tables."""


class Order(Base):
    """A record: a key, what is changed, and something to carry along."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]
    state: Mapped[str] = mapped_column(default="new")
    done: Mapped[int] = mapped_column(default=0)
    address: Mapped[str]


def fill(engine: Engine, rows: int, *, bad: bool) -> None:
    """Make the table anew, with *rows* records."""
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for lines in _lines(rows, bad=bad):
            connection.execute(insert(Order), lines)
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            # As it stands after a while in real life; and no side is disturbed by autovacuum's first visit.
            connection.exec_driver_sql("VACUUM ANALYZE orders")


def _lines(rows: int, *, bad: bool) -> Iterator[list[dict[str, object]]]:
    for start in range(1, rows + 1, 10_000):
        yield [
            {
                "id": number,
                "amount": -1 if bad and number % 100 == BAD else number,
                "state": "new",
                "done": 0,
                "address": f"{number} Long Street, a line as long as lines are in tables of real applications",
            }
            for number in range(start, min(start + 10_000, rows + 1))
        ]


def check(engine: Engine, rows: int, *, bad: bool) -> None:
    """See that a side did what it was to do.

    Raises:
        AssertionError: If it did not.
    """
    with Session(engine) as session:
        states = session.execute(select(Order.state, func.count()).group_by(Order.state))
        found = {row[0]: row[1] for row in states}
        done = session.scalar(select(func.sum(Order.done)))
    failed = sum(1 for number in range(1, rows + 1) if number % 100 == BAD) if bad else 0
    expected = {"settled": rows - failed, **({"refused": failed} if failed else {})}
    assert (found, done) == (expected, rows - failed), (found, done)


def settle(session: Session, order: Order) -> None:
    """Do what is to be done to a record, by the plainest of ORM code."""
    if order.amount < 0:
        raise ValueError("negative amount")
    order.state = "settled"
    order.done += 1


def refuse(session: Session, order: Order, error: BaseException) -> None:
    """Mark a bad one."""
    order.state = "refused"


def tune(engine: Engine) -> Engine:
    """Make SQLite fit for more than one writer, as every guide says, and as ``Database`` does."""
    if make_url(engine.url).get_backend_name() == "sqlite":

        @event.listens_for(engine, "connect")
        def set_up(connection: object, _record: object) -> None:
            cursor = connection.cursor()  # type: ignore[attr-defined]  # the driver's
            for pragma in ("journal_mode = WAL", "busy_timeout = 30000", "foreign_keys = ON"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

    return engine
