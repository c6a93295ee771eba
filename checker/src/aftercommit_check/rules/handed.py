"""AC101, AC102, AC103, AC105: sessions, rows and connections that leave with work that is handed over."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts import handovers, library
from aftercommit_check.facts.handovers import Handover, Way
from aftercommit_check.facts.values import Kind, Origin
from aftercommit_check.findings import Confidence, Step
from aftercommit_check.rules import teach
from aftercommit_check.rules.context import Context, text
from aftercommit_check.rules.crossing import CONNECTION, ROW, SESSION, Crossing, crossings
from aftercommit_check.rules.fate import Fate, in_loop, outcome, same_session

if TYPE_CHECKING:
    from aftercommit_check.index.scopes import Scope


def check(context: Context, scope: Scope) -> None:
    """Report what is handed over in the body of *scope*."""
    found: list[tuple[Handover, list[Crossing]]] = []
    for call, inner in scope.body.calls:
        handover = handovers.find(context.ev, call, inner, context.wrappers)
        if handover is not None and not inside_trigger(call, scope):
            found.append((handover, crossings(context.ev, handover)))
    for handover, items in found:
        if handover.way is Way.BACKGROUND:
            for item in items:
                _background(context, handover, items, item)
        else:
            _concurrent(context, scope, handover, items, found)


def inside_trigger(call: ast.Call, scope: Scope) -> bool:
    """Return whether *call* only makes the coroutine of an outer hand-over, which reports it."""
    parent = scope.body.parents.get(call)
    return isinstance(parent, ast.Call) and parent.func is not call and _last(parent.func) == "run_coroutine_threadsafe"


def _background(context: Context, handover: Handover, items: list[Crossing], item: Crossing) -> None:
    code = {SESSION: "AC101", ROW: "AC102", CONNECTION: "AC105"}[item.what]
    confidence = _confidence(handover, item)
    if item.what == ROW and _closed_before(handover):
        confidence = Confidence.LOW
    task = text(handover.target_node, 50) if handover.target_node is not None else "the task"
    context.report(
        code,
        handover.call,
        _sentence(context, item, task, Way.BACKGROUND),
        confidence=confidence,
        runtime=teach.runtime(context.pin, item, task),
        steps=_steps(context, handover, item, task),
        plain=teach.plain(context.ev, handover, items),
        aftercommit=teach.with_aftercommit(handover, items),
    )


def _concurrent(
    context: Context,
    scope: Scope,
    handover: Handover,
    items: list[Crossing],
    others: list[tuple[Handover, list[Crossing]]],
) -> None:
    if not items:
        return
    end = outcome(handover)
    if end.fate is Fate.AWAITED:
        return
    task = text(handover.target_node, 50) if handover.target_node is not None else "the task"
    for item in items:
        if end.fate is Fate.JOINED and (item.what == ROW or not _shared(context, scope, handover, item, others)):
            continue
        code = {SESSION: "AC103", ROW: "AC102", CONNECTION: "AC105"}[item.what]
        context.report(
            code,
            handover.call,
            _sentence(context, item, task, handover.way),
            confidence=_confidence(handover, item),
            runtime=teach.concurrent_runtime(item, handover.way),
            steps=_steps(context, handover, item, task),
            plain=teach.plain(context.ev, handover, items),
            aftercommit=teach.with_aftercommit(handover, items),
        )


def _shared(
    context: Context, scope: Scope, handover: Handover, item: Crossing, others: list[tuple[Handover, list[Crossing]]]
) -> bool:
    """Return whether work that is joined later shares its session with something that runs meanwhile."""
    end = outcome(handover)
    owner = handover.scope.function or scope
    if end.many and not _per_round(item, handover):
        return True
    for other, items in others:
        if other is handover or outcome(other).fate is Fate.AWAITED or other.way is Way.BACKGROUND:
            continue
        if any(it.what != ROW and it.used and same_session(it.value, item.value) for it in items):
            return True
    for call, inner in owner.body.calls:
        if handover.call.end_lineno is None or not handover.call.end_lineno < call.lineno < end.line:
            continue
        func = context.ev.infer(call.func, inner)
        receiver = func.receiver
        if (
            func.kind is Kind.LIBRARY_METHOD
            and receiver is not None
            and receiver.kind in (Kind.SESSION, Kind.CONNECTION)
        ):
            if func.name not in library.HARMLESS_METHODS and same_session(receiver, item.value):
                return True
        elif any(
            value.kind in (Kind.SESSION, Kind.CONNECTION) and same_session(value, item.value)
            for value in (context.ev.infer(arg, inner) for arg in call.args if isinstance(arg, ast.Name))
        ):
            return True
    return False


def _per_round(item: Crossing, handover: Handover) -> bool:
    """Return whether each round of the loop around the call has a session of its own."""
    if item.value.origin is not Origin.OPENED or item.value.call is None:
        return _bound_in_comprehension(item.node, handover.scope)
    call, scope = item.value.call
    owner = scope.function or scope
    return in_loop(call, owner.body.parents)


def _bound_in_comprehension(node: ast.expr, scope: Scope) -> bool:
    return scope.kind == "comprehension" and isinstance(node, ast.Name) and node.id in scope.bindings


def _confidence(handover: Handover, item: Crossing) -> Confidence:
    sure = item.sure and handover.sure and item.how == "argument" and item.used
    return Confidence.HIGH if sure else Confidence.MEDIUM


def _closed_before(handover: Handover) -> bool:
    """Return whether the function closes a session on its own before the call: its rows are detached on purpose."""
    func = handover.scope.function
    if func is None:
        return False
    return any(
        isinstance(call.func, ast.Attribute)
        and call.func.attr in ("close", "aclose")
        and isinstance(call.func.value, ast.Name | ast.Attribute)
        and _last(call.func.value) in library.SESSION_LIKE_NAMES
        and call.lineno < handover.call.lineno
        for call, _ in func.body.calls
    )


def _sentence(context: Context, item: Crossing, task: str, way: Way) -> str:
    del context
    shown = text(item.node, 50)
    carried = {
        "argument": f"`{shown}`",
        "bound": f"`{shown}` carries",
        "held": f"`{shown}` holds",
        "captured": f"`{item.param}`, captured by `{shown}`,",
    }[item.how]
    if item.what == ROW:
        what = f"an instance of the mapped class {item.value.name or 'unknown'} that belongs to the request's session"
    else:
        kind = library.describe(item.value)
        owner = {Origin.REQUEST: "the request's", Origin.OPENED: "this function's"}.get(
            item.value.origin, "the caller's"
        )
        what = f"{owner} {kind}"
    verb = {"argument": "is", "bound": "", "held": "", "captured": "is"}[item.how]
    tail = (
        f"and goes to the {way.value} `{task}`"
        if item.how in ("bound", "held")
        else f"and is handed to the {way.value} `{task}`"
    )
    if item.how == "bound":
        tail = f"into the {way.value}"
    return " ".join(f"{carried} {verb} {what} {tail}".split()) + "."


def _steps(context: Context, handover: Handover, item: Crossing, task: str) -> tuple[Step, ...]:
    last = Step(context.module.shown, handover.call.lineno, f"`{text(item.node, 40)}` handed to {task}")
    seen: dict[tuple[str, int], Step] = {}
    for step in (*item.value.steps, last):
        seen.setdefault((step.path, step.line), step)
    return tuple(seen.values())


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
