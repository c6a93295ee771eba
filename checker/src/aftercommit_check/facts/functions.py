"""Functions: what their parameters are, and what calling them gives."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts import classes, library, typehints
from aftercommit_check.facts.values import SCALAR, UNKNOWN, Kind, Origin, Value, element_of, join, sequence
from aftercommit_check.findings import Step

if TYPE_CHECKING:
    from aftercommit_check.facts.infer import Evaluator
    from aftercommit_check.index.scopes import Function, Param, Scope

CONTEXT_MANAGERS = frozenset({"contextmanager", "asynccontextmanager"})
DEPENDS = frozenset({"Depends", "Security"})
EXPUNGING = frozenset({"expunge", "expunge_all", "make_transient"})
EXPUNGED = "expunged"
NOT_ATTACHING = frozenset(
    [
        "add_task",
        "BackgroundTask",
        "create_task",
        "ensure_future",
        "submit",
        "run_in_executor",
        "to_thread",
        "Thread",
        "gather",
        "start_soon",
        "print",
        "str",
        "repr",
        "len",
        "isinstance",
        "info",
        "debug",
        "warning",
        "error",
        "exception",
        "append",
        "extend",
        "model_validate",
        "from_orm",
        "getattr",
    ]
)
ENDPOINT_VERBS = frozenset(
    {"get", "post", "put", "patch", "delete", "options", "head", "api_route", "route", "websocket"}
)


def param_value(ev: Evaluator, func: Function, param: Param) -> Value:
    """Return what *param* of *func* is: by its place, its annotation, its ``Depends``, its use."""
    key: tuple[object, ...] = ("param", func, param)
    framed = bool(ev.type_variables)
    if not framed and key in ev.function_facts:
        known = ev.function_facts[key]
        return known if isinstance(known, Value) else UNKNOWN
    if not framed:
        ev.function_facts[key] = UNKNOWN
    value = _param_value(ev, func, param)
    if not framed:
        ev.function_facts[key] = value
    return value


def _param_value(ev: Evaluator, func: Function, param: Param) -> Value:
    owner = func.owner
    if owner is not None and func.params and func.params[0] is param and "staticmethod" not in func.decorator_names():
        if "classmethod" in func.decorator_names() or func.name in ("__new__", "__init_subclass__"):
            return Value(Kind.CLASS, cls=owner)
        return classes.instance(ev, owner)
    scope = func.parent or func
    if param.kind:
        inner = typehints.annotation(ev, param.annotation, scope) if param.annotation is not None else UNKNOWN
        return sequence(inner) if param.kind == "*" else Value(Kind.MAPPING, element=inner)
    value = typehints.annotation(ev, param.annotation, scope) if param.annotation is not None else UNKNOWN
    dependency = dependency_of(ev, func, param)
    if dependency is not None:
        given = provided(ev, dependency[0], dependency[1])
        if given.kind in (Kind.SESSION, Kind.CONNECTION, Kind.FACTORY) or (given.mapped and not value.mapped):
            if value.kind is not Kind.SESSION and value.kind is not Kind.CONNECTION:
                value = given
        elif (
            not value.is_known
            or value.kind in (Kind.OBJECT, Kind.EXTERNAL)
            or (value.kind is Kind.MAPPING and given.is_known)
        ):
            value = given if given.is_known else value
        steps = (
            *given.steps[-1:],
            Step(func.module.shown, param.line, f"`{param.name}` comes from {_said(dependency[0])}"),
        )
        name = ast.unparse(dependency[0])[:60] if dependency[0] is not None else ""
        if value.kind in (Kind.SESSION, Kind.CONNECTION):
            return value.but(origin=Origin.REQUEST, identity=f"depends:{name}", owner=name, steps=steps, call=None)
        if value.is_known:
            return value.but(steps=steps, origin=Origin.REQUEST, owner=name)
        if _looks_like_session(ev, func, param, name):
            return Value(
                Kind.SESSION, origin=Origin.REQUEST, identity=f"depends:{name}", owner=name, sure=False, steps=steps
            )
        return UNKNOWN
    step = Step(func.module.shown, param.line, f"parameter `{param.name}` of {func.name}")
    if value.kind in (Kind.SESSION, Kind.CONNECTION):
        return value.but(origin=Origin.PARAMETER, identity=f"{func.qualname}:{param.name}", steps=(step,))
    if value.kind is Kind.UNKNOWN or (value.kind is Kind.OBJECT and value.name.rpartition(".")[2].endswith("Session")):
        if _looks_like_session(ev, func, param, ""):
            return Value(
                Kind.SESSION,
                origin=Origin.PARAMETER,
                identity=f"{func.qualname}:{param.name}",
                sure=False,
                steps=(step,),
            )
        if param.default is not None and value.kind is Kind.UNKNOWN:
            default = ev.infer(param.default, scope)
            return default if default.kind not in (Kind.NONE, Kind.SCALAR) else UNKNOWN
    return value.after(step) if value.mapped else value


def _said(node: ast.expr | None) -> str:
    return f"Depends({ast.unparse(node)[:60]})" if node is not None else "Depends()"


def dependency_of(ev: Evaluator, func: Function, param: Param) -> tuple[ast.expr | None, Scope] | None:
    """Return what *param* depends on (None inside for ``Depends()``), with the scope to read it in."""
    scope = func.parent or func
    if is_depends(param.default):
        return _depends_argument(param.default, param.annotation), scope
    if param.annotation is not None:
        for node, where in typehints.metadata(ev, param.annotation, scope):
            if is_depends(node):
                first = _depends_argument(node, None)
                return first, where
            if isinstance(node, ast.Name):
                alias = ev.name(node.id, where)
                if alias.kind is Kind.UNKNOWN:
                    continue
    return None


def is_depends(node: ast.expr | None) -> bool:
    """Return whether *node* is ``Depends(…)`` or ``Security(…)``."""
    return isinstance(node, ast.Call) and typehints.last_name(node.func) in DEPENDS


def _depends_argument(node: ast.expr | None, otherwise: ast.expr | None) -> ast.expr | None:
    if not isinstance(node, ast.Call):
        return otherwise
    if node.args:
        return node.args[0]
    return next((keyword.value for keyword in node.keywords if keyword.arg == "dependency"), otherwise)


def provided(ev: Evaluator, dependency: ast.expr | None, scope: Scope) -> Value:
    """Return what FastAPI injects for ``Depends(dependency)``."""
    if dependency is None:
        return UNKNOWN
    value = ev.infer(dependency, scope)
    if value.kind is Kind.CLASS and value.cls is not None:
        return classes.instance(ev, value.cls, value.args)
    if value.kind is Kind.INSTANCE and value.cls is not None:
        method = classes.find_method(ev, value.cls, "__call__")
        return _settled(result(ev, method, value)) if method is not None else UNKNOWN
    if value.kind in (Kind.FUNCTION, Kind.METHOD) and value.func is not None:
        found = _settled(result(ev, value.func, value.receiver))
        if found.kind is Kind.CONTEXT:
            found = found.element or UNKNOWN
        if value.func.is_generator and found.kind is Kind.SEQUENCE:
            found = found.element or UNKNOWN
        step = Step(value.func.module.shown, value.func.line, f"{value.func.name} provides it")
        return found.but(steps=(step,))
    if value.kind is Kind.FACTORY:
        return Value(Kind.SESSION, is_async=value.is_async, sure=value.sure)
    if value.kind is Kind.LIBRARY_METHOD and value.receiver is not None and value.receiver.kind is Kind.OBJECT:
        return UNKNOWN
    return UNKNOWN


def _settled(value: Value) -> Value:
    return (value.element or UNKNOWN) if value.kind is Kind.COROUTINE else value


def _looks_like_session(ev: Evaluator, func: Function, param: Param, dependency: str) -> bool:
    """Guess from name and use whether an untyped parameter is a session."""
    if param.annotation is not None:
        last = typehints.last_name(param.annotation)
        if last in ("Any", "object"):
            pass
        elif not last.endswith("Session") or param.name not in library.SESSION_LIKE_NAMES:
            return False
        else:
            value = ev.infer(param.annotation, func.parent or func)
            return value.kind is not Kind.EXTERNAL or value.name.startswith(("?", "."))
    lowered = param.name.lower()
    if lowered not in library.SESSION_LIKE_NAMES and not lowered.endswith(("_session", "_db")):
        return False
    if dependency and any(word in dependency.lower() for word in ("session", "db")):
        return True
    used = used_methods(func, param.name)
    return bool(used & library.TELLING_METHODS) or len(used & library.SESSION_METHODS) >= 2


def used_methods(func: Function, name: str) -> set[str]:
    """Return the attributes of *name* that *func* uses."""
    found = set()
    for node, _ in func.body.names:
        parent = func.body.parents.get(node)
        if node.id == name and isinstance(parent, ast.Attribute):
            found.add(parent.attr)
    return found


def result(
    ev: Evaluator, func: Function, receiver: Value | None = None, call: tuple[ast.Call, Scope] | None = None
) -> Value:
    """Return what calling *func* gives (a coroutine, for ``async def``)."""
    variables: dict[str, Value] = {}
    if receiver is not None and receiver.cls is not None and func.owner is not None:
        variables = classes.type_mapping(ev, receiver.cls, receiver.args, func.owner)
    needs_frame = call is not None and _has_bare_params(func)
    key: tuple[object, ...] = ("result", func, receiver.cls if receiver else None)
    typed = any(value.is_known for value in variables.values())
    own = receiver is None or receiver.call is None
    simple = not needs_frame and not typed and own and func not in ev.frames
    if simple and key in ev.function_facts:
        known = ev.function_facts[key]
        return known if isinstance(known, Value) else UNKNOWN
    active: tuple[object, ...] = ("active", func)
    if active in ev.function_facts:
        return UNKNOWN
    ev.function_facts[active] = True
    if typed:
        ev.type_variables.append(variables)
    try:
        if needs_frame and call is not None:
            given = {
                name: ev.infer(node, scope)
                for name, node, scope in bind(func, call[0], call[1], skip=receiver is not None)
            }
            frame = {**given, **_self_frame(func, receiver)}
            with ev.frame(func, frame):
                value = _result(ev, func)
        elif receiver is not None and receiver.call is not None and func.params:
            with ev.frame(func, _self_frame(func, receiver)):
                value = _result(ev, func)
        else:
            value = _result(ev, func)
    finally:
        if typed:
            ev.type_variables.pop()
        del ev.function_facts[active]
    if simple:
        ev.function_facts[key] = value
    return value


def _self_frame(func: Function, receiver: Value | None) -> dict[str, Value]:
    if receiver is None or func.owner is None or not func.params:
        return {}
    return {func.params[0].name: receiver}


def _has_bare_params(func: Function) -> bool:
    """Return whether a result can depend on arguments: no result annotation and parameters without one."""
    if func.returns is not None and typehints.last_name(func.returns) not in ("Any", "object"):
        return False
    return any(param.annotation is None for param in func.params) or any(
        isinstance(param.annotation, ast.Subscript) and typehints.last_name(param.annotation.value) in ("type", "Type")
        for param in func.params
    )


def _result(ev: Evaluator, func: Function) -> Value:
    scope = func.parent or func
    declared = typehints.annotation(ev, func.returns, scope) if func.returns is not None else UNKNOWN
    names = func.decorator_names()
    if func.is_generator or (declared.kind is Kind.SEQUENCE and CONTEXT_MANAGERS & set(names)):
        element = element_of(declared) if declared.kind is Kind.SEQUENCE else declared
        if _vague(element):
            element = join([_yielded(ev, node, func) for node in func.body.yields])
        element = element.but(origin=Origin.OPENED) if element.kind in (Kind.SESSION, Kind.CONNECTION) else element
        if CONTEXT_MANAGERS & set(names):
            return Value(Kind.CONTEXT, element=element, func=func, steps=element.steps)
        return Value(Kind.SEQUENCE, element=element, func=func, steps=element.steps)
    value = declared
    if _vague(declared):
        found = join([ev.infer(node, func) for node in func.body.returns])
        value = found if found.is_known else declared
    elif declared.mapped and func.body.returns and len(func.body.returns) <= 6:
        made = [ev.infer(node, func) for node in func.body.returns]
        known = [item for item in made if item.kind not in (Kind.NONE, Kind.UNKNOWN)]
        if known and all(item.fresh for item in known):
            value = declared.but(fresh=True)
    else:
        value = _concrete(ev, func, value)
    if value.kind is Kind.SESSION and value.origin is Origin.UNKNOWN:
        value = value.but(origin=Origin.OPENED)
    if any(typehints.last_name(call.func) in EXPUNGING for call, _ in func.body.calls) or _outlives_session(
        ev, func, value
    ):
        value = unattached(value)
    if func.is_async:
        return Value(Kind.COROUTINE, element=value, func=func, steps=value.steps)
    return value


def _outlives_session(ev: Evaluator, func: Function, value: Value) -> bool:
    """Return whether the rows that *func* returns come from a session that it opened itself: they are detached by then."""
    if not has_row(value) or not any(
        typehints.last_name(call.func) not in NOT_ATTACHING for call, _ in func.body.calls
    ):
        return False
    found = [ev.infer(node, func) for node in func.body.returns]
    rows = [row for item in found for row in rows_in(item)]
    if rows and all(row.origin is Origin.OPENED for row in rows):
        return True
    # Added to, or refreshed by, a session of the function's own.
    names = {node.id for node in func.body.returns if isinstance(node, ast.Name)}
    for call, scope in func.body.calls:
        if (
            typehints.last_name(call.func) in ("add", "merge", "refresh", "delete")
            and isinstance(call.func, ast.Attribute)
            and any(isinstance(arg, ast.Name) and arg.id in names for arg in call.args)
        ):
            session = ev.infer(call.func.value, scope)
            return session.kind is Kind.SESSION and session.origin is Origin.OPENED
    return False


def rows_in(value: Value | None, depth: int = 3) -> list[Value]:
    """Return the rows of mapped classes in *value*."""
    if value is None or depth == 0:
        return []
    if value.kind is Kind.INSTANCE:
        return [value] if value.mapped else []
    if value.kind in (Kind.TUPLE, Kind.ROW):
        return [row for part in value.args for row in rows_in(part, depth - 1)]
    return rows_in(value.element, depth - 1) if value.kind in (Kind.SEQUENCE, Kind.MAPPING, Kind.SCALARS) else []


def has_row(value: Value) -> bool:
    """Return whether a row of a mapped class is in *value*."""
    return bool(rows_in(value))


def _concrete(ev: Evaluator, func: Function, declared: Value) -> Value:
    """Prefer what is really made to the declared base class: it knows what it was given."""
    inner = declared.element if declared.kind is Kind.SEQUENCE else declared
    if inner is None or inner.kind is not Kind.INSTANCE or inner.cls is None or inner.mapped:
        return declared
    if not 0 < len(func.body.returns) <= 4 or func.returns is None:
        return declared
    made = join([ev.infer(node, func) for node in func.body.returns])
    found = made.element if made.kind is Kind.SEQUENCE else made
    if found is None or found.kind is not Kind.INSTANCE or found.cls is None or found.call is None:
        return declared
    return made if made.kind is declared.kind and inner.cls in set(classes.lineage(ev, found.cls)) else declared


def unattached(value: Value) -> Value:
    """Return *value* with its rows marked as taken out of their session on purpose."""
    if value.kind is Kind.INSTANCE and value.mapped:
        return value.but(fresh=True, owner=EXPUNGED)
    if value.kind in (Kind.TUPLE, Kind.ROW):
        return value.but(args=tuple(unattached(part) for part in value.args))
    if value.kind in (Kind.SEQUENCE, Kind.MAPPING) and value.element is not None:
        return value.but(element=unattached(value.element))
    return value


def attaches(scope: Function, name: str) -> bool:
    """Return whether *scope* passes the new row *name* on to something that may add it to a session."""
    for call, _ in scope.body.calls:
        last = typehints.last_name(call.func)
        if last in NOT_ATTACHING:
            continue
        for node in [*call.args, *(keyword.value for keyword in call.keywords)]:
            parts = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
            if any(isinstance(part, ast.Name) and part.id == name for part in parts):
                return True
    return False


def _yielded(ev: Evaluator, node: ast.Yield | ast.YieldFrom, func: Function) -> Value:
    if node.value is None:
        return UNKNOWN
    value = ev.infer(node.value, func)
    return element_of(value) if isinstance(node, ast.YieldFrom) else value


def _vague(value: Value) -> bool:
    if value.kind in (Kind.SEQUENCE, Kind.MAPPING):
        return value.element is None or not value.element.is_known
    if value.kind is Kind.TUPLE:
        return not value.args
    return value.kind in (Kind.UNKNOWN, Kind.OBJECT) and value.name != "pool"


def entered(ev: Evaluator, value: Value) -> Value:
    """Return what ``with value as …`` gives."""
    if value.kind is Kind.CONTEXT:
        return value.element or UNKNOWN
    if value.kind in (Kind.SESSION, Kind.CONNECTION):
        return value
    if value.kind is Kind.COROUTINE and value.element is not None:
        return entered(ev, value.element)
    if value.kind is Kind.INSTANCE and value.cls is not None:
        for name in ("__enter__", "__aenter__"):
            method = classes.find_method(ev, value.cls, name)
            if method is not None:
                found = _settled(result(ev, method, value))
                return found if found.is_known else value
        return value
    if value.kind is Kind.OBJECT:
        return value
    return SCALAR if value.kind is Kind.SCALAR else UNKNOWN


def bind(
    func: Function, call: ast.Call, scope: Scope, *, skip: bool, first: int = 0
) -> list[tuple[str, ast.expr, Scope]]:
    """Return which argument expression each parameter of *func* gets from *call*.

    Args:
        func: The function that runs.
        call: The call that carries the arguments.
        scope: Where the call stands.
        skip: Whether the first parameter is already bound (``self``).
        first: How many positional arguments of the call are not the function's (``add_task``'s own).

    """
    params = [param for param in func.params if not param.kind and not param.keyword_only]
    if skip and params and "staticmethod" not in func.decorator_names() and func.owner is not None:
        params = params[1:]
    found: list[tuple[str, ast.expr, Scope]] = []
    for param, node in zip(params, call.args[first:], strict=False):
        if isinstance(node, ast.Starred):
            break
        found.append((param.name, node, scope))
    names = {param.name for param in func.params if not param.kind}
    found += [
        (keyword.arg, keyword.value, scope)
        for keyword in call.keywords
        if keyword.arg is not None and keyword.arg in names
    ]
    return found
