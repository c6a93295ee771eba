"""AC104: a session that is opened here and not closed on every path."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aftercommit_check.facts import functions, handovers, reach
from aftercommit_check.facts.handovers import TRIGGERS
from aftercommit_check.facts.values import Kind, Origin, Value
from aftercommit_check.findings import Confidence
from aftercommit_check.index.scopes import Function, Scope
from aftercommit_check.rules.context import Context, text

if TYPE_CHECKING:
    from collections.abc import Iterator

CLOSERS = frozenset({"close", "aclose", "remove", "__exit__", "__aexit__", "close_all"})
MANAGERS = frozenset(
    {"enter_context", "enter_async_context", "closing", "aclosing", "push", "push_async_exit", "callback"}
)
SCRIPT_PARTS = frozenset(
    {"scripts", "script", "migrations", "alembic", "versions", "tools", "bin", "examples", "seeds", "notebooks"}
)
SCRIPT_NAME = re.compile(r"^(seed|init_|create_|migrat|populate|setup|manage|cli|main_script|reset_|import_|load_)")
CATCH_ALL = frozenset({"Exception", "BaseException"})


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a session stays open: never closed, or on some paths only."""

    never: bool
    line: int


def check(context: Context, scope: Scope) -> None:
    """Report sessions opened in the body of *scope* that stay open."""
    if not isinstance(scope, Function):
        return
    parents = scope.body.parents
    for call, inner in scope.body.calls:
        if not _may_open(call):
            continue
        value = context.ev.infer(call, inner)
        inferred = value.element if value.kind is Kind.COROUTINE and value.element is not None else value
        if (
            inferred.kind is not Kind.SESSION
            or inferred.origin is not Origin.OPENED
            or not is_new(context, call, inner, inferred)
        ):
            continue
        node: ast.AST = call
        while isinstance(parents.get(node), ast.Await):
            node = parents[node]
        _follow(context, scope, call, node, inferred)


def _may_open(call: ast.Call) -> bool:
    """Leave out at once what is the method of something, and the like: most calls."""
    func = call.func
    name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else "call"
    return name not in TRIGGERS and not name.startswith(("execute", "scalar", "commit", "query", "add", "flush"))


def is_new(context: Context, call: ast.Call, scope: Scope, value: Value, depth: int = 0) -> bool:
    """Return whether *call* itself makes the session, rather than passing on one that somebody keeps."""
    if value.call is None or value.call[0] is not call:
        return False
    if _borrows_connection(context, call, scope):
        return False
    func = context.ev.infer(call.func, scope)
    if func.kind is Kind.FACTORY:
        return "scoped" not in func.name
    if func.kind is Kind.EXTERNAL and func.name.startswith("builtins."):
        return func.name in ("builtins.next", "builtins.anext")
    if func.kind in (Kind.FUNCTION, Kind.METHOD) and func.func is not None:
        if func.func.is_generator:
            return False
        return bool(func.func.body.returns) and all(
            _returns_new(context, node, func.func, depth) for node in func.func.body.returns
        )
    if func.kind is Kind.LIBRARY_METHOD:
        return func.name in ("__next__", "__anext__")
    return func.kind in (Kind.EXTERNAL, Kind.CLASS)


def _returns_new(context: Context, node: ast.expr, func: Function, depth: int) -> bool:
    """Return whether a function's result is a session that it has just made, not one that it keeps."""
    inner = node.value if isinstance(node, ast.Await) else node
    if isinstance(inner, ast.Constant):
        return inner.value is None
    made = handovers.resolve_call(inner, func)
    if made is None or depth > 3:
        return False
    value = context.ev.infer(made[0], made[1])
    if value.kind is Kind.COROUTINE and value.element is not None:
        value = value.element
    kept = isinstance(inner, ast.Name) and any(
        isinstance(other, ast.Attribute) and isinstance(statement, ast.Assign) and _is_name(statement.value, inner.id)
        for other, statement in func.body.parents.items()
    )
    return (
        not kept
        and value.kind is Kind.SESSION
        and value.origin is Origin.OPENED
        and is_new(context, made[0], made[1], value, depth + 1)
    )


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _borrows_connection(context: Context, call: ast.Call, scope: Scope) -> bool:
    """Return whether the session works on a connection that somebody else closes (event listeners do so)."""
    for node in [*call.args[:1], *(word.value for word in call.keywords if word.arg == "bind")]:
        if "conn" in text(node).lower() or context.ev.infer(node, scope).kind is Kind.CONNECTION:
            return True
    return False


def _follow(context: Context, scope: Function, call: ast.Call, node: ast.AST, value: Value) -> None:
    """Follow the session from the expression that opens it."""
    parent = scope.body.parents.get(node)
    if isinstance(parent, ast.Attribute):
        grand = scope.body.parents.get(parent)
        used = isinstance(grand, ast.Call) and grand.func is parent
        if used and parent.attr not in (CLOSERS | {"begin", "__enter__", "__aenter__", "configure"}):
            _report(context, scope, call, value, Lost(True, 0), None)
        return
    if isinstance(parent, ast.Assign) and len(parent.targets) == 1:
        target = parent.targets[0]
    elif isinstance(parent, ast.AnnAssign | ast.NamedExpr):
        target = parent.target
    else:
        return
    if not isinstance(target, ast.Name):
        return
    lost = _lost(context, scope, target.id, call)
    if lost is not None:
        _report(context, scope, call, value, lost, target.id)


def _lost(context: Context, scope: Function, name: str, call: ast.Call) -> Lost | None:
    """Return why the session in *name* stays open; None if it does not, or leaves the function."""
    parents = reach.deep_parents(scope)
    closes: list[ast.AST] = []
    kept = {name, *_generator_names(call)}
    for node in parents:
        if isinstance(node, ast.Global | ast.Nonlocal) and name in node.names:
            return None
        if not isinstance(node, ast.Name) or node.id not in kept or not isinstance(node.ctx, ast.Load):
            continue
        verdict = _use(context, scope, node, parents, node.id == name)
        if verdict == "leaves" and node.id == name:
            return None
        if verdict == "managed" and node.lineno >= call.lineno:
            return None
        if verdict == "closed":
            closes.append(node)
    end = call.end_lineno or call.lineno
    after = [
        node for node in closes if getattr(node, "lineno", 0) >= call.lineno or _in_final(node, parents) is not None
    ]
    for node in after:
        block = _in_final(node, parents)
        if block is not None and (block.end_lineno or 0) >= end:
            return None
    later = [node for node in after if getattr(node, "lineno", 0) > end]
    if not later:
        return Lost(True, 0)
    if _both_ways(later, parents, call) or _nothing_between(scope, call, later[0], parents):
        return None
    return Lost(False, getattr(later[0], "lineno", 0))


def _generator_names(call: ast.Call) -> set[str]:
    """Return the variable that holds the generator in ``next(gen)``: closing that closes the session."""
    found = {arg.id for arg in call.args if isinstance(arg, ast.Name)}
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        found.add(call.func.value.id)
    return found


def _use(context: Context, scope: Function, node: ast.Name, parents: dict[ast.AST, ast.AST], is_session: bool) -> str:
    """Return what one use of the variable does: ``closed``, ``managed``, ``leaves`` or nothing."""
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return "closed" if parent.attr in CLOSERS else ""
    if isinstance(parent, ast.withitem):
        return "managed"
    call: ast.AST | None = parents.get(parent) if isinstance(parent, ast.keyword) else parent
    if isinstance(call, ast.Call):
        last = (
            call.func.attr
            if isinstance(call.func, ast.Attribute)
            else call.func.id
            if isinstance(call.func, ast.Name)
            else ""
        )
        if last in MANAGERS:
            return "managed"
        if "close" in last.lower() or "cleanup" in last.lower():
            return "closed"
        if not is_session:
            return (
                "closed"
                if last in ("next", "anext") and node.lineno > scope.line + 1 and _in_final(node, parents)
                else ""
            )
        if last in TRIGGERS or last in ("append", "add", "put", "set", "setattr"):
            return "leaves"
        callee = context.ev.infer(call.func, reach.scope_of(call, parents, scope))
        if callee.kind in (Kind.FUNCTION, Kind.METHOD) and callee.func is not None:
            bound = functions.bind(callee.func, call, scope, skip=callee.kind is Kind.METHOD)
            param = next((given for given, expr, _ in bound if expr is node), None)
            return "closed" if param is not None and reach.closes(callee.func, param) else ""
        if callee.kind is Kind.CLASS and callee.cls is not None:
            exits = any(method in callee.cls.methods for method in ("__exit__", "__aexit__", "close", "aclose"))
            return "leaves" if exits or _is_passed_on(call, parents, scope) else ""
        return ""
    if not is_session:
        return ""
    if isinstance(parent, ast.Return | ast.Tuple | ast.List | ast.Dict):
        return "leaves"
    if isinstance(parent, ast.Assign | ast.AnnAssign):
        return "leaves"
    if isinstance(parent, ast.Yield):
        return ""
    return ""


def _is_passed_on(node: ast.AST, parents: dict[ast.AST, ast.AST], scope: Function) -> bool:
    """Return whether the object made by *node* is returned or kept: with it goes the session."""
    parent = parents.get(node)
    if isinstance(parent, ast.Return | ast.Yield):
        return True
    if isinstance(parent, ast.Assign):
        target = parent.targets[0]
        if isinstance(target, ast.Attribute):
            return True
        return isinstance(target, ast.Name) and any(
            isinstance(inner, ast.Name) and inner.id == target.id
            for value in scope.body.returns
            for inner in ast.walk(value)
        )
    return False


def _in_final(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> ast.Try | None:
    """Return the ``try`` in whose ``finally`` *node* stands."""
    child: ast.AST = node
    current = parents.get(node)
    while current is not None:
        if isinstance(current, ast.Try) and any(child is statement for statement in current.finalbody):
            return current
        child, current = current, parents.get(current)
    return None


def _handler(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> tuple[ast.Try, ast.ExceptHandler] | None:
    child: ast.AST = node
    current = parents.get(node)
    while current is not None:
        if isinstance(current, ast.Try) and isinstance(child, ast.ExceptHandler):
            return current, child
        child, current = current, parents.get(current)
    return None


def _catches_all(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(name, ast.Name) and name.id in CATCH_ALL for name in names)


def _both_ways(closes: list[ast.AST], parents: dict[ast.AST, ast.AST], call: ast.Call) -> bool:
    """Return whether it is closed when all goes well and also in a handler that catches everything."""
    in_handlers = [found for node in closes if (found := _handler(node, parents)) is not None]
    normal = [node for node in closes if _handler(node, parents) is None]
    if normal and any(
        _catches_all(handler) and (block.end_lineno or 0) >= call.lineno for block, handler in in_handlers
    ):
        return True
    # The other way to the same end: everything is caught and swallowed, and the close comes after it.
    for node in normal:
        for block in _blocks_before(node, parents, call):
            if any(_catches_all(handler) for handler in block.handlers) and not any(
                isinstance(inner, ast.Return) or (isinstance(inner, ast.Raise) and _handler(inner, parents) is not None)
                for inner in ast.walk(block)
            ):
                return True
    return False


def _blocks_before(node: ast.AST, parents: dict[ast.AST, ast.AST], call: ast.Call) -> Iterator[ast.Try]:
    """Yield the ``try`` statements beside *node* that begin after the session is opened or hold its opening."""
    statement: ast.AST = node
    while not isinstance(statement, ast.stmt) and statement in parents:
        statement = parents[statement]
    parent = parents.get(statement)
    for field in ("body", "orelse", "finalbody"):
        block = getattr(parent, field, None)
        if isinstance(block, list) and statement in block:
            for other in block[: block.index(statement)]:
                if isinstance(other, ast.Try) and (other.end_lineno or 0) >= call.lineno:
                    yield other


def _nothing_between(scope: Function, call: ast.Call, close: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Return whether nothing that can fail stands between opening and closing."""
    del parents
    first, last = call.end_lineno or call.lineno, getattr(close, "lineno", 0)
    return not any(first < other.lineno < last for other, _ in scope.body.calls)


def _report(context: Context, scope: Function, call: ast.Call, value: Value, lost: Lost, name: str | None) -> None:
    opened = text(call, 50)
    generator = (isinstance(call.func, ast.Name) and call.func.id in ("next", "anext")) or opened.endswith("__next__()")
    variable = name or "db"
    kind = "AsyncSession" if value.is_async else "Session"
    if lost.never:
        message = f"The {kind} opened by `{opened}` is never closed in {scope.name}."
    else:
        message = f"The {kind} opened by `{opened}` is closed on line {lost.line} only if nothing raises before."
    runtime = (
        "Its connection stays checked out (idle in transaction after the first statement) until the garbage collector "
        "comes by; a failing or frequent task empties the pool."
    )
    if generator:
        runtime = (
            "The generator is thrown away at once, so its finally closes the session before you use it; SQLAlchemy reopens it "
            f"without a word, and nobody closes it again. {runtime}"
        )
    word = "async with" if value.is_async else "with"
    factory = "SessionLocal()" if generator else opened.removeprefix("await ")
    confidence = Confidence.HIGH if lost.never and value.sure else Confidence.MEDIUM
    if is_script(context, scope):
        confidence = Confidence.LOW
    context.report(
        "AC104",
        call,
        message,
        confidence=confidence,
        runtime=runtime,
        steps=value.steps,
        plain=f"{word} {factory} as {variable}:\n    …",
        aftercommit=f"{word} db.{'async_session' if value.is_async else 'session'}() as {variable}:\n    …",
    )


def is_script(context: Context, scope: Function) -> bool:
    """Return whether *scope* belongs to a script that ends after it: leaks do not matter much there."""
    parts = context.module.inside.split("/")
    if any(part in SCRIPT_PARTS for part in parts[:-1]) or SCRIPT_NAME.match(parts[-1]):
        return True
    for statement in context.module.tree.body:
        if isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
            return any(isinstance(node, ast.Name) and node.id == scope.name for node in ast.walk(statement))
    return False
