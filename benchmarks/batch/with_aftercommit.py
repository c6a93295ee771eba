"""The same with ``run_batch``."""

from sqlalchemy import select, update
from sqlalchemy.orm import Session

import aftercommit.batches.batch  # noqa: F401  # imported when the first batch runs, and no part of its work
from aftercommit import Database
from benchmarks.batch.table import SIZE, Order, refuse, settle

SET_SIZE = 5000
"""Records in a chunk of the set-based sides."""


def batch(url: str, *, workers: int = 1) -> None:
    """Outside of any task."""
    db = Database(url)
    db.run_batch(
        select(Order).where(Order.state == "new"),
        settle,
        size=SIZE,
        workers=workers,
        on_error=refuse,
        progress=False,
    )
    db.dispose()


def batch_in_task(url: str) -> None:
    """In a durable task, so that the position is saved with every chunk."""
    db = Database(url)

    @db.task
    def settle_all() -> int:
        report = db.run_batch(select(Order).where(Order.state == "new"), settle, size=SIZE, on_error=refuse)
        return report.total

    db.create_tables()
    with db.session() as session:
        db.after_commit(session, settle_all)
    db.drain(timeout=3600.0)
    db.dispose()


def settle_rows(session: Session, orders: list[Order]) -> None:
    """Do what is to be done to the rows of a chunk at once."""
    settle_keys(session, [order.id for order in orders])


def settle_keys(session: Session, keys: list[int]) -> None:
    """Do it to rows that nobody has loaded. They come in order, and the snapshot is that which the keys are of."""
    session.execute(
        update(Order)
        .where(Order.id.between(keys[0], keys[-1]), Order.state == "new")
        .values(state="settled", done=Order.done + 1),
        execution_options={"synchronize_session": False},
    )


def per_chunk(url: str) -> None:
    """A handler for whole chunks, which is given loaded rows."""
    db = Database(url)
    source = select(Order).where(Order.state == "new")
    db.run_batch(source, settle_rows, per_chunk=True, size=SET_SIZE, progress=False)
    db.dispose()


def per_chunk_of_keys(url: str) -> None:
    """The same, given keys."""
    db = Database(url)
    source = select(Order.id).where(Order.state == "new")
    db.run_batch(source, settle_keys, per_chunk=True, size=SET_SIZE, progress=False)
    db.dispose()
