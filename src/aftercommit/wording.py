"""How an error is told of to whoever reads records, logs and traces: without the values that it met.

Databases write values into their messages: ``Failing row contains (4111…)``, ``Key (number)=(4111…) already
exists``, ``invalid input syntax for type date: "4111…"``; so do drivers and SQLAlchemy, where a value is of no use to
them. ``told``, ``told_fully`` and ``without_values`` say the same without: the classes, the SQLSTATE, the statement
with its placeholders, the names of table, column, type and constraint, the lines of code.

- Servers speak the administrator's language, so nothing is looked for in their sentences. Names come from the fields
  of the error. The details, hints and contexts are left out. The message itself is left out in class 22 ("data
  exception": it is *about* a value); of the others it is kept as far as the first thing in it that may be a value,
  which is whatever stands in quotes or has a digit in it, and is no name that the error or the statement gives.
- What the application says in its own errors is its own, and stays. So does what its triggers RAISE, as far as the
  first thing in it that may be a value: they like to repeat what the database has said.
- What an error of the application repeats of a database error in its chain (``raise Refused(str(error)) from
  error``) is replaced.

The exceptions themselves are never changed: ``on_failure`` and the subscribers of signals get them as they are.
"""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import exc

from aftercommit.errors import AfterCommitError
from aftercommit.plain import indented, one_line, several_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["code_of", "is_drivers", "told", "told_fully", "unit_of", "without_values"]

_DRIVERS: Final = frozenset({"psycopg", "asyncpg", "sqlite3"})
_THEIRS: Final = _DRIVERS | {"psycopg_binary", "psycopg_c", "aiosqlite", "sqlalchemy"}
"""Packages in whose code an error of Python's own may be about a value that was bound or fetched."""

_ABOUT_VALUES: Final = (ValueError, LookupError, ArithmeticError)

_NOT_ABOUT_ROWS: Final = frozenset({"08", "25", "26", "28", "3D", "53", "57", "58"})
"""Classes of SQLSTATEs whose messages are about connections, roles and the server, and are needed whole."""

_RAISES: Final = "exec_stmt_raise"
"""The server's function behind PL/pgSQL's RAISE."""

_NAMES: Final = (
    ("schema", ("schema_name",)),
    ("table", ("table_name",)),
    ("column", ("column_name",)),
    ("type", ("datatype_name", "data_type_name")),
    ("constraint", ("constraint_name",)),
)
_SECRET_FIELDS: Final = ("message_detail", "message_hint", "context", "internal_query", "detail", "hint")
_SPELLED_OUT: Final = ("SQLITE_CONSTRAINT",)
"""SQLite's codes whose messages hold nothing but names."""

_CLOSING: Final = {
    '"': '"', "'": "'", "`": "`'", "\xab": "\xbb", "\xbb": "\xab", "\u2039": "\u203a", "\u300c": "\u300d",
    "\u300e": "\u300f", "\u201e": "\u201c\u201d", "\u201c": "\u201d", "\u201a": "\u2018\u2019", "\u2018": "\u2019",
}  # fmt: skip
"""Quotation marks of the server's languages, and what ends them. An apostrophe within a word is none."""

_OPENING: Final = "".join(_CLOSING)
_NOT_WORDS: Final = _OPENING.replace("'", "")
_PIECE: Final = re.compile(rf"(?<!\w)[{_OPENING}]|[{_NOT_WORDS}]|[^\s{_NOT_WORDS}]+")
_PLACEHOLDER: Final = re.compile(r"\$\d+")
_KEY: Final = re.compile(r"(<class '[^']*'>, )\(.*\)(?=, )", re.DOTALL)
_ORIGINAL: Final = " Original exception was:"
_LONGEST: Final = 20_000
_ENOUGH: Final = 24
"""Characters of a database's message by which it is known again in one of the application's."""
_DEEPEST: Final = 100
"""Links of a chain beyond which nobody reads, and Python's own stack would come to its end."""


def told(error: BaseException) -> str:
    """Return *error* as one line: its class, and its message without values."""
    return _headed(_kind(error), one_line(_first_line(_Telling(error).text(error))))[:1000]


def told_fully(error: BaseException) -> str:
    """Return the traceback of *error* and of all that led to it, without values; of a long one the end."""
    return "".join(traceback.format_exception(without_values(error)))[-_LONGEST:]


def without_values(error: BaseException) -> BaseException:
    """Return what may be given to ``logging`` and to tracers in the place of *error*.

    It is *error* itself where nothing in its chain is to be left out. Else it is a likeness of it, with the names of
    the classes, the tracebacks, causes, contexts, members and notes, whose messages hold no values.
    """
    try:
        return _Telling(error).likeness(error)
    except Exception:  # noqa: BLE001  # somebody's exception that cannot even be read
        return _stand_in(error, "…").with_traceback(error.__traceback__)


# --- reading drivers' errors ------------------------------------------------------------------------------------


def unit_of(link: BaseException) -> list[BaseException]:
    """Return one error in its wrappings, outermost first: SQLAlchemy's, its async adapter's, the driver's own."""
    unit = [link]
    if isinstance(link, exc.DBAPIError) and link.orig is not None:
        unit.append(link.orig)
    # SQLAlchemy's adapter loses the code of asyncpg's InvalidCachedStatementError (2.1.9; 2.0.40 does not), and
    # asyncpg itself (0.32) raises 08003 from what the server said before it closed the connection.
    while is_drivers(unit[-1]):
        cause = unit[-1].__cause__
        if cause is None or cause in unit or not is_drivers(cause):
            break
        unit.append(cause)
    return unit


def code_of(unit: list[BaseException]) -> str | None:
    """Return the SQLSTATE, or SQLite's name of the code, from as far inside as there is one."""
    for error in reversed(unit):
        for name in ("sqlstate", "sqlite_errorname"):
            code = getattr(error, name, None)
            if isinstance(code, str):
                return code
    return None


def is_drivers(error: BaseException) -> bool:
    """Tell whether a driver, or SQLAlchemy's adapter of one, has made the class of *error*."""
    return any(
        module.partition(".")[0] in _DRIVERS or module.startswith("sqlalchemy.dialects.")
        for module in (kind.__module__ for kind in type(error).__mro__)
    )


# --- a chain of errors ------------------------------------------------------------------------------------------


class _Telling:
    """Tells of one error and of all that belongs to it.

    Args:
        error: The last error of the chain.
    """

    def __init__(self, error: BaseException) -> None:
        self._made: dict[int, BaseException] = {}
        self._texts: dict[int, str] = {}
        links = list(_links(error))
        wrapped = {id(link.orig) for link in links if isinstance(link, exc.StatementError)}
        self._repeated: dict[str, str] = {}
        for link in links:
            safe = _own_words(link, is_wrapped=id(link) in wrapped)
            if safe is not None and safe != _text(link):
                self._texts[id(link)] = safe
                self._repeated.update(_secrets(link, safe))
        self._is_plain = not self._texts and not any(map(_is_odd, links))

    def text(self, error: BaseException) -> str:
        """Return the message of one link."""
        found = self._texts.get(id(error))
        return self._cleaned(_text(error)) if found is None else found

    def _cleaned(self, text: str) -> str:
        """Return *text* without what it repeats of the others, which may be only the beginning of it."""
        told = ""
        while True:
            places = [(at, secret) for secret in self._repeated if (at := text.find(secret[:_ENOUGH])) != -1]
            if not places:
                return told + text
            at = min(at for at, _ in places)
            length, secret = max((_common(text[at:], secret), secret) for place, secret in places if place == at)
            told += text[:at] + self._repeated[secret]
            text = text[at + length :]

    def likeness(self, error: BaseException, depth: int = 0) -> BaseException:
        """Return what is shown in the place of *error*."""
        if self._is_plain:
            return error
        made = self._made.get(id(error))
        if made is not None:
            return made
        if isinstance(error, BaseExceptionGroup):
            members = [self.likeness(member, depth + 1) for member in error.exceptions] if depth < _DEEPEST else []
            like = _stand_in(error, indented(self._cleaned(str(error.message))), members)
        else:
            text = _laid_out(error, self.text(error))
            like = (_twin(error) if text == _text(error) else None) or _stand_in(error, text)
        self._made[id(error)] = like
        like.__traceback__ = error.__traceback__
        if depth < _DEEPEST:
            cause, context = error.__cause__, error.__context__
            like.__cause__ = None if cause is None else self.likeness(cause, depth + 1)
            like.__context__ = None if context is None else self.likeness(context, depth + 1)
        like.__suppress_context__ = error.__suppress_context__
        if hasattr(error, "__notes__"):
            like.__notes__ = [indented(self._cleaned(str(note))) for note in error.__notes__]
        return like


def _links(error: BaseException) -> Iterator[BaseException]:
    """Everything that a message in the chain may have repeated, what is not shown of it among it."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        waiting += [link.__cause__, link.__context__]
        if isinstance(link, exc.StatementError):
            waiting.append(link.orig)
        if isinstance(link, BaseExceptionGroup):
            waiting += link.exceptions


def _common(text: str, other: str) -> int:
    """How many characters both have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _laid_out(error: BaseException, text: str) -> str:
    """Return a message as it may stand among other lines. Ours have lines of their own, which nobody else writes."""
    return several_lines(text) if isinstance(error, AfterCommitError) else indented(text)


def _is_odd(link: BaseException) -> bool:
    """Whether a message would spoil the lines around it."""
    text = str(link.message) if isinstance(link, BaseExceptionGroup) else _text(link)
    notes = map(str, getattr(link, "__notes__", None) or ())
    return _laid_out(link, text) != text or any(indented(note) != note for note in notes)


def _secrets(link: BaseException, safe: str) -> Iterator[tuple[str, str]]:
    """Give what others may have repeated of *link*, and what stands there instead."""
    line = one_line(_first_line(safe))
    unit = unit_of(link)
    for error in (*unit, getattr(link, "orig", None)):
        if error is None:
            continue
        diag = getattr(error, "diag", None)
        found = [_text(error), repr(error), *map(repr, error.args), *(str(arg) for arg in error.args)]
        found += [value for source in (error, diag) for name in ("message_primary", "message")
                  if isinstance(value := getattr(source, name, None), str)]  # fmt: skip
        found += [_first_line(_text(error))]
        yield from ((text, line) for text in found if len(text) > 3 and text not in line)  # noqa: PLR2004
        for source in (error, diag):
            for name in _SECRET_FIELDS:
                value = getattr(source, name, None)
                if isinstance(value, str) and len(value) > 3:  # noqa: PLR2004
                    yield value, "…"


def _twin(error: BaseException) -> BaseException | None:
    """Return another exception of the same class and message; None where its class does not let itself be copied."""
    kind = type(error)
    try:
        twin: BaseException = kind.__new__(kind, *error.args)
        twin.args = error.args
        twin.__dict__.update(error.__dict__)
        twin.__dict__.pop("__notes__", None)
        return twin if str(twin) == str(error) else None
    except Exception:  # noqa: BLE001  # somebody's class
        return None


def _stand_in(error: BaseException, text: str, members: list[BaseException] | None = None) -> BaseException:
    """Return an exception that is called as *error* is, and says *text*."""
    kind = type(error)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if members:
        base: type[BaseException] = ExceptionGroup if isinstance(error, ExceptionGroup) else BaseExceptionGroup
        likeness: Any = type(kind.__name__, (base,), names)
        return cast("BaseException", likeness(text, members))
    return cast("BaseException", type(kind.__name__, (Exception,), names)(text))


# --- one error --------------------------------------------------------------------------------------------------


def _own_words(link: BaseException, *, is_wrapped: bool) -> str | None:
    """Return what is told of *link* where it may hold values; None where its message is its own affair.

    Args:
        link: One error.
        is_wrapped: Whether it was met while a statement's values were bound.
    """
    if isinstance(link, exc.StatementError):
        return _of_statement(link)
    if is_drivers(link):
        return _of_driver(unit_of(link), "")
    if isinstance(link, exc.PendingRollbackError):
        return _text(link).partition(_ORIGINAL)[0]
    if isinstance(link, exc.SQLAlchemyError):
        text = _text(link)
        safe = _KEY.sub(r"\1(…)", text)
        return None if safe == text else safe
    if type(link).__module__.startswith("pydantic_core"):
        return _of_pydantic(link)
    is_about_values = isinstance(link, Exception if is_wrapped else _ABOUT_VALUES) and _is_met_inside(link)
    return _until_value(_text(link), "", after_colon=False) if is_about_values else None


def _of_statement(error: exc.StatementError) -> str:
    statement = error.statement or ""
    orig = error.orig
    if orig is None:
        said = _until_value(_text_of_args(error), statement, after_colon=False)
    elif is_drivers(orig):
        unit = unit_of(error)
        said = f"({_kind(unit[-1])}) {_of_driver(unit, statement)}"
    else:
        own = _own_words(orig, is_wrapped=True)
        said = f"({_kind(orig)}) {_text(orig) if own is None else own}"
    lines = [f"({detail})" for detail in error.detail] + [said]
    return "\n".join([*lines, f"[SQL: {statement}]"] if statement else lines)


def _of_driver(unit: list[BaseException], statement: str) -> str:
    """Put an error of a driver's into words: code, message, names."""
    error = unit[-1]
    code = code_of(unit)
    fields = getattr(error, "diag", None)
    fields = error if fields is None else fields
    names = {title: name for title, each in _NAMES if (name := _field(fields, *each)) not in {"", "public"}}
    known = "\0".join([statement, *names.values()])
    message = _field(fields, "message_primary", "message") or _text(error)
    said = _message(error, code, fields, message, known)
    named = ", ".join(f'{title} "{name}"' for title, name in names.items() if f'"{name}"' not in said)
    is_known = code not in {None, "unknown"}
    return " ".join(filter(None, [f"[{code}]" if is_known else "", said, f"({named})" if named else ""]))


def _message(error: BaseException, code: str | None, fields: object, message: str, known: str) -> str:
    if code is None:
        # The driver itself. Of what cannot be a value, psycopg's errors of connecting are what an operator needs most.
        names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
        if ("psycopg", "OperationalError") in names or isinstance(error.__cause__, OSError):
            return message.strip()
        is_about_values = ("asyncpg", "InterfaceError") not in names or ("asyncpg", "DataError") in names
        return _until_value(message, known, after_colon=not is_about_values)
    if code.startswith("SQLITE_"):
        is_names = code.startswith(_SPELLED_OUT) and not code.endswith(("_TRIGGER", "_FUNCTION", "_VTAB"))
        return _first_line(message) if is_names else _until_value(message, known, after_colon=False)
    if _field(fields, "source_function", "server_source_function") == _RAISES:
        return _until_value(message, known)
    if code[:2] == "22":
        return "what it says is about a value, and left out"
    return _first_line(message) if code[:2] in _NOT_ABOUT_ROWS else _until_value(message, known)


def _of_pydantic(error: Any) -> str | None:
    try:
        found = error.errors(include_input=False, include_url=False, include_context=False)
        lines = [f"{len(found)} validation error{'' if len(found) == 1 else 's'} for {error.title}"]
        for each in found:
            lines += [".".join(map(str, each["loc"])), f"  {each['msg']} [type={each['type']}]"]
    except Exception:  # noqa: BLE001  # another version, another class
        return "…"
    return "\n".join(lines)


def _is_met_inside(error: BaseException) -> bool:
    """Whether an error of Python's own was met in the code of a driver or of SQLAlchemy."""
    if type(error).__module__ not in {"builtins", "decimal"} or isinstance(error, OSError):
        return False
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = "" if place is None else str(place.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in _THEIRS


def _until_value(message: str, known: str, *, after_colon: bool = True) -> str:
    """Return the first line of *message* as far as the first thing in it that may be a value.

    Args:
        message: What somebody's code says, in whatever language.
        known: Names, and the statement: what stands there is no secret.
        after_colon: Whether words that follow a colon are words; else they may be values, unless they are known.
    """
    line = _first_line(message)
    at = 0
    has_colon = False
    while (found := _PIECE.search(line, at)) is not None:
        piece = found[0]
        begin, at = found.span()
        if piece in _CLOSING:
            end = next((i for i in range(at, len(line)) if line[i] in _CLOSING[piece]), -1)
            if end == -1 or not line[at:end] or line[at:end] not in known:
                return f"{line[:begin]}{piece}…{_CLOSING[piece][-1]}"
            at = end + 1
            continue
        word = piece.strip(".,:;()[]{}")
        may_be_value = any(character.isdigit() or character == "@" for character in word) or has_colon
        if may_be_value and word and word not in known and not _PLACEHOLDER.fullmatch(word):
            return f"{line[:begin]}…"
        has_colon = has_colon or (piece.endswith(":") and not after_colon)
    return line


def _field(source: object, *names: str) -> str:
    return next((value for name in names if isinstance(value := getattr(source, name, None), str) and value), "")


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # somebody's class
        return "<its message cannot be read>"


def _text_of_args(error: BaseException) -> str:
    return str(error.args[0]) if error.args else ""


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip("\r")


def _kind(error: BaseException) -> str:
    kind = type(error)
    return (
        kind.__qualname__ if kind.__module__ in {"builtins", "__main__"} else f"{kind.__module__}.{kind.__qualname__}"
    )


def _headed(kind: str, text: str) -> str:
    return f"{kind}: {text}" if text else kind
