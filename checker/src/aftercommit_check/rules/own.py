"""AC109 to AC113: rules for code that uses aftercommit, and two about sessions that live too long."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts import functions, library, typehints
from aftercommit_check.facts.values import Kind, Origin, Value
from aftercommit_check.findings import Confidence, Edit
from aftercommit_check.index.scopes import Function, Scope
from aftercommit_check.rules import closing
from aftercommit_check.rules.context import Context, text

if TYPE_CHECKING:
    from aftercommit_check.index.scopes import Param

UNSENDABLE = {
    "Request": "the request",
    "WebSocket": "a WebSocket",
    "UploadFile": "an uploaded file",
    "BackgroundTasks": "the request's background tasks",
    "Response": "a response",
}
SELF_COMMITTING = frozenset({"SessionDep", "AsyncSessionDep", "get_session", "get_async_session"})


def check(context: Context, scope: Scope) -> None:
    """Report misuse of aftercommit in *scope*, and sessions that outlive their request."""
    if _uses_aftercommit(context):
        _handovers(context, scope)
        if isinstance(scope, Function):
            _task_definition(context, scope)
    if isinstance(scope, Function):
        _swallowing_dependency(context, scope)
    _global_session(context, scope)


def _uses_aftercommit(context: Context) -> bool:
    if context.uses_aftercommit is None:
        source = context.module.text
        context.uses_aftercommit = "after_commit" in source or "aftercommit" in source
    return context.uses_aftercommit


def _handovers(context: Context, scope: Scope) -> None:
    for call, inner in scope.body.calls:
        name = typehints.last_name(call.func)
        if name not in ("after_commit", "after_commit_async"):
            continue
        first = 0
        session: Value | None = None
        if call.args:
            given = context.ev.infer(call.args[0], inner)
            if given.kind is Kind.SESSION and isinstance(call.func, ast.Attribute):
                session, first = given, 1
        if len(call.args) <= first:
            continue
        target = context.ev.infer(call.args[first], inner)
        _cannot_cross(context, call, inner, target, first + 1)
        if session is not None:
            _after_last_commit(context, scope, call, session)


def _cannot_cross(context: Context, call: ast.Call, scope: Scope, target: Value, first: int) -> None:
    names = (
        {node: name for name, node, _ in functions.bind(target.func, call, scope, skip=False, first=first)}
        if target.func is not None
        else {}
    )
    if (
        target.func is not None
        and target.func.params
        and _is_session_param(context, target.func, target.func.params[0])
    ):
        params = [param for param in target.func.params[1:] if not param.kind and not param.keyword_only]
        names = dict(zip(call.args[first:], (param.name for param in params), strict=False))
        names |= {word.value: word.arg for word in call.keywords if word.arg}
    for node in [*call.args[first:], *(word.value for word in call.keywords)]:
        value = context.ev.infer(node, scope)
        what = _unsendable(context, value, node, target, names.get(node, ""))
        if what:
            context.report(
                "AC109",
                call,
                f"`{text(node, 40)}` is {what}: it cannot cross to the task.",
                confidence=Confidence.HIGH if value.sure else Confidence.MEDIUM,
                runtime="aftercommit raises UnsafeArgument at this call.",
                plain="Pass data: an id, a string, a Pydantic model.",
                aftercommit="Pass data, or a mapped instance into a parameter annotated with its class.",
            )


def _unsendable(context: Context, value: Value, node: ast.expr, target: Value, param: str) -> str:
    if value.kind is Kind.SESSION:
        return "a session (the task gets one of its own)"
    if value.kind is Kind.CONNECTION:
        return "a connection or cursor"
    if isinstance(node, ast.Lambda | ast.GeneratorExp) or value.kind in (
        Kind.FUNCTION,
        Kind.METHOD,
        Kind.COROUTINE,
        Kind.TASK,
    ):
        return "a function or coroutine"
    if value.kind is Kind.OBJECT:
        return UNSENDABLE.get(value.name.rpartition(".")[2], "")
    if value.kind is Kind.INSTANCE and value.mapped and target.func is not None and param:
        wanted = target.func.param(param)
        if wanted is not None:
            declared = (
                context.ev.annotation(wanted.annotation, target.func.parent or target.func)
                if wanted.annotation
                else None
            )
            if declared is None or not declared.mapped:
                return f"an instance of the mapped class {value.name}, but `{param}` is not annotated with it"
    return ""


def _after_last_commit(context: Context, scope: Scope, call: ast.Call, session: Value) -> None:
    if session.owner in SELF_COMMITTING or session.name.startswith("aftercommit") or session.origin is Origin.UNKNOWN:
        return
    owner = scope.function or scope
    commits = [
        other.lineno
        for other, inner in owner.body.calls
        if isinstance(other.func, ast.Attribute)
        and other.func.attr == "commit"
        and context.ev.infer(other.func.value, inner).kind is Kind.SESSION
    ]
    if not commits or max(commits) > call.lineno or _commits_itself(owner, call):
        return
    context.report(
        "AC110",
        call,
        f"Handed over after the last commit of `{text(call.args[0], 30)}` (line {max(commits)}): nothing will start it.",
        confidence=Confidence.MEDIUM,
        runtime="A task starts with the commit of its session. None follows here: aftercommit reports TasksNotCommitted.",
        plain="",
        aftercommit=f"Move this call above line {max(commits)}.",
    )


def _commits_itself(owner: Scope, call: ast.Call) -> bool:
    """Return whether a ``with`` around the call commits at its end (``factory.begin()``, ``db.session()``)."""
    node: ast.AST | None = owner.body.parents.get(call)
    while node is not None:
        if isinstance(node, ast.With | ast.AsyncWith) and any(
            word in ast.unparse(item.context_expr)
            for item in node.items
            for word in (".begin(", ".session(", "async_session(")
        ):
            return True
        node = owner.body.parents.get(node)
    return False


def _is_session_param(context: Context, func: Function, param: Param) -> bool:
    return functions.param_value(context.ev, func, param).kind is Kind.SESSION


def _task_definition(context: Context, func: Function) -> None:
    """Report a task whose first parameter is no session, or one of the wrong kind."""
    decorator = next((node for node in func.decorators if _is_task(node)), None)
    if decorator is None or not func.params:
        return
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    assert isinstance(target, ast.Attribute)
    owner = context.ev.infer(target.value, func.parent or func)
    if not (owner.kind is Kind.OBJECT and owner.name.startswith("aftercommit")) and not (
        owner.kind in (Kind.UNKNOWN, Kind.EXTERNAL) and "aftercommit" in context.module.text
    ):
        return
    first = func.params[0]
    if first.annotation is None:
        wanted = "AsyncSession" if func.is_async else "Session"
        line = context.module.lines[first.line - 1]
        sure = first.name in library.SESSION_LIKE_NAMES and wanted in context.module.scope.bindings
        fixed = line.replace(f"({first.name}", f"({first.name}: {wanted}", 1)
        context.report(
            "AC111",
            func.node,
            f"The first parameter `{first.name}` of the task {func.name} has no annotation: no session is injected.",
            confidence=Confidence.HIGH if first.name in library.SESSION_LIKE_NAMES else Confidence.MEDIUM,
            runtime=f"`{first.name}` becomes an ordinary argument of the task.",
            aftercommit=f"def {func.name}({first.name}: {wanted}, …)",
            edits=(Edit(first.line, first.line, (fixed,)),) if sure and fixed != line else (),
        )
        return
    value = functions.param_value(context.ev, func, first)
    if value.kind is Kind.SESSION and value.is_async is not None and bool(value.is_async) != func.is_async:
        wanted = "AsyncSession" if func.is_async else "Session"
        context.report(
            "AC111",
            func.node,
            f"The task {func.name} is {'an async def' if func.is_async else 'a def'} and takes "
            f"{'a Session' if func.is_async else 'an AsyncSession'}.",
            runtime="aftercommit refuses it when the module is imported.",
            aftercommit=f"{'async ' if func.is_async else ''}def {func.name}({first.name}: {wanted}, …)",
        )


def _is_task(node: ast.expr) -> bool:
    target = node.func if isinstance(node, ast.Call) else node
    return isinstance(target, ast.Attribute) and target.attr == "task"


def _swallowing_dependency(context: Context, func: Function) -> None:
    """Report a generator that swallows what is thrown in at its yield, if it is used with ``scope="function"``."""
    if (
        not func.is_generator
        or f"{func.name}" not in context.module.text
        or 'scope="function"' not in context.module.text
    ):
        return
    if not _used_in_function_scope(context, func):
        return
    for node in ast.walk(func.node):
        if not isinstance(node, ast.Try) or not any(
            isinstance(inner, ast.Yield) for part in node.body for inner in ast.walk(part)
        ):
            continue
        for handler in node.handlers:
            broad = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
            if broad and not any(isinstance(inner, ast.Raise) for part in handler.body for inner in ast.walk(part)):
                context.report(
                    "AC113",
                    handler,
                    f"{func.name} swallows the endpoint's exception; the session's dependency sees none and commits.",
                    confidence=Confidence.HIGH,
                    runtime="Half the work is committed, its tasks start, and FastAPI answers 500.",
                    plain="Raise it again at the end of the handler.",
                    aftercommit="Raise it again at the end of the handler.",
                )


def _used_in_function_scope(context: Context, func: Function) -> bool:
    for node in ast.walk(context.module.tree):
        if functions.is_depends(node if isinstance(node, ast.expr) else None) and isinstance(node, ast.Call):
            scoped = any(
                word.arg == "scope" and isinstance(word.value, ast.Constant) and word.value.value == "function"
                for word in node.keywords
            )
            if scoped and node.args and typehints.last_name(node.args[0]) == func.name:
                return True
    return False


def _global_session(context: Context, scope: Scope) -> None:
    """Report sessions kept at module level, in a global, in a context variable or in the application's state."""
    if context.module.is_test:
        return
    for call, inner in scope.body.calls:
        parent = scope.body.parents.get(call)
        if typehints.last_name(call.func) == "set" and call.args and isinstance(call.func, ast.Attribute):
            holder = context.ev.infer(call.func.value, inner)
            kept = context.ev.infer(call.args[0], inner)
            if holder.kind is Kind.OBJECT and holder.name.endswith("ContextVar") and kept.kind is Kind.SESSION:
                _report_global(context, call, f"The session `{text(call.args[0], 30)}` is kept in a context variable.")
            continue
        if not isinstance(parent, ast.Assign):
            continue
        target = parent.targets[0]
        at_module = scope.kind == "module" and isinstance(target, ast.Name)
        declared = isinstance(target, ast.Name) and isinstance(scope, Function) and target.id in _globals(scope)
        state = isinstance(target, ast.Attribute) and ast.unparse(target).startswith(
            ("app.state.", "application.state.")
        )
        if not (at_module or declared or state):
            continue
        value = context.ev.infer(call, inner)
        if value.kind is Kind.SESSION and value.origin is Origin.OPENED and closing.is_new(context, call, inner, value):
            script = scope.kind == "module" and (
                "__main__" in context.module.text or not any(True for _ in _definitions(context))
            )
            _report_global(
                context, call, f"The session opened here is kept in `{ast.unparse(target)}`.",
                Confidence.LOW if script else Confidence.MEDIUM,
            )  # fmt: skip


def _globals(scope: Function) -> set[str]:
    return {name for node in scope.body.parents if isinstance(node, ast.Global) for name in node.names}


def _definitions(context: Context) -> list[ast.stmt]:
    return [
        node
        for node in context.module.tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]


def _report_global(context: Context, call: ast.Call, message: str, confidence: Confidence = Confidence.MEDIUM) -> None:
    context.report(
        "AC112",
        call,
        message,
        confidence=confidence,
        runtime="Every request and thread then shares one connection and one transaction; kept in a context, it is never collected.",
        plain="Open a session where it is used: with SessionLocal() as session: …",
        aftercommit="with db.session() as session: …",
    )
