"""Calls: what calling something gives, by our own functions and by the library's."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts import classes, functions, library, members
from aftercommit_check.facts.values import (
    NONE,
    SCALAR,
    UNKNOWN,
    Kind,
    Origin,
    Value,
    element_of,
    join,
    row_of,
    sequence,
)
from aftercommit_check.findings import Step

if TYPE_CHECKING:
    from aftercommit_check.facts.infer import Evaluator
    from aftercommit_check.index.scopes import Scope

TO_SCALAR = frozenset(
    [
        "str",
        "int",
        "float",
        "bool",
        "bytes",
        "len",
        "repr",
        "id",
        "hash",
        "sum",
        "abs",
        "all",
        "any",
        "isinstance",
        "hasattr",
        "callable",
        "format",
        "ord",
        "pow",
        "round",
        "vars",
        "range",
        "print",
        "divmod",
        "issubclass",
        "open",
        "dir",
    ]
)
TO_SEQUENCE = frozenset(["list", "set", "tuple", "sorted", "reversed", "frozenset"])
PYDANTIC_MAKERS = frozenset(
    [
        "from_orm",
        "model_validate",
        "parse_obj",
        "validate",
        "construct",
        "model_construct",
        "parse_raw",
        "model_validate_json",
        "from_attributes",
    ]
)
AS_CONTEXT = "as a context manager"
COPIES = frozenset({"copy", "model_copy", "__copy__"})
DUMPS = frozenset({"dict", "model_dump", "json", "model_dump_json", "to_dict", "as_dict", "asdict"})


def call(ev: Evaluator, node: ast.Call, scope: Scope) -> Value:
    """Return what the call *node* gives."""
    func = ev.infer(node.func, scope)
    if func.kind is Kind.CLASS and func.cls is not None:
        return _construct(ev, func, node, scope)
    if func.kind in (Kind.FUNCTION, Kind.METHOD) and func.func is not None:
        found = functions.result(ev, func.func, func.receiver, (node, scope))
        if func.name == AS_CONTEXT and found.kind is Kind.SEQUENCE:
            found = Value(Kind.CONTEXT, element=found.element, func=func.func)
        return _opened(found, node, scope)
    if func.kind is Kind.FACTORY:
        return Value(
            Kind.SESSION, origin=Origin.OPENED, is_async=func.is_async, identity=_place(node, scope),
            owner=ast.unparse(node.func)[:60], call=(node, scope), sure=func.sure, steps=(_opening(node, scope),),
        )  # fmt: skip
    if func.kind is Kind.EXTERNAL:
        return external(ev, func.name, node, scope)
    if func.kind is Kind.LIBRARY_METHOD and func.receiver is not None:
        return method(ev, func.receiver, func.name, node, scope)
    if func.kind is Kind.PARTIAL and func.receiver is not None and func.receiver.func is not None:
        return functions.result(ev, func.receiver.func, func.receiver.receiver)
    if func.kind is Kind.INSTANCE and func.cls is not None:
        calls = classes.find_method(ev, func.cls, "__call__")
        if calls is not None:
            return _opened(functions.result(ev, calls, func, (node, scope)), node, scope)
    return UNKNOWN


def _construct(ev: Evaluator, func: Value, node: ast.Call, scope: Scope) -> Value:
    assert func.cls is not None
    made = classes.instance(ev, func.cls, func.args)
    if made.kind is Kind.SESSION:
        return made.but(
            origin=Origin.OPENED, identity=_place(node, scope), owner=ast.unparse(node.func)[:60], call=(node, scope),
            steps=(_opening(node, scope),),
        )  # fmt: skip
    return made.but(call=(node, scope), fresh=made.mapped)


def _opened(value: Value, node: ast.Call, scope: Scope) -> Value:
    """Note where a session that a function of ours returns was asked for."""
    inner = value.element if value.kind in (Kind.COROUTINE, Kind.CONTEXT, Kind.SEQUENCE) else value
    if inner is None or inner.kind not in (Kind.SESSION, Kind.CONNECTION) or inner.origin is not Origin.OPENED:
        return value
    fresh = inner.but(
        identity=_place(node, scope),
        owner=ast.unparse(node.func)[:60],
        call=(node, scope),
        steps=(_opening(node, scope),),
    )
    return fresh if inner is value else value.but(element=fresh)


def _opening(node: ast.Call, scope: Scope) -> Step:
    return Step(scope.module.shown, node.lineno, f"opened by {ast.unparse(node)[:60]}")


def _place(node: ast.Call, scope: Scope) -> str:
    return f"opened:{scope.module.shown}:{node.lineno}:{node.col_offset}"


def argument(ev: Evaluator, node: ast.Call, scope: Scope, index: int, name: str = "") -> Value:
    """Return the value of one argument of a call."""
    expr = argument_node(node, index, name)
    return ev.infer(expr, scope) if expr is not None else UNKNOWN


def argument_node(node: ast.Call, index: int, name: str = "") -> ast.expr | None:
    """Return the expression of one argument of a call, by place or by keyword."""
    if len(node.args) > index and not any(isinstance(arg, ast.Starred) for arg in node.args[: index + 1]):
        return node.args[index]
    return next((keyword.value for keyword in node.keywords if name and keyword.arg == name), None)


def entity(ev: Evaluator, value: Value, whole: bool = True) -> Value:
    """Return a row of what a query names: a mapped class, or a column."""
    if value.kind is Kind.CLASS and value.cls is not None:
        return Value(
            Kind.INSTANCE, cls=value.cls, args=value.args, mapped=whole or ev.is_mapped(value.cls), name=value.cls.name
        )
    if value.kind is Kind.EXTERNAL:
        last = value.name.rpartition(".")[2]
        return classes.unknown_mapped(last) if last[:1].isupper() and not last.isupper() else SCALAR
    if value.kind is Kind.QUERY:
        return UNKNOWN
    return SCALAR if value.kind is not Kind.UNKNOWN else UNKNOWN


def _entities(ev: Evaluator, node: ast.Call, scope: Scope) -> tuple[Value, ...]:
    found = []
    for arg in node.args:
        if isinstance(arg, ast.Starred):
            found.append(UNKNOWN)
        else:
            found.append(entity(ev, ev.infer(arg, scope)))
    return tuple(found)


def external(ev: Evaluator, name: str, node: ast.Call, scope: Scope) -> Value:
    """Return what calling the external *name* gives."""
    root, last = library.root_of(name), name.rpartition(".")[2]
    if root == "builtins":
        return _builtin(ev, last, node, scope)
    if root in ("sqlalchemy", "sqlmodel"):
        if last == "select":
            return Value(Kind.QUERY, args=_entities(ev, node, scope))
        if last in ("aliased", "with_polymorphic"):
            return argument(ev, node, scope, 0)
        if last in ("insert", "update", "delete"):
            return Value(Kind.QUERY)
    known = library.external_call(name)
    if known is not None:
        if known.kind is Kind.FACTORY:
            chosen = argument_node(node, 1, "class_")
            if chosen is not None and "Async" in ast.unparse(chosen):
                return known.but(is_async=True)
        if known.kind in (Kind.SESSION, Kind.CONNECTION):
            return known.but(
                identity=_place(node, scope),
                owner=ast.unparse(node.func)[:60],
                call=(node, scope),
                steps=(_opening(node, scope),),
            )
        return known
    if name in ("asyncio.create_task", "asyncio.ensure_future"):
        return Value(Kind.TASK, element=argument(ev, node, scope, 0), call=(node, scope))
    if name in ("asyncio.wait_for", "asyncio.shield"):
        return argument(ev, node, scope, 0)
    if name == "functools.partial":
        return Value(Kind.PARTIAL, receiver=argument(ev, node, scope, 0), call=(node, scope))
    if name in ("contextlib.contextmanager", "contextlib.asynccontextmanager"):
        return argument(ev, node, scope, 0).but(name=AS_CONTEXT)
    if name in ("contextlib.closing", "contextlib.aclosing"):
        return Value(Kind.CONTEXT, element=argument(ev, node, scope, 0))
    if name in ("typing.cast", "typing_extensions.cast") and node.args:
        return ev.annotation(node.args[0], scope)
    if last in functions.DEPENDS and root in ("fastapi", "fastapi_injector"):
        return functions.provided(ev, node.args[0] if node.args else None, scope)
    if root == "copy":
        return argument(ev, node, scope, 0)
    if last[:1].isupper() and not last.isupper() and not name.startswith("?"):
        return Value(Kind.OBJECT, name=name, call=(node, scope))
    return UNKNOWN


def _builtin(ev: Evaluator, name: str, node: ast.Call, scope: Scope) -> Value:
    if name in TO_SCALAR:
        return SCALAR
    first = argument(ev, node, scope, 0)
    if name in TO_SEQUENCE:
        return sequence(element_of(first))
    if name in ("next", "anext", "max", "min"):
        found = element_of(first) if first.kind is not Kind.CONTEXT else (first.element or UNKNOWN)
        if found.kind is Kind.SESSION:
            return found.but(
                identity=_place(node, scope), origin=Origin.OPENED, owner=ast.unparse(node)[:60], call=(node, scope),
                steps=(_opening(node, scope),),
            )  # fmt: skip
        return found
    if name in ("iter", "aiter"):
        return first
    if name == "dict":
        return Value(Kind.MAPPING, element=join([ev.infer(keyword.value, scope) for keyword in node.keywords]))
    if name == "filter":
        return sequence(element_of(argument(ev, node, scope, 1)))
    if name == "enumerate":
        return sequence(Value(Kind.TUPLE, args=(SCALAR, element_of(first))))
    if name == "zip":
        return sequence(Value(Kind.TUPLE, args=tuple(element_of(ev.infer(arg, scope)) for arg in node.args)))
    if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        return members.attribute(ev, first, str(node.args[1].value))
    if name == "super":
        cls = scope.enclosing_class
        if cls is not None:
            for base in classes.bases(ev, cls):
                if base.kind is Kind.CLASS and base.cls is not None:
                    return classes.instance(ev, base.cls, base.args)
        return UNKNOWN
    if name == "type":
        return (
            Value(Kind.CLASS, cls=first.cls, args=first.args) if first.kind is Kind.INSTANCE and first.cls else UNKNOWN
        )
    return UNKNOWN


def method(ev: Evaluator, receiver: Value, name: str, node: ast.Call, scope: Scope) -> Value:
    """Return what a method of a known library class gives."""
    kind = receiver.kind
    if kind is Kind.SESSION or (kind is Kind.FACTORY and name not in ("begin", "configure", "remove", "kw")):
        return _session_method(ev, receiver, name, node, scope)
    if kind is Kind.FACTORY and name == "begin":
        session = Value(
            Kind.SESSION, origin=Origin.OPENED, is_async=receiver.is_async, identity=_place(node, scope), call=(node, scope),
            owner=ast.unparse(node.func)[:60], steps=(_opening(node, scope),),
        )  # fmt: skip
        return Value(Kind.CONTEXT, element=session)
    if kind is Kind.QUERY:
        return _query_method(ev, receiver, name, node, scope)
    if kind is Kind.RESULT:
        return _result_method(receiver, name)
    if kind is Kind.SCALARS:
        return _scalars_method(receiver, name)
    if kind is Kind.SEQUENCE:
        if name == "copy":
            return receiver
        if name in ("__next__", "__anext__"):
            found = element_of(receiver)
            return (
                found.but(
                    origin=Origin.OPENED, call=(node, scope), identity=_place(node, scope), owner=ast.unparse(node)[:60]
                )
                if found.is_session
                else found
            )
        return element_of(receiver) if name in ("pop", "popleft", "send", "asend") else UNKNOWN
    if kind is Kind.MAPPING:
        element = receiver.element or UNKNOWN
        if name in ("get", "pop", "setdefault"):
            return element
        if name == "values":
            return sequence(element)
        return sequence(Value(Kind.TUPLE, args=(SCALAR, element))) if name == "items" else UNKNOWN
    if kind is Kind.CONTEXT and name in ("__enter__", "__aenter__"):
        return receiver.element or UNKNOWN
    if kind is Kind.CONNECTION:
        if name == "cursor":
            return Value(Kind.CONNECTION, name="cursor", identity=receiver.identity, steps=receiver.steps)
        return receiver if name in ("connection", "execution_options", "__enter__", "__aenter__") else UNKNOWN
    if kind is Kind.OBJECT:
        return _object_method(receiver, name, node, scope)
    if kind is Kind.CLASS and receiver.cls is not None:
        if name in PYDANTIC_MAKERS:
            return classes.instance(ev, receiver.cls, receiver.args).but(fresh=True)
        return UNKNOWN
    if kind is Kind.INSTANCE:
        if name in COPIES:
            return receiver.but(fresh=True) if receiver.mapped else receiver
        return SCALAR if name in DUMPS else UNKNOWN
    return SCALAR if kind is Kind.SCALAR else UNKNOWN


def _object_method(receiver: Value, name: str, node: ast.Call, scope: Scope) -> Value:
    last = receiver.name.rpartition(".")[2]
    if last in library.ENGINE_NAMES and name in ("connect", "begin", "raw_connection"):
        return _connection(name, node, scope)
    if receiver.name == "pool" and name in ("getconn", "acquire", "connection", "get_connection"):
        return _connection("pool", node, scope)
    return UNKNOWN


def _connection(name: str, node: ast.Call, scope: Scope) -> Value:
    return Value(
        Kind.CONNECTION, name=name, origin=Origin.OPENED, identity=_place(node, scope), call=(node, scope),
        owner=ast.unparse(node.func)[:60], steps=(_opening(node, scope),),
    )  # fmt: skip


def _session_method(ev: Evaluator, receiver: Value, name: str, node: ast.Call, scope: Scope) -> Value:
    if name == "query":
        return Value(Kind.QUERY, args=_of(receiver, _entities(ev, node, scope)), steps=receiver.steps)
    if name in ("execute", "exec", "stream", "scalars", "stream_scalars", "scalar"):
        statement = argument(ev, node, scope, 0, "statement")
        args = _of(receiver, statement.args) if statement.kind is Kind.QUERY else ()
        first = args[0].but(steps=receiver.steps) if args else UNKNOWN
        if name == "scalar":
            return first
        if name in ("scalars", "stream_scalars") or (name == "exec" and len(args) == 1):
            return Value(Kind.SCALARS, element=first, steps=receiver.steps)
        return Value(Kind.RESULT, args=args, steps=receiver.steps)
    if name in ("get", "get_one"):
        return entity(ev, argument(ev, node, scope, 0, "entity")).but(steps=receiver.steps, origin=receiver.origin)
    if name == "merge":
        return argument(ev, node, scope, 0, "instance").but(fresh=False)
    if name == "connection":
        return Value(Kind.CONNECTION, name="connection", steps=receiver.steps, identity=receiver.identity)
    if name == "get_bind":
        return Value(Kind.OBJECT, name="sqlalchemy.Engine")
    if name == "run_sync":
        func = argument(ev, node, scope, 0)
        return functions.result(ev, func.func, func.receiver) if func.func is not None else UNKNOWN
    if name in ("__enter__", "__aenter__"):
        return receiver
    return NONE if name in ("add", "add_all", "commit", "flush", "refresh", "rollback", "close", "delete") else UNKNOWN


def _of(session: Value, rows: tuple[Value, ...]) -> tuple[Value, ...]:
    """Note on rows where the session that loads them comes from."""
    return tuple(row.but(origin=session.origin) if row.mapped else row for row in rows)


def _query_method(ev: Evaluator, receiver: Value, name: str, node: ast.Call, scope: Scope) -> Value:
    single = receiver.args[0] if len(receiver.args) == 1 else row_of(receiver) if receiver.args else UNKNOWN
    if single.kind is Kind.INSTANCE:
        single = single.but(steps=receiver.steps)
    if name in ("first", "one", "one_or_none", "get", "get_or_404", "first_or_404"):
        return single
    if name in ("scalar", "scalar_one", "scalar_one_or_none"):
        return receiver.args[0] if receiver.args else UNKNOWN
    if name in ("all", "yield_per", "paginate", "fetchall", "__iter__"):
        return sequence(single)
    if name in ("count", "exists", "delete", "update"):
        return SCALAR
    if name in ("with_entities", "with_only_columns", "returning"):
        return receiver.but(args=_entities(ev, node, scope))
    if name == "add_columns":
        return receiver.but(args=(*receiver.args, *_entities(ev, node, scope)))
    if name in ("subquery", "cte", "scalar_subquery", "label"):
        return UNKNOWN
    return receiver


def _result_method(receiver: Value, name: str) -> Value:
    first = receiver.args[0].but(steps=receiver.steps) if receiver.args else UNKNOWN
    row = row_of(receiver)
    if name == "scalars":
        return Value(Kind.SCALARS, element=first, steps=receiver.steps)
    if name in ("scalar", "scalar_one", "scalar_one_or_none"):
        return first
    if name in ("first", "one", "one_or_none", "fetchone"):
        return row if receiver.args else UNKNOWN
    if name in ("all", "fetchall", "fetchmany", "partitions"):
        return sequence(row if receiver.args else UNKNOWN)
    if name == "mappings":
        return Value(Kind.SCALARS, element=SCALAR)
    return receiver if name in ("unique", "freeze", "yield_per", "columns", "tuples") else UNKNOWN


def _scalars_method(receiver: Value, name: str) -> Value:
    element = receiver.element or UNKNOWN
    if name in ("first", "one", "one_or_none", "fetchone"):
        return element
    if name in ("all", "fetchall", "fetchmany", "to_list"):
        return sequence(element)
    return receiver if name in ("unique", "yield_per", "partitions") else UNKNOWN
