"""What may cross to a task, what may not, and what the refusal says. No database."""
# ruff: noqa: D102, D103, DTZ001, E501, SIM115 - helpers speak for themselves; naive times cross, too; tables are wide

import asyncio
import contextlib
import dataclasses
import datetime as dt
import enum
import functools
import io
import json
import socket
import sqlite3
import tempfile
import threading
import typing
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypeVar
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import asyncpg.pgproto.pgproto
import pydantic
import pytest
import sqlmodel
import typing_extensions
from fastapi import BackgroundTasks, Request, Response, UploadFile, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from aftercommit.errors import PayloadError, TaskDefinitionError, UnsafeArgument
from aftercommit.tasks.arguments import ArgumentPlan

MANY = 65536
# 2.10.0 alone does not hand a configuration on to standard dataclasses: bytes in them must be text there.
DATACLASSES_TAKE_BINARY = pydantic.VERSION != "2.10.0"


def test_session_passed_by_habit_is_named() -> None:
    """A session too many in the call is refused as a session, and not counted as an argument too many."""

    def confirm(session: Session, order_id: int) -> None: ...

    plan = plan_for(confirm, skip_first=True)

    with pytest.raises(UnsafeArgument, match="`argument 1` is a database session") as caught:
        plan.hand_over(None, (Session(), 1), {}, max_bytes=MANY)
    with pytest.raises(UnsafeArgument, match="`session` is a database session"):
        plan.hand_over(None, (1,), {"session": Session()}, max_bytes=MANY)
    assert caught.value.code == "AC101"


def plan_for(function: Callable[..., Any], *, skip_first: bool = False) -> ArgumentPlan:
    return ArgumentPlan(function, task="job", skip_first=skip_first)


def stored(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """What would be written for this call."""
    return plan_for(function).hand_over(None, args, kwargs, max_bytes=MANY).resolve()


def crossed(annotation: Any, value: Any) -> Any:
    """What the task would get for *value*."""
    plan = plan_for(taking(annotation))
    (back,), kwargs = plan.load(None, plan.hand_over(None, (value,), {}, max_bytes=MANY).resolve())
    assert kwargs == {}
    return back


def taking(annotation: Any) -> Callable[..., Any]:
    """A task with one parameter, ``value``."""

    def job(value: Any) -> None: ...

    job.__annotations__["value"] = annotation
    return job


def refused(annotation: Any, value: Any) -> UnsafeArgument:
    with pytest.raises(UnsafeArgument) as caught:
        plan_for(taking(annotation)).hand_over(None, (value,), {}, max_bytes=MANY)
    return caught.value


# --- things to pass ---------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")


class Hero(sqlmodel.SQLModel, table=True):
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    name: str = ""


class Color(enum.Enum):
    RED = "red"
    TUPLE = 2


class Level(enum.IntEnum):
    LOW = 1


class Mood(enum.StrEnum):
    GOOD = "good"


@dataclasses.dataclass
class Point:
    x: int
    blob: bytes = b""
    when: dt.datetime | None = None


@dataclasses.dataclass
class Point3(Point):
    z: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    inside: Any


class Address(pydantic.BaseModel):
    street: str
    number: int = 1


class Person(pydantic.BaseModel):
    name: str
    addresses: list[Address] = []
    note: str | None = None


class Customer(Person):
    discount: Decimal = Decimal(0)


T = TypeVar("T")


class Box(pydantic.BaseModel, Generic[T]):
    content: T


class Holder(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    inside: Any = None
    _hidden: Any = pydantic.PrivateAttr(default=None)


class Loose(pydantic.BaseModel, extra="allow"):
    known: int = 0


class Options(typing_extensions.TypedDict):
    size: int
    name: typing_extensions.NotRequired[str]


class Pair(NamedTuple):
    left: int
    right: UUID


UserId = NewType("UserId", int)
Tree = typing_extensions.TypeAliasType("Tree", "dict[str, Tree] | list[Tree] | int | str")
Mixed = typing_extensions.TypeAliasType("Mixed", str | UUID)
Ids = typing_extensions.TypeAliasType("Ids", list[UUID])

ZONES = [dt.UTC, dt.timezone(dt.timedelta(hours=5, minutes=45)), dt.timezone(-dt.timedelta(hours=9, minutes=30))]
zoned = st.datetimes(timezones=st.sampled_from(ZONES))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
texts = st.text(st.characters(exclude_categories=["Cs"]))

EXACT: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "int": (int, st.integers()),
    "str": (str, texts),
    "bool": (bool, st.booleans()),
    "float": (float, st.floats(allow_nan=False, allow_infinity=False)),
    "bytes": (bytes, st.binary()),
    "uuid": (UUID, st.uuids()),
    "decimal": (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    "date": (dt.date, st.dates()),
    "naive datetime": (dt.datetime, st.datetimes()),
    "datetime": (dt.datetime, zoned),
    "time": (dt.time, st.times()),
    "timedelta": (dt.timedelta, st.timedeltas(dt.timedelta(days=-99999), dt.timedelta(days=99999))),
    "enum": (Color, st.sampled_from(Color)),
    "optional": (UUID | None, st.none() | st.uuids()),
    "list": (list[Decimal], st.lists(st.decimals(allow_nan=False, allow_infinity=False))),
    "set": (set[int], st.sets(st.integers(-(2**70), 2**70))),
    "frozenset": (frozenset[UUID], st.frozensets(st.uuids())),
    "tuple": (tuple[int, str, bytes], st.tuples(st.integers(-(2**70), 2**70), texts, st.binary())),
    "open tuple": (tuple[dt.date, ...], st.lists(st.dates()).map(tuple)),
    "dict": (dict[UUID, list[bytes]], st.dictionaries(st.uuids(), st.lists(st.binary()))),
    "any": (Any, json_values),
    "json": (Tree, st.recursive(st.integers(-99, 99) | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner))),
    "dataclass": (Point, st.builds(Point, st.integers(-(2**70), 2**70), st.binary() if DATACLASSES_TAKE_BINARY else st.just(b""), st.none() | zoned)),
    "model": (Person, st.builds(Person, name=texts, addresses=st.lists(st.builds(Address, street=texts)))),
    "text or uuid": (str | UUID, texts | st.uuids() | st.uuids().map(str)),
    "text or decimal": (str | Decimal, texts | st.sampled_from(["1.0", "1"]) | st.sampled_from([Decimal(1), Decimal("1.00")])),
    "text or int": (int | str, st.integers(-99, 99) | st.integers().map(str)),
    "int or float": (int | float, st.integers(-99, 99) | st.sampled_from([0.0, 1.0, -3.5])),
    "date or datetime": (dt.date | dt.datetime, st.dates() | st.datetimes()),
    "bytes or text": (bytes | str, st.binary() | texts),
    "inner union": (list[int | Decimal | str | UUID], st.lists(st.integers(-9, 9) | st.uuids() | texts | st.just(Decimal(1)))),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXACT)
def test_what_crosses_comes_back_exactly(kind):
    """Every value of an allowed type arrives equal and of the same type, however deep it stands."""
    annotation, values = EXACT[kind]
    plan = plan_for(taking(annotation))

    @given(values)
    def check(value):
        text = plan.hand_over(None, (value,), {}, max_bytes=2**22).resolve()

        (back,), _ = plan.load(None, text)

        assert back == value
        assert type(back) is type(value)
        assert json.loads(text).keys() == {"value"}
        if isinstance(value, dt.datetime):
            assert back.utcoffset() == value.utcoffset()
        if isinstance(value, list):
            assert list(map(type, back)) == list(map(type, value))

    check()


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Person, Person(name="a", note=None)),
        (Customer, Customer(name="a", discount=Decimal("0.10"))),
        (Box[list[UUID]], Box[list[UUID]](content=[UUID(int=1)])),
        (Options, {"size": 1}),
        (Pair, Pair(1, UUID(int=2))),
        (Literal["a", 1], 1),
        (tuple[Mixed, Mixed], ("a", UUID(int=1))),
        (Annotated[int, {"unhashable": []}], 1),
        (UserId, 7),
        (Ids, [UUID(int=3)]),
        (Annotated[int, pydantic.Field(gt=0)], 3),
        (Path, Path("/tmp/x")),
        (deque[int], deque([1, 2])),
        (OrderedDict[str, int], OrderedDict(b=1, a=2)),
        (defaultdict[str, list[int]], defaultdict(list, {"a": [1]})),
        (Sequence[int], [1, 2]),
        (Person | Address, Address(street="a")),
        (Point | Point3 | None, Point3(1, z=2)),
        (list[int] | list[str], ["1"]),
        (dict[str, int] | Address, Address(street="a")),
        (int | Color, Color.TUPLE),
        (Loose, Loose(known=1, other=[1])),
        (object, [1, "a", None]),
    ],
)
def test_types_of_the_users_own_cross(annotation, value):
    """Models, dataclasses, named tuples, generics, aliases and unions of them arrive as they were."""
    back = crossed(annotation, value)

    assert back == value
    assert type(back) is type(value)


def test_alike_scalars_are_taken():
    """What Python itself calls the same is no error: True for an int, 1 for a float, a StrEnum for a str."""
    assert crossed(int, True) == 1
    assert crossed(float, 1) == 1.0
    assert crossed(str, Mood.GOOD) == "good"
    assert crossed(int, Level.LOW) == 1


def test_values_of_drivers_and_test_tools_cross():
    """A subclass of a plain value is that value: asyncpg's UUID, freezegun's datetime."""

    class Frozen(dt.datetime):
        pass

    moment = Frozen(2026, 1, 2, tzinfo=dt.UTC)

    assert crossed(UUID, asyncpg.pgproto.pgproto.UUID(str(UUID(int=5)))) == UUID(int=5)
    assert crossed(str | UUID, asyncpg.pgproto.pgproto.UUID(str(UUID(int=5)))) == UUID(int=5)
    assert crossed(dt.datetime, moment) == moment


def test_union_says_which_member_it_was():
    """A member that its JSON does not tell is named there, and survives a change in the order of the union."""
    text = stored(taking(str | UUID), UUID(int=1))

    assert json.loads(text) == {"value": {"$is": "UUID", "value": str(UUID(int=1))}}
    assert plan_for(taking(UUID | int | str)).load(None, text) == ((UUID(int=1),), {})


def test_union_reads_what_was_stored_before_it_was_one():
    """A task that waits while its parameter becomes a union gets its argument."""
    text = stored(taking(UUID), UUID(int=1))

    (back,), _ = plan_for(taking(UUID | int)).load(None, text)

    assert back == UUID(int=1)


def test_discriminated_union_is_left_to_pydantic():
    """Members that tell themselves apart are stored plainly."""

    class Cat(pydantic.BaseModel):
        kind: Literal["cat"] = "cat"

    class Dog(pydantic.BaseModel):
        kind: Literal["dog"]

    text = stored(taking(Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]), Dog(kind="dog"))

    assert json.loads(text) == {"value": {"kind": "dog"}}


def test_fields_that_were_never_set_stay_so():
    """`model_dump(exclude_unset=True)` says in the task what it said in the request: updates stay partial."""
    back = crossed(Person, Person(name="a"))

    assert back.model_dump(exclude_unset=True) == {"name": "a"}


def test_defaults_made_anew_are_written_down():
    """A default that is another each time crosses with the value that the asker saw."""

    class Ticket(pydantic.BaseModel):
        number: UUID = pydantic.Field(default_factory=uuid4)

    ticket = Ticket()

    assert crossed(Ticket, ticket) == ticket


def test_changed_default_of_a_list_crosses():
    """What was put into a default in place is not lost."""
    person = Person(name="a")
    person.addresses.append(Address(street="b"))

    assert crossed(Person, person).addresses == [Address(street="b")]


def test_binary_in_standard_dataclasses_and_typed_dicts_crosses():
    """Bytes need not be text, inside standard types either."""

    class Blob(typing_extensions.TypedDict):
        data: bytes

    assert crossed(Blob, {"data": b"\xff"}) == {"data": b"\xff"}
    if DATACLASSES_TAKE_BINARY:
        assert crossed(list[Point], [Point(1, b"\xff\x00")]) == [Point(1, b"\xff\x00")]
    else:
        assert "ser_json_bytes" in str(refused(list[Point], [Point(1, b"\xff\x00")]))


def test_binary_in_a_model_says_how_to_cross():
    """A model decides by itself how its bytes are written: the refusal has the line."""

    class Blob(pydantic.BaseModel):
        data: bytes

    class Base64Blob(Blob):
        model_config = pydantic.ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    assert 'ConfigDict(ser_json_bytes="base64"' in str(refused(Blob, Blob(data=b"\xff")))
    assert crossed(Base64Blob, Base64Blob(data=b"\xff")) == Base64Blob(data=b"\xff")


# --- calls ------------------------------------------------------------------------------------------------------


def every_kind(a: int, b: str = "b", /, c: int = 3, *rest: UUID, d: bytes, e: int = 5, **more: Decimal) -> None: ...


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1,), {"d": b"d"}, ((1,), {"d": b"d"})),
        ((1, "x"), {"c": 4, "d": b""}, ((1, "x", 4), {"d": b""})),
        ((1,), {"c": 4, "d": b""}, ((1,), {"c": 4, "d": b""})),
        (
            (1, "x", 4, UUID(int=1), UUID(int=2)),
            {"d": b"", "e": 6, "f": Decimal("1.0")},
            ((1, "x", 4, UUID(int=1), UUID(int=2)), {"d": b"", "e": 6, "f": Decimal("1.0")}),
        ),
        ((1,), {"d": b"", "a": Decimal(2)}, ((1,), {"d": b"", "a": Decimal(2)})),
    ],
)
def test_every_kind_of_parameter_crosses(args, kwargs, expected):
    """Positional-only, starred and keyword-only parameters arrive as they were called."""
    plan = plan_for(every_kind)

    text = plan.hand_over(None, args, kwargs, max_bytes=MANY).resolve()

    assert plan.load(None, text) == expected


def test_session_is_neither_asked_for_nor_stored():
    """The first parameter is injected: the call and the record know nothing of it."""

    def job(session: Session, number: int) -> None: ...

    handed = plan_for(job, skip_first=True).hand_over(None, (1,), {}, max_bytes=MANY)

    assert handed.resolve() == '{"number":1}'


def test_defaults_are_not_stored():
    """A task that waits through a deploy gets the new release's default."""

    def before(a: int, b: int = 1) -> None: ...
    def after(a: int, b: int = 2, c: int = 3) -> None: ...

    text = stored(before, 5)

    assert text == '{"a":5}'
    assert plan_for(after).load(None, text) == ((5,), {})


def test_default_in_front_of_starred_arguments_is_filled_in():
    """A parameter that a release puts before `*args` takes none of them."""

    def before(a: int, *rest: int) -> None: ...
    def after(a: int, b: int = 9, *rest: int) -> None: ...

    assert plan_for(after).load(None, stored(before, 1, 2, 3)) == ((1, 9, 2, 3), {})


def test_what_was_handed_over_is_what_crosses():
    """A list changed after the hand-over crosses as it was."""
    plan, numbers = plan_for(taking(list[int])), [1]
    handed = plan.hand_over(None, (numbers,), {}, max_bytes=MANY)

    numbers.append(2)

    assert plan.load(None, handed.resolve()) == (([1],), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing a required argument: 'value'"),
        ((1, 2), {}, "too many positional arguments"),
        ((1,), {"other": 1}, "got an unexpected keyword argument 'other'"),
        ((1,), {"value": 1}, "multiple values for argument 'value'"),
    ],
)
def test_calls_that_python_would_refuse_are_refused(args, kwargs, message):
    """A call that cannot be made is a TypeError at hand-over that names the task."""
    with pytest.raises(TypeError, match="task 'job'") as caught:
        plan_for(taking(int)).hand_over(None, args, kwargs, max_bytes=MANY)

    assert message in str(caught.value)
    assert not isinstance(caught.value, UnsafeArgument)


@pytest.mark.parametrize("unpack", [typing.Unpack, typing_extensions.Unpack])
def test_unpacked_typed_dict_types_keyword_arguments(unpack):
    """`**options: Unpack[Options]` is checked field by field."""

    def job(**options: Any) -> None: ...

    job.__annotations__["options"] = unpack[Options]

    assert plan_for(job).load(None, stored(job, size=1, name="a")) == ((), {"size": 1, "name": "a"})
    with pytest.raises(UnsafeArgument):
        stored(job, size="1")


@pytest.mark.parametrize("name", ["schema", "copy", "model_config", "_private", "a0", "json", "self", "cls"])
def test_no_name_of_a_parameter_is_special(name):
    """Parameters may be called what Pydantic calls its own."""
    scope: dict[str, Any] = {}
    exec(f"def job({name}: int, other: int = 0): ...", scope)

    assert plan_for(scope["job"]).load(None, stored(scope["job"], **{name: 3})) == ((3,), {})


# --- refusals ---------------------------------------------------------------------------------------------------


def generator() -> Iterator[int]:
    yield 1


async def coroutine() -> None: ...


class Service:
    def __init__(self, session: Any) -> None:
        self.session = session

    def method(self) -> None: ...


class Slots:
    __slots__ = ("__mangled",)

    def __init__(self, inside: Any) -> None:
        self.__mangled = inside


def closure_over(thing: Any) -> Callable[[], Any]:
    return lambda: thing


def cycle() -> list[Any]:
    around: list[Any] = []
    around.append(around)
    return around


ENGINE = create_engine("sqlite://")
ASYNC_ENGINE = create_async_engine("sqlite+aiosqlite://")


def fetched(method: str) -> Any:
    with ENGINE.connect() as connection:
        result = connection.execute(text("select 1 as one"))
        return result if method == "result" else getattr(result, method)()


class Closing:
    """Makes things and closes them after the test."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()

    def __call__(self, thing: Any) -> Any:
        self.stack.callback(thing.close)
        return thing


@pytest.fixture
def closing() -> Iterator[Closing]:
    found = Closing()
    with found.stack:
        yield found


REQUEST_SCOPE = {"type": "http", "headers": []}
FORBIDDEN: dict[str, tuple[str, str, Callable[[Closing], Any]]] = {
    "Session": ("AC101", "gets a session of its own as its first parameter", lambda _: Session()),
    "Session of SQLModel": ("AC101", "gets a session of its own", lambda _: sqlmodel.Session()),
    "AsyncSession": ("AC101", "gets a session of its own", lambda _: AsyncSession()),
    "scoped_session": ("AC101", "gets a session of its own", lambda _: scoped_session(sessionmaker())),
    "async_scoped_session": (
        "AC101",
        "gets a session of its own",
        lambda _: async_scoped_session(async_sessionmaker(), lambda: 1),
    ),
    "sessionmaker": ("AC101", "gets a session of its own", lambda _: sessionmaker()),
    "async_sessionmaker": ("AC101", "gets a session of its own", lambda _: async_sessionmaker()),
    "transaction of a session": ("AC105", "its first parameter", lambda closing: closing(Session(ENGINE)).begin()),
    "Connection": ("AC105", "`session.connection()`", lambda closing: closing(ENGINE.connect())),
    "AsyncConnection": ("AC105", "`session.connection()`", lambda _: ASYNC_ENGINE.connect()),
    "Engine": ("AC105", "`session.connection()`", lambda _: ENGINE),
    "AsyncEngine": ("AC105", "`session.connection()`", lambda _: ASYNC_ENGINE),
    "raw connection": ("AC105", "`session.connection()`", lambda closing: closing(ENGINE.raw_connection())),
    "transaction": ("AC105", "its first parameter", lambda closing: closing(closing(ENGINE.connect()).begin())),
    "Result": ("AC105", "fetch it here", lambda _: fetched("result")),
    "ScalarResult": ("AC105", "fetch it here", lambda _: fetched("scalars")),
    "MappingResult": ("AC105", "fetch it here", lambda _: fetched("mappings")),
    "Row": ("AC109", "`row.id`", lambda _: fetched("one")),
    "sqlite3 connection": ("AC105", "`session.connection()`", lambda closing: closing(sqlite3.connect(":memory:"))),
    "sqlite3 cursor": (
        "AC105",
        "run the query in the task",
        lambda closing: closing(closing(sqlite3.connect(":memory:")).cursor()),
    ),
    "mapped instance": ("AC102", "`user: User`", lambda _: User(id=1)),
    "row of SQLModel": ("AC102", "`hero.id`", lambda _: Hero(id=1)),
    "Request": ("AC109", "read what the task needs", lambda _: Request(REQUEST_SCOPE)),
    "Response": ("AC109", "the data that it was made from", lambda _: Response()),
    "WebSocket": (
        "AC109",
        "pass an id",
        lambda _: WebSocket({"type": "websocket", "headers": []}, lambda: None, lambda _: None),
    ),
    "UploadFile": (
        "AC109",
        "read the upload first, store it, pass its path",
        lambda closing: UploadFile(closing(io.BytesIO())),
    ),
    "BackgroundTasks": ("AC109", "`db.after_commit(session, …)`", lambda _: BackgroundTasks()),
    "open file": ("AC109", "pass its path", lambda closing: closing(Path(__file__).open())),
    "file in memory": ("AC109", "pass its path", lambda closing: closing(io.BytesIO())),
    "temporary file": ("AC109", "pass its path", lambda closing: closing(tempfile.NamedTemporaryFile())),
    "lock": ("AC109", "lock a row", lambda _: threading.Lock()),
    "reentrant lock": ("AC109", "lock a row", lambda _: threading.RLock()),
    "asyncio lock": ("AC109", "lock a row", lambda _: asyncio.Lock()),
    "thread": ("AC109", "lock a row", lambda _: threading.Thread()),
    "socket": ("AC109", "pass the address", lambda closing: closing(socket.socket())),
    "generator": ("AC109", "pass `list(…)`", lambda closing: closing(generator())),
    "iterator": ("AC109", "pass `list(…)`", lambda _: iter([1])),
    "map": ("AC109", "pass `list(…)`", lambda _: map(str, [1])),
    "coroutine": ("AC109", "await it", lambda closing: closing(coroutine())),
}


@pytest.mark.parametrize("kind", FORBIDDEN)
@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda thing: thing, "value"),
        (lambda thing: [1, {"owner": thing}], "value[1]['owner']"),
        (Slotted, "value.inside"),
        (lambda thing: Holder(inside=thing), "value.inside"),
    ],
    ids=["itself", "containers", "dataclass", "model"],
)
def test_what_belongs_to_the_request_is_refused(kind, wrap, path, closing):
    """Sessions, connections, rows, requests and the like are refused wherever they stand, with path and remedy."""
    code, remedy, make = FORBIDDEN[kind]
    value = wrap(make(closing))

    error = refused(Any, value)

    assert (error.code, error.parameter, error.task) == (code, path, "job")
    assert remedy in str(error)
    assert f"`{path}` is {error.thing}" in str(error)


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda thing: functools.partial(print, thing), "value.args[0]"),
        (lambda thing: functools.partial(print, end=thing), "value.keywords['end']"),
        (lambda thing: Service(thing).method, "value.__self__.session"),
        (closure_over, "value.<closure>.thing"),
        (lambda thing: lambda session=thing: session, "value.__defaults__[0]"),
        (Service, "value.session"),
        (Slots, "value._Slots__mangled"),
        (lambda thing: {thing}, "value{`sqlalchemy.orm.session.Session`}"),
        (lambda thing: {thing: 1}, "value[`sqlalchemy.orm.session.Session`]"),
        (lambda thing: (1, deque([thing])), "value[1][0]"),
        (lambda thing: Loose(extra=thing), "value.extra"),
        (lambda thing: [cycle(), Service(Service(thing))], "value[1].session.session"),
    ],
)
def test_a_session_is_found_wherever_it_hides(wrap, path):
    """Partials, bound methods, closures, slots and private attributes are looked into."""
    error = refused(Any, wrap(Session()))

    assert (error.code, error.parameter) == ("AC101", path)


def test_a_session_in_a_private_attribute_is_found():
    """A model's private attributes do not cross, so nothing may hide in them."""
    holder = Holder()
    holder._hidden = Session()

    assert refused(Holder, holder).parameter == "value._hidden"


def test_a_starred_argument_is_named_by_its_place():
    """The path into `*items` and `**options` is that of the call."""

    def job(*items: Any, **options: Any) -> None: ...

    with pytest.raises(UnsafeArgument) as positional:
        stored(job, 1, Session())
    with pytest.raises(UnsafeArgument) as named:
        stored(job, owner=Service(Session()))

    assert positional.value.parameter == "items[1]"
    assert named.value.parameter == "options['owner'].session"


def test_a_row_is_told_how_to_cross():
    """The remedy for a mapped instance names its class and its key."""
    error = refused(int, User(id=3))

    assert error.code == "AC102"
    assert "`user: User`" in str(error)
    assert "`user.id`" in str(error)


class Counting:
    """Is equal to nothing, and says so by raising."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


class Array:
    """Compares as numpy does."""

    def __eq__(self, other: object) -> Any:
        return [True]

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            lambda _: cls(), serialization=core_schema.plain_serializer_function_ser_schema(lambda _: 1)
        )


class Secretive(pydantic.BaseModel):
    shown: int
    hidden: int = pydantic.Field(default=0, exclude=True)


class Lost(pydantic.BaseModel):
    hidden: int = pydantic.Field(exclude=True)


@pytest.mark.parametrize(
    ("annotation", "value", "path", "words"),
    [
        (int, "5", "value", "valid integer"),
        (str, 5, "value", "valid string"),
        (str, None, "value", "valid string"),
        (UUID, str(UUID(int=1)), "value", "UUID"),
        (Decimal, "1.0", "value", "Decimal"),
        (dt.datetime, "2020-01-01T00:00:00", "value", "datetime"),
        (dt.date, dt.datetime(2020, 1, 1), "value", "valid date"),
        (Color, "red", "value", "Color"),
        (list[int], [1, "2"], "value[1]", "valid integer"),
        (list[int], (1, 2), "value", "list"),
        (dict[str, list[int]], {"a": [1, 2.5]}, "value['a'][1]", "valid integer"),
        (Any, UUID(int=1), "value", "would arrive as `str`"),
        (Any, (1, 2), "value", "would arrive as `list`"),
        (Any, {1: 2}, "value", "`int`"),
        (pydantic.SecretStr, pydantic.SecretStr("s3cret"), "value", "stars"),
        (dict[str, pydantic.SecretStr], {"a": pydantic.SecretStr("s3cret")}, "value['a']", "stars"),
        (float, float("nan"), "value", "nan or infinity"),
        (list[float], [1.0, float("inf")], "value[1]", "nan or infinity"),
        (Person, Customer(name="a", discount=Decimal(1)), "value", "would arrive as"),
        (list[Point], [Point3(1)], "value[0]", "would arrive as"),
        (Secretive, Secretive(shown=1, hidden=2), "value.hidden", "left out"),
        (Lost, Lost(hidden=2), "value.hidden", "left out"),
        (Array, Array(), "value", "another value"),
        (Any, Counting(), "value", "Counting"),
        (Any, cycle(), "value", "contains itself"),
        (Any, lambda: 1, "value", "code"),
        (Any, object(), "value", "`object`"),
        (Options, {"size": 1, "more": 2}, "value", "another value"),
        (Annotated[str, pydantic.AfterValidator(str.strip)], " a ", "value", "another value"),
        (str, "\ud800", "value", "`str`"),
        (int, Decimal(1), "value", "valid integer"),
        (Person, {"name": "a"}, "value", "Person"),
        (dt.time, dt.time(1, tzinfo=ZoneInfo("Europe/Berlin")), "value", "`datetime.time`"),
        (int | UUID, "a", "value", "`str`"),
    ],
)
def test_what_would_not_come_back_the_same_is_refused(annotation, value, path, words):
    """Nothing is converted, shortened or starred on the way: it is refused, and no value is in the message."""
    error = refused(annotation, value)

    assert (error.code, error.parameter) == ("AC109", path)
    assert words in str(error)
    assert "s3cret" not in str(error)
    assert error.__cause__ is None


def test_too_large_is_refused():
    """The limit counts bytes of UTF-8, names the size and tells where large things belong."""
    plan = plan_for(taking(str))

    plan.hand_over(None, ("a" * 88,), {}, max_bytes=100)
    with pytest.raises(UnsafeArgument, match=r"take 102 bytes of JSON, and 100 are allowed.*pass the row"):
        plan.hand_over(None, ("ä" * 45,), {}, max_bytes=100)


def test_a_large_list_is_looked_through():
    """Length hides nothing."""
    assert refused(Any, [*range(50_000), Session()]).parameter == "value[50000]"


# --- definitions ------------------------------------------------------------------------------------------------


def imported_for_types(value: "Missing") -> None: ...  # noqa: F821


def test_an_unknown_name_is_named():
    """A name that only a type checker knows is an error that says what to do."""
    with pytest.raises(TaskDefinitionError, match=r"parameter `value` uses `Missing`.*TYPE_CHECKING"):
        plan_for(imported_for_types).prepare()


def test_names_of_an_enclosing_function_are_found():
    """An annotation in quotes may use what the function has closed over."""

    class Local(pydantic.BaseModel):
        number: int

    def job(value: "list[Local]") -> Any:
        return Local

    assert plan_for(job).load(None, stored(job, [Local(number=1)])) == (([Local(number=1)],), {})


def test_definition_is_lazy():
    """A plan can be made before the names in its annotations exist."""
    scope: dict[str, Any] = {}
    exec("def job(value: 'Later') -> None: ...", scope)
    plan = plan_for(scope["job"])

    scope["Later"] = int
    plan.prepare()
    plan.prepare()

    assert plan.hand_over(None, (1,), {}, max_bytes=MANY).resolve() == '{"value":1}'


class RowInside(typing_extensions.TypedDict):
    user: User


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Session, "AC101"),
        (list[AsyncSession], "AC101"),
        (UploadFile, "read the upload first"),
        (Request | None, "read what the task needs"),
        (Callable[[], int], "code does not cross"),
        (type[int], "code does not cross"),
        (Iterator[int], r"list\[…\]"),
        (threading.Thread, "lock a row"),
        (object(), "cannot"),
        (Service, "carried as JSON"),
        (RowInside, "not inside another type"),
        (set[User], r"list\[User\]"),
        (dict[User, int], r"list\[User\]"),
    ],
)
def test_annotations_that_no_json_can_carry_are_refused(annotation, words):
    """A task that could never be handed over is refused when it is prepared, naming the parameter."""
    with pytest.raises(TaskDefinitionError, match=r"`value") as caught:
        plan_for(taking(annotation)).prepare()

    assert caught.match(words)


def test_many_threads_prepare_once():
    """Threads that come first together get one plan."""
    plan, found, barrier = plan_for(taking(int)), [], threading.Barrier(8)

    def first() -> None:
        barrier.wait()
        found.append(plan._prepared())

    threads = [threading.Thread(target=first) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(map(id, found))) == 1


# --- stored arguments that do not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "model_type"),
        ("null", "model_type"),
        ("{}", "has no `value`|have no `value`"),
        ('{"value": "hunter2"}', "`value`"),
        ('{"value": null}', "`value`"),
        ('{"value": 1, "extra": 2, "more": 3}', "`extra`, `more`"),
        ('{"a0": 1}', "`a0`"),
        ('{"value": {"$row": "User", "key": [1]}}', "`value`"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_tampered_arguments_are_an_error_of_that_task(text, words):
    """What does not fit the signature is a PayloadError that shows no value."""
    run = UUID(int=9)

    with pytest.raises(PayloadError, match=words) as caught:
        plan_for(taking(int)).load(None, text, run_id=run)

    assert (caught.value.task, caught.value.run_id) == ("job", run)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_keys_of_a_dictionary_are_not_shown():
    """What stands in a stored dictionary, its keys included, is not repeated by the error."""
    with pytest.raises(PayloadError, match="`value`") as caught:
        plan_for(taking(dict[str, int])).load(None, '{"value": {"hunter2": "x"}}')

    assert "hunter2" not in str(caught.value)


def test_a_validator_that_raises_anything_is_a_payload_error():
    """What a validator of the user's raises while reading is an error of that payload."""

    def strict(value: int) -> int:
        if value > 1:
            raise KeyError("hunter2")
        return value

    job = taking(Annotated[int, pydantic.AfterValidator(strict)])

    with pytest.raises(PayloadError, match="KeyError") as caught:
        plan_for(job).load(None, '{"value": 2}')
    assert "hunter2" not in str(caught.value)


@given(st.text() | json_values.map(json.dumps) | st.dictionaries(st.just("value"), json_values).map(json.dumps))
def test_no_stored_text_raises_anything_else(text):
    """Whatever stands in the record, reading it works or is a PayloadError."""
    with contextlib.suppress(PayloadError):
        plan_for(taking(int | UUID | list[Person])).load(None, text)
