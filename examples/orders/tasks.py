"""What happens after the commit: a file is read, and its orders are written in short transactions."""

from itertools import islice

from models import DATA, Order, OrderFile, db
from reading import BadFile, read_lines
from sqlalchemy import delete, insert
from sqlalchemy.orm import Session

from aftercommit import current_run


def mark_failed(session: Session, error: BaseException, file: OrderFile) -> None:
    """Take back what was written and say why, in the transaction that records the failure."""
    session.execute(delete(Order).where(Order.file_id == file.id))
    file.status, file.orders, file.cents, file.refused = "failed", 0, 0, 0
    file.reason = str(error) if isinstance(error, BadFile) else "Something went wrong on our side. Try again later."


@db.task(pool="files", on_failure=mark_failed)
def process_file(session: Session, file: OrderFile) -> None:
    """Write the file's orders, 1,000 at a time; after a crash, go on behind the last that were committed."""
    run = current_run()
    position, number = run.restored or [0, 0]
    file_id, size = file.id, file.size
    file.status = "processing"
    run.checkpoint([position, number])
    session.commit()  # reading needs no connection and, on SQLite, must not hold the write lock

    with (DATA / f"{run.id}.csv").open("rb") as source:
        source.seek(position)
        while lines := list(islice(read_lines(source, number), 1_000)):
            number = lines[-1][0]
            orders = [{"file_id": file_id, "line": at, **found} for at, found in lines if isinstance(found, dict)]
            refusals = [[at, found] for at, found in lines if isinstance(found, str)]
            if orders:
                session.execute(insert(Order), orders)
            file.orders += len(orders)
            file.cents += sum(order["cents"] for order in orders)
            file.refused += len(refusals)
            file.refusals = [*file.refusals, *refusals][:100]
            if file.refused > file.orders:
                first, why = file.refusals[0]
                raise BadFile(f"Most lines are not orders. Line {first}: {why}.")
            run.checkpoint([source.tell(), number])
            run.progress(source.tell(), size)
            session.commit()
    if not file.orders:
        raise BadFile("There is no order in this file.")
    file.status = "completed"
