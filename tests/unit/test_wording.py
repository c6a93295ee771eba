"""What is told of an error holds no value, in whatever language the server speaks and whoever repeats it."""

import ast
import traceback
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

import aftercommit
from aftercommit.plain import indented, one_line
from aftercommit.wording import told, told_fully, without_values

PACKAGE = Path(aftercommit.__file__).parent
SECRET = "4111" * 4
FORGED = "2026-11-30 12:00:00 ERROR root: forged"


def of_the_server(kind: type[asyncpg.PostgresError], message: str, **fields: str) -> DBAPIError:
    """An error as SQLAlchemy raises it, from a server that speaks its administrator's language."""
    error = kind(message)
    for name, value in fields.items():
        setattr(error, name, value)
    return DBAPIError.instance("SELECT n FROM card", {"n": SECRET}, error, asyncpg.PostgresError, hide_parameters=True)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        (asyncpg.InvalidTextRepresentationError, f"ungültige Eingabesyntax für Typ integer: »{SECRET}«", "[22P02]"),
        (asyncpg.UndefinedTableError, f"Relation »card {SECRET}« existiert nicht", "Relation »…«"),
        (asyncpg.UndefinedTableError, "la relation « n » n'existe pas", "la relation « n » n'existe pas"),
        (asyncpg.UndefinedTableError, "la relation « géheim » n'existe pas", "la relation «…»"),
        (asyncpg.UndefinedColumnError, "列“geheim”不存在", "列“…”"),
        (asyncpg.PostgresSyntaxError, f'"{SECRET}"またはその近辺で構文エラー', '"…"'),
        (asyncpg.RaiseError, "карта geheim@example.org заблокирована", "карта …"),
        (asyncpg.RaiseError, 'das "geheim', 'das "…"'),
        (asyncpg.TooManyConnectionsError, "zu viele Verbindungen für Rolle »shop«", "für Rolle »shop«"),
    ],
)
def test_messages_end_before_what_may_be_a_value(kind: type[asyncpg.PostgresError], message: str, expected: str):
    """Words stay, and what the statement or a field names; whatever else is quoted or has a digit in it goes."""
    error = of_the_server(kind, message, detail=f"Schlüssel (n)=({SECRET})", hint=SECRET, context=SECRET)

    text = told(error) + told_fully(error)

    assert expected in text
    assert SECRET not in text
    assert "geheim" not in text
    assert "SELECT n FROM card" in text


def test_names_come_from_the_fields():
    """The constraint, the table and the column are told of, whatever the message says."""
    error = of_the_server(
        asyncpg.UniqueViolationError, "doppelter Schlüsselwert verletzt Unique-Constraint »card_number_key«",
        detail=f"Schlüssel »(number)=({SECRET})« existiert bereits.", constraint_name="card_number_key",
        table_name="card",
    )  # fmt: skip

    text = told(error)

    assert "[23505] doppelter Schlüsselwert verletzt Unique-Constraint »card_number_key«" in text
    assert 'table "card", constraint "card_number_key"' in text
    assert SECRET not in text


def test_the_errors_themselves_stay_as_they_are():
    """What tells of them is a likeness, with the same names, lines, causes and notes."""
    cause = of_the_server(asyncpg.UniqueViolationError, "so", detail=f"(n)=({SECRET})")
    try:
        try:
            raise cause
        except DBAPIError as exc:
            raise LookupError(f"no place for {exc.orig}") from exc
    except LookupError as exc:
        error = exc
        error.add_note(f"because of {cause.orig}")

    likeness = without_values(error)

    assert likeness is not error
    assert isinstance(likeness, LookupError) or type(likeness).__name__ == "LookupError"
    assert likeness.__traceback__ is error.__traceback__
    assert type(likeness.__cause__).__name__ == type(cause).__name__
    assert SECRET in str(error)
    assert SECRET in "".join(traceback.format_exception(error))
    assert SECRET not in "".join(traceback.format_exception(likeness))
    assert "no place for [23505] so" in str(likeness)


def test_an_error_without_values_is_itself():
    """Nothing is copied for nothing: filters and error trackers see the application's own classes."""
    error = ValueError("no")
    error.__cause__ = KeyError("why")

    assert without_values(error) is error


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_no_message_begins_a_line(separator: str):
    """Neither in the one line nor in the traceback; notes and groups are no exception."""
    error = ExceptionGroup(f"a{separator}{FORGED}", [ValueError(f"b{separator}{FORGED}\x1b]0;title\x07")])
    error.add_note(f"c{separator}{FORGED}")
    error.exceptions[0].__context__ = KeyError(f"{separator}{FORGED}")

    text = told_fully(error)

    assert len(told(error).splitlines()) == 1
    assert not any(line.startswith(FORGED) for line in text.splitlines())
    assert "\x1b" not in text
    assert "forged" in text


def test_chains_that_bite_their_tail_or_never_end():
    """Circles and thousands of links are told of, and so is an exception that cannot be read."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    first, second = ValueError("1\n"), Mute()
    first.__context__, second.__context__ = second, first
    long: BaseException = of_the_server(asyncpg.UniqueViolationError, "so", detail=SECRET)
    for number in range(5000):
        link = ValueError(number)
        link.__context__ = long
        long = link

    assert "ValueError" in told_fully(first)
    assert "Mute" in told_fully(second)
    assert "ValueError" in told_fully(long)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_log_of_ours_is_given_an_error_as_it_is(path: Path):
    """What we log of an error goes through ``told`` or ``without_values``, or its values would be in the log again."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    for call in calls:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        is_log = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in {"logger", "logging"}
        names = {ast.unparse(each) for each in call.args} if is_log else set()

        assert not (is_log and isinstance(call.func, ast.Attribute) and call.func.attr == "exception"), call.lineno
        assert "exc_info" not in given or given["exc_info"].startswith(("without_values(", "shown")), call.lineno
        assert names.isdisjoint({"exc", "raised", "signal.error"}), call.lineno


def test_text_is_shown_without_what_moves_a_terminal():
    """Control characters, directions of writing and half characters are shown by their numbers."""
    assert one_line("a\x1b[31m\x9b\u202eb\ud800\0\tc\n") == "a\\x1b[31m\\x9b\\u202eb\\ud800\\0\tc\\n"
    assert one_line("Ünï — 日本 👩\u200d👧") == "Ünï — 日本 👩\u200d👧"
    assert one_line("x" * 50, 10) == "x" * 9 + "…"
    assert indented("a\nb\r\n\x1bc") == "a\n    b\n    \\x1bc"
