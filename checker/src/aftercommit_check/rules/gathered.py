"""AC103 for gathered coroutines: one session, used by several of them at once."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aftercommit_check.facts import handovers, library, typehints
from aftercommit_check.facts.handovers import Way
from aftercommit_check.facts.infer import additions
from aftercommit_check.facts.values import Kind, Origin, Value
from aftercommit_check.findings import Confidence, Step
from aftercommit_check.index.scopes import Function, Scope, nested_scope
from aftercommit_check.rules import teach
from aftercommit_check.rules.context import Context, text
from aftercommit_check.rules.crossing import ROW, Crossing, crossings
from aftercommit_check.rules.fate import in_loop, same_session

if TYPE_CHECKING:
    from collections.abc import Iterator

GATHERERS = frozenset({"gather", "wait", "as_completed"})


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One coroutine among those that run at once; ``many`` if there are several of it."""

    node: ast.expr
    scope: Scope
    many: bool


def check(context: Context, scope: Scope) -> None:
    """Report gathered coroutines in the body of *scope* that share a session."""
    for call, inner in scope.body.calls:
        name = typehints.last_name(call.func)
        if (name in GATHERERS or "gather" in name.lower()) and _is_gather(context, call, inner, name):
            _gather(context, scope, call, inner)


def _is_gather(context: Context, call: ast.Call, scope: Scope, name: str) -> bool:
    value = context.ev.infer(call.func, scope)
    if value.kind is Kind.EXTERNAL:
        return value.name in ("asyncio.gather", "asyncio.wait", "asyncio.as_completed") or "gather" in name
    if value.kind in (Kind.FUNCTION, Kind.METHOD) and value.func is not None:
        return "gather" in name and any(param.kind == "*" for param in value.func.params)
    return value.kind is Kind.UNKNOWN and name != "wait" and "gather" in name


def _gather(context: Context, scope: Scope, call: ast.Call, inner: Scope) -> None:
    uses: list[tuple[Crossing, Piece]] = []
    repeated = False
    for piece in _pieces(call, inner, scope):
        item = _session_of(context, piece, call)
        if item is None:
            continue
        uses.append((item, piece))
        repeated = repeated or (piece.many and not _own_each_round(item, piece))
    if not uses:
        return
    first = uses[0][0]
    shared = [item for item, _ in uses if same_session(item.value, first.value)]
    if len(shared) < 2 and not repeated:
        return
    item = next((item for item, piece in uses if piece.many), first)
    sure = item.sure and all(piece is not None for _, piece in uses)
    what = library.describe(item.value)
    context.report(
        "AC103",
        call,
        f"{'The coroutines' if repeated else f'{len(shared)} coroutines'} gathered here use one {what} "
        f"(`{text(item.node, 40)}`) at the same time.",
        confidence=Confidence.HIGH if sure and item.how == "argument" else Confidence.MEDIUM,
        runtime=teach.concurrent_runtime(item, Way.TASK),
        steps=(*item.value.steps, Step(context.module.shown, call.lineno, "gathered here")),
        plain="Open a session in each coroutine (`async with SessionLocal() as db:`), or await them one after another.",
        aftercommit="Open `db.async_session()` in each coroutine, or await them one after another.",
    )


def _pieces(call: ast.Call, scope: Scope, owner: Scope) -> Iterator[Piece]:
    for node in call.args:
        many = isinstance(node, ast.Starred) or typehints.last_name(call.func) in ("wait", "as_completed")
        yield from _expand(node.value if isinstance(node, ast.Starred) else node, scope, owner, many)


def _expand(node: ast.expr, scope: Scope, owner: Scope, several: bool, depth: int = 0) -> Iterator[Piece]:
    """Yield the coroutines that an argument of ``gather`` stands for."""
    if depth > 5:
        return
    if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
        inner = nested_scope(node, scope)
        for piece in _expand(node.elt, inner, owner, False, depth + 1):
            yield Piece(piece.node, piece.scope, True)
        return
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        for element in node.elts:
            starred = isinstance(element, ast.Starred)
            yield from _expand(
                element.value if isinstance(element, ast.Starred) else element, scope, owner, starred, depth + 1
            )
        return
    if isinstance(node, ast.BinOp):
        yield from _expand(node.left, scope, owner, several, depth + 1)
        yield from _expand(node.right, scope, owner, several, depth + 1)
        return
    if isinstance(node, ast.Call):
        name = typehints.last_name(node.func)
        if name in handovers.TASK_CALLS and node.args:
            return  # a task: reported where it is created
        if name == "map" and len(node.args) > 1 and isinstance(node.func, ast.Name):
            yield Piece(node, scope, True)
            return
        if name in ("wait_for", "shield", "list", "tuple") and node.args:
            yield from _expand(node.args[0], scope, owner, several, depth + 1)
            return
        yield Piece(node, scope, False)
        return
    if isinstance(node, ast.Name):
        yield from _variable(node, scope, owner, depth)


def _variable(node: ast.Name, scope: Scope, owner: Scope, depth: int) -> Iterator[Piece]:
    function = scope.function
    if function is None or node.id not in function.bindings:
        return
    parents = function.body.parents
    for binding in function.bindings[node.id]:
        if (
            binding.kind == "assign"
            and binding.value is not None
            and binding.position <= (node.lineno, node.col_offset)
        ):
            yield from _expand(binding.value, function, owner, False, depth + 1)
    for added, where in additions(node.id, function):
        looped = in_loop(added, parents)
        for piece in _expand(added, where, owner, False, depth + 1):
            yield Piece(piece.node, piece.scope, piece.many or looped)


def _session_of(context: Context, piece: Piece, call: ast.Call) -> Crossing | None:
    """Return the session that a coroutine works with."""
    ev = context.ev
    node = piece.node
    if isinstance(node, ast.Call) and typehints.last_name(node.func) == "map" and node.args:
        target = ev.infer(node.args[0], piece.scope)
        handover = handovers.Handover(Way.TASK, call, piece.scope, target, node.args[0], (), True)
        return next((item for item in crossings(ev, handover) if item.what != ROW and item.used), None)
    if not isinstance(node, ast.Call):
        return None
    func = ev.infer(node.func, piece.scope)
    receiver = func.receiver
    if func.kind is Kind.LIBRARY_METHOD and receiver is not None and receiver.kind in (Kind.SESSION, Kind.CONNECTION):
        if func.name in library.HARMLESS_METHODS:
            return None
        return Crossing("session", receiver, node.func, "argument", sure=receiver.sure)
    started = handovers.coroutine(ev, Way.TASK, call, piece.scope, node)
    if started is None:
        return None
    if isinstance(func.func, Function) and _guarded(func.func):
        return None
    return next((item for item in crossings(ev, started) if item.what != ROW and item.used), None)


def _guarded(func: Function) -> bool:
    """Return whether a coroutine takes a lock, so that only one runs at a time."""
    return any(
        isinstance(node, ast.AsyncWith) and any("lock" in ast.unparse(item.context_expr).lower() for item in node.items)
        for node in ast.walk(func.node)
    )


def _own_each_round(item: Crossing, piece: Piece) -> bool:
    """Return whether every coroutine of a loop has a session of its own."""
    node = item.node
    if piece.scope.kind == "comprehension" and isinstance(node, ast.Name) and node.id in piece.scope.bindings:
        return True
    value: Value = item.value
    if value.origin is Origin.OPENED and value.call is not None:
        made, scope = value.call
        owner = scope.function or scope
        return in_loop(made, owner.body.parents)
    return False
