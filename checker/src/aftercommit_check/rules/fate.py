"""What becomes of work that was started: awaited on the spot, joined later, or let go."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from aftercommit_check.facts.handovers import Handover, Way
from aftercommit_check.facts.values import Origin, Value

if TYPE_CHECKING:
    from aftercommit_check.index.scopes import Scope

WAITERS = frozenset({"gather", "wait", "wait_for", "shield", "as_completed", "timeout"})
JOINERS = frozenset({"join", "result", "wait"})


class Fate(Enum):
    """What becomes of started work."""

    AWAITED = auto()  # nothing else runs meanwhile
    JOINED = auto()  # the same function waits for it later
    LOOSE = auto()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The fate of one hand-over.

    Attributes:
        fate: What becomes of it.
        many: Whether the call runs several times (in a loop or a comprehension) before anybody waits.
        line: The line on which it is waited for; 0 if it is not.

    """

    fate: Fate
    many: bool
    line: int


def outcome(handover: Handover) -> Outcome:
    """Return what becomes of the work that *handover* starts."""
    owner: Scope = handover.scope.function or _module_scope(handover.scope)
    parents = owner.body.parents
    many = in_loop(handover.call, parents)
    if handover.way is Way.GROUP:
        return Outcome(Fate.JOINED, many, _end_of_group(handover, parents))
    node: ast.AST = handover.call
    while True:
        parent = parents.get(node)
        if parent is None:
            return Outcome(Fate.LOOSE, many, 0)
        if isinstance(parent, ast.Await):
            return Outcome(
                Fate.JOINED if many and _in_comprehension(node, parents) else Fate.AWAITED, many, parent.lineno
            )
        if isinstance(parent, ast.Attribute):
            waits = parent.attr in JOINERS
            started = parent.attr == "start"  # Thread(…).start() as one statement: let go
            if waits:
                return Outcome(Fate.AWAITED, many, node_line(parent))
            if started:
                return Outcome(Fate.LOOSE, many, 0)
            return Outcome(Fate.LOOSE, many, 0)
        if isinstance(parent, ast.Call) and node is not parent.func:
            name = _last(parent.func)
            if name in ("append", "add", "extend", "insert", "appendleft") and isinstance(parent.func, ast.Attribute):
                return _container(parent.func.value, handover, owner, many)
            if name in WAITERS or "gather" in name:
                node = parent
                many = many or _several(parent)
                continue
            return Outcome(Fate.LOOSE, many, 0)
        if isinstance(parent, ast.Assign | ast.AnnAssign | ast.NamedExpr):
            target = parent.targets[0] if isinstance(parent, ast.Assign) else parent.target
            return _container(target, handover, owner, many)
        if isinstance(parent, ast.stmt):
            return Outcome(Fate.LOOSE, many, 0)
        node = parent


def _module_scope(scope: Scope) -> Scope:
    while scope.parent is not None and scope.kind != "class":
        scope = scope.parent
    return scope


def _several(call: ast.Call) -> bool:
    return len(call.args) > 1 and _last(call.func) == "gather"


def _container(target: ast.expr, handover: Handover, owner: Scope, many: bool) -> Outcome:
    """Follow the name that a task, or a list of tasks, is kept under."""
    if not isinstance(target, ast.Name):
        return Outcome(Fate.LOOSE, many, 0)
    parents = owner.body.parents
    names = {target.id}
    last = 0
    for used, _ in owner.body.names:
        if used.id in names and isinstance(used.ctx, ast.Load) and used.lineno >= handover.call.lineno:
            line = _waited(used, parents)
            if line:
                last = max(last, line)
    for node in ast.walk(owner.node):
        if (
            isinstance(node, ast.For | ast.AsyncFor)
            and _mentions(node.iter, target.id)
            and isinstance(node.target, ast.Name)
        ):
            names.add(node.target.id)
            if any(
                isinstance(inner, ast.Await) and _mentions(inner, node.target.id) for inner in ast.walk(node)
            ) or any(
                isinstance(inner, ast.Attribute) and inner.attr in JOINERS and _mentions(inner.value, node.target.id)
                for inner in ast.walk(node)
            ):
                last = max(last, node.lineno)
    if last:
        return Outcome(Fate.JOINED, many, last)
    if handover.way is Way.EXECUTOR and _executor_block(handover, parents):
        return Outcome(Fate.JOINED, many, _executor_block(handover, parents))
    return Outcome(Fate.LOOSE, many, 0)


def _waited(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> int:
    current: ast.AST = node
    for _ in range(6):
        parent = parents.get(current)
        if parent is None or isinstance(parent, ast.stmt):
            return 0
        if isinstance(parent, ast.Await):
            return parent.lineno
        if isinstance(parent, ast.Attribute) and parent.attr in JOINERS:
            return parent.lineno
        if isinstance(parent, ast.Call) and _last(parent.func) == "as_completed":
            return parent.lineno
        if isinstance(parent, ast.Attribute):
            return 0
        current = parent
    return 0


def _executor_block(handover: Handover, parents: dict[ast.AST, ast.AST]) -> int:
    """Return the last line of the ``with`` around the call that waits for its executor; 0 if there is none."""
    func = handover.call.func
    name = func.value.id if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) else ""
    node: ast.AST | None = handover.call
    while node is not None:
        node = parents.get(node)
        if isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                if isinstance(item.optional_vars, ast.Name) and item.optional_vars.id == name:
                    return node.end_lineno or 0
    return 0


def _end_of_group(handover: Handover, parents: dict[ast.AST, ast.AST]) -> int:
    return _executor_block(handover, parents) or (handover.call.end_lineno or 0)


def in_loop(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Return whether *node* runs several times: in a loop's body or a comprehension."""
    child: ast.AST = node
    current = parents.get(node)
    while current is not None:
        if isinstance(current, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            return True
        if isinstance(current, ast.For | ast.AsyncFor | ast.While) and child is not getattr(current, "iter", None):
            return True
        child, current = current, parents.get(current)
    return False


def _in_comprehension(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    current = parents.get(node)
    while current is not None and not isinstance(current, ast.stmt):
        if isinstance(current, ast.ListComp | ast.SetComp | ast.GeneratorExp):
            return True
        current = parents.get(current)
    return False


def same_session(one: Value, other: Value) -> bool:
    """Return whether two sessions are one and the same, as far as one can tell.

    Sessions that a function is given all come from one request, unless two different dependencies provide them.
    """
    if one.identity == other.identity:
        return True
    if Origin.OPENED in (one.origin, other.origin):
        return False
    both = one.identity.startswith("depends:") and other.identity.startswith("depends:")
    return not both


def node_line(node: ast.AST) -> int:
    """Return the line of *node*."""
    return getattr(node, "lineno", 0)


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id == name for inner in ast.walk(node))


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
