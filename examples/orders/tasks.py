"""What happens after the commit: a file is worked through as a batch, and each of its orders is an event."""

from models import STOCK, BadLine, Customer, Order, OrderFile, Product, db
from pydantic import BaseModel
from reading import BadFile, Line, Lines, OrderLine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from aftercommit import Retry

# The demo invites people to kill it, and what was at work then has used up an attempt: five, the default, are few.
UNDAUNTED = Retry(attempts=100)


class OrderCreated(BaseModel):
    """An order is there, for the first and only time."""

    order: OrderLine


def mark_failed(session: Session, error: BaseException, file: OrderFile) -> None:
    """Say why, in the transaction that records the failure. Orders that were written until then stay."""
    file.status = "failed"
    file.reason = str(error) if isinstance(error, BadFile) else "Something went wrong on our side. Try again later."


# repeatable: after a crash it runs again from the top. The status may be set twice, and the batch knows how far it was.
@db.task(pool="files", retry=UNDAUNTED, on_failure=mark_failed, repeatable=True)
def process_file(session: Session, file: OrderFile) -> None:
    """Write the file's orders, a hundred lines in a transaction."""
    lines = Lines(file.id, file.path)
    file.status = "processing"
    session.commit()  # shows at once; and each chunk of the batch has a transaction of its own
    report = db.run_batch(lines, save_order, on_error=mark_bad)
    if not report.total:
        raise BadFile("There is no order in this file.")
    file.status, file.lines = "completed", len(lines)


def save_order(session: Session, line: Line) -> None:
    """Write one order as if it were the only one, and tell whom it may concern: the batch cares for the rest."""
    order = line.order()
    columns = order.model_dump(exclude={"unit_price"})
    session.add(Order(file_id=line.file_id, line=line.number, cents=order.cents, **columns))
    file = session.get_one(OrderFile, line.file_id)
    file.orders += 1
    file.units += order.quantity
    file.cents += order.cents
    db.publish(session, OrderCreated(order=order))


def mark_bad(session: Session, line: Line, error: BaseException) -> None:
    """Keep the line with what is wrong with it. What `save_order` had done for it is undone by then."""
    # The database itself refuses a second order of the same number, also if two files bring it at the same moment.
    reason = "an order of this number is there already" if isinstance(error, IntegrityError) else str(error)
    session.add(BadLine(file_id=line.file_id, line=line.number, reason=reason, text=line.text))
    session.get_one(OrderFile, line.file_id).bad_lines += 1


# The handlers read, add in Python and write back, and create what is missing: by hand, that loses orders as soon as two
# run at once. Here a run that met another is made again, and takes effect exactly once, whatever is killed meanwhile.


@db.on(OrderCreated, pool="events", retry=UNDAUNTED)
def keep_inventory(session: Session, event: OrderCreated) -> None:
    """Take what was ordered out of the product's inventory."""
    order = event.order
    product = session.get(Product, order.product)
    if product is None:
        product = Product(code=order.product, inventory=STOCK, orders=0, cents=0)
        session.add(product)
    product.inventory -= order.quantity
    product.orders += 1
    product.cents += order.cents


@db.on(OrderCreated, pool="events", retry=UNDAUNTED)
def keep_statistics(session: Session, event: OrderCreated) -> None:
    """Add the order to the customer's figures."""
    order = event.order
    customer = session.get(Customer, order.customer)
    if customer is None:
        customer = Customer(code=order.customer, orders=0, units=0, cents=0, last_order=order.ordered_on)
        session.add(customer)
    customer.orders += 1
    customer.units += order.quantity
    customer.cents += order.cents
    customer.last_order = max(customer.last_order, order.ordered_on)
