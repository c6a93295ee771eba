"""Scopes of one module: what binds each name, where, and under which condition.

Built lazily from the syntax tree. A :class:`Binding` remembers the conditional blocks around it, so that the
binding that reaches a use can be told from one in another branch without a control-flow graph.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aftercommit_check.index.modules import Module

Position = tuple[int, int]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
ComprehensionNode = ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """One statement that gives a name a value.

    Attributes:
        kind: ``assign``, ``for``, ``with``, ``import``, ``from``, ``def``, ``class`` or ``except``.
        node: The statement.
        value: The expression on the right, where there is one.
        annotation: The annotation of the target, where there is one.
        unpack: The way into a tuple on the left: ``(1,)`` for ``b`` in ``a, b = …``.
        position: From where on the name has this value.
        blocks: The conditional blocks around it, as ranges of lines.
        name: For imports, what is imported.
        child: For ``def`` and ``class``, the scope that it opens.

    """

    kind: str
    node: ast.AST
    position: Position
    blocks: tuple[tuple[int, int], ...] = ()
    value: ast.expr | None = None
    annotation: ast.expr | None = None
    unpack: tuple[int, ...] = ()
    name: str = ""
    child: Scope | None = None

    def reaches(self, line: int) -> bool:
        """Return whether a use at *line* always comes by here first (if it comes after)."""
        return all(start <= line <= end for start, end in self.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Param:
    """One parameter of a function; ``kind`` is ``""``, ``*`` or ``**``."""

    name: str
    annotation: ast.expr | None
    default: ast.expr | None
    kind: str
    line: int
    keyword_only: bool = False


@dataclass(slots=True, eq=False)
class Body:
    """What stands in a scope's own body, nested functions and classes left out."""

    calls: list[tuple[ast.Call, Scope]]
    names: list[tuple[ast.Name, Scope]]
    returns: list[ast.expr]
    yields: list[ast.Yield | ast.YieldFrom]
    parents: dict[ast.AST, ast.AST]
    nested: list[Function]


class Scope:
    """A module, class, function, lambda or comprehension.

    Attributes:
        kind: ``module``, ``class``, ``function``, ``lambda`` or ``comprehension``.
        node: The syntax tree of it.
        module: The module that it stands in.
        parent: The scope around it.
        name: Its own name.

    """

    kind = "module"

    def __init__(self, node: ast.AST, module: Module, parent: Scope | None, name: str) -> None:
        self.node = node
        self.module = module
        self.parent = parent
        self.name = name

    @property
    def line(self) -> int:
        """Return the line where it begins."""
        return getattr(self.node, "lineno", 1)

    @property
    def statements(self) -> list[ast.stmt]:
        """Return the statements of its body."""
        body = getattr(self.node, "body", [])
        return body if isinstance(body, list) else []

    @cached_property
    def bindings(self) -> dict[str, list[Binding]]:
        """Return what binds each name, in source order."""
        binder = _Binder(self)
        binder.block(self.statements, ())
        return binder.found

    @cached_property
    def body(self) -> Body:
        """Return calls, names and returns of its own body, with the parent of every node."""
        return _collect(self)

    @property
    def function(self) -> Function | None:
        """Return the function around this scope (itself, if it is one)."""
        scope: Scope | None = self
        while scope is not None and not isinstance(scope, Function):
            scope = scope.parent
        return scope

    @property
    def enclosing_class(self) -> Class | None:
        """Return the class whose ``self`` is seen from here, through closures too."""
        scope: Scope | None = self
        while scope is not None:
            if isinstance(scope, Class):
                return scope
            scope = scope.parent
        return None

    @property
    def qualname(self) -> str:
        """Return the dotted name inside the module."""
        parts = [self.name]
        scope = self.parent
        while scope is not None and scope.kind != "module":
            parts.append(scope.name)
            scope = scope.parent
        return ".".join(reversed(parts))


class Class(Scope):
    """A class statement."""

    kind = "class"
    node: ast.ClassDef

    @property
    def base_nodes(self) -> list[ast.expr]:
        """Return the expressions that name its bases."""
        return self.node.bases

    def keyword(self, name: str) -> ast.expr | None:
        """Return the value of a keyword in the class statement (``table=True``)."""
        return next((keyword.value for keyword in self.node.keywords if keyword.arg == name), None)

    @cached_property
    def methods(self) -> dict[str, Function]:
        """Return its own methods; the last definition of a name counts."""
        return {
            name: binding.child
            for name, bindings in self.bindings.items()
            for binding in bindings
            if isinstance(binding.child, Function)
        }

    @cached_property
    def self_attributes(self) -> dict[str, list[tuple[Function, Binding]]]:
        """Return what methods assign to attributes of their first parameter, ``__init__`` first."""
        found: dict[str, list[tuple[Function, Binding]]] = {}
        order = sorted(self.methods.values(), key=lambda method: method.name != "__init__")
        for method in order:
            if not method.params:
                continue
            owner = method.params[0].name
            for node in ast.walk(method.node):
                targets: list[ast.expr]
                value: ast.expr | None
                annotation: ast.expr | None
                if isinstance(node, ast.Assign):
                    targets, value, annotation = node.targets, node.value, None
                elif isinstance(node, ast.AnnAssign):
                    targets, value, annotation = [node.target], node.value, node.annotation
                else:
                    continue
                for target in targets:
                    pairs: list[tuple[ast.expr, tuple[int, ...]]] = [(target, ())]
                    if isinstance(target, ast.Tuple):
                        pairs = [(element, (index,)) for index, element in enumerate(target.elts)]
                    for element, unpack in pairs:
                        if (
                            isinstance(element, ast.Attribute)
                            and isinstance(element.value, ast.Name)
                            and element.value.id == owner
                        ):
                            binding = Binding(
                                "assign", node, _end(node), value=value, annotation=annotation, unpack=unpack
                            )
                            found.setdefault(element.attr, []).append((method, binding))
        return found


class Function(Scope):
    """A function, method or lambda."""

    kind = "function"
    node: FunctionNode

    @property
    def is_async(self) -> bool:
        """Return whether it is an ``async def``."""
        return isinstance(self.node, ast.AsyncFunctionDef)

    @property
    def owner(self) -> Class | None:
        """Return the class it is a method of."""
        return self.parent if isinstance(self.parent, Class) else None

    @property
    def decorators(self) -> list[ast.expr]:
        """Return its decorators, outermost first."""
        return [] if isinstance(self.node, ast.Lambda) else self.node.decorator_list

    @property
    def returns(self) -> ast.expr | None:
        """Return the annotation of its result."""
        return None if isinstance(self.node, ast.Lambda) else self.node.returns

    @cached_property
    def params(self) -> list[Param]:
        """Return its parameters in order."""
        arguments = self.node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        blank: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
        found = [
            Param(arg.arg, arg.annotation, default, "", arg.lineno)
            for arg, default in zip(positional, [*blank, *arguments.defaults], strict=True)
        ]
        if arguments.vararg:
            found.append(Param(arguments.vararg.arg, arguments.vararg.annotation, None, "*", arguments.vararg.lineno))
        found += [
            Param(arg.arg, arg.annotation, default, "", arg.lineno, keyword_only=True)
            for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        ]
        if arguments.kwarg:
            found.append(Param(arguments.kwarg.arg, arguments.kwarg.annotation, None, "**", arguments.kwarg.lineno))
        return found

    def param(self, name: str) -> Param | None:
        """Return the parameter called *name*."""
        return next((param for param in self.params if param.name == name), None)

    @property
    def is_generator(self) -> bool:
        """Return whether it yields."""
        return bool(self.body.yields)

    def decorator_names(self) -> list[str]:
        """Return the last name of each decorator, calls looked through."""
        names = []
        for decorator in self.decorators:
            target = decorator.func if isinstance(decorator, ast.Call) else decorator
            if isinstance(target, ast.Attribute):
                names.append(target.attr)
            elif isinstance(target, ast.Name):
                names.append(target.id)
        return names


class Comprehension(Scope):
    """A comprehension, whose targets are names of its own."""

    kind = "comprehension"
    node: ComprehensionNode

    @cached_property
    def bindings(self) -> dict[str, list[Binding]]:
        """Return the targets of its ``for`` clauses."""
        found: dict[str, list[Binding]] = {}
        for generator in self.node.generators:
            for name, unpack in _targets(generator.target):
                binding = Binding("for", generator, (0, 0), value=generator.iter, unpack=unpack)
                found.setdefault(name, []).append(binding)
        return found


def nested_scope(node: ast.AST, scope: Scope) -> Scope:
    """Return the scope that *node* opens inside *scope*: always the same object for the same node."""
    known = scope.module.nested
    found = known.get(node)
    if found is None:
        if isinstance(node, ast.Lambda):
            found = Function(node, scope.module, scope, "<lambda>")
        elif isinstance(node, ast.ClassDef):
            found = Class(node, scope.module, scope, node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found = Function(node, scope.module, scope, node.name)
        else:
            found = Comprehension(node, scope.module, scope, "<comprehension>")
        known[node] = found
    return found


def all_functions(scope: Scope) -> Iterator[Function]:
    """Yield every function below *scope*, methods and nested ones too, in source order."""
    for bindings in list(scope.bindings.values()):
        for binding in bindings:
            child = binding.child
            if isinstance(child, Function):
                yield child
            if child is not None:
                yield from all_functions(child)


def _end(node: ast.AST) -> Position:
    """Return where *node* ends."""
    return (getattr(node, "end_lineno", 0) or 0, getattr(node, "end_col_offset", 0) or 0)


def _targets(target: ast.expr, way: tuple[int, ...] = ()) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names in an assignment's target, each with its way into the tuple."""
    if isinstance(target, ast.Name):
        yield target.id, way
    elif isinstance(target, ast.Tuple | ast.List):
        for index, element in enumerate(target.elts):
            yield from _targets(element, (*way, index))
    elif isinstance(target, ast.Starred):
        yield from _targets(target.value, (*way[:-1], -1))


class _Binder:
    """Collect the bindings of one scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.found: dict[str, list[Binding]] = {}

    def add(self, name: str, binding: Binding) -> None:
        self.found.setdefault(name, []).append(binding)

    def block(self, statements: list[ast.stmt], blocks: tuple[tuple[int, int], ...], conditional: bool = False) -> None:
        if not statements:
            return
        if conditional:
            blocks = (*blocks, (statements[0].lineno, _end(statements[-1])[0]))
        for statement in statements:
            self.statement(statement, blocks)

    def statement(self, node: ast.stmt, blocks: tuple[tuple[int, int], ...]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "def"
            child = nested_scope(node, self.scope)
            self.add(node.name, Binding(kind, node, (node.lineno, 0), blocks, child=child))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name, unpack in _targets(target):
                    self.add(name, Binding("assign", node, _end(node), blocks, value=node.value, unpack=unpack))
            self.walrus(node.value, blocks)
        elif isinstance(node, ast.AnnAssign):
            if isinstance(node.target, ast.Name):
                found = Binding("assign", node, _end(node), blocks, value=node.value, annotation=node.annotation)
                self.add(node.target.id, found)
        elif isinstance(node, ast.For | ast.AsyncFor):
            for name, unpack in _targets(node.target):
                self.add(name, Binding("for", node, _end(node.iter), blocks, value=node.iter, unpack=unpack))
            self.block(node.body, blocks, conditional=True)
            self.block(node.orelse, blocks)
        elif isinstance(node, ast.While):
            self.walrus(node.test, blocks)
            self.block(node.body, blocks, conditional=True)
            self.block(node.orelse, blocks)
        elif isinstance(node, ast.If):
            self.walrus(node.test, blocks)
            self.block(node.body, blocks, conditional=True)
            self.block(node.orelse, blocks, conditional=True)
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                if item.optional_vars is not None:
                    for name, unpack in _targets(item.optional_vars):
                        position = _end(item.context_expr)
                        self.add(name, Binding("with", node, position, blocks, value=item.context_expr, unpack=unpack))
            self.block(node.body, blocks)
        elif isinstance(node, ast.Try | ast.TryStar):
            self.block(node.body, blocks)
            for handler in node.handlers:
                if handler.name:
                    self.add(handler.name, Binding("except", handler, (handler.lineno, 0), blocks))
                self.block(handler.body, blocks, conditional=True)
            self.block(node.orelse, blocks)
            self.block(node.finalbody, blocks)
        elif isinstance(node, ast.Match):
            for case in node.cases:
                self.block(case.body, blocks, conditional=True)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                imported = alias.name if alias.asname else name
                self.add(name, Binding("import", node, (node.lineno, 0), blocks, name=imported))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                self.add(alias.asname or alias.name, Binding("from", node, (node.lineno, 0), blocks, name=alias.name))
        elif isinstance(node, ast.Expr | ast.Return) and node.value is not None:
            self.walrus(node.value, blocks)
        elif type(node).__name__ == "TypeAlias":  # Python 3.12; its attributes are unknown to 3.11
            alias_name = getattr(node, "name", None)
            if isinstance(alias_name, ast.Name):
                self.add(alias_name.id, Binding("assign", node, _end(node), blocks, value=getattr(node, "value", None)))

    def walrus(self, node: ast.expr, blocks: tuple[tuple[int, int], ...]) -> None:
        if isinstance(node, ast.Name | ast.Constant):
            return
        for inner in ast.walk(node):
            if isinstance(inner, ast.NamedExpr):
                self.add(inner.target.id, Binding("assign", inner, _end(inner), blocks, value=inner.value))


def _collect(scope: Scope) -> Body:
    """Walk the own body of *scope*."""
    found = Body([], [], [], [], {}, [])
    stack: list[tuple[ast.AST, Scope]] = []

    def push(parent: ast.AST, node: ast.AST, inner: Scope) -> None:
        found.parents[node] = parent
        stack.append((node, inner))

    node = scope.node
    roots: list[ast.AST]
    if isinstance(node, ast.Lambda):
        roots = [node.body]
        found.returns.append(node.body)
    else:
        roots = list(scope.statements)
    for root in reversed(roots):
        push(node, root, scope)
    while stack:
        current, inner = stack.pop()
        if isinstance(current, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            child = nested_scope(current, inner)
            if isinstance(child, Function):
                found.nested.append(child)
            for decorator in current.decorator_list:
                push(current, decorator, inner)
            continue
        if isinstance(current, ast.Lambda):
            continue
        if isinstance(current, ast.Call):
            found.calls.append((current, inner))
        elif isinstance(current, ast.Name):
            found.names.append((current, inner))
        elif isinstance(current, ast.Return):
            if current.value is not None:
                found.returns.append(current.value)
        elif isinstance(current, ast.Yield | ast.YieldFrom):
            found.yields.append(current)
        elif isinstance(current, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            child = nested_scope(current, inner)
            for part in reversed(list(ast.iter_child_nodes(current))):
                push(current, part, child)
            continue
        for part in reversed(list(ast.iter_child_nodes(current))):
            push(current, part, inner)
    return found
