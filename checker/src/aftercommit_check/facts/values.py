"""What the checker can know about an expression, as a small tagged value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ast

    from aftercommit_check.findings import Step
    from aftercommit_check.index.modules import Module
    from aftercommit_check.index.scopes import Class, Function, Scope


class Kind(Enum):
    """What sort of thing a value is."""

    UNKNOWN = auto()
    NONE = auto()
    SCALAR = auto()  # numbers, strings, column values: data that may cross
    MODULE = auto()
    EXTERNAL = auto()  # a name of an external library: `name`
    OBJECT = auto()  # an instance of an external class: `name`
    CLASS = auto()
    INSTANCE = auto()
    FUNCTION = auto()
    METHOD = auto()  # bound: `func`, `receiver`
    LIBRARY_METHOD = auto()  # method `name` of `receiver`, whose class we know by heart
    COROUTINE = auto()  # called, not awaited: `element` is the result
    CONTEXT = auto()  # `with` gives `element`
    SESSION = auto()
    FACTORY = auto()  # a sessionmaker, or a scoped_session
    CONNECTION = auto()  # a DBAPI or SQLAlchemy connection, or a cursor
    QUERY = auto()  # select(…) or session.query(…): `args` are its entities
    RESULT = auto()  # rows of `args`
    SCALARS = auto()  # single values: `element`
    ROW = auto()  # one row of `args`
    SEQUENCE = auto()  # many of `element`
    MAPPING = auto()  # values of `element`
    TUPLE = auto()  # `args`
    PARTIAL = auto()  # `receiver` with `args` already given
    TASK = auto()  # an asyncio task around `element`


class Origin(Enum):
    """Where a session comes from."""

    UNKNOWN = auto()
    REQUEST = auto()  # a dependency
    PARAMETER = auto()
    OPENED = auto()  # made in this function


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What is known of an expression.

    Attributes:
        kind: What sort of thing it is.
        name: External names; for mapped instances of unknown classes, the class's name.
        cls: For classes and instances.
        func: For functions, methods and coroutines.
        receiver: What a method is bound to.
        element: What a collection, context, coroutine or task gives.
        args: Type arguments of an instance, entities of a query, elements of a tuple.
        module: For modules.
        origin: For sessions: where it comes from.
        identity: For sessions: equal for two expressions that are surely the same session.
        owner: For sessions: the expression that opens it, or the dependency.
        call: The call that made it, with the scope it stands in.
        is_async: For sessions.
        fresh: For mapped instances: made by calling the class, and not known to be attached to a session.
        sure: Whether it is known, or only likely.
        steps: The way from where it is born.

    """

    kind: Kind
    name: str = ""
    cls: Class | None = None
    func: Function | None = None
    receiver: Value | None = None
    element: Value | None = None
    args: tuple[Value, ...] = ()
    module: Module | None = None
    origin: Origin = Origin.UNKNOWN
    identity: str = ""
    owner: str = ""
    call: tuple[ast.Call, Scope] | None = None
    is_async: bool | None = None
    mapped: bool = False
    fresh: bool = False
    sure: bool = True
    steps: tuple[Step, ...] = ()

    def but(self, **changes: object) -> Value:
        """Return a copy with *changes*."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def after(self, *steps: Step) -> Value:
        """Return a copy whose way goes on by *steps*."""
        return self.but(steps=(*self.steps, *steps)) if len(self.steps) < 8 else self

    @property
    def is_session(self) -> bool:
        """Return whether it is a session."""
        return self.kind is Kind.SESSION

    @property
    def is_known(self) -> bool:
        """Return whether anything is known of it."""
        return self.kind is not Kind.UNKNOWN


UNKNOWN = Value(Kind.UNKNOWN)
NONE = Value(Kind.NONE)
SCALAR = Value(Kind.SCALAR)

_WEIGHT = {
    Kind.SESSION: 9,
    Kind.CONNECTION: 8,
    Kind.UNKNOWN: -2,
    Kind.NONE: -1,
    Kind.SCALAR: 0,
}


def join(values: list[Value]) -> Value:
    """Return one value for an expression that may be any of *values*.

    The one that matters most is kept: a session before an instance, an instance before data. If something else
    known competes with it, it is no longer sure.
    """
    known = [value for value in values if value.kind not in (Kind.UNKNOWN, Kind.NONE)]
    if not known:
        return values[0] if values else UNKNOWN
    best = max(known, key=_weight)
    rivals = {(value.kind, value.cls) for value in known if value.kind is not Kind.UNKNOWN}
    return best if len(rivals) == 1 or not best.sure else best.but(sure=False)


def _weight(value: Value) -> int:
    bonus = 3 if value.mapped else 0
    if value.element is not None and value.element.mapped:
        bonus = 2
    return _WEIGHT.get(value.kind, 1) + bonus


def sequence(element: Value) -> Value:
    """Return a collection of *element*."""
    return Value(Kind.SEQUENCE, element=element, steps=element.steps)


def element_of(value: Value) -> Value:
    """Return what iterating over *value* gives."""
    if value.kind in (Kind.SEQUENCE, Kind.SCALARS):
        return value.element or UNKNOWN
    if value.kind in (Kind.QUERY, Kind.RESULT):
        single = value.kind is Kind.QUERY and len(value.args) == 1
        return value.args[0] if single else row_of(value)
    if value.kind in (Kind.TUPLE, Kind.ROW):
        return join(list(value.args)) if value.args else UNKNOWN
    if value.kind is Kind.MAPPING:
        return SCALAR
    if value.kind is Kind.TASK and value.element is not None:
        return value.element
    return UNKNOWN


def row_of(value: Value) -> Value:
    """Return one row of a query or result."""
    return Value(Kind.ROW, args=value.args, steps=value.steps)


def unpacked(value: Value, way: tuple[int, ...]) -> Value:
    """Return what a name in a tuple on the left of an assignment gets."""
    for index in way:
        if value.kind in (Kind.TUPLE, Kind.ROW) and 0 <= index < len(value.args):
            value = value.args[index]
        elif index == -1:
            value = sequence(element_of(value))
        else:
            value = element_of(value)
    return value
