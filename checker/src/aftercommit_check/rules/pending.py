"""What a rollback in a handler would take along: work that the session holds and has not committed."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts.values import Origin, Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aftercommit_check.index.scopes import Function

HARMLESS = frozenset({"refresh", "scalars", "scalar", "query", "get", "get_one", "commit", "rollback", "close"})
CONTAINERS = frozenset({"list", "dict", "set", "Counter", "defaultdict", "deque"})
LOOPS = (ast.For, ast.AsyncFor, ast.While)


def rollback_loses_nothing(scope: Function, block: ast.Try, handler: ast.ExceptHandler, session: Value) -> bool:
    """Return whether a rollback as the first line of *handler* surely undoes nothing but what failed.

    That is so where the function opened the session itself, all that it did before *block* is committed, *block* ends
    with the commit of its own work, and a loop around it leaves nothing to its next round. What this cannot see, such
    as work that a caller did on the session, counts as work that would be lost.
    """
    shown = _opened_as(scope, session)
    if shown is None or block.orelse or block.finalbody or _in_transaction_block(scope, block):
        return False
    look = _Look(scope, shown)
    return (
        look.ends_with_commit(block.body)
        # What the block made is gone with the rollback, so that the handler could not go on with it.
        and not _stored(block.body) & _used(handler.body)
        and (not look.has_work(handler.body) or look.ends_with_commit(handler.body))
        and not look.has_pending_work(block, opened=session.call[0].lineno if session.call else 0)
    )


def commits_each_round(scope: Function, block: ast.Try, shown: str) -> bool:
    """Return whether *block* ends with the commit of its own work, so that a rollback undoes one round alone."""
    return _Look(scope, shown).ends_with_commit(block.body)


def _opened_as(scope: Function, session: Value) -> str | None:
    """Return the name of the session, if the function opened it and bound that name once."""
    if session.origin is not Origin.OPENED or session.call is None or session.call[1].function is not scope:
        return None
    parent = scope.body.parents.get(session.call[0])
    target = parent.optional_vars if isinstance(parent, ast.withitem) else None
    if isinstance(parent, ast.Assign) and len(parent.targets) == 1:
        target = parent.targets[0]
    if not isinstance(target, ast.Name):
        return None
    bound = [node for node, _ in scope.body.names if node.id == target.id and isinstance(node.ctx, ast.Store)]
    return target.id if len(bound) == 1 else None


def _in_transaction_block(scope: Function, block: ast.Try) -> bool:
    return any(
        isinstance(node, ast.With | ast.AsyncWith)
        and any("begin" in ast.unparse(each.context_expr) for each in node.items)
        for node in _around(scope, block)
    )


class _Look:
    """Looks for work on one session.

    Args:
        scope: The function.
        shown: The name of the session in it.

    """

    def __init__(self, scope: Function, shown: str) -> None:
        self.scope = scope
        self.shown = shown
        self.locals = {node.id for node, _ in scope.body.names if isinstance(node.ctx, ast.Store)}
        self.locals |= {each.arg for each in _arguments(scope.node)}
        self.locals -= {"logger", "log"} | set(_containers(scope.node))

    def ends_with_commit(self, body: list[ast.stmt]) -> bool:
        """Return whether *body* itself ends with a commit that is always reached, and leaves no work behind it."""
        place = max((place for place, each in enumerate(body) if self.is_call(each, "commit")), default=None)
        if place is None or self.has_work(body[place + 1 :]):
            return False
        leaving = ast.Return | ast.Break | ast.Continue
        return not any(isinstance(node, leaving) for each in body[:place] for node in ast.walk(each))

    def has_pending_work(self, block: ast.Try, *, opened: int) -> bool:
        """Return whether uncommitted work may be there when *block* begins, in its first round or in a later one."""
        inside = set(ast.walk(block))
        for outer in _around(self.scope, block):
            if isinstance(outer, LOOPS) and outer.lineno > opened:
                rest = [node for node in self.work([*outer.body, *outer.orelse]) if node not in inside]
                if rest:
                    return True
        clean = max(
            (each.lineno for each in self._passed(block) if self.is_call(each, "commit", "rollback")), default=0
        )
        before = self.work(getattr(self.scope.node, "body", []))
        return any(max(opened, clean) < node.lineno < block.lineno for node in before)

    def _passed(self, block: ast.Try) -> Iterator[ast.stmt]:
        """Yield statements that have surely run when *block* begins: the earlier ones of the bodies around it."""
        inner: ast.AST = block
        for outer in [*_around(self.scope, block), self.scope.node]:
            for field in ("body", "orelse", "finalbody"):
                found = getattr(outer, field, None)
                if isinstance(found, list) and inner in found:
                    yield from found[: found.index(inner)]
            inner = outer

    def has_work(self, body: list[ast.stmt]) -> bool:
        """Return whether *body* may put work into the session."""
        return next(self.work(body), None) is not None

    def work(self, body: Iterable[ast.stmt]) -> Iterator[ast.stmt | ast.expr]:
        """Yield what may put work into the session: its methods, calls that it is given to, rows that are changed."""
        for statement in body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Assign | ast.Delete | ast.AugAssign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
                    if any(isinstance(each, ast.Attribute) for each in targets):
                        yield node
                elif isinstance(node, ast.Call) and self._works(node):
                    yield node

    def _works(self, call: ast.Call) -> bool:
        func = call.func
        if isinstance(func, ast.Attribute) and _is_name(func.value, self.shown):
            reads = func.attr in ("execute", "exec") and call.args and ast.unparse(call.args[0]).startswith("select(")
            return func.attr not in HARMLESS and not reads
        if any(_is_name(node, self.shown) for each in [*call.args, *call.keywords] for node in ast.walk(each)):
            return True
        # A method of a row, or of an object that was given the session, may change rows.
        return isinstance(func, ast.Attribute) and bool(_used([ast.Expr(func.value)]) & self.locals)

    def is_call(self, statement: ast.stmt, *methods: str) -> bool:
        """Return whether *statement* is a call of one of the session's *methods*, and nothing else."""
        call = statement.value if isinstance(statement, ast.Expr) else None
        func = call.func if isinstance(call, ast.Call) else None
        return isinstance(func, ast.Attribute) and func.attr in methods and _is_name(func.value, self.shown)


def _around(scope: Function, node: ast.AST) -> Iterator[ast.AST]:
    current = scope.body.parents.get(node)
    while current is not None and current is not scope.node:
        yield current
        current = scope.body.parents.get(current)


def _arguments(node: ast.AST) -> list[ast.arg]:
    given = getattr(node, "args", None)
    if not isinstance(given, ast.arguments):
        return []
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]


def _containers(node: ast.AST) -> Iterator[str]:
    """Yield the names of plain lists, sets and dictionaries: what is put into them is put into no session."""
    plain = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp | ast.Constant | ast.JoinedStr
    for each in ast.walk(node):
        if isinstance(each, ast.Assign | ast.AnnAssign) and each.value is not None:
            called = each.value.func if isinstance(each.value, ast.Call) else None
            if isinstance(each.value, plain) or (isinstance(called, ast.Name) and called.id in CONTAINERS):
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                yield from (target.id for target in targets if isinstance(target, ast.Name))


def _stored(body: list[ast.stmt]) -> set[str]:
    return {
        node.id
        for each in body
        for node in ast.walk(each)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _used(body: list[ast.stmt]) -> set[str]:
    return {node.id for each in body for node in ast.walk(each) if isinstance(node, ast.Name)}


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
