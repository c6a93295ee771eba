"""Keeps one line of psycopg's off the terminal: what it says when an ``executemany`` ends in an error.

psycopg sends the rows of an ``executemany`` as a pipeline. When a row fails, and after a conflict between two tasks one
does, the error is raised; closing the pipeline then meets the same aborted transaction, which psycopg logs as a warning
("error ignored terminating <Pipeline …>"). Nothing was lost and nothing can be done: the error that was raised says it
all. Left out are these lines of engines of ours, and only while they execute many rows.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sqlalchemy import Engine

__all__ = ["set_up"]

_LOGGER: Final = logging.getLogger("psycopg")
_LINE: Final = "error ignored terminating"

# Not a thread's: psycopg's async pipeline ends on the event loop, in between what others do.
_executing: Final[ContextVar[bool]] = ContextVar("aftercommit_executemany", default=False)


def set_up(engine: Engine) -> None:
    """Have *engine*, if its driver is psycopg, leave that line out."""
    dialect: Any = engine.dialect
    if dialect.driver not in {"psycopg", "psycopg_async"}:
        return
    if _is_wanted not in _LOGGER.filters:
        _LOGGER.addFilter(_is_wanted)
    execute = dialect.do_executemany

    def execute_quietly(*args: Any, **kwargs: Any) -> Any:
        token = _executing.set(True)
        try:
            return execute(*args, **kwargs)
        finally:
            _executing.reset(token)

    vars(dialect)["do_executemany"] = execute_quietly


def _is_wanted(record: logging.LogRecord) -> bool:
    """Whether psycopg's *record* is to be logged."""
    return not (_executing.get() and isinstance(record.msg, str) and record.msg.startswith(_LINE))
