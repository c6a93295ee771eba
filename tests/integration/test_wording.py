"""No value that an error met is kept, logged, printed or traced: whoever wrote it into the message."""

import datetime as dt
import enum
import importlib
import io
import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pydantic
import pytest
import sqlalchemy as sa
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import Mapped, Session, mapped_column
from typer.testing import CliRunner

from aftercommit import Database, Retry
from aftercommit.cli.commands import app
from aftercommit.monitoring.opentelemetry import instrument, uninstrument
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Base, Workshop

SECRET = "4111" * 4
WORD = "xyzzy" + "plugh"
WAYS: dict[str, tuple[str, Callable[[Session], object]]] = {}


class Colour(enum.Enum):
    """What a column may hold."""

    RED = "red"


class Card(Base):
    """A row with something in it that nobody else should read."""

    __tablename__ = "card"
    number: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    owner: Mapped[str] = mapped_column(sa.String(20), sa.CheckConstraint("owner <> 'nobody'", name="card_has_owner"))
    code: Mapped[int | None] = mapped_column(sa.SmallInteger)
    day: Mapped[dt.date | None]
    colour: Mapped[Colour | None] = mapped_column(sa.Enum(Colour, native_enum=False, validate_strings=True))


class Account(Base):
    """A row that refers to another one."""

    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True)
    card: Mapped[str] = mapped_column(sa.ForeignKey("card.number", deferrable=True, initially="DEFERRED"))


class Booking(pydantic.BaseModel):
    """What comes from outside."""

    number: int


ON_POSTGRES = f"""
CREATE DOMAIN short AS text CHECK (length(value) < 5);
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TABLE room (number text, EXCLUDE USING btree (number WITH =), m mood, s short);
CREATE TABLE part (number bigint) PARTITION BY LIST (number);
CREATE TABLE guarded (number text, how text);
CREATE VIEW open_room AS SELECT number FROM room WHERE number <> '{SECRET}' WITH CHECK OPTION;
CREATE SEQUENCE ticket;
CREATE FUNCTION guard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF new.how = 'plain' THEN RAISE EXCEPTION 'the card % is blocked', new.number;
    ELSIF new.how = 'detail' THEN RAISE EXCEPTION 'blocked' USING DETAIL = new.number, HINT = new.number,
        ERRCODE = 'check_violation';
    ELSIF new.how = 'quote' THEN RAISE EXCEPTION 'the card "%" is blocked', new.number USING ERRCODE = '22000';
    ELSIF new.how = 'inner' THEN PERFORM (new.number || 'x')::int;
    ELSIF new.how = 'dynamic' THEN EXECUTE 'SELECT ' || new.number || ' FRM x';
    ELSIF new.how = 'missing' THEN EXECUTE format('SELECT 1 FROM %I', 'card ' || new.number);
    END IF;
    RETURN new;
EXCEPTION WHEN invalid_text_representation THEN RAISE EXCEPTION 'guard: %', SQLERRM; END $$;
CREATE TRIGGER guard BEFORE INSERT ON guarded FOR EACH ROW EXECUTE FUNCTION guard();
"""
ON_SQLITE = """
CREATE TABLE strict_card (number INTEGER) STRICT;
CREATE TABLE room (number TEXT, UNIQUE (number));
CREATE TRIGGER guard BEFORE INSERT ON room WHEN new.number = 'bad' BEGIN SELECT RAISE(ABORT, 'blocked'); END;
CREATE VIRTUAL TABLE book USING fts5(text);
"""


def way(on: str = "postgresql sqlite") -> Callable[[Callable[[Session], object]], Callable[[Session], object]]:
    """Note one way to get a value into an error."""

    def note(body: Callable[[Session], object]) -> Callable[[Session], object]:
        WAYS[body.__name__] = (on, body)
        return body

    return note


def saying(on: str, name: str, statement: str, **values: Any) -> None:
    """Note one statement that fails because of a value."""
    WAYS[name] = (on, lambda session: session.execute(sa.text(statement), values or {"v": SECRET}))


def twice(session: Session) -> None:
    """Break a unique constraint."""
    session.execute(sa.insert(Card), [{"number": SECRET, "owner": WORD}])
    session.execute(sa.insert(Card), [{"number": SECRET, "owner": WORD}])


BOTH, PG, LITE = "postgresql sqlite", "postgresql", "sqlite"
way(BOTH)(twice)
saying(BOTH, "not_null", "INSERT INTO card (number, owner) VALUES (:v, NULL)")
saying(BOTH, "check", "INSERT INTO card (number, owner) VALUES (:v, 'nobody')")
saying(BOTH, "foreign_key", "INSERT INTO account (id, card) VALUES (1, :v)")
saying(BOTH, "unique_elsewhere", "INSERT INTO room (number) VALUES (:v), (:v)")
saying(PG, "too_long", "INSERT INTO card (number, owner) VALUES (:v, 'x')", v=SECRET + SECRET)
saying(PG, "to_int", "SELECT CAST(CAST(:v AS text) || 'x' AS int)")
saying(PG, "to_small_int", "SELECT CAST(CAST(:v AS text) AS int)")
saying(PG, "to_date", "SELECT CAST(CAST(:v AS text) AS date)")
saying(PG, "to_word_date", "SELECT CAST(CAST(:v AS text) AS date)", v=WORD)
saying(PG, "date_out_of_range", "SELECT CAST(CAST(:v AS text) AS date)", v="4111-13-41")
saying(PG, "to_uuid", "SELECT CAST(CAST(:v AS text) AS uuid)")
saying(PG, "to_bool", "SELECT CAST(CAST(:v AS text) AS bool)")
saying(PG, "to_inet", "SELECT CAST(CAST(:v AS text) AS inet)")
saying(PG, "to_enum", "SELECT CAST(CAST(:v AS text) AS mood)", v=WORD)
saying(PG, "to_json", "SELECT CAST(CAST(:v AS text) AS json)", v='{"number": ' + SECRET + " oops}")
saying(PG, "to_array", "SELECT CAST(CAST(:v AS text) AS int[])")
saying(PG, "to_domain", "SELECT CAST(CAST(:v AS text) AS short)")
saying(PG, "to_relation", "SELECT CAST(CAST(:v AS text) AS regclass)", v="card" + SECRET)
saying(PG, "to_query", "SELECT to_tsquery(CAST(:v AS text))", v=f"{SECRET} oops !")
saying(PG, "to_path", "SELECT CAST(CAST(:v AS text) AS jsonpath)", v=f"$.{SECRET}")
saying(PG, "regular_expression", "SELECT 'x' ~ CAST(:v AS text)", v=f"({SECRET}")
saying(PG, "numeric_overflow", "SELECT CAST(CAST(:v AS numeric) AS numeric(5, 2))", v=int(SECRET))
saying(PG, "bad_bytes", "SELECT convert_from(CAST(:v AS bytea), 'UTF8')", v=b"\xff" + SECRET.encode())
saying(PG, "sequence", "SELECT setval('ticket', CAST(CAST(:v AS numeric) * 1000 AS bigint))", v=-int(SECRET))
saying(PG, "setting", "SELECT current_setting(CAST(:v AS text))", v="card." + SECRET)
saying(PG, "set_setting", "SELECT set_config('TimeZone', CAST(:v AS text), true)")
saying(PG, "role", "SELECT has_table_privilege(CAST(:v AS name), 'card', 'SELECT')")
saying(PG, "large_object", "SELECT lo_get(CAST(CAST(:v AS bigint) % 4111111111 AS oid))", v=4111111110)
saying(PG, "no_partition", "INSERT INTO part VALUES (CAST(CAST(:v AS text) AS bigint))")
saying(PG, "exclusion", "INSERT INTO room (number) VALUES (CAST(:v AS text)), (CAST(:v AS text))")
saying(PG, "check_option", "INSERT INTO open_room VALUES (CAST(:v AS text))")
saying(PG, "division", "SELECT 1 / (CAST(CAST(:v AS text) AS bigint) - CAST(CAST(:v AS text) AS bigint))")
for how in ("plain", "detail", "quote", "inner", "dynamic", "missing"):
    saying(PG, f"trigger_{how}", f"INSERT INTO guarded VALUES (CAST(:v AS text), '{how}')")
saying(PG, "driver_cannot_send", "SELECT CAST(:v AS int) + 1", v=SECRET + "oops")
saying(PG, "driver_cannot_send_a_word", "SELECT CAST(:v AS int) + 1", v=WORD)
saying(PG, "driver_cannot_send_nul", "SELECT CAST(:v AS text)", v=SECRET + "\0")
saying(PG, "driver_cannot_send_it", "SELECT CAST(:v AS int)", v={"number": SECRET})
saying(LITE, "strict", "INSERT INTO strict_card (number) VALUES (:v)", v=WORD + SECRET)
saying(LITE, "json", "SELECT json(:v)", v="{" + SECRET)
saying(LITE, "json_path", "SELECT json_extract('{}', :v)")
saying(LITE, "search", "SELECT * FROM book WHERE book MATCH :v", v=f'{SECRET}"')
saying(LITE, "search_in_column", "SELECT * FROM book WHERE book MATCH :v", v=f"c{SECRET}: x")
saying(LITE, "search_in_word", "SELECT * FROM book WHERE book MATCH :v", v=f"{WORD}: x")
saying(LITE, "too_large", "SELECT :v", v=int(SECRET) ** 2)
saying(LITE, "no_type", "SELECT :v", v={"number": SECRET})


@way()
def bind_a_date(session: Session) -> None:
    """A driver, or SQLAlchemy's type, that wants a date."""
    session.add(Card(number="1", owner="x", day=SECRET))  # type: ignore[arg-type]
    session.flush()


@way()
def bind_an_enum(session: Session) -> None:
    """SQLAlchemy's type that knows its values."""
    session.add(Card(number="1", owner="x", colour=SECRET))  # type: ignore[arg-type]
    session.flush()


@way()
def fetch_an_enum(session: Session) -> None:
    """The same on the way back."""
    session.execute(sa.text("INSERT INTO card (number, owner, colour) VALUES ('1', 'x', :v)"), {"v": "411"})
    session.execute(sa.text("UPDATE card SET colour = :v"), {"v": WORD[:3]})
    session.scalars(sa.select(Card)).all()


@way()
def two_of_an_identity(session: Session) -> None:
    """SQLAlchemy names the key of what is there already."""
    first, second = Card(number=SECRET, owner="x"), Card(number=SECRET, owner="x")
    session.add_all([first, second])
    session.flush()


@way()
def used_after_its_failure(session: Session) -> None:
    """SQLAlchemy repeats what made the flush fail, and nobody raises that itself."""
    session.add(Card(number=SECRET, owner=None))  # type: ignore[arg-type]
    with suppress(IntegrityError):
        session.flush()
    session.execute(sa.text("SELECT 1"))


@way()
def raised_from(session: Session) -> None:
    """The application says what the cause was."""
    try:
        twice(session)
    except IntegrityError as error:
        raise LookupError("no place") from error


@way()
def repeated(session: Session) -> None:
    """The application repeats the message, and hides the cause."""
    try:
        twice(session)
    except IntegrityError as error:
        raise LookupError(f"no place: {error}") from None


@way()
def repeated_in_part(session: Session) -> None:
    """Only the driver's part of it, or the beginning."""
    try:
        session.execute(sa.text("INSERT INTO card (number, owner) VALUES (:v, NULL)"), {"v": SECRET})
    except IntegrityError as error:
        raise LookupError(f"no place: {str(error.orig)[:150]} or {error.orig!r}") from None


@way()
def raised_meanwhile(session: Session) -> None:
    """Another error while the first was being handled; and a note."""
    try:
        twice(session)
    except IntegrityError as error:
        error.add_note(f"it was {error}")
        raise KeyError("no place")  # noqa: B904


@way()
def in_a_group(session: Session) -> None:
    """Several at once."""
    errors = []
    for _ in range(2):
        try:
            with session.begin_nested():
                twice(session)
        except IntegrityError as error:
            errors.append(error)
    raise ExceptionGroup(f"two: {errors[0]}", [*errors, LookupError(str(errors[1]))])


@way()
def from_outside(session: Session) -> None:
    """Pydantic shows what it was given."""
    Booking.model_validate({"number": SECRET + "x"})


@way(PG)
def copied(session: Session) -> None:
    """COPY names the line."""
    driver: Any = session.connection().connection.driver_connection
    if not hasattr(driver, "cursor") or hasattr(driver, "copy_records_to_table"):
        session.execute(sa.text("SELECT CAST(CAST(:v AS text) AS macaddr)"), {"v": SECRET})
        return
    cursor = driver.cursor()
    with cursor.copy("COPY card (number, owner, code) FROM STDIN") as copy:
        copy.write_row(("1", "x", SECRET))


# --- the search -------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop with all that can be provoked."""
    shop = Workshop(database, heartbeat=0.2)
    for statement in (ON_SQLITE if database.is_sqlite else ON_POSTGRES).split(";\n" if database.is_sqlite else "\0"):
        if statement.strip():
            shop.sql(statement.replace(":", r"\:"))
    if database.is_sqlite:
        sa.event.listen(
            shop.db.engine("default") if not database.is_async else shop.db.async_engine("default").sync_engine,
            "connect",
            lambda driver, _: driver.execute("PRAGMA foreign_keys=ON").close(),
        )
    yield shop
    Base.metadata.drop_all(shop.outside, [Account.__table__, Card.__table__])  # type: ignore[list-item]
    shop.close()


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged, as it is written."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    ours = logging.getLogger("aftercommit")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    yield written
    ours.removeHandler(handler)
    ours.setLevel(level)


def test_no_value_leaves_in_an_error(shop: Workshop, log: io.StringIO, monkeypatch: pytest.MonkeyPatch):
    """Not in the record, the file, the log, the commands' output, nor the trace; names and codes do."""
    dialect = "sqlite" if shop.under_test.is_sqlite else "postgresql"
    ways = {name: body for name, (on, body) in WAYS.items() if dialect in on.split()}
    assert len(ways) >= 22
    spans = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    raised: dict[str, BaseException] = {}

    def on_failure(session: Session, error: BaseException, label: str) -> None:
        raised[label] = error
        if label == "check":
            twice(session)

    @shop.task(retry=Retry(attempts=2, base=0.001, cap=0.001, on=(Exception,)), on_failure=_for(shop, on_failure))
    def fail(session: Session, label: str) -> None:
        ways[label](session)

    instrument(shop.db, tracer_provider=tracers)
    try:
        with shop.running():
            ids = {name: shop.ask(fail, name) for name in ways}
            shop.drain()
            failed = {record.arguments["label"] for record in shop.records() if record.state == "failed"}
            assert set(ways) == failed, set(ways) - failed
            told = _commands(shop, monkeypatch, str(ids["twice"]), str(ids["not_null"]), str(ids["in_a_group"]))
    finally:
        uninstrument()
    records = {name: shop.record(id) for name, id in ids.items()}
    places = {
        "record": "\n".join(
            repr({c.key: getattr(r, c.key) for c in sa.inspect(type(r)).columns}) for r in records.values()
        ),
        "log": log.getvalue(),
        "commands": told,
        "spans": "\n".join(span.to_json() for span in spans.get_finished_spans()),
        "table": _dump(shop),
    }

    for name, record in records.items():
        assert record.state == "failed", name
        assert record.errors, name
        if name != "foreign_key":  # which is found at the commit
            assert "test_wording.py" in (record.traceback or ""), name
    for name, text in places.items():
        assert len(text) > 1000, name
        for secret in (SECRET, SECRET[:8], WORD, "4111-13"):
            around = text.find(secret)
            assert around == -1, f"{name}: {text[max(0, around - 1500) : around + 100]}"
    unique = records["twice"].error or ""
    assert "card" in unique
    assert ("23505" if dialect == "postgresql" else "SQLITE_CONSTRAINT_PRIMARYKEY") in unique
    assert "INSERT INTO card" in (records["twice"].traceback or "")
    assert "owner" in (records["not_null"].error or "")
    assert "card_has_owner" in (records["check"].error or "")
    assert isinstance(raised["twice"], IntegrityError)
    assert SECRET in str(raised["not_null"]) or shop.under_test.driver != "psycopg"
    assert isinstance(raised["used_after_its_failure"], PendingRollbackError)
    assert "no place" in (records["repeated"].error or "")
    assert "on_failure raised, too" in (records["check"].traceback or "")


def _for(shop: Workshop, body: Callable[..., None]) -> Any:
    """The same for both flavours."""
    if not shop.is_async:

        def plain(session: Session, error: BaseException, label: str = "") -> None:
            body(session, error, label)

        return plain

    async def native(session: Any, error: BaseException, label: str = "") -> None:
        await session.run_sync(body, error, label)

    return native


def _commands(shop: Workshop, monkeypatch: pytest.MonkeyPatch, *ids: str) -> str:
    """What the commands print."""
    module = types.ModuleType("its_shop")
    module.db = Database(shop.under_test.url)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "its_shop", module)
    assert importlib.import_module("its_shop") is module
    runner = CliRunner(env={"COLUMNS": "400"})
    lines = [["tasks", "list"], ["tasks", "list", "--json"], ["doctor"], ["doctor", "--json"]]
    lines += [["tasks", "show", id, *more] for id in ids for more in ([], ["--json"])]
    outputs = [runner.invoke(app, [*line, "--db", "its_shop:db"]) for line in lines]
    return "\n".join(each.output for each in outputs)


def _dump(shop: Workshop) -> str:
    if shop.under_test.path is not None:
        files = sorted(Path(shop.under_test.path.parent).glob(f"{shop.under_test.path.name}*"))
        return "".join(file.read_bytes().decode("latin-1") for file in files)
    with shop.outside.connect() as connection:
        tables = ("aftercommit_task", "aftercommit_worker", "aftercommit_event")
        return "\n".join(
            str(row[0])
            for each in tables
            for row in connection.execute(sa.text(f"SELECT CAST(t AS text) FROM {each} t"))
        )
