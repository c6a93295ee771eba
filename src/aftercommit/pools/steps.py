"""What of ours happens around the steps of an engine's connections: statements, and begins.

SQLAlchemy has events of the engine for these. But one listener on an engine makes each of its connections put together,
and then look through, two lists of listeners at every step there is, also where nobody listens: more than a tenth of
what a short session computes. So those are left to the application. Ours are the events of the engine's dialect, which
cost a call, and where it has none, its methods: as public, and every step passes through them.

What runs, and since when, is noted here as well (see ``watch``). There is no event behind a statement but the engine's,
so the listener runs the statement itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

from aftercommit.watch.holders import HELD, hold_of, note_begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine, PoolProxiedConnection

    from aftercommit.watch.holders import HeldConnection

__all__ = ["Steps", "steps_of"]

_STEPS: Final = "_aftercommit_steps"
_EXECUTE: Final = ("do_execute", "do_executemany", "do_execute_no_params")


@dataclass(slots=True, kw_only=True)
class Steps:
    """Who is told of the steps of one engine's connections, and of its views' connections, which share its dialect.

    What is called before a step may raise, and the step is not taken.

    Attributes:
        before_statement: Called with the connection and the statement.
        before_begin: Called with the pooled connection that begins a transaction.
    """

    before_statement: list[Callable[[Connection, str], None]] = field(default_factory=list)
    before_begin: list[Callable[[PoolProxiedConnection], None]] = field(default_factory=list)


def steps_of(engine: Engine) -> Steps:
    """The steps of *engine*, to add to while it is set up (for an async engine: of its ``sync_engine``)."""
    dialect: Any = engine.dialect
    own = vars(dialect)
    steps: Steps | None = own.get(_STEPS)
    if steps is None:
        steps = own[_STEPS] = Steps()
        for name in _EXECUTE:
            event.listen(engine, name, _run(dialect, name, steps.before_statement))
        own["do_begin"] = _told(dialect.do_begin, steps.before_begin)
    return steps


def _run(dialect: Any, name: str, before: list[Callable[[Connection, str], None]]) -> Callable[..., bool]:
    listeners: Any = None

    # A statement comes with its cursor, its parameters where it has any, and last its context.
    def run(cursor: Any, statement: str, *rest: Any) -> bool:
        nonlocal listeners
        connection: Connection = rest[-1].root_connection
        # These may wait for SQLite's lock: what waits there is not running yet.
        for each in before:
            each(connection, statement)
        held: HeldConnection | None = connection.__dict__.get(HELD)
        if held is None or held.entry is None:
            held = hold_of(connection)
            if held is None:
                # Detached from its pool, or of one that is not watched.
                return False
        if listeners is None:
            listeners = getattr(dialect.dispatch, name)
        held.statement = statement
        held.done_since = None
        try:
            # Whatever listens behind this one may still run the statement in its own way.
            if len(listeners) == 1 or not any(each(cursor, statement, *rest) for each in _behind(run, listeners)):
                getattr(dialect, name)(cursor, statement, *rest)
        finally:
            held.done_since = time.monotonic()
        return True

    return run


def _behind(listener: Callable[..., bool], listeners: Any) -> Iterator[Callable[..., Any]]:
    every = iter(listeners)
    for each in every:
        if each is listener:
            break
    yield from every


def _told(step: Callable[[Any], None], tell: list[Callable[[Any], None]]) -> Callable[[Any], None]:
    def run(pooled: PoolProxiedConnection) -> None:
        note_begin(pooled)
        for each in tell:
            each(pooled)
        step(pooled)

    return run
