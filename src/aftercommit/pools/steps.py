"""What of ours happens around the steps of an engine's connections: statements, and begins.

SQLAlchemy has events of the engine for these. But one listener on an engine makes each of its connections put together,
and then look through, two lists of listeners at every step there is, also where nobody listens: more than a tenth of
what a short session computes. So those are left to the application. Ours are the events of the engine's dialect, which
cost a call, and where it has none, its methods: as public, and every step passes through them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Engine, PoolProxiedConnection

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
            # An event, and not in the method: a listener may run the statement in its own way.
            event.listen(engine, name, _begun(steps.before_statement))
        own["do_begin"] = _told(dialect.do_begin, steps.before_begin)
    return steps


# A statement comes with its cursor, its parameters where it has any, and last its context.


def _begun(tell: list[Callable[[Connection, str], None]]) -> Callable[..., None]:
    def listener(_cursor: Any, statement: str, *rest: Any) -> None:
        connection: Connection = rest[-1].root_connection
        for each in tell:
            each(connection, statement)

    return listener


def _told(step: Callable[[Any], None], tell: list[Callable[[Any], None]]) -> Callable[[Any], None]:
    def run(pooled: PoolProxiedConnection) -> None:
        for each in tell:
            each(pooled)
        step(pooled)

    return run
