"""What crosses in a hand-over: sessions (AC101, AC103), rows (AC102) and connections (AC105)."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aftercommit_check.facts import functions, reach
from aftercommit_check.facts.values import UNKNOWN, Kind, Origin, Value
from aftercommit_check.index.scopes import Function

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aftercommit_check.facts.handovers import Argument, Handover
    from aftercommit_check.facts.infer import Evaluator

SESSION, ROW, CONNECTION = "session", "row", "connection"


@dataclass(frozen=True, slots=True, eq=False)
class Crossing:
    """One thing that crosses and should not.

    Attributes:
        what: ``session``, ``row`` or ``connection``.
        value: The session, row or connection itself.
        node: The expression that carries it.
        how: How it is carried: ``argument``, ``bound`` (method), ``held`` (by an object) or ``captured`` (by a closure).
        param: The task's parameter that gets it.
        sure: Whether it surely is one.
        used: Whether the task is known to work with it.

    """

    what: str
    value: Value
    node: ast.expr
    how: str
    param: str = ""
    sure: bool = True
    used: bool = True


def crossings(ev: Evaluator, handover: Handover) -> list[Crossing]:
    """Return all that crosses in *handover* and should not."""
    found: list[Crossing] = []
    for argument in handover.arguments:
        found += _in_argument(ev, handover, argument)
    found += _in_target(ev, handover)
    return found


def _in_argument(ev: Evaluator, handover: Handover, argument: Argument) -> Iterator[Crossing]:
    value = argument.value
    task = handover.target.func
    if value.kind is Kind.UNKNOWN:
        value = _expected(ev, task, argument)
    if value.kind in (Kind.SESSION, Kind.CONNECTION):
        found = _session(ev, handover, argument, value)
        if found is not None:
            yield found
        return
    row = row_inside(value)
    if row is not None:
        if not _detached(handover, argument.node):
            yield Crossing(ROW, row, argument.node, "argument", argument.param, row.sure)
        return
    if value.kind in (Kind.SEQUENCE, Kind.MAPPING, Kind.TUPLE):
        inner = reach.holds_session(ev, value)
        if (
            inner is not None
            and inner.kind in (Kind.SESSION, Kind.CONNECTION)
            and isinstance(argument.node, ast.Tuple | ast.List | ast.Dict | ast.Name)
        ):
            yield Crossing(_what(inner), inner, argument.node, "argument", argument.param, inner.sure)
        return
    if value.kind is Kind.INSTANCE and task is not None and argument.param and not value.mapped:
        held = reach.holds_session(ev, value)
        if held is not None and held.origin is not Origin.OPENED and reach.brings_session(ev, value):
            touched = reach.touches(ev, task, {argument.param: value})
            if touched is not None and (touched.identity == held.identity or handover.target.kind is not Kind.METHOD):
                yield Crossing(_what(held), held, argument.node, "held", argument.param, held.sure)
        return
    if value.kind in (Kind.FUNCTION, Kind.METHOD) and value.func is not None:
        yield from _callable(ev, value, argument.node)


def _in_target(ev: Evaluator, handover: Handover) -> Iterator[Crossing]:
    node = handover.target_node
    if node is None:
        return
    target = handover.target
    if target.kind is Kind.INSTANCE and target.cls is not None and not target.mapped:
        from aftercommit_check.facts import classes  # noqa: PLC0415 - keeps the import order of the room plain

        method = classes.find_method(ev, target.cls, "__call__")
        if method is not None:
            target = Value(Kind.METHOD, func=method, receiver=target)
    yield from _callable(ev, target, node)
    if target.kind is Kind.LIBRARY_METHOD and target.receiver is not None:
        receiver = target.receiver
        if receiver.kind in (Kind.SESSION, Kind.CONNECTION) and target.name not in (
            "close",
            "aclose",
            "remove",
            "rollback",
        ):
            yield Crossing(_what(receiver), receiver, node, "bound", sure=receiver.sure)


def _callable(ev: Evaluator, value: Value, node: ast.expr) -> Iterator[Crossing]:
    """Look at what a callable carries along: its ``self``, or what it captures."""
    func = value.func
    if func is None:
        return
    receiver = value.receiver
    if value.kind is Kind.METHOD and receiver is not None:
        if receiver.mapped and receiver.kind is Kind.INSTANCE and not receiver.fresh:
            yield Crossing(ROW, receiver, node, "bound", sure=receiver.sure)
            return
        if receiver.kind is Kind.SESSION:
            yield Crossing(SESSION, receiver, node, "bound", sure=receiver.sure)
            return
        if func.params and "staticmethod" not in func.decorator_names() and reach.brings_session(ev, receiver):
            touched = reach.touches(ev, func, {func.params[0].name: receiver})
            if touched is not None and not _comes_from_parameter(func, touched):
                yield Crossing(_what(touched), touched, node, "bound", sure=touched.sure)
    if isinstance(func.parent, Function) or (func.parent is not None and func.parent.function is not None):
        yield from _captured(ev, func, node)


def _comes_from_parameter(func: Function, session: Value) -> bool:
    """Return whether *session* is the task's own parameter: then it is an argument's business."""
    return any(session.identity == f"{func.qualname}:{param.name}" for param in func.params)


def _captured(ev: Evaluator, func: Function, node: ast.expr) -> Iterator[Crossing]:
    for name, value in reach.captured(ev, func):
        if value.kind in (Kind.SESSION, Kind.CONNECTION):
            if reach.name_use(ev, func, name.id) is reach.Use.USED:
                yield Crossing(_what(value), value, node, "captured", name.id, value.sure)
        elif value.kind is Kind.INSTANCE and not value.mapped and value.cls is not None:
            touched = reach.touches(ev, func, {})
            if touched is not None and reach.holds_session(ev, value) is not None and reach.is_foreign(touched, func):
                yield Crossing(_what(touched), touched, node, "captured", name.id, touched.sure)
        else:
            row = row_inside(value)
            if row is not None:
                yield Crossing(ROW, row, node, "captured", name.id, sure=False)


def _session(ev: Evaluator, handover: Handover, argument: Argument, value: Value) -> Crossing | None:
    task = handover.target.func
    used = True
    if task is not None and argument.param and task.param(argument.param) is not None:
        use = reach.name_use(ev, task, argument.param)
        if use is reach.Use.HARMLESS:
            return None
        used = use is reach.Use.USED
        own = value.origin is Origin.OPENED and value.call is not None and not is_managed(value)
        if own and reach.closes(task, argument.param):
            return None  # opened for the task and closed by it: it is the task's
    elif task is None and "close" in _name(handover.target_node).lower():
        return None
    return Crossing(_what(value), value, argument.node, "argument", argument.param, value.sure, used)


def _name(node: ast.expr | None) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def is_managed(session: Value) -> bool:
    """Return whether *session* was opened by a ``with`` statement."""
    if session.call is None:
        return False
    call, scope = session.call
    owner = scope.function or scope
    parent = owner.body.parents.get(call)
    while isinstance(parent, ast.Await | ast.Call | ast.Attribute):
        parent = owner.body.parents.get(parent)
    return isinstance(parent, ast.withitem)


def _expected(ev: Evaluator, task: Function | None, argument: Argument) -> Value:
    """Judge an unknown argument by the parameter that takes it."""
    if task is None or not argument.param or not isinstance(argument.node, ast.Name | ast.Attribute | ast.Await):
        return UNKNOWN
    param = task.param(argument.param)
    if param is None or param.annotation is None or functions.is_depends(param.default):
        return UNKNOWN
    value = functions.param_value(ev, task, param)
    if value.kind in (Kind.SESSION, Kind.CONNECTION) and value.sure:
        return value.but(sure=False, origin=Origin.UNKNOWN, identity=ast.unparse(argument.node), steps=())
    if row_inside(value) is not None and value.sure:
        return value.but(sure=False, steps=())
    return UNKNOWN


def row_inside(value: Value, depth: int = 3) -> Value | None:
    """Return the attached row that *value* is or holds."""
    if depth == 0:
        return None
    if value.kind is Kind.INSTANCE:
        return value if value.mapped and not value.fresh else None
    if value.kind in (Kind.SEQUENCE, Kind.MAPPING, Kind.SCALARS):
        return row_inside(value.element, depth - 1) if value.element is not None else None
    if value.kind in (Kind.QUERY, Kind.RESULT):
        return None
    if value.kind in (Kind.TUPLE, Kind.ROW):
        return next((row for part in value.args if (row := row_inside(part, depth - 1)) is not None), None)
    return None


def _detached(handover: Handover, node: ast.expr) -> bool:
    """Return whether the row was taken out of its session on purpose before the call."""
    func = handover.scope.function
    if func is None:
        return False
    for call, _ in func.body.calls:
        if call.lineno > handover.call.lineno or not isinstance(call.func, ast.Attribute | ast.Name):
            continue
        name = _name(call.func)
        if name == "expunge_all":
            return True
        if name in ("expunge", "make_transient") and any(ast.dump(arg) == ast.dump(node) for arg in call.args):
            return True
    return False


def _what(value: Value) -> str:
    return CONNECTION if value.kind is Kind.CONNECTION else SESSION
