"""Attributes: what ``value.name`` is."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts import classes, functions, typehints
from aftercommit_check.facts.values import SCALAR, UNKNOWN, Kind, Origin, Value, element_of, sequence
from aftercommit_check.findings import Step
from aftercommit_check.index.scopes import Class, Function

if TYPE_CHECKING:
    from aftercommit_check.facts.infer import Evaluator
    from aftercommit_check.index.scopes import Binding

COLUMN_CALLS = frozenset(
    {"Column", "mapped_column", "column_property", "synonym", "Field", "deferred", "composite", "column"}
)
RELATION_CALLS = frozenset({"relationship", "Relationship", "dynamic_loader", "backref"})


def attribute(ev: Evaluator, value: Value, name: str) -> Value:
    """Return what the attribute *name* of *value* is."""
    if value.kind is Kind.MODULE and value.module is not None:
        return ev.member(value.module, name)
    if value.kind is Kind.EXTERNAL:
        return Value(Kind.EXTERNAL, name=f"{value.name}.{name}")
    if value.kind is Kind.CLASS and value.cls is not None:
        return _class_attribute(ev, value, value.cls, name)
    if value.kind is Kind.INSTANCE:
        return instance_attribute(ev, value, name)
    if value.kind is Kind.ROW:
        return next(
            (part for part in value.args if part.cls is not None and part.cls.name == name),
            SCALAR if name == "id" else UNKNOWN,
        )
    if value.kind is Kind.SESSION and value.cls is not None:
        method = classes.find_method(ev, value.cls, name)
        if method is not None:
            return Value(Kind.METHOD, func=method, receiver=value)
    if value.kind in (Kind.UNKNOWN, Kind.NONE, Kind.SCALAR):
        return UNKNOWN
    return Value(Kind.LIBRARY_METHOD, name=name, receiver=value)


def _class_attribute(ev: Evaluator, value: Value, cls: Class, name: str) -> Value:
    if name == "__class__":
        return value
    for owner, binding in classes.find_members(ev, cls, name):
        child = binding.child
        if isinstance(child, Function):
            if "classmethod" in child.decorator_names():
                return Value(Kind.METHOD, func=child, receiver=value)
            return Value(Kind.FUNCTION, func=child)
        if isinstance(child, Class):
            return Value(Kind.CLASS, cls=child)
        if ev.is_mapped(cls):
            return SCALAR
        found = ev.binding(binding, owner)
        return found if found.is_known else UNKNOWN
    return Value(Kind.LIBRARY_METHOD, name=name, receiver=value)


def instance_attribute(ev: Evaluator, value: Value, name: str) -> Value:
    """Return the attribute *name* of an instance of a class of the project."""
    cls = value.cls
    if cls is None:
        return UNKNOWN
    if name == "__class__":
        return Value(Kind.CLASS, cls=cls, args=value.args)
    if name in ("__dict__", "__name__", "__doc__"):
        return SCALAR
    candidates: list[Value] = []
    for owner, binding in classes.find_members(ev, cls, name):
        child = binding.child
        if isinstance(child, Function):
            return _method(ev, value, child)
        if isinstance(child, Class):
            return Value(Kind.CLASS, cls=child)
        found = _declared(ev, value, owner, binding, name)
        if found.is_known and found.kind is not Kind.NONE:
            candidates.append(found)
            break
    if candidates and not _better_from_init(candidates[0]):
        return candidates[0]
    for part in classes.lineage(ev, cls):
        for method, binding in part.self_attributes.get(name, ()):
            found = _assigned(ev, value, part, method, binding)
            if found.is_known and found.kind is not Kind.NONE:
                if found.kind in (Kind.SESSION, Kind.CONNECTION):
                    step = Step(
                        part.module.shown, getattr(binding.node, "lineno", 1), f"kept as `self.{name}` by {part.name}"
                    )
                    identity = found.identity or f"{part.name}.{name}"
                    found = found.but(identity=identity, call=None).after(step)
                return found
    if candidates:
        return candidates[0]
    return Value(Kind.LIBRARY_METHOD, name=name, receiver=value) if not ev.is_mapped(cls) or name in _SAFE else UNKNOWN


_SAFE = frozenset({"copy", "model_copy", "dict", "model_dump", "json", "model_dump_json"})


def _better_from_init(value: Value) -> bool:
    return value.kind in (Kind.OBJECT, Kind.SEQUENCE, Kind.MAPPING) and not value.mapped


def _method(ev: Evaluator, value: Value, method: Function) -> Value:
    names = method.decorator_names()
    if any(name.endswith("property") for name in names):
        found = functions.result(ev, method, value)
        return (found.element or UNKNOWN) if found.kind is Kind.COROUTINE else found
    if "staticmethod" in names:
        return Value(Kind.FUNCTION, func=method)
    if "classmethod" in names:
        return Value(Kind.METHOD, func=method, receiver=Value(Kind.CLASS, cls=value.cls, args=value.args))
    return Value(Kind.METHOD, func=method, receiver=value, steps=value.steps)


def _declared(ev: Evaluator, value: Value, owner: Class, binding: Binding, name: str) -> Value:
    """Return an attribute that the class body declares."""
    if value.mapped:
        return _mapped_attribute(ev, owner, binding)
    if binding.annotation is not None:
        variables = classes.type_mapping(ev, value.cls, value.args, owner) if value.cls is not None else {}
        with ev.typed(variables):
            found = ev.annotation(binding.annotation, owner)
        dependency = binding.value if functions.is_depends(binding.value) else None
        if dependency is None:
            for node, _ in typehints.metadata(ev, binding.annotation, owner):
                if functions.is_depends(node):
                    dependency = node
        if isinstance(dependency, ast.Call):
            inner = dependency.args[0] if dependency.args else None
            given = functions.provided(ev, inner, owner)
            found = given if not found.is_known else found
            said = ast.unparse(inner)[:60] if inner is not None else ""
            if found.kind in (Kind.SESSION, Kind.CONNECTION):
                step = Step(
                    owner.module.shown,
                    getattr(binding.node, "lineno", 1),
                    f"`{owner.name}.{name}` comes from Depends({said})",
                )
                return found.but(
                    origin=Origin.REQUEST, identity=f"depends:{said}", owner=said, steps=(*given.steps[-1:], step)
                )
        if found.kind in (Kind.SESSION, Kind.CONNECTION):
            step = Step(
                owner.module.shown, getattr(binding.node, "lineno", 1), f"`{owner.name}.{name}` is declared a session"
            )
            return found.but(origin=Origin.PARAMETER, identity=f"{owner.name}.{name}", steps=(step,))
        return found
    if functions.is_depends(binding.value) and isinstance(binding.value, ast.Call):
        inner = binding.value.args[0] if binding.value.args else None
        found = functions.provided(ev, inner, owner)
        said = ast.unparse(inner)[:60] if inner is not None else ""
        if found.kind in (Kind.SESSION, Kind.CONNECTION):
            return found.but(origin=Origin.REQUEST, identity=f"depends:{said}", owner=said)
        return found
    return ev.binding(binding, owner)


def _mapped_attribute(ev: Evaluator, owner: Class, binding: Binding) -> Value:
    """Return an attribute of a row: a column, or rows of a relationship."""
    call = binding.value if isinstance(binding.value, ast.Call) else None
    made_by = typehints.last_name(call.func) if call is not None else ""
    if binding.annotation is not None:
        found = ev.annotation(binding.annotation, owner)
        if found.mapped or (found.element is not None and found.element.mapped):
            return found
        if made_by in RELATION_CALLS:
            return _related(ev, owner, call, binding.annotation)
        return found if found.kind in (Kind.SEQUENCE, Kind.MAPPING) and found.element is not None else SCALAR
    if made_by in RELATION_CALLS:
        return _related(ev, owner, call, None)
    return SCALAR


def _related(ev: Evaluator, owner: Class, call: ast.Call | None, annotation: ast.expr | None) -> Value:
    """Return what a relationship leads to; its class may be known by name only."""
    many = annotation is not None and any(
        isinstance(node, ast.Name | ast.Attribute) and typehints.last_name(node) in typehints.SEQUENCES
        for node in ast.walk(annotation)
    )
    target = UNKNOWN
    name = "related row"
    if call is not None and call.args:
        first = call.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            name = first.value.rpartition(".")[2]
            target = ev.annotation(ast.Constant(name), owner)
        else:
            target = typehints.instance_of(ev, ev.infer(first, owner))
    if not target.mapped:
        target = classes.unknown_mapped(name).but(sure=True)
    return sequence(target) if many else target


def _assigned(ev: Evaluator, value: Value, owner: Class, method: Function, binding: Binding) -> Value:
    """Return what a method assigns to an attribute of ``self``, for this very instance where its making is known."""
    if binding.annotation is not None:
        variables = classes.type_mapping(ev, value.cls, value.args, owner) if value.cls is not None else {}
        with ev.typed(variables):
            found = ev.annotation(binding.annotation, method)
        if found.kind is Kind.FACTORY or (found.kind is Kind.INSTANCE and found.cls is not None):
            return found
    if binding.value is None:
        return UNKNOWN
    frame: dict[str, Value] = {}
    if method.name == "__init__" and value.call is not None:
        node, scope = value.call
        frame = {name: ev.infer(expr, where) for name, expr, where in functions.bind(method, node, scope, skip=True)}
        frame = {name: found for name, found in frame.items() if found.is_known}
    variables = classes.type_mapping(ev, value.cls, value.args, owner) if value.cls is not None and value.args else {}
    with ev.typed(variables):
        if frame:
            with ev.frame(method, frame):
                found = ev.infer(binding.value, method)
        else:
            found = ev.infer(binding.value, method)
    for index in binding.unpack:
        found = found.args[index] if found.kind is Kind.TUPLE and index < len(found.args) else element_of(found)
    return found
