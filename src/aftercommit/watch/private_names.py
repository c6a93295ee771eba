"""Every name of SQLAlchemy's that its documentation does not promise, and that this library leans on; each is tried.

When the first engine opens, each is tried out once, and a release of SQLAlchemy's that has it no more is refused with
an error that names it: what is leant on for the safety of data must not fail without a word.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import ChunkedIteratorResult
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.orm import Session

from aftercommit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

__all__ = ["NAMES", "PrivateName", "check"]


class PrivateName(NamedTuple):
    """A name that SQLAlchemy may change without saying so.

    Attributes:
        name: The name, as one would look for it in the source.
        purpose: What it is used for.
        works: Whether it is there and does what it is used for, tried on an engine in memory.
    """

    name: str
    purpose: str
    works: Callable[[Engine], bool]


def _statements_meet(engine: Engine) -> bool:
    seen: list[Any] = []

    class Probe(Session):
        def _execute_internal(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(args[0])
            return super()._execute_internal(*args, **kwargs)

    one = text("SELECT 1")
    with Probe(engine) as session:
        session.execute(one)
        session.scalar(one)
        session.scalars(one)
    return seen == [one] * 3


def _binds_are_asked_for(engine: Engine) -> bool:
    seen: list[Any] = []

    class Probe(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            seen.append("bind")
            return super().get_bind(*args, **kwargs)

    with Probe(engine) as session:
        event.listen(session, "after_begin", lambda *_: seen.append("begin"))
        session.execute(text("SELECT 1"))
    return seen == ["bind", "begin"]


def _sessions_keep_dispatch(_engine: Engine) -> bool:
    session = Session()
    is_late = "dispatch" not in vars(session)
    event.listen(session, "after_flush", lambda *_: None)
    return is_late and "dispatch" in vars(session)


def _rows_come_in_chunks(_engine: Engine) -> bool:
    result: Any = ChunkedIteratorResult(SimpleResultMetaData(["n"]), lambda _size: iter([[(1,)], [(2,)]]))
    is_plain = result._yield_per is None  # noqa: SLF001  # that is what is tried
    chunks = result.chunks
    result.chunks = lambda size: ([row for row in chunk if row != (1,)] for chunk in chunks(size))
    result.iterator = (row for chunk in result.chunks(None) for row in chunk)
    result.yield_per(5)
    is_known = result._yield_per == 5  # noqa: SLF001, PLR2004  # that is what is tried
    return is_plain and is_known and [tuple(row) for row in result] == [(2,)]


def _streams_fetch_by_strategy(engine: Engine) -> bool:
    fetched: list[str] = []

    class Probe:
        def __init__(self, strategy: Any) -> None:
            self.strategy = strategy

        def __getattr__(self, name: str) -> Any:
            fetched.append(name)
            return getattr(self.strategy, name)

    with engine.connect() as connection:
        result: Any = connection.execute(text("SELECT 1 UNION SELECT 2")).yield_per(1)
        is_buffered = isinstance(result.cursor_strategy, BufferedRowCursorFetchStrategy)
        result.cursor_strategy = Probe(result.cursor_strategy)
        rows = [result.fetchone(), *result.fetchmany(1), *result.fetchall()]
    return is_buffered and len(rows) == 2 and {"fetchone", "fetchmany", "fetchall"} <= set(fetched)  # noqa: PLR2004


def _listeners_are_counted(engine: Engine) -> bool:
    def listener(*_: Any) -> None:
        """Nothing."""

    dialect: Any = engine.dialect
    before = len(dialect.dispatch.do_execute)
    event.listen(engine, "do_execute", listener)
    listeners = list(dialect.dispatch.do_execute)
    return len(listeners) == before + 1 and listeners[-1] is listener


def _take_attributes(engine: Engine) -> bool:
    seen: list[Any] = []

    def note(_connection: Any, entry: Any, pooled: Any) -> None:
        vars(entry)["_aftercommit_probe"] = vars(pooled)["_aftercommit_probe"] = 1
        seen.append(pooled)

    event.listen(engine, "checkout", note)
    with engine.connect() as connection:
        pooled = connection.connection
        vars(connection)["_aftercommit_probe"] = 1
        return seen == [pooled] and vars(pooled).get("_aftercommit_probe") == 1


NAMES: Final = (
    PrivateName("Session._execute_internal", "a second user of a session is refused", _statements_meet),
    PrivateName("Session.get_bind, called before each begin", "a holder is named", _binds_are_asked_for),
    PrivateName("Session.__dict__['dispatch']", "a session's begin and flush are heard", _sessions_keep_dispatch),
    PrivateName("ChunkedIteratorResult.chunks, .iterator, ._yield_per", "rows are guarded", _rows_come_in_chunks),
    PrivateName("CursorResult.cursor_strategy", "streams are guarded", _streams_fetch_by_strategy),
    PrivateName("Dialect.dispatch", "a statement is told from the next", _listeners_are_counted),
    PrivateName(
        "PoolProxiedConnection.__dict__, ConnectionPoolEntry.__dict__",
        "a holder is noted",
        _take_attributes,
    ),
)


@cache
def check() -> None:
    """Try each name, once in a process.

    Raises:
        ConfigurationError: If the SQLAlchemy that is installed has one of them no more.
    """
    changed: list[PrivateName] = []
    reason: Exception | None = None
    for each in NAMES:
        engine = create_engine("sqlite://")
        try:
            if not each.works(engine):
                changed.append(each)
        except Exception as exc:  # noqa: BLE001  # whatever comes of it, it does not work
            changed.append(each)
            reason = exc
        finally:
            engine.dispose()
    if changed:
        raise ConfigurationError(
            f"SQLAlchemy {sqlalchemy.__version__} has changed what aftercommit leans on: "
            + "; ".join(f"{each.name}, by which {each.purpose}" for each in changed)
            + ". It would fail there without a word. Use a release of SQLAlchemy that aftercommit names as supported, "
            "or a newer aftercommit."
        ) from reason
