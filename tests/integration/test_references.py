"""Rows cross by identity and are loaded anew, on real databases."""
# ruff: noqa: D102, D103, DTZ001 - helpers speak for themselves; keys of naive columns are naive

import asyncio
import dataclasses
import datetime as dt
import enum
import json
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
import sqlmodel
from sqlalchemy import Engine, ForeignKey, create_engine, event, inspect
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    registry,
    relationship,
)

from aftercommit.errors import HandOverError, PayloadError, RowGone, TaskDefinitionError, UnsafeArgument
from aftercommit.tasks.arguments import ArgumentPlan
from tests.support.databases import DatabaseUnderTest

MANY = 65536


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str] = mapped_column(default="")
    items: Mapped[list["Item"]] = relationship(back_populates="order")


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int | None] = mapped_column(ForeignKey("orders.id"))
    order: Mapped[Order | None] = relationship(back_populates="items")


class Hero(sqlmodel.SQLModel, table=True):
    __tablename__ = "heroes"
    number: int | None = sqlmodel.Field(default=None, primary_key=True)


class Shade(enum.Enum):
    DARK = "d"
    LIGHT = "l"


class Code:
    """A value of the user's, behind a type of the user's."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


class CodeType(sa.TypeDecorator[Code]):
    impl = sa.String(20)
    cache_ok = True

    def process_bind_param(self, value: Code | None, dialect: Any) -> Any:
        return value.text if value else None

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return Code(value)


class GuidText(sa.TypeDecorator[uuid.UUID]):
    """A UUID kept as text: the column says `str` and holds `UUID`."""

    impl = sa.String(36)
    cache_ok = True

    def process_bind_param(self, value: uuid.UUID | None, dialect: Any) -> Any:
        return str(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return uuid.UUID(value)


def keyed(name: str, *types: Any) -> type:
    """A mapped class whose key has columns of these types."""
    columns = {f"k{n}": mapped_column(column, primary_key=True, autoincrement=False) for n, column in enumerate(types)}
    return type(name, (Base,), {"__tablename__": name.lower(), **columns})


ID = uuid.UUID("018f4d2e-0000-7000-8000-00000000abcd")
MOMENT = dt.datetime(2026, 3, 29, 1, 30, 15, 123456)
KEYS: dict[str, tuple[type, tuple[Any, ...]]] = {
    "int": (keyed("ByInt", sa.BigInteger), (2**40,)),
    "negative": (keyed("ByNegative", sa.Integer), (-3,)),
    "str": (keyed("ByStr", sa.String(40)), ('a"b\\ü\n',)),
    "digits": (keyed("ByDigits", sa.String(40)), ("007",)),
    "uuid": (keyed("ByUuid", sa.Uuid), (ID,)),
    "uuid as text": (keyed("ByUuidText", sa.Uuid(as_uuid=False)), (str(ID),)),
    "uuid decorated": (keyed("ByGuid", GuidText), (ID,)),
    "datetime": (keyed("ByMoment", sa.DateTime), (MOMENT,)),
    "date": (keyed("ByDate", sa.Date), (dt.date(2026, 2, 28),)),
    "time": (keyed("ByTime", sa.Time), (dt.time(23, 59, 59, 1),)),
    "interval": (keyed("ByInterval", sa.Interval), (dt.timedelta(days=-1, microseconds=5),)),
    "decimal": (keyed("ByDecimal", sa.Numeric(12, 4)), (Decimal("10.5000"),)),
    "bytes": (keyed("ByBytes", sa.LargeBinary), (b"\x00\xff",)),
    "bool": (keyed("ByBool", sa.Boolean), (True,)),
    "enum": (keyed("ByEnum", sa.Enum(Shade)), (Shade.LIGHT,)),
    "enum of text": (keyed("ByWord", sa.Enum("a", "b", name="words")), ("b",)),
    "composite": (keyed("ByMany", sa.Integer, sa.Uuid, sa.String(5), sa.Date), (1, ID, "x", dt.date(2026, 1, 1))),
}
Coded = keyed("Coded", CodeType)


def plan_for(function: Callable[..., Any]) -> ArgumentPlan:
    return ArgumentPlan(function, task="job", skip_first=True)


def taking(annotation: Any) -> ArgumentPlan:
    """The plan of a task with one parameter, ``value``."""

    def job(session: Session, value: Any) -> None: ...

    job.__annotations__["value"] = annotation
    return plan_for(job)


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[Engine]:
    engine = create_engine(sqlite_url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def statements(engine: Engine) -> list[str]:
    """The statements that were run since the fixture was made (or cleared)."""
    found: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: found.append(args[2]))
    return found


def stored(engine: Engine, annotation: Any, make: Callable[[Session], Any]) -> str:
    """What a committed hand-over of what *make* returns writes."""
    with Session(engine) as session:
        handed = taking(annotation).hand_over(session, (make(session),), {}, max_bytes=MANY)
        session.flush()
        text = handed.resolve()
        session.commit()
    return text


def added(*instances: Any) -> Callable[[Session], Any]:
    def add(session: Session) -> Any:
        session.add_all(instances)
        return instances[0] if len(instances) == 1 else list(instances)

    return add


def loaded(engine: Engine, annotation: Any, text: str, check: Callable[[Any], Any] = lambda value: value) -> Any:
    """What *check* says of the argument, in the task's session."""
    with Session(engine) as session:
        (value,), kwargs = taking(annotation).load(session, text)
        assert kwargs == {}
        return check(value)


# --- keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key_crosses(database: DatabaseUnderTest, kind: str) -> None:
    """A row is found again by keys of every type, on every driver, and the key is the one it had."""
    if kind == "bytes" and not database.is_sqlite:
        kind = "composite"  # PostgreSQL would index bytes, too; what matters there is the driver's types
    cls, key = KEYS[kind]
    plan = taking(cls)

    def hand_over(session: Session) -> str:
        cls.__table__.create(session.connection())
        instance = cls(**{f"k{n}": part for n, part in enumerate(key)})
        session.add(instance)
        handed = plan.hand_over(session, (instance,), {}, max_bytes=MANY)
        session.flush()
        return handed.resolve()

    def load(session: Session, text: str) -> tuple[tuple[Any, ...], bool]:
        (row,), _ = plan.load(session, text)
        assert type(row) is cls
        return inspect(row).identity, plan.hand_over(session, (row,), {}, max_bytes=MANY).resolve() == text

    async def with_async_session() -> tuple[tuple[Any, ...], bool]:
        engine = create_async_engine(database.async_url)
        async with AsyncSession(engine) as session, session.begin():
            text = await session.run_sync(hand_over)
        async with AsyncSession(engine) as session:
            found = await session.run_sync(load, text)
        await engine.dispose()
        return found

    def with_session() -> tuple[tuple[Any, ...], bool]:
        engine = create_engine(database.sync_url)
        with Session(engine) as session, session.begin():
            text = hand_over(session)
        with Session(engine) as session:
            found = load(session, text)
        engine.dispose()
        return found

    found, is_written_alike = asyncio.run(with_async_session()) if database.is_async else with_session()

    assert found == key
    assert all(isinstance(part, type(expected)) for part, expected in zip(found, key, strict=True))
    assert is_written_alike  # asyncpg's UUIDs are of a class of their own


def test_a_reference_is_plain_to_read(engine: Engine) -> None:
    """The record shows which row it was."""
    assert stored(engine, Order, added(Order(id=7))) == '{"value":{"$row":"Order","key":[7]}}'


def test_a_key_that_cannot_be_written_exactly_is_refused(engine: Engine) -> None:
    """A key part of a type that nothing is known of is an error that says what to pass."""
    with pytest.raises(HandOverError, match=r"part of type `Code`.*`coded.k0`"):
        stored(engine, Coded, added(Coded(k0=Code("x"))))


# --- where rows may stand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "shape"),
    [
        (Order | None, lambda one, other: one),
        (Annotated[Order, "note"], lambda one, other: one),
        ("Order", lambda one, other: one),
        (list[Order], lambda one, other: [one, other]),
        (list["Order | None"], lambda one, other: [one, None]),
        (tuple[Order, ...], lambda one, other: (one, other)),
        (tuple[int, Order], lambda one, other: (1, one)),
        (dict[str, Order], lambda one, other: {"a": one, "b": other}),
        (dict[str, list[Order]], lambda one, other: {"a": [one, other]}),
        (Order | int, lambda one, other: one),
        (Order | dict[str, Any], lambda one, other: one),
        (Item | Order, lambda one, other: one),
    ],
)
def test_rows_cross_wherever_the_annotation_names_their_class(engine: Engine, annotation: Any, shape: Any) -> None:
    """Lists, dicts, tuples, options and unions of rows arrive as such, with rows of the task's own session."""
    one, other = Order(note="one"), Order(note="other")
    sent = []

    def make(session: Session) -> Any:
        session.add_all([one, other])
        sent.append(shape(one, other))
        return sent[0]

    text = stored(engine, annotation, make)

    def check(value: Any) -> None:
        assert type(value) is type(sent[0])
        assert spelled(value) == shape("one", "other")
        assert one is not value

    loaded(engine, annotation, text, check)


def spelled(value: Any) -> Any:
    if isinstance(value, Order):
        assert inspect(value).persistent
        return value.note
    if isinstance(value, dict):
        return {key: spelled(inner) for key, inner in value.items()}
    return type(value)(map(spelled, value)) if isinstance(value, (list, tuple)) else value


def test_starred_rows_cross(engine: Engine) -> None:
    """`*items: Item` and `**named: Item` take rows, too."""

    def job(session: Session, *items: Item, **named: Item) -> None: ...

    plan = plan_for(job)
    with Session(engine) as session, session.begin():
        session.add_all([one := Item(id=1), two := Item(id=2)])
        handed = plan.hand_over(session, (one, two), {"last": two}, max_bytes=MANY)
        session.flush()
        text = handed.resolve()

    with Session(engine) as session:
        args, kwargs = plan.load(session, text)

        assert [item.id for item in args] == [1, 2]
        assert kwargs["last"] is args[1]


def test_the_same_row_twice_is_one_object(engine: Engine, statements: list[str]) -> None:
    """Identity holds in the task's session, and the row is read once."""
    text = stored(engine, list[Order], lambda session: [added(order := Order())(session), order])
    statements.clear()

    assert loaded(engine, list[Order], text, lambda orders: orders[0] is orders[1])
    assert len(statements) == 1


def test_beside_other_arguments(engine: Engine) -> None:
    """Text that looks like a mark of ours stays text."""

    def job(session: Session, order: Order, text: str, more: dict[str, Any]) -> None: ...

    plan = plan_for(job)
    odd = 'aftercommit:row:0:0 {"$row":"Order","key":[1]}'
    with Session(engine) as session, session.begin():
        session.add(order := Order(id=5))
        handed = plan.hand_over(session, (order, odd), {"more": {"$row": "Order", "key": [1]}}, max_bytes=MANY)
        session.flush()
        text = handed.resolve()

    with Session(engine) as session:
        (found, text_back, more), _ = plan.load(session, text)

        assert (found.id, text_back, more) == (5, odd, {"$row": "Order", "key": [1]})


def test_every_style_of_mapping_crosses(tmp_path: Any) -> None:
    """Imperative, dataclass and SQLModel mappings are rows like any other."""
    mappings = registry()

    class Plain:
        def __init__(self, number: int) -> None:
            self.number = number

    table = sa.Table("plain", mappings.metadata, sa.Column("key", sa.Integer, primary_key=True, autoincrement=False))
    mappings.map_imperatively(Plain, table, properties={"number": table.c.key})

    class DataBase(MappedAsDataclass, DeclarativeBase):
        pass

    class Data(DataBase):
        __tablename__ = "data"
        number: Mapped[int] = mapped_column(primary_key=True)

    engine = create_engine(f"sqlite:///{tmp_path / 'styles.db'}")
    for cls in (Plain, Data, Hero):
        inspect(cls).local_table.create(engine)
        text = stored(engine, list[cls], lambda session, cls=cls: [added(cls(number=4))(session)])

        assert loaded(engine, list[cls], text, lambda rows, cls=cls: (type(rows[0]) is cls, rows[0].number)) == (
            True,
            4,
        )
    engine.dispose()


# --- nothing is loaded or flushed -------------------------------------------------------------------------------


def test_hand_over_runs_no_statement(engine: Engine, statements: list[str]) -> None:
    """Neither lazy relationships nor expired attributes are read, nor anything flushed."""
    stored(engine, Order, added(Order(id=1, items=[Item(), Item()])))
    with Session(engine) as session:
        order = session.get(Order, 1)
        session.expire(order)
        session.add(pending := Order())
        statements.clear()

        handed = taking(list[Order]).hand_over(session, ([order, pending],), {}, max_bytes=MANY)

        assert statements == []
        assert inspect(pending).pending
        session.flush()
        statements.clear()
        session.expire_all()
        assert '"key":[1]' in handed.resolve()
        assert statements == []


def test_refusing_a_row_runs_no_statement(engine: Engine, statements: list[str]) -> None:
    """The refusal of an expired row does not read it."""
    stored(engine, Order, added(Order(id=1)))
    with Session(engine) as session:
        order = session.get(Order, 1)
        session.expire(order)
        statements.clear()

        with pytest.raises(UnsafeArgument, match=r"`value\['a'\]\[0\]`.*`order: Order`.*`order.id`"):
            taking(Any).hand_over(session, ({"a": [order]},), {}, max_bytes=MANY)

        assert statements == []


# --- inheritance ------------------------------------------------------------------------------------------------


class Employee(Base):
    __tablename__ = "employees"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}  # noqa: RUF012 - SQLAlchemy's


class Manager(Employee):
    __tablename__ = "managers"
    id: Mapped[int] = mapped_column(ForeignKey("employees.id"), primary_key=True)
    title: Mapped[str] = mapped_column(default="boss")
    __mapper_args__ = {"polymorphic_identity": "manager"}  # noqa: RUF012


class Engineer(Employee):
    tool: Mapped[str | None]
    __mapper_args__ = {"polymorphic_identity": "engineer"}  # noqa: RUF012


@pytest.mark.parametrize("cls", [Manager, Engineer])
def test_a_subclass_crosses_as_itself(engine: Engine, statements: list[str], cls: type) -> None:
    """Where the annotation is the base, the row arrives as what it is, with all its columns read at once."""
    text = stored(engine, Employee, added(cls(id=1)))
    statements.clear()

    def check(row: Any) -> None:
        assert type(row) is cls
        assert (row.title if cls is Manager else row.tool) in {"boss", None}

    loaded(engine, Employee, text, check)
    assert len(statements) == 1


def test_a_base_is_no_subclass(engine: Engine) -> None:
    """Where the annotation is a subclass, an instance of the base is refused with its own class named."""
    with pytest.raises(UnsafeArgument, match="Employee") as caught:
        stored(engine, Manager, added(Employee(id=1)))

    assert caught.value.code == "AC102"


def test_a_row_that_is_of_another_class_by_now(engine: Engine) -> None:
    """A row that became another subclass still fits the base, and is an error of the payload for the subclass."""
    text = stored(engine, Manager, added(Manager(id=1)))
    with engine.begin() as connection:
        connection.execute(sa.delete(Manager.__table__))
        connection.execute(sa.update(Employee.__table__).values(kind="engineer"))

    assert loaded(engine, Employee, text, type) is Engineer
    with pytest.raises(PayloadError, match=r"Manager\(1,\) is a `Engineer`, the task takes a `Manager`"):
        loaded(engine, Manager, text)


def test_an_annotation_that_became_a_subclass(engine: Engine) -> None:
    """What was stored for the base is taken if the row is of the subclass."""
    text = stored(engine, Employee, added(Manager(id=1))).replace("Manager", "Employee")

    assert loaded(engine, Manager, text, type) is Manager


# --- rows that cannot cross -------------------------------------------------------------------------------------


def test_a_transient_row_is_refused(engine: Engine) -> None:
    """A row that nobody added would never be written."""
    with pytest.raises(
        UnsafeArgument, match=r"`value\[1\]` is a `Order` that is in no session.*`session.add\(order\)`"
    ) as caught:
        stored(engine, list[Order], lambda session: [added(Order())(session), Order()])

    assert (caught.value.code, caught.value.parameter) == ("AC102", "value[1]")


def test_a_row_of_another_session_is_refused(engine: Engine) -> None:
    """This commit says nothing about a row of another session, flushed or not."""
    with Session(engine) as other:
        other.add(persistent := Order(id=9))
        other.flush()
        other.add(pending := Order())

        for row in (pending, persistent):
            with pytest.raises(
                UnsafeArgument, match=r"another session.*`session.merge\(order\)`.*`order.id`"
            ) as caught:
                stored(engine, Order, lambda session, row=row: row)
            assert (caught.value.code, caught.value.parameter) == ("AC102", "value")


def test_a_row_without_a_transaction_to_wait_for_is_refused(engine: Engine) -> None:
    """Without a session to hand over with, a row must be in none."""
    with Session(engine) as session:
        session.add(order := Order())

        with pytest.raises(UnsafeArgument, match="hand over with that session"):
            taking(Order).hand_over(None, (order,), {}, max_bytes=MANY)


def test_a_deleted_row_is_refused(engine: Engine) -> None:
    """A row that is marked for deletion, deleted, or was deleted and committed cannot be loaded."""
    stored(engine, Order, added(Order(id=1)))
    with Session(engine) as session:
        order = session.get(Order, 1)
        session.delete(order)

        for step in (lambda: None, session.flush, session.commit):
            step()
            with pytest.raises(UnsafeArgument, match="deleted") as caught:
                taking(Order).hand_over(session, (order,), {}, max_bytes=MANY)
            assert caught.value.code == "AC102"


def test_a_detached_row_crosses_by_its_key(engine: Engine) -> None:
    """A row read earlier, whose session has ended, is known by its key, and that is all that crosses."""
    stored(engine, Order, added(Order(id=1)))
    with Session(engine) as session:
        order = session.get(Order, 1)
        session.expire(order)

    text = stored(engine, Order, lambda session: order)

    assert loaded(engine, Order, text, lambda row: row.id) == 1


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (lambda session, order: None, "never flushed"),
        (lambda session, order: session.expunge(order), "not in the session any more"),
        (lambda session, order: session.rollback(), "not in the session any more"),
        (lambda session, order: (session.flush(), session.rollback()), "not in the session any more"),
        (lambda session, order: (session.flush(), session.delete(order), session.flush()), "deleted after"),
    ],
)
def test_what_happens_between_hand_over_and_commit(engine: Engine, happens: Any, words: str) -> None:
    """A row that has no key at the commit is an error that says why."""
    with Session(engine) as session:
        session.add(order := Order())
        handed = taking(list[Order]).hand_over(session, ([order],), {}, max_bytes=MANY)

        happens(session, order)

        with pytest.raises(HandOverError, match=rf"`value\[0\]`, a `Order`, .*{words}"):
            handed.resolve()


def test_a_changed_key_is_the_one_that_crosses(engine: Engine) -> None:
    """The key is read at the commit, not at the hand-over."""
    stored(engine, Order, added(Order(id=1)))
    with Session(engine) as session:
        order = session.get(Order, 1)
        handed = taking(Order).hand_over(session, (order,), {}, max_bytes=MANY)
        order.id = 2
        session.flush()

        assert json.loads(handed.resolve())["value"]["key"] == [2]


def test_keys_count_towards_the_limit(engine: Engine) -> None:
    """Keys that turn out too long are refused at the commit."""
    with Session(engine) as session:
        cls = KEYS["str"][0]
        session.add(row := cls(k0="x" * 30))
        handed = taking(cls).hand_over(session, (row,), {}, max_bytes=50)
        session.flush()

        with pytest.raises(UnsafeArgument, match="50 are allowed"):
            handed.resolve()


@pytest.mark.parametrize("value", [7, "7", Item(id=1), {"$row": "Order", "key": [1]}, None])
def test_nothing_else_passes_for_a_row(engine: Engine, value: Any) -> None:
    """A key, another class or a hand-made reference is no row."""
    with pytest.raises(UnsafeArgument) as caught:
        stored(engine, Order, lambda session: value)

    assert caught.value.parameter == "value"


def test_rows_inside_other_types_are_refused() -> None:
    """A dataclass with a row in it cannot be a parameter: the definition says how to write it."""

    @dataclasses.dataclass
    class Job:
        order: Order

    with pytest.raises(TaskDefinitionError, match=r"`value: Job`.*annotated with its class"):
        taking(Job).prepare()


# --- loading ----------------------------------------------------------------------------------------------------


def test_a_row_that_is_gone(engine: Engine) -> None:
    """A row that was deleted meanwhile is RowGone, naming it."""
    text = stored(engine, list[Order], lambda session: [added(Order(id=7))(session)])
    with engine.begin() as connection:
        connection.execute(sa.delete(Order.__table__))
    run = uuid.uuid4()

    with (
        Session(engine) as session,
        pytest.raises(RowGone, match=r"Order\(7,\) is gone, or not vis") as caught,
    ):
        taking(list[Order]).load(session, text, run_id=run)

    assert (caught.value.row, caught.value.run_id, caught.value.task) == ("Order(7,)", run, "job")


@pytest.mark.parametrize(
    "reference",
    [
        7,
        None,
        "Order",
        [7],
        {},
        {"key": [7]},
        {"$row": "Order"},
        {"$row": "Order", "key": 7},
        {"$row": "Order", "key": []},
        {"$row": "Order", "key": [7, 7]},
        {"$row": "Order", "key": ["7"]},
        {"$row": "Order", "key": [True]},
        {"$row": "Order", "key": [7.0]},
        {"$row": "Order", "key": [None]},
        {"$row": "Order", "key": [{"id": 7}]},
        {"$row": "Order", "key": [{"$type": "secret", "value": "7"}]},
        {"$row": "Order", "key": [{"$type": [], "value": "7"}]},
        {"$row": "Order", "key": [{"$type": "uuid", "value": "7"}]},
        {"$row": "Item", "key": [7]},
        {"$row": ["Order"], "key": [7]},
        {"$row": "Order", "key": [7], "more": 1},
        "aftercommit:row:0",
    ],
)
def test_only_references_of_ours_are_read(engine: Engine, statements: list[str], reference: Any) -> None:
    """A tampered reference is a PayloadError before the database is asked."""
    stored(engine, Order, added(Order(id=7)))
    statements.clear()

    with pytest.raises(PayloadError):
        loaded(engine, Order, json.dumps({"value": reference}))

    assert statements == []


@pytest.mark.parametrize("kind", ["uuid", "decimal", "datetime", "date", "time", "interval", "bytes", "enum"])
@pytest.mark.parametrize("part", ["hunter2", 1.5, 10**30, [], None])
def test_a_tampered_key_shows_no_value(engine: Engine, kind: str, part: Any) -> None:
    """A key part that cannot be read is a PayloadError that does not repeat it."""
    cls = KEYS[kind][0]

    with pytest.raises(PayloadError) as caught:
        loaded(engine, cls, json.dumps({"value": {"$row": cls.__name__, "key": [part]}}))

    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_key_larger_than_the_database_can_hold(engine: Engine) -> None:
    """A number that no column can hold is an error of the payload, not of the runner."""
    with pytest.raises(PayloadError, match="nothing the database can look up"):
        loaded(engine, Order, json.dumps({"value": {"$row": "Order", "key": [10**30]}}))


def test_a_row_needs_a_session(engine: Engine) -> None:
    """Rows cannot be loaded without a session: the error says to take one."""
    text = stored(engine, Order, added(Order(id=1)))

    with pytest.raises(PayloadError, match="Give the task a session"):
        taking(Order).load(None, text)
