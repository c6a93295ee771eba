"""The evaluator, which says what an expression is, as far as reading can tell.

Nothing is run or imported. Every question is answered from the syntax trees on demand, with a memory for answers and
a limit on how deep one question may lead to another.
"""

from __future__ import annotations

import ast
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aftercommit_check.facts import calls, classes, functions, members, typehints
from aftercommit_check.facts.values import (
    NONE,
    SCALAR,
    UNKNOWN,
    Kind,
    Value,
    element_of,
    join,
    sequence,
    unpacked,
)
from aftercommit_check.index.scopes import Class, Comprehension, Function, Scope, nested_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aftercommit_check.index.modules import Module, Project
    from aftercommit_check.index.scopes import Binding

MAX_DEPTH = 34
MAX_STEPS = 150_000
"""How many expressions may be looked at for one file; enough for everything seen, and an end for what was not."""

BUILTINS = frozenset(
    [
        "abs",
        "all",
        "anext",
        "any",
        "aiter",
        "bool",
        "bytes",
        "callable",
        "classmethod",
        "dict",
        "dir",
        "divmod",
        "enumerate",
        "filter",
        "float",
        "format",
        "frozenset",
        "getattr",
        "hasattr",
        "hash",
        "id",
        "int",
        "isinstance",
        "issubclass",
        "iter",
        "len",
        "list",
        "map",
        "max",
        "min",
        "next",
        "object",
        "open",
        "ord",
        "pow",
        "print",
        "property",
        "range",
        "repr",
        "reversed",
        "round",
        "set",
        "setattr",
        "sorted",
        "staticmethod",
        "str",
        "sum",
        "super",
        "tuple",
        "type",
        "vars",
        "zip",
    ]
)


class Evaluator:
    """Answers questions about expressions of a project.

    One evaluator serves one analysed file: a fresh memory each time makes the answer independent of which files
    were looked at before.
    """

    def __init__(self, project: Project) -> None:
        self.project = project
        self._memory: dict[tuple[ast.AST, Scope], Value] = {}
        self._active: set[tuple[ast.AST, Scope]] = set()
        self._depth = 0
        self._budget = MAX_STEPS
        self.frames: dict[Function, dict[str, Value]] = {}
        self.type_variables: list[dict[str, Value]] = []
        self._kept: list[object] = []
        self._contexts: dict[tuple[int, int], tuple[object, object, dict[tuple[ast.AST, Scope], Value]]] = {}
        self.class_facts: dict[tuple[Class, str], bool] = {}
        self.function_facts: dict[tuple[object, ...], object] = {}

    # -- expressions ---------------------------------------------------------------------------------------------

    def infer(self, node: ast.expr, scope: Scope) -> Value:
        """Return what *node* is, evaluated in *scope*."""
        key = (node, scope)
        memory = self._memory_for(scope)
        known = memory.get(key)
        if known is not None:
            return known
        self._budget -= 1
        if key in self._active or self._depth > MAX_DEPTH or self._budget < 0:
            return UNKNOWN
        self._active.add(key)
        self._depth += 1
        try:
            value = self._infer(node, scope)
        finally:
            self._depth -= 1
            self._active.discard(key)
        memory[key] = value
        return value

    def remembered(self, key: tuple[object, ...], find: Callable[[], Value]) -> Value:
        """Return what *find* finds, once for each *key* and each set of type arguments; unknown in a circle."""
        if self.type_variables:
            key = (*key, id(self.type_variables[-1]))
            self._kept.append(self.type_variables[-1])  # an id is only good while its owner lives
        known = self.function_facts.get(key)
        if isinstance(known, Value):
            return known
        self._budget -= 1
        if self._depth > MAX_DEPTH or self._budget < 0:
            return UNKNOWN
        self.function_facts[key] = UNKNOWN
        self._depth += 1
        try:
            value = find()
        finally:
            self._depth -= 1
            del self.function_facts[key]
        self.function_facts[key] = value
        return value

    def _memory_for(self, scope: Scope) -> dict[tuple[ast.AST, Scope], Value]:
        """Return where answers are remembered: those that depend on arguments or type arguments have a place of their own."""
        if not self.frames and not self.type_variables:
            return self._memory
        frame: object = None
        current: Scope | None = scope
        while current is not None and self.frames:
            if isinstance(current, Function) and current in self.frames:
                frame = self.frames[current]
                break
            current = current.parent
        variables: object = self.type_variables[-1] if self.type_variables else None
        if frame is None and variables is None:
            return self._memory
        found = self._contexts.setdefault((id(frame), id(variables)), (frame, variables, {}))
        return found[2]

    def _infer(self, node: ast.expr, scope: Scope) -> Value:
        if isinstance(node, ast.Name):
            return self.name(node.id, scope, (node.lineno, node.col_offset))
        if isinstance(node, ast.Attribute):
            return members.attribute(self, self.infer(node.value, scope), node.attr)
        if isinstance(node, ast.Call):
            return calls.call(self, node, scope)
        if isinstance(node, ast.Await):
            return awaited(self.infer(node.value, scope))
        if isinstance(node, ast.Constant):
            return NONE if node.value is None else SCALAR
        if isinstance(node, ast.NamedExpr | ast.Starred):
            return self.infer(node.value, scope)
        if isinstance(node, ast.IfExp):
            return join([self.infer(node.body, scope), self.infer(node.orelse, scope)])
        if isinstance(node, ast.BoolOp):
            return join([self.infer(value, scope) for value in node.values])
        if isinstance(node, ast.List | ast.Set):
            return sequence(join([self._item(element, scope) for element in node.elts]))
        if isinstance(node, ast.Tuple):
            return Value(Kind.TUPLE, args=tuple(self._item(element, scope) for element in node.elts))
        if isinstance(node, ast.Dict):
            return Value(Kind.MAPPING, element=join([self.infer(value, scope) for value in node.values]))
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
            return sequence(self.infer(node.elt, nested_scope(node, scope)))
        if isinstance(node, ast.DictComp):
            return Value(Kind.MAPPING, element=self.infer(node.value, nested_scope(node, scope)))
        if isinstance(node, ast.Lambda):
            inner = nested_scope(node, scope)
            return Value(Kind.FUNCTION, func=inner if isinstance(inner, Function) else None)
        if isinstance(node, ast.Subscript):
            return self._subscript(node, scope)
        if isinstance(node, ast.BinOp):
            sides = (self.infer(node.left, scope), self.infer(node.right, scope))
            return next((side for side in sides if side.kind in (Kind.SEQUENCE, Kind.MAPPING)), SCALAR)
        if isinstance(node, ast.JoinedStr | ast.Compare | ast.UnaryOp):
            return SCALAR
        return UNKNOWN

    def _item(self, node: ast.expr, scope: Scope) -> Value:
        value = self.infer(node, scope)
        return element_of(value) if isinstance(node, ast.Starred) else value

    def _subscript(self, node: ast.Subscript, scope: Scope) -> Value:
        value = self.infer(node.value, scope)
        if value.kind is Kind.CLASS:
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return value.but(args=tuple(typehints.annotation(self, part, scope) for part in parts))
        if value.kind in (Kind.EXTERNAL, Kind.FACTORY):
            return value
        if isinstance(node.slice, ast.Slice):
            return value if value.kind is Kind.SEQUENCE else sequence(element_of(value))
        if value.kind is Kind.MAPPING:
            return value.element or UNKNOWN
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
            return unpacked(value, (node.slice.value,)) if node.slice.value >= 0 else element_of(value)
        return element_of(value)

    # -- names ---------------------------------------------------------------------------------------------------

    def name(self, name: str, scope: Scope, position: tuple[int, int] | None = None) -> Value:
        """Return what *name* is when used at *position* in *scope* (None: from a nested function, at any time)."""
        current: Scope | None = scope
        while current is not None:
            if not isinstance(current, Class) or current is scope:
                value = self._name_in(name, current, position)
                if value is not None:
                    return value
            if isinstance(current, Function):
                position = None  # a closure runs later
            current = current.parent
        for generic in self._generics(scope):
            if generic == name:
                return Value(Kind.EXTERNAL, name="typing.TypeVar")
        return Value(Kind.EXTERNAL, name=f"builtins.{name}") if name in BUILTINS else UNKNOWN

    @staticmethod
    def _generics(scope: Scope | None) -> Iterator[str]:
        while scope is not None:
            for parameter in getattr(scope.node, "type_params", ()):
                yield str(getattr(parameter, "name", ""))
            scope = scope.parent

    def _name_in(self, name: str, scope: Scope, position: tuple[int, int] | None) -> Value | None:
        if isinstance(scope, Function):
            frame = self.frames.get(scope)
            param = scope.param(name)
            bindings = reaching(scope.bindings.get(name, []), position) if name in scope.bindings else []
            if param is None and not bindings:
                return None
            values = [self.binding(binding, scope) for binding in bindings]
            certain = bool(bindings) and position is not None and bindings[-1].reaches(position[0])
            if param is not None and not certain:
                given = frame.get(name) if frame else None
                values.append(
                    given if given is not None and given.is_known else functions.param_value(self, scope, param)
                )
            value = join(values)
            if value.fresh and value.mapped and value.owner != functions.EXPUNGED and functions.attaches(scope, name):
                value = value.but(fresh=False)
            return self._grown(name, scope, value)
        bindings = scope.bindings.get(name, [])
        if not bindings:
            return self._starred(name, scope) if scope.kind == "module" else None
        if not isinstance(scope, Comprehension) and scope.kind != "module":
            bindings = bindings[-1:]
        reached = reaching(bindings, position if scope.kind == "module" else None)
        value = join([self.binding(binding, scope) for binding in reached])
        if scope.kind == "module" and value.kind in (Kind.NONE, Kind.UNKNOWN):
            value = join([value, *self._assigned_globally(name, scope)])
        return value

    def _assigned_globally(self, name: str, scope: Scope) -> list[Value]:
        """Return what functions assign to the global *name*."""
        found = []
        for bindings in scope.bindings.values():
            for binding in bindings:
                child = binding.child
                if isinstance(child, Function) and name in child.bindings:
                    declared = any(
                        isinstance(statement, ast.Global) and name in statement.names
                        for statement in ast.walk(child.node)
                    )
                    if declared:
                        found += [self.binding(inner, child) for inner in child.bindings[name]]
        return found

    def _grown(self, name: str, scope: Function, value: Value) -> Value:
        """Look at what is appended to a list or stored in a dictionary that starts empty."""
        if value.kind not in (Kind.SEQUENCE, Kind.MAPPING) or (value.element is not None and value.element.is_known):
            return value
        found = [self.infer(node, inner) for node, inner in additions(name, scope)]
        found = [
            element_of(item)
            if isinstance(item, Value) and item.kind is Kind.SEQUENCE and value.kind is Kind.SEQUENCE
            else item
            for item in found
        ]
        element = join(found) if found else UNKNOWN
        return value.but(element=element, steps=element.steps) if element.is_known else value

    def binding(self, binding: Binding, scope: Scope) -> Value:
        """Return what *binding* gives its name."""
        if binding.kind in ("def", "class"):
            child = binding.child
            if isinstance(child, Function):
                return Value(Kind.FUNCTION, func=child)
            return Value(Kind.CLASS, cls=child) if isinstance(child, Class) else UNKNOWN
        if binding.kind == "import":
            return self.module_named(binding.name, scope.module)
        if binding.kind == "from":
            node = binding.node
            return (
                self._imported_from(node, binding.name, scope.module) if isinstance(node, ast.ImportFrom) else UNKNOWN
            )
        value = UNKNOWN
        if binding.annotation is not None and not binding.unpack:
            value = typehints.annotation(self, binding.annotation, scope)
            if value.is_known and value.kind not in (Kind.OBJECT, Kind.SCALAR) and not _empty(value):
                if binding.value is not None and (value.mapped or value.is_session):
                    made = self.infer(binding.value, scope)
                    return made if made.kind is value.kind and (made.fresh or made.is_session) else value
                if binding.value is not None and value.kind is Kind.INSTANCE:
                    made = self.infer(binding.value, scope)  # knows what it was made with
                    return made if made.kind is Kind.INSTANCE and made.call is not None else value
                return value
        if binding.value is None:
            return value
        inferred = self.infer(binding.value, scope)
        if binding.kind == "for":
            inferred = element_of(inferred)
        elif binding.kind == "with":
            inferred = functions.entered(self, inferred)
        inferred = unpacked(inferred, binding.unpack)
        return inferred if inferred.is_known else value

    # -- modules -------------------------------------------------------------------------------------------------

    def module_named(self, name: str, importer: Module) -> Value:
        """Return the project's module called *name*, or the external name."""
        path = self.project.resolve(name, importer)
        module = self.project.load(path) if path else None
        if module is not None:
            return Value(Kind.MODULE, module=module, name=name)
        return Value(Kind.EXTERNAL, name=name)

    def member(self, module: Module, name: str) -> Value:
        """Return what *name* is in *module*: a name bound there, or a submodule."""
        key: tuple[object, ...] = ("member", module, name)
        if key in self.function_facts:
            known = self.function_facts[key]
            return known if isinstance(known, Value) else UNKNOWN
        self.function_facts[key] = UNKNOWN  # a circle of imports ends here
        value = self._name_in(name, module.scope, None)
        if value is None or not value.is_known:
            path = self.project.submodule(module, name)
            found = self.project.load(path) if path else None
            value = Value(Kind.MODULE, module=found) if found is not None else (value or UNKNOWN)
        self.function_facts[key] = value
        return value

    def _imported_from(self, node: ast.ImportFrom, name: str, importer: Module) -> Value:
        module = self.source_of(node, importer)
        if module is not None:
            value = self.member(module, name)
            if value.is_known:
                return value
            return Value(Kind.EXTERNAL, name=f"?.{node.module or ''}.{name}")
        if not node.level and node.module:
            nested = self.project.resolve(f"{node.module}.{name}", importer)
            found = self.project.load(nested) if nested else None
            if found is not None:
                return Value(Kind.MODULE, module=found)
        elif node.level:
            path = self.project.resolve_relative(f"{node.module}.{name}" if node.module else name, node.level, importer)
            found = self.project.load(path) if path else None
            if found is not None:
                return Value(Kind.MODULE, module=found)
        return Value(Kind.EXTERNAL, name=f"{node.module or ''}.{name}".lstrip("."))

    def source_of(self, node: ast.ImportFrom, importer: Module) -> Module | None:
        """Return the project's module that a ``from … import`` names."""
        if node.level:
            path = self.project.resolve_relative(node.module or "", node.level, importer)
        else:
            path = self.project.resolve(node.module or "", importer)
        return self.project.load(path) if path else None

    def _starred(self, name: str, scope: Scope) -> Value | None:
        for binding in scope.bindings.get("*", []):
            if isinstance(binding.node, ast.ImportFrom):
                module = self.source_of(binding.node, scope.module)
                if module is not None and module is not scope.module:
                    value = self.member(module, name)
                    if value.is_known:
                        return value
        return None

    # -- shorthands for the rooms around ---------------------------------------------------------------------------

    def annotation(self, node: ast.expr, scope: Scope) -> Value:
        """Return an instance of what the annotation *node* names."""
        return typehints.annotation(self, node, scope)

    def is_mapped(self, cls: Class) -> bool:
        """Return whether *cls* is mapped to a table."""
        return classes.is_mapped(self, cls)

    @contextmanager
    def typed(self, variables: dict[str, Value]) -> Iterator[None]:
        """Evaluate with *variables* for the type variables of a generic class."""
        if not any(value.is_known for value in variables.values()):
            yield
            return
        self.type_variables.append(variables)
        try:
            yield
        finally:
            self.type_variables.pop()

    @contextmanager
    def frame(self, func: Function, values: dict[str, Value]) -> Iterator[None]:
        """Evaluate *func* with *values* for its parameters."""
        before = self.frames.get(func)
        self.frames[func] = values
        try:
            yield
        finally:
            if before is None:
                del self.frames[func]
            else:
                self.frames[func] = before


def awaited(value: Value) -> Value:
    """Return what ``await value`` gives."""
    if value.kind in (Kind.COROUTINE, Kind.TASK):
        inner = value.element or UNKNOWN
        return awaited(inner) if value.kind is Kind.TASK and inner.kind is Kind.COROUTINE else inner
    return value


def reaching(bindings: list[Binding], position: tuple[int, int] | None) -> list[Binding]:
    """Return the bindings that can have reached a use at *position*, in source order."""
    if position is None:
        return bindings
    before = [binding for binding in bindings if binding.position <= position]
    if not before:
        return bindings
    found: list[Binding] = []
    for binding in reversed(before):
        found.append(binding)
        if binding.reaches(position[0]):
            break
    return found[::-1]


def additions(name: str, scope: Function) -> list[tuple[ast.expr, Scope]]:
    """Return what is appended to, added to or stored in the collection *name* of *scope*."""
    found: list[tuple[ast.expr, Scope]] = []
    for call, inner in scope.body.calls:
        func = call.func
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == name and call.args:
            if func.attr in ("append", "add", "extend", "appendleft", "update"):
                found.append((call.args[0], inner))
            elif func.attr in ("insert", "setdefault") and len(call.args) > 1:
                found.append((call.args[1], inner))
    for node, inner in scope.body.names:
        if node.id == name:
            parent = scope.body.parents.get(node)
            if isinstance(parent, ast.AugAssign) and parent.target is node:
                found.append((parent.value, inner))
            elif isinstance(parent, ast.Subscript) and isinstance(parent.ctx, ast.Store):
                statement = scope.body.parents.get(parent)
                if isinstance(statement, ast.Assign):
                    found.append((statement.value, inner))
    return found


def _empty(value: Value) -> bool:
    return value.kind in (Kind.SEQUENCE, Kind.MAPPING) and (value.element is None or not value.element.is_known)
