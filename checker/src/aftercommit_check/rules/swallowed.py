"""AC106: an error is swallowed without a rollback, and the session is used again."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts.values import Kind, Value
from aftercommit_check.findings import Confidence, Edit
from aftercommit_check.index.scopes import Function, Scope
from aftercommit_check.rules.fate import in_loop
from aftercommit_check.rules.pending import commits_each_round, rollback_loses_nothing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aftercommit_check.rules.context import Context

WRITES = frozenset(
    {"commit", "flush", "execute", "add", "merge", "delete", "refresh", "scalars", "scalar", "query", "exec"}
)
FAILING = frozenset({"commit", "flush", "execute", "exec"})
ENDING = frozenset({"rollback", "close", "aclose", "invalidate", "reset"})


def check(context: Context, scope: Scope) -> None:
    """Report handlers in the body of *scope* that go on with a session that may have failed."""
    if not isinstance(scope, Function):
        return
    if not any(_attr(call) in FAILING for call, _ in scope.body.calls):
        return
    for block in _own_tries(scope):
        for handler in block.handlers:
            _handler(context, scope, block, handler)


def _own_tries(scope: Function) -> Iterator[ast.Try]:
    seen: set[ast.AST] = set()
    for node in scope.body.parents.values():
        if isinstance(node, ast.Try) and node not in seen:
            seen.add(node)
            yield node


def _handler(context: Context, scope: Function, block: ast.Try, handler: ast.ExceptHandler) -> None:
    if not _may_be_database(handler) or any(isinstance(node, ast.Raise) for node in handler.body):
        return
    failing = [found for found in _session_calls(context, scope, block.body) if found[1] in FAILING]
    if not failing or _in_savepoint(context, scope, block):
        return
    session = failing[0][2]
    names = {ast.unparse(_receiver(call)) for call, _, _ in failing}
    inside = [
        found for found in _session_calls(context, scope, handler.body) if ast.unparse(_receiver(found[0])) in names
    ]
    ended = [call.lineno for call, name, _ in inside if name in ENDING] + _helper_rollbacks(handler)
    if ended and min(ended) <= min([call.lineno for call, name, _ in inside if name in WRITES], default=10**9):
        return
    used = next((call for call, name, _ in inside if name in WRITES), None)
    shown = ast.unparse(_receiver(failing[0][0]))
    word = "await " if session.is_async else ""
    if used is not None:
        context.report(
            "AC106",
            handler,
            f"The handler uses `{shown}` again (line {used.lineno}) without a rollback after it may have failed.",
            confidence=Confidence.MEDIUM,
            runtime="After a failed flush or commit every use of the session raises PendingRollbackError; after a failed "
            "statement PostgreSQL refuses the rest of the transaction. What the handler means to write is lost.",
            plain=f"except …:\n    {word}{shown}.rollback()  # undoes all that is not committed yet, work before the try, too\n    …",
            aftercommit="A task's failure is recorded on a session of its own: pass on_failure= instead of writing in a handler.",
            edits=_fix(context, scope, block, handler, session, shown),
        )
        return
    parents = scope.body.parents
    writes = any(name in ("commit", "flush") for _, name, _ in failing)
    if (writes and in_loop(block, parents) and not _leaves(handler) and not session.identity.startswith("opened:")) or (
        writes and in_loop(block, parents) and not _leaves(handler) and not _opened_in_loop(session, scope)
    ):
        if commits_each_round(scope, block, shown):
            plain = f"except …:\n    {word}{shown}.rollback()\n    …"
        else:
            begin = "async with" if session.is_async else "with"
            plain = (
                f"try:\n    {begin} {shown}.begin_nested():  # a savepoint: an error undoes this round alone\n        …\n"
                "except …:\n    …"
            )
        context.report(
            "AC106",
            handler,
            f"The loop goes on with `{shown}` after an error that is swallowed here without a rollback.",
            confidence=Confidence.MEDIUM,
            runtime="After one failed flush or commit every later round fails with PendingRollbackError, and is swallowed too.",
            plain=plain,
            aftercommit="db.run_batch(source, handler, on_error=…): a bad record costs nothing to the others.",
            edits=_fix(context, scope, block, handler, session, shown),
        )


def _session_calls(context: Context, scope: Function, body: list[ast.stmt]) -> list[tuple[ast.Call, str, Value]]:
    """Return the calls of session methods in *body*, outermost handlers' bodies included, in source order."""
    if not body:
        return []
    first, last = body[0].lineno, body[-1].end_lineno or body[-1].lineno
    found = []
    for call, inner in scope.body.calls:
        name = _attr(call)
        if first <= call.lineno <= last and (name in WRITES or name in ENDING) and isinstance(call.func, ast.Attribute):
            value = context.ev.infer(call.func.value, inner)
            if value.kind is Kind.SESSION:
                found.append((call, name, value))
    return sorted(found, key=lambda item: item[0].lineno)


def _helper_rollbacks(handler: ast.ExceptHandler) -> list[int]:
    return [
        node.lineno
        for statement in handler.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and "rollback" in ast.unparse(node.func).lower()
    ]


def _in_savepoint(context: Context, scope: Function, block: ast.Try) -> bool:
    """Return whether the work stands in ``begin_nested()`` or another ``with`` that rolls back by itself."""
    del context
    inner = [
        node for statement in block.body for node in ast.walk(statement) if isinstance(node, ast.With | ast.AsyncWith)
    ]
    del scope
    return any(
        "begin" in ast.unparse(item.context_expr) or "savepoint" in ast.unparse(item.context_expr)
        for node in inner
        for item in node.items
    )


def _may_be_database(handler: ast.ExceptHandler) -> bool:
    """Return whether the handler can catch an error of the database."""
    if handler.type is None:
        return True
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        ast.unparse(name).rpartition(".")[2]
        in (
            "Exception",
            "BaseException",
            "SQLAlchemyError",
            "IntegrityError",
            "DBAPIError",
            "OperationalError",
            "DatabaseError",
        )
        for name in names
    )


def _leaves(handler: ast.ExceptHandler) -> bool:
    return any(
        isinstance(node, ast.Return | ast.Break | ast.Raise)
        for statement in handler.body
        for node in ast.walk(statement)
    )


def _opened_in_loop(session: Value, scope: Function) -> bool:
    return session.call is not None and in_loop(session.call[0], scope.body.parents)


def _fix(
    context: Context, scope: Function, block: ast.Try, handler: ast.ExceptHandler, session: Value, shown: str
) -> tuple[Edit, ...]:
    """Insert the rollback as the handler's first line, where it surely undoes nothing but what failed."""
    first = handler.body[0]
    if session.is_async or not session.sure or first.lineno == handler.lineno:
        return ()
    if not rollback_loses_nothing(scope, block, handler, session):
        return ()
    line = context.module.lines[first.lineno - 1]
    indent = line[: len(line) - len(line.lstrip())]
    return (Edit(first.lineno, first.lineno - 1, (f"{indent}{shown}.rollback()",)),)


def _receiver(call: ast.Call) -> ast.expr:
    return call.func.value if isinstance(call.func, ast.Attribute) else call.func


def _attr(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""
