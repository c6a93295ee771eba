"""Annotations: what an expression annotated with this is an instance of."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts import classes, library
from aftercommit_check.facts.values import NONE, SCALAR, UNKNOWN, Kind, Value, sequence
from aftercommit_check.index.scopes import Class, Function, Scope

if TYPE_CHECKING:
    from aftercommit_check.facts.infer import Evaluator

SEQUENCES = frozenset(
    [
        "list",
        "List",
        "set",
        "Set",
        "frozenset",
        "FrozenSet",
        "Sequence",
        "Iterable",
        "Iterator",
        "Collection",
        "MutableSequence",
        "AbstractSet",
        "deque",
        "Generator",
        "AsyncGenerator",
        "AsyncIterator",
        "AsyncIterable",
        "MutableSet",
        "ScalarResult",
        "DynamicMapped",
        "WriteOnlyMapped",
        "Page",
        "LimitOffsetPage",
        "InstrumentedList",
    ]
)
MAPPINGS = frozenset(["dict", "Dict", "Mapping", "MutableMapping", "defaultdict", "DefaultDict", "OrderedDict"])
TRANSPARENT = frozenset(
    ["Optional", "Mapped", "Required", "NotRequired", "Final", "ClassVar", "Awaitable", "Coroutine", "SkipValidation"]
)
SCALARS = frozenset(
    [
        "int",
        "str",
        "float",
        "bool",
        "bytes",
        "complex",
        "UUID",
        "Decimal",
        "datetime",
        "date",
        "time",
        "timedelta",
        "Path",
        "Any",
        "object",
    ]
)


def annotation(ev: Evaluator, node: ast.expr, scope: Scope) -> Value:
    """Return an instance of what *node* names; unknown if that cannot be told."""
    return ev.remembered(("annotation", node, scope), lambda: _annotation(ev, node, scope))


def _annotation(ev: Evaluator, node: ast.expr, scope: Scope) -> Value:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            try:
                return annotation(ev, ast.parse(node.value.strip(), mode="eval").body, scope)
            except (SyntaxError, ValueError, RecursionError):
                return UNKNOWN
        return NONE if node.value is None else UNKNOWN
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([annotation(ev, node.left, scope), annotation(ev, node.right, scope)])
    if isinstance(node, ast.Subscript):
        return _subscript(ev, node, scope)
    if isinstance(node, ast.Name | ast.Attribute):
        return _named(ev, node, scope)
    if isinstance(node, ast.Call):
        return instance_of(ev, ev.infer(node, scope))
    return UNKNOWN


def instance_of(ev: Evaluator, value: Value) -> Value:
    """Return an instance of the class *value*."""
    if value.kind is Kind.CLASS and value.cls is not None:
        return classes.instance(ev, value.cls, value.args)
    if value.kind is Kind.EXTERNAL:
        return library.external_instance(value.name)
    return UNKNOWN


def metadata(ev: Evaluator, node: ast.expr | None, scope: Scope, depth: int = 0) -> list[tuple[ast.expr, Scope]]:
    """Return what stands behind the type in ``Annotated[…]``, aliases followed."""
    if node is None or depth > 5:
        return []
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return metadata(ev, ast.parse(node.value.strip(), mode="eval").body, scope, depth + 1)
        except (SyntaxError, ValueError, RecursionError):
            return []
    if isinstance(node, ast.BinOp):
        return metadata(ev, node.left, scope, depth + 1) or metadata(ev, node.right, scope, depth + 1)
    if isinstance(node, ast.Subscript):
        last = last_name(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if last == "Annotated":
            return [(part, scope) for part in parts[1:]] or metadata(ev, parts[0], scope, depth + 1)
        if last in ("Optional", "Union"):
            return [found for part in parts for found in metadata(ev, part, scope, depth + 1)]
        return []
    if isinstance(node, ast.Name | ast.Attribute):
        alias = alias_of(ev, node, scope)
        if alias is not None:
            return metadata(ev, alias[0], alias[1], depth + 1)
    return []


def alias_of(ev: Evaluator, node: ast.expr, scope: Scope, depth: int = 0) -> tuple[ast.expr, Scope] | None:
    """Return the expression that a type alias stands for, with the scope it is to be read in."""
    if depth > 8:
        return None
    if isinstance(node, ast.Attribute):
        base = ev.infer(node.value, scope)
        if base.kind is Kind.MODULE and base.module is not None:
            return alias_of(ev, ast.copy_location(ast.Name(node.attr, ast.Load()), node), base.module.scope, depth + 1)
        return None
    if not isinstance(node, ast.Name):
        return None
    current: Scope | None = scope
    while current is not None:
        bindings = current.bindings.get(node.id, [])
        star = current.bindings.get("*", []) if current.kind == "module" and not bindings else []
        for binding in reversed(bindings):
            if binding.kind == "assign" and binding.value is not None and not binding.unpack:
                if isinstance(binding.value, ast.Subscript | ast.BinOp | ast.Name | ast.Attribute):
                    if isinstance(binding.value, ast.Name | ast.Attribute):
                        return alias_of(ev, binding.value, current, depth + 1) or (binding.value, current)
                    return binding.value, current
                return None
        for binding in [*reversed(bindings), *star]:
            if isinstance(binding.node, ast.ImportFrom):
                module = ev.source_of(binding.node, current.module)
                if module is not None and module is not current.module:
                    target = ast.copy_location(
                        ast.Name(binding.name if binding.name != "*" else node.id, ast.Load()), node
                    )
                    found = alias_of(ev, target, module.scope, depth + 1)
                    if found is not None or binding.name != "*":
                        return found
        if bindings:
            return None
        current = current.parent
    return None


def last_name(node: ast.expr) -> str:
    """Return the last part of a dotted name, or nothing."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _named(ev: Evaluator, node: ast.expr, scope: Scope) -> Value:
    last = last_name(node)
    for variables in reversed(ev.type_variables):
        if isinstance(node, ast.Name) and node.id in variables:
            return variables[node.id]
    start = scope.parent if isinstance(scope, Function) and scope.parent is not None else scope
    value = _lookup(ev, node, scope if scope.kind != "function" else start)
    if value.kind is not Kind.CLASS:
        meant = alias_of(ev, node, scope)
        if meant is not None and isinstance(meant[0], ast.Subscript | ast.BinOp):
            return annotation(ev, *meant)
    if value.kind is Kind.CLASS or (
        value.kind is Kind.EXTERNAL and not value.name.startswith(("typing.TypeVar", "?."))
    ):
        found = instance_of(ev, value)
        if found.is_known and found.kind is not Kind.OBJECT:
            return found
        if last in SEQUENCES:
            return sequence(UNKNOWN)
        if last in MAPPINGS:
            return Value(Kind.MAPPING, element=UNKNOWN)
        return (
            SCALAR
            if last in SCALARS and last not in ("Any", "object")
            else (UNKNOWN if last in ("Any", "object") else found)
        )
    alias = alias_of(ev, node, scope)
    if alias is not None and not (isinstance(alias[0], ast.Name | ast.Attribute) and alias[0] is node):
        return annotation(ev, *alias)
    bound = _type_variable(ev, node, scope)
    if bound is not None:
        return bound
    if value.kind is Kind.EXTERNAL:
        return library.external_instance(value.name.lstrip("?."))
    return UNKNOWN


def _lookup(ev: Evaluator, node: ast.expr, scope: Scope) -> Value:
    """Resolve a name in an annotation; a class may name itself and later classes."""
    value = ev.infer(node, scope) if isinstance(node, ast.Attribute) else UNKNOWN
    if isinstance(node, ast.Name):
        value = ev.name(node.id, scope)
    return value


def _type_variable(ev: Evaluator, node: ast.expr, scope: Scope) -> Value | None:
    """Return an instance of a type variable's bound."""
    if not isinstance(node, ast.Name):
        return None
    current: Scope | None = scope
    while current is not None:
        for parameter in getattr(current.node, "type_params", ()):
            if getattr(parameter, "name", "") == node.id:
                bound = getattr(parameter, "bound", None)
                return annotation(ev, bound, current) if bound is not None else UNKNOWN
        for binding in current.bindings.get(node.id, []):
            if isinstance(binding.value, ast.Call) and last_name(binding.value.func) == "TypeVar":
                for keyword in binding.value.keywords:
                    if keyword.arg == "bound":
                        return annotation(ev, keyword.value, current)
                return UNKNOWN
        current = current.parent
    return None


def _union(values: list[Value]) -> Value:
    known = [value for value in values if value.kind not in (Kind.NONE, Kind.UNKNOWN)]
    if not known:
        return UNKNOWN
    heavy = [value for value in known if value.mapped or value.is_session or value.kind is Kind.CONNECTION]
    if heavy:
        return heavy[0] if len(known) == len(heavy) else heavy[0].but(sure=False)
    return known[0]


def _subscript(ev: Evaluator, node: ast.Subscript, scope: Scope) -> Value:
    last = last_name(node.value)
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if not parts:
        return UNKNOWN
    if last == "Annotated" or last in TRANSPARENT:
        return annotation(ev, parts[-1] if last == "Coroutine" else parts[0], scope)
    if last == "Union":
        return _union([annotation(ev, part, scope) for part in parts])
    if last in SEQUENCES:
        return sequence(annotation(ev, parts[0], scope))
    if last in MAPPINGS:
        return Value(Kind.MAPPING, element=annotation(ev, parts[-1], scope))
    if last in ("tuple", "Tuple"):
        if len(parts) == 2 and isinstance(parts[1], ast.Constant) and parts[1].value is Ellipsis:
            return sequence(annotation(ev, parts[0], scope))
        return Value(Kind.TUPLE, args=tuple(annotation(ev, part, scope) for part in parts))
    if last in ("type", "Type"):
        inner = annotation(ev, parts[0], scope)
        return Value(Kind.CLASS, cls=inner.cls, args=inner.args) if inner.cls is not None else UNKNOWN
    if last in ("Literal", "Callable"):
        return SCALAR if last == "Literal" else UNKNOWN
    value = _lookup(ev, node.value, scope)
    if value.kind is Kind.CLASS and isinstance(value.cls, Class):
        return classes.instance(ev, value.cls, tuple(annotation(ev, part, scope) for part in parts))
    if value.kind is Kind.EXTERNAL:
        return library.external_instance(value.name)
    return UNKNOWN
