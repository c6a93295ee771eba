"""What a function does with a session that reaches it: directly, through ``self``, or captured from around it."""

from __future__ import annotations

import ast
from enum import IntEnum
from typing import TYPE_CHECKING

from aftercommit_check.facts import classes, functions, library, members
from aftercommit_check.facts.values import Kind, Origin, Value
from aftercommit_check.index.scopes import Function, Scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aftercommit_check.facts.infer import Evaluator

MAX_DEPTH = 6
HARMLESS_BUILTINS = frozenset(
    {"print", "isinstance", "id", "hasattr", "bool", "str", "repr", "type", "len", "closing", "aclosing", "callable"}
)


class Use(IntEnum):
    """How much a function does with a session it is given."""

    NONE = 0
    HARMLESS = 1  # only closes it, or asks for its engine
    USED = 2


def name_use(ev: Evaluator, func: Function, name: str, depth: int = 0) -> Use:
    """Return what *func* does with the session in its parameter or variable *name*."""
    key: tuple[object, ...] = ("use", func, name)
    known = ev.function_facts.get(key)
    if isinstance(known, Use):
        return known
    if depth > MAX_DEPTH:
        return Use.USED
    ev.function_facts[key] = Use.HARMLESS  # recursion adds nothing of its own
    use = Use.NONE
    parents = deep_parents(func)
    for node in parents:
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
            use = max(use, _one_use(ev, func, node, parents, depth))
            if use is Use.USED:
                break
    ev.function_facts[key] = use
    return use


def _one_use(ev: Evaluator, func: Function, node: ast.Name, parents: dict[ast.AST, ast.AST], depth: int) -> Use:
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return Use.HARMLESS if parent.attr in library.HARMLESS_METHODS else Use.USED
    if isinstance(
        parent, ast.Compare | ast.If | ast.UnaryOp | ast.FormattedValue | ast.Delete | ast.withitem | ast.Assert
    ):
        return Use.HARMLESS
    keyword = parent if isinstance(parent, ast.keyword) else None
    call = parents.get(parent) if keyword is not None else parent
    if not isinstance(call, ast.Call) or call.func is node:
        return Use.USED
    callee = ev.infer(call.func, scope_of(call, parents, func))
    if callee.kind is Kind.EXTERNAL and callee.name.rpartition(".")[2] in HARMLESS_BUILTINS:
        return Use.HARMLESS
    if callee.kind in (Kind.FUNCTION, Kind.METHOD) and callee.func is not None:
        scope = scope_of(call, parents, func)
        bound = functions.bind(callee.func, call, scope, skip=callee.kind is Kind.METHOD)
        param = next((name for name, expr, _ in bound if expr is node), None)
        if param is not None:
            return name_use(ev, callee.func, param, depth + 1)
    return Use.USED


def closes(func: Function, name: str) -> bool:
    """Return whether *func* closes *name*, or hands it to something that says it does."""
    for node in ast.walk(func.node):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("close", "aclose", "remove")
            and _is_name(node.value, name)
        ):
            return True
        if isinstance(node, ast.withitem) and any(_is_name(part, name) for part in _outer(node.context_expr)):
            return True
        if (
            isinstance(node, ast.Call)
            and "close" in _last(node.func).lower()
            and any(_is_name(arg, name) for arg in node.args)
        ):
            return True
    return False


def _outer(node: ast.expr) -> list[ast.expr]:
    return [node, *node.args] if isinstance(node, ast.Call) else [node]


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def touches(
    ev: Evaluator, func: Function, frame: dict[str, Value], depth: int = 0, seen: set[object] | None = None
) -> Value | None:
    """Return the session or connection of somebody else that running *func* works on, if any.

    Sessions that the function opens for itself do not count, nor closing one.

    Args:
        ev: The evaluator.
        func: What is run.
        frame: What its parameters are, as far as they matter (``self``).
        depth: How deep we are.
        seen: What was looked at on the way here.

    """
    seen = set() if seen is None else seen
    mark = (func, tuple(sorted((name, value.cls.qualname if value.cls else "") for name, value in frame.items())))
    if depth > MAX_DEPTH or mark in seen or len(seen) > 120:
        return None
    seen.add(mark)
    with ev.frame(func, frame):
        if _brings_its_own(ev, func):
            return None
        for call, scope in deep_calls(func):
            found = _touch(ev, func, call, scope, depth, seen)
            if found is not None:
                return found
    return None


def _touch(ev: Evaluator, func: Function, call: ast.Call, scope: Scope, depth: int, seen: set[object]) -> Value | None:
    callee = ev.infer(call.func, scope)
    receiver = callee.receiver
    if callee.kind is Kind.LIBRARY_METHOD and receiver is not None and receiver.kind in (Kind.SESSION, Kind.CONNECTION):
        if callee.name not in library.HARMLESS_METHODS and is_foreign(receiver, func):
            return receiver
        return None
    if callee.kind is Kind.METHOD and callee.func is not None and receiver is not None:
        if receiver.kind is Kind.SESSION:
            return receiver if is_foreign(receiver, func) else None
        if receiver.kind in (Kind.INSTANCE, Kind.CLASS) and not receiver.mapped and callee.func.params:
            if receiver.call is not None and not brings_session(ev, receiver, func):
                return _touch_arguments(ev, func, call, scope, callee, depth, seen)
            for method, owner in _implementations(ev, callee.func, receiver):
                found = touches(ev, method, {method.params[0].name: owner}, depth + 1, seen)
                if found is not None and is_foreign(found, func):
                    return found
    return _touch_arguments(ev, func, call, scope, callee, depth, seen)


def brings_session(ev: Evaluator, value: Value, func: Function | None = None) -> bool:
    """Return whether an object was given somebody else's session when it was made.

    One that was not opens its own, or works with one that *func* opened: not the request's.
    """
    if value.call is None:
        return True
    node, scope = value.call
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    for part in given:
        held = holds_session(ev, ev.infer(part, scope)) if not isinstance(part, ast.Constant) else None
        if held is not None and (is_foreign(held, func) if func is not None else held.origin is not Origin.OPENED):
            return True
    return False


def _implementations(ev: Evaluator, method: Function, receiver: Value) -> Iterator[tuple[Function, Value]]:
    """Yield *method*, or for an abstract one what classes of the project make of it."""
    if receiver.cls is None or not _is_abstract(ev, method):
        yield method, receiver
        return
    for cls in classes.implementations(ev, receiver.cls):
        found = classes.find_method(ev, cls, method.name)
        if found is not None and found is not method and found.params:
            yield found, classes.instance(ev, cls)


def _is_abstract(ev: Evaluator, method: Function) -> bool:
    if "abstractmethod" in method.decorator_names():
        return True
    owner = method.owner
    return owner is not None and any(name.endswith(".Protocol") for name in classes.external_bases(ev, owner))


def _touch_arguments(
    ev: Evaluator, func: Function, call: ast.Call, scope: Scope, callee: Value, depth: int, seen: set[object]
) -> Value | None:
    if callee.kind is Kind.CLASS or _last(call.func) in HARMLESS_BUILTINS:
        return None
    for node in [*call.args, *(keyword.value for keyword in call.keywords)]:
        if isinstance(node, ast.Constant | ast.JoinedStr):
            continue
        value = ev.infer(node, scope)
        if value.kind in (Kind.SESSION, Kind.CONNECTION) and is_foreign(value, func):
            if callee.func is None:
                return value
            bound = functions.bind(callee.func, call, scope, skip=callee.kind is Kind.METHOD)
            param = next((name for name, expr, _ in bound if expr is node), None)
            if param is None or name_use(ev, callee.func, param, depth + 1) is Use.USED:
                return value
        elif value.kind is Kind.METHOD and value.func is not None and value.receiver is not None:
            if value.receiver.kind is Kind.INSTANCE and not value.receiver.mapped and value.func.params:
                found = touches(ev, value.func, {value.func.params[0].name: value.receiver}, depth + 1, seen)
                if found is not None and is_foreign(found, func):
                    return found
        elif value.kind is Kind.INSTANCE and callee.func is not None and not value.mapped and value.cls is not None:
            bound = functions.bind(callee.func, call, scope, skip=callee.kind is Kind.METHOD)
            param = next((name for name, expr, _ in bound if expr is node), None)
            held = holds_session(ev, value) if param is not None and brings_session(ev, value, func) else None
            if param is not None and held is not None:
                found = touches(ev, callee.func, {param: value}, depth + 1, seen)
                if found is not None and found.identity == held.identity and is_foreign(found, func):
                    return found
    return None


def is_foreign(session: Value, func: Function) -> bool:
    """Return whether *session* was made outside *func* (and outside what it calls).

    A session among the function's own parameters is not: whoever passes it is asked about it.
    """
    if session.identity.startswith((f"{func.qualname}:", f"{func.qualname}.")) and ":" in session.identity:
        return False
    if session.origin is not Origin.OPENED:
        return True
    if session.call is None:
        return not session.identity.startswith("opened:")
    where: Scope | None = session.call[1]
    outer = func.parent
    while outer is not None and not isinstance(outer, Function):
        outer = outer.parent
    # A session opened in the function around a closure is foreign to the closure; any other opened one was opened
    # on the way, for this task.
    while where is not None:
        if where is func:
            return False
        if where is outer:
            return True
        where = where.parent
    return False


def holds_session(ev: Evaluator, value: Value, depth: int = 3) -> Value | None:
    """Return the session inside *value*: itself, in a collection, or an attribute of an object, some levels deep."""
    if value.kind in (Kind.SESSION, Kind.CONNECTION):
        return value
    if depth == 0:
        return None
    if value.kind in (Kind.TUPLE, Kind.ROW):
        return next((found for part in value.args if (found := holds_session(ev, part, depth - 1)) is not None), None)
    if value.kind in (Kind.SEQUENCE, Kind.MAPPING) and value.element is not None:
        return holds_session(ev, value.element, depth - 1)
    if value.kind is Kind.INSTANCE and value.cls is not None and not value.mapped:
        for name in attribute_names(ev, value):
            found = members.instance_attribute(ev, value, name)
            if found.kind in (Kind.SESSION, Kind.CONNECTION):
                return found
            if found.kind is Kind.INSTANCE and found.cls is not value.cls:
                inner = holds_session(ev, found, depth - 1)
                if inner is not None:
                    return inner
    return None


def attribute_names(ev: Evaluator, value: Value) -> list[str]:
    """Return the attributes that instances carry: assigned in ``__init__`` or declared in the class body."""
    found: dict[str, None] = {}
    if value.cls is not None:
        for part in classes.lineage(ev, value.cls):
            for name, assignments in part.self_attributes.items():
                if any(method.name in ("__init__", "__post_init__") for method, _ in assignments):
                    found[name] = None
            for name, bindings in part.bindings.items():
                if bindings[-1].kind == "assign" and (
                    bindings[-1].annotation is not None or functions.is_depends(bindings[-1].value)
                ):
                    found[name] = None
    return list(found)[:40]


def deep_calls(func: Function) -> Iterator[tuple[ast.Call, Scope]]:
    """Yield the calls of *func*, of its lambdas and of the functions defined in it."""
    yield from func.body.calls
    for node in ast.walk(func.node) if any(isinstance(part, ast.Lambda) for part in ast.walk(func.node)) else ():
        if isinstance(node, ast.Lambda) and node is not func.node:
            inner = func.module.nested.get(node)
            if isinstance(inner, Function):
                yield from inner.body.calls
    for nested in func.body.nested:
        yield from deep_calls(nested)


def deep_parents(func: Function) -> dict[ast.AST, ast.AST]:
    """Return the parent of every node in *func*, nested functions included."""
    known = func.__dict__.get("_deep_parents")
    if isinstance(known, dict):
        return known
    parents: dict[ast.AST, ast.AST] = {}
    roots: list[ast.AST] = [func.node.body] if isinstance(func.node, ast.Lambda) else list(func.node.body)
    for root in roots:
        parents[root] = func.node
        for node in ast.walk(root):
            for child in ast.iter_child_nodes(node):
                parents[child] = node
    func.__dict__["_deep_parents"] = parents  # lives and dies with the function
    return parents


def scope_of(node: ast.AST, parents: dict[ast.AST, ast.AST], func: Function) -> Scope:
    """Return the innermost scope around *node* inside *func*."""
    current: ast.AST | None = parents.get(node)
    while current is not None and current is not func.node:
        found = func.module.nested.get(current)
        if found is not None:
            return found
        current = parents.get(current)
    return func


def captured(ev: Evaluator, func: Function) -> Iterator[tuple[ast.Name, Value]]:
    """Yield the names that a closure or lambda takes from the function around it, with what they are."""
    outer = func.parent.function if func.parent is not None else None
    if outer is None:
        return
    own = {param.name for param in func.params} | set(func.bindings)
    done: set[str] = set()
    for node in deep_parents(func):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in own and node.id not in done:
            scope: Scope | None = func.parent
            while scope is not None and not (
                scope.kind != "class"
                and (node.id in scope.bindings or (isinstance(scope, Function) and scope.param(node.id)))
            ):
                scope = scope.parent
            if scope is not None and scope.kind != "module":
                done.add(node.id)
                yield node, ev.name(node.id, func, None)


def _brings_its_own(ev: Evaluator, func: Function) -> bool:
    """Return whether a method gives its object a session that it opens (``self.session = session``): it works on that."""
    for target, statement in func.body.parents.items():
        if not (
            isinstance(statement, ast.Assign) and isinstance(target, ast.Attribute) and target in statement.targets
        ):
            continue
        if isinstance(target.value, ast.Name) and func.params and target.value.id == func.params[0].name:
            kept = ev.infer(statement.value, func)
            if kept.kind is Kind.SESSION and not is_foreign(kept, func):
                return True
    return False
