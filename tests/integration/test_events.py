"""Events: published in the transaction, handled after the commit, each handler exactly once."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic
import pytest
import sqlalchemy as sa
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aftercommit import Database, EventHandle, PoolSettings, Retry, TaskRecord
from aftercommit.errors import ConfigurationError, HandOverError, TaskDefinitionError, UnsafeArgument
from aftercommit.fastapi import AfterCommit
from aftercommit.records.tables import EventRecord
from tests.support.databases import DatabaseUnderTest


class Base(DeclarativeBase):
    """Tables of an application."""


class Product(Base):
    """A row that is counted down by hand."""

    __tablename__ = "product"
    id: Mapped[int] = mapped_column(primary_key=True)
    inventory_count: Mapped[int]


class Stats(Base):
    """A row that is created when it is missing, and counted up by hand."""

    __tablename__ = "stats"
    name: Mapped[str] = mapped_column(primary_key=True)
    user_count: Mapped[int] = mapped_column(default=0)


class OrderCreated(pydantic.BaseModel):
    """An event as a Pydantic model."""

    order: int
    quantity: int = 1


@dataclass(frozen=True)
class UserJoined:
    """An event as a dataclass."""

    user: int
    source: str = "web"


class Post:
    """A ``Database`` on the driver under test; handlers are written once, for a ``Session``."""

    def __init__(self, under_test: DatabaseUnderTest) -> None:
        self.db = Database(under_test.url, pools={"default": PoolSettings(pool_size=8)})
        self.outside = sa.create_engine(under_test.sync_url)
        self.loop = asyncio.Runner() if under_test.is_async else None
        Base.metadata.create_all(self.outside)
        if self.loop is None:
            self.db.create_tables()
        else:
            self.loop.run(self.db.async_create_tables())

    def close(self) -> None:
        """Give everything back."""
        if self.loop is None:
            self.db.dispose()
        else:
            self.loop.run(self.db.async_dispose())
            self.loop.close()
        self.outside.dispose()

    def on(self, event_type: type, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        """Declare a handler, of the flavour under test."""

        def decorate(function: Callable[..., Any]) -> Any:
            if self.loop is None:
                return self.db.on(event_type, **options)(function)

            async def handler(session: AsyncSession, event: Any) -> Any:
                return await session.run_sync(function, event)

            handler.__name__ = function.__name__
            return self.db.on(event_type, **options)(handler)

        return decorate

    def commit(self, body: Callable[[Any], Any]) -> Any:
        """Run *body* in one committed transaction of ours."""
        if self.loop is None:
            with self.db.session() as session:
                return body(session)
        return self.loop.run(self._commit(body))

    async def _commit(self, body: Callable[[Any], Any]) -> Any:
        async with self.db.async_session() as session:
            return body(session)

    def drain(self) -> None:
        """Run all that is due."""
        if self.loop is None:
            self.db.drain()
        else:
            self.loop.run(self.db.async_drain())

    def look(self, statement: sa.Select[Any]) -> list[Any]:
        """What somebody else sees."""
        with Session(self.outside) as session:
            return list(session.scalars(statement))

    @property
    def records(self) -> list[TaskRecord]:
        """All records, in the order in which they were asked for."""
        return self.look(select(TaskRecord).order_by(TaskRecord.id))


@pytest.fixture
def post(database: DatabaseUnderTest) -> Iterator[Post]:
    """A post on the driver under test."""
    made = Post(database)
    yield made
    made.close()


def two_handlers(post: Post, seen: list[Any]) -> None:
    """Declare two handlers of ``OrderCreated``, the first of which fails."""

    @post.on(OrderCreated)
    def keep_stock(session: Session, event: OrderCreated) -> None:
        raise ValueError("no stock")

    @post.on(OrderCreated)
    def count_orders(session: Session, event: OrderCreated) -> None:
        seen.append(event)


# --- publishing -------------------------------------------------------------------------------------------------


def test_each_handler_is_a_task_of_its_own(post: Post) -> None:
    """One handler's failure is its own: the others take effect."""
    seen: list[Any] = []
    two_handlers(post, seen)

    handle = post.commit(lambda session: post.db.publish(session, OrderCreated(order=7, quantity=2)))
    post.drain()

    assert isinstance(handle, EventHandle)
    assert list(handle.tasks) == ["keep_stock", "count_orders"]
    assert seen == [OrderCreated(order=7, quantity=2)]
    assert {record.task: record.state for record in post.records} == {
        "keep_stock": "failed",
        "count_orders": "succeeded",
    }
    assert {each.id for each in handle.tasks.values()} == {record.id for record in post.records}


def test_rolled_back_an_event_never_was(post: Post) -> None:
    """The event's tasks are written in the publisher's transaction, and go with it; so does its key."""
    two_handlers(post, [])

    def fail(session: Any) -> None:
        post.db.publish(session, OrderCreated(order=1), key="1")
        raise KeyError

    with pytest.raises(KeyError):
        post.commit(fail)

    assert post.records == []
    assert post.look(select(EventRecord.key)) == []


def test_tasks_of_an_event_are_written_with_one_statement(post: Post) -> None:
    """All handlers' tasks, and others that the transaction asks for, are one INSERT."""
    two_handlers(post, [])
    task = post.db.task(name="other")(lambda: None)
    pool = post.db.engine() if post.loop is None else post.db.async_engine().sync_engine
    sent: list[str] = []
    sa.event.listen(pool, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))

    def body(session: Any) -> None:
        post.db.publish(session, OrderCreated(order=1))
        post.db.publish(session, OrderCreated(order=2))
        post.db.after_commit(session, task)

    post.commit(body)

    assert len([each for each in sent if each.startswith("INSERT INTO aftercommit_task")]) == 1
    assert not [each for each in sent if "aftercommit_event" in each]
    assert len(post.records) == 5


def test_keys_cost_the_publisher_one_statement_more(post: Post) -> None:
    """However many events with a key a transaction publishes, their keys are one INSERT, beside that of the tasks."""
    two_handlers(post, [])
    pool = post.db.engine() if post.loop is None else post.db.async_engine().sync_engine
    sent: list[str] = []

    def body(session: Any, count: int) -> None:
        for number in range(count):
            post.db.publish(session, OrderCreated(order=number), key=f"{count}-{number}")
        post.db.publish(session, OrderCreated(order=-1))

    post.commit(lambda session: body(session, 0))  # opens the connection
    sa.event.listen(pool, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))
    post.commit(lambda session: body(session, 0))
    without = len(sent)
    post.commit(lambda session: body(session, 1))
    with_one = len(sent) - without
    post.commit(lambda session: body(session, 3))

    assert with_one == without + 1
    assert len(sent) - without - with_one == with_one
    assert len([each for each in sent if each.startswith("INSERT INTO aftercommit_event")]) == 2


def test_an_event_that_nobody_handles_is_legal(post: Post) -> None:
    """Publishing does not know who listens."""
    handle = post.commit(lambda session: post.db.publish(session, UserJoined(user=1)))

    assert handle.tasks == {}
    assert post.records == []


@pytest.mark.drivers("psycopg", "asyncpg")
def test_after_commit_publishes_too(post: Post) -> None:
    """What endpoints have at hand publishes into the request's transaction."""
    two_handlers(post, [])

    post.commit(lambda session: AfterCommit(post.db, session).publish(OrderCreated(order=1), key="1"))

    assert len(post.records) == 2
    assert post.look(select(EventRecord.key)) == ["1"]


@pytest.mark.drivers("pysqlite")
@pytest.mark.parametrize("event", [OrderCreated, {"order": 1}, 7, "OrderCreated"])
def test_only_events_can_be_published(post: Post, event: object) -> None:
    """Classes and plain data are refused where they are published."""
    with pytest.raises(HandOverError, match="publish takes an event"):
        post.commit(lambda session: post.db.publish(session, event))


@pytest.mark.drivers("pysqlite")
def test_what_cannot_cross_is_refused_at_publishing(post: Post) -> None:
    """An event is data: what would not come back equal is refused at once."""

    @dataclass
    class Bad:
        secret: pydantic.SecretStr

    @post.on(Bad)
    def handle(session: Session, event: Any) -> None: ...

    class Larger(OrderCreated):
        more: int = 0

    two_handlers(post, [])

    with pytest.raises(UnsafeArgument):
        post.commit(lambda session: post.db.publish(session, Bad(pydantic.SecretStr("x"))))
    with pytest.raises(HandOverError, match="subclass of the event OrderCreated"):
        post.commit(lambda session: post.db.publish(session, Larger(order=1)))
    with pytest.raises(ConfigurationError, match="key="):
        post.commit(lambda session: post.db.publish(session, OrderCreated(order=1), key=""))


# --- keys -------------------------------------------------------------------------------------------------------


def test_a_key_makes_publishing_idempotent(post: Post) -> None:
    """A second event of the same class and key does nothing, in this transaction or later, finished or not."""
    seen: list[Any] = []
    two_handlers(post, seen)

    def body(session: Any) -> list[EventHandle]:
        return [post.db.publish(session, OrderCreated(order=1), key="order-1") for _ in range(2)]

    first = post.commit(body)
    post.drain()
    second = post.commit(body)
    post.drain()
    post.commit(lambda session: post.db.publish(session, OrderCreated(order=2), key="order-2"))
    post.drain()

    assert [event.order for event in seen] == [1, 2]
    created = [each.created for handle in first + second for each in handle.tasks.values()]
    assert created.count(True) == 2
    assert len(post.records) == 4


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_key_holds_under_concurrency(post: Post) -> None:
    """Of many that publish the same key at once, one is handled."""
    seen: list[Any] = []
    two_handlers(post, seen)
    start = threading.Barrier(6)
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            start.wait(20)
            for number in range(10):
                post.commit(
                    lambda session, number=number: post.db.publish(session, OrderCreated(order=number), key=str(number))
                )
        except BaseException as exc:  # noqa: BLE001  # shown below
            errors.append(exc)

    threads = [threading.Thread(target=publish) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    post.drain()

    assert errors == []
    assert sorted(event.order for event in seen) == list(range(10))


def test_a_key_is_taken_even_where_nobody_handles_the_event(post: Post) -> None:
    """A handler that a deploy adds does not get what was published, with its key, before it came."""
    post.commit(lambda session: post.db.publish(session, UserJoined(user=1), key="1"))
    seen: list[Any] = []

    @post.on(UserJoined)
    def late(session: Session, event: UserJoined) -> None:
        seen.append(event)

    post.commit(lambda session: post.db.publish(session, UserJoined(user=1), key="1"))
    post.commit(lambda session: post.db.publish(session, UserJoined(user=2), key="2"))
    post.drain()

    assert seen == [UserJoined(user=2)]


@pytest.mark.drivers("psycopg", "pysqlite")
def test_keys_are_pruned_with_the_events(post: Post) -> None:
    """Keys are kept as long as finished records are, and then may be used again."""
    from aftercommit.records import workers

    post.commit(lambda session: post.db.publish(session, UserJoined(user=1), key="1"))

    with post.outside.begin() as connection:
        workers.prune(connection, keep=3600.0)
    kept = post.look(select(EventRecord.key))
    with post.outside.begin() as connection:
        workers.prune(connection, keep=-1.0)

    assert kept == ["1"]
    assert post.look(select(EventRecord.key)) == []


# --- versions ---------------------------------------------------------------------------------------------------


def test_an_old_payload_with_a_missing_default_loads(post: Post) -> None:
    """A field that was added with a default has it in events that were published before."""
    seen: list[Any] = []
    two_handlers(post, seen)
    post.commit(lambda session: post.db.publish(session, OrderCreated(order=3, quantity=9)))

    with Session(post.outside) as session, session.begin():
        for record in session.scalars(select(TaskRecord)):
            record.arguments = {"event": {"order": 3}}
    post.drain()

    assert seen == [OrderCreated(order=3, quantity=1)]


def test_a_payload_that_cannot_be_read_fails_its_handler_only(post: Post) -> None:
    """It is that handler's recorded failure, and nobody else's."""
    seen: list[Any] = []
    two_handlers(post, seen)
    post.commit(lambda session: post.db.publish(session, OrderCreated(order=3)))
    with Session(post.outside) as session, session.begin():
        record = session.scalars(select(TaskRecord).where(TaskRecord.task == "keep_stock")).one()
        record.arguments = {"event": {"wrong": 1}}

    post.drain()

    assert seen == [OrderCreated(order=3)]
    failed = next(record for record in post.records if record.task == "keep_stock")
    assert failed.state == "failed"
    assert "PayloadError" in (failed.error or "")


def test_old_payloads_of_a_dataclass(post: Post) -> None:
    """A dataclass event loads without a field that has a default; what it cannot load fails that handler only."""
    seen: list[tuple[str, UserJoined]] = []

    @post.on(UserJoined)
    def welcome(session: Session, event: UserJoined) -> None:
        seen.append(("welcome", event))

    @post.on(UserJoined)
    def count(session: Session, event: UserJoined) -> None:
        seen.append(("count", event))

    post.commit(lambda session: post.db.publish(session, UserJoined(user=1, source="mail")))
    with Session(post.outside) as session, session.begin():
        for record in session.scalars(select(TaskRecord)):
            record.arguments = {"event": {"user": 1} if record.task == "welcome" else {"source": "mail"}}
    post.drain()

    assert seen == [("welcome", UserJoined(user=1, source="web"))]
    states = {record.task: (record.state, "PayloadError" in (record.error or "")) for record in post.records}
    assert states == {"welcome": ("succeeded", False), "count": ("failed", True)}


@pytest.mark.drivers("pysqlite")
def test_a_parameter_may_be_renamed_while_events_wait(post: Post) -> None:
    """What a handler calls its event is its own affair: it is stored under one name."""

    @post.on(OrderCreated)
    def handler(session: Session, order_created: OrderCreated) -> None: ...

    post.commit(lambda session: post.db.publish(session, OrderCreated(order=1)))

    assert post.records[0].arguments == {"event": {"order": 1}}


# --- declaring --------------------------------------------------------------------------------------------------


@pytest.mark.drivers("pysqlite")
def test_handlers_are_checked_at_declaration(post: Post) -> None:
    """What could never handle an event is refused at import."""

    def two(session: Session, event: OrderCreated, more: int) -> None: ...

    def none() -> None: ...

    def other(session: Session, event: UserJoined) -> None: ...

    def keyword(session: Session, event: OrderCreated, *, more: int) -> None: ...

    for function in (two, none, other, keyword):
        with pytest.raises(TaskDefinitionError):
            post.db.on(OrderCreated)(function)
    for kind in (dict, int, "OrderCreated", OrderCreated(order=1)):
        with pytest.raises(TaskDefinitionError):
            post.db.on(kind)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        post.db.on(OrderCreated, pool="nowhere")(lambda event: None)


@pytest.mark.drivers("pysqlite")
def test_a_handler_is_called_like_a_function_in_unit_tests(post: Post) -> None:
    """Calling it calls the function; with or without a session, annotated in any way."""

    @post.db.on(OrderCreated, name="plain")
    def plain(event: OrderCreated) -> int:
        return event.order

    @post.db.on(OrderCreated, name="annotated")
    def annotated(session: Annotated[Session, "ours"], event: "OrderCreated") -> int:
        assert isinstance(session, Session)
        return event.order

    assert plain(OrderCreated(order=4)) == 4
    post.commit(lambda session: post.db.publish(session, OrderCreated(order=5)))
    post.drain()
    assert [(record.task, record.result) for record in post.records] == [("plain", None), ("annotated", None)]
    assert {record.state for record in post.records} == {"succeeded"}


def test_on_failure_is_given_the_event(post: Post) -> None:
    """Options are those of a task; on_failure has the event."""
    told: list[Any] = []

    @post.on(
        OrderCreated,
        retry=Retry(attempts=2, base=0.0, on=ConnectionError),
        on_failure=lambda session, error, event: told.append((type(error), event)),
    )
    def handle(session: Session, event: OrderCreated) -> None:
        raise ConnectionError

    post.commit(lambda session: post.db.publish(session, OrderCreated(order=1)))
    post.drain()

    assert told == [(ConnectionError, OrderCreated(order=1))]
    assert post.records[0].attempt == 2


# --- the naive code is right ------------------------------------------------------------------------------------


def test_naive_counters_are_exact(post: Post) -> None:
    """Read-modify-write, and "create it if it is missing", in handlers side by side end with exact numbers."""
    with Session(post.outside) as session, session.begin():
        session.add_all([Product(id=number, inventory_count=1000) for number in range(2)])

    @post.on(OrderCreated)
    def keep_stock(session: Session, event: OrderCreated) -> None:
        product = session.get_one(Product, event.order % 2)
        product.inventory_count -= event.quantity

    @post.on(OrderCreated)
    def count(session: Session, event: OrderCreated) -> None:
        stats = session.get(Stats, f"day {event.order % 3}")
        if stats is None:
            stats = Stats(name=f"day {event.order % 3}", user_count=0)
            session.add(stats)
        stats.user_count += 1

    for start in range(0, 60, 10):

        def body(session: Any, start: int = start) -> None:
            for number in range(start, start + 10):
                post.db.publish(session, OrderCreated(order=number, quantity=number % 5))

        post.commit(body)
    post.drain()

    assert {record.state for record in post.records} == {"succeeded"}
    sold = {parity: sum(number % 5 for number in range(60) if number % 2 == parity) for parity in range(2)}
    assert {row.id: 1000 - row.inventory_count for row in post.look(select(Product))} == sold
    assert {row.name: row.user_count for row in post.look(select(Stats))} == {f"day {day}": 20 for day in range(3)}


# --- while a deploy is under way --------------------------------------------------------------------------------


@pytest.fixture
def deploy(database: DatabaseUnderTest) -> Iterator[Callable[[], Post]]:
    """Make further applications on the same database: the code before a deploy, and the code behind it."""
    made: list[Post] = []

    def make() -> Post:
        made.append(Post(database))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_old_and_new_code_side_by_side(deploy: Callable[[], Post]) -> None:
    """Each publishes for the handlers that it knows, and runs only these; what the other knows waits for it."""
    old, new = deploy(), deploy()
    ran: list[tuple[str, int]] = []

    @old.on(OrderCreated, name="kept")
    def kept_in_old(session: Session, event: OrderCreated) -> None:
        ran.append(("kept in old", event.order))

    @old.on(OrderCreated)
    def removed(session: Session, event: OrderCreated) -> None:
        ran.append(("removed", event.order))

    @new.on(OrderCreated, name="kept")
    def kept_in_new(session: Session, event: OrderCreated) -> None:
        ran.append(("kept in new", event.order))

    @new.on(OrderCreated)
    def added(session: Session, event: OrderCreated) -> None:
        ran.append(("added", event.order))

    by_old = old.commit(lambda session: old.db.publish(session, OrderCreated(order=1)))
    by_new = new.commit(lambda session: new.db.publish(session, OrderCreated(order=2)))
    new.drain()
    waiting = {(record.task, record.state) for record in new.records if record.state != "succeeded"}
    ran_by_new, ran[:] = sorted(ran), []
    old.drain()

    assert (list(by_old.tasks), list(by_new.tasks)) == (["kept", "removed"], ["kept", "added"])
    assert ran_by_new == [("added", 2), ("kept in new", 1), ("kept in new", 2)]
    assert waiting == {("removed", "queued")}
    assert ran == [("removed", 1)]


def test_a_handler_that_was_renamed_takes_what_waits(deploy: Callable[[], Post]) -> None:
    """Under its former name as an alias, a renamed handler gets the events of before."""
    old, new = deploy(), deploy()
    seen: list[int] = []

    @old.on(OrderCreated)
    def keep_stock(session: Session, event: OrderCreated) -> None:
        raise AssertionError("the old code is gone")

    @new.on(OrderCreated, aliases=("keep_stock",))
    def reserve_stock(session: Session, event: OrderCreated) -> None:
        seen.append(event.order)

    old.commit(lambda session: old.db.publish(session, OrderCreated(order=1)))
    new.commit(lambda session: new.db.publish(session, OrderCreated(order=2)))
    new.drain()

    assert sorted(seen) == [1, 2]
    assert {(record.task, record.state) for record in new.records} == {
        ("keep_stock", "succeeded"),
        ("reserve_stock", "succeeded"),
    }


def test_a_key_holds_across_a_deploy(deploy: Callable[[], Post]) -> None:
    """What the old code has published under a key, the new code does not publish again, not even for a new handler."""
    old, new = deploy(), deploy()
    seen: list[str] = []

    @old.on(OrderCreated, name="kept")
    def kept_in_old(session: Session, event: OrderCreated) -> None:
        seen.append("kept")

    @new.on(OrderCreated, name="kept")
    def kept_in_new(session: Session, event: OrderCreated) -> None:
        seen.append("kept")

    @new.on(OrderCreated)
    def added(session: Session, event: OrderCreated) -> None:
        seen.append("added")

    old.commit(lambda session: old.db.publish(session, OrderCreated(order=1), key="1"))
    new.commit(lambda session: new.db.publish(session, OrderCreated(order=1), key="1"))
    new.drain()

    assert seen == ["kept"]
