"""AC107 and AC108: work that starts before the commit, and slow work inside a transaction."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts import handovers, library, typehints
from aftercommit_check.facts.handovers import Way
from aftercommit_check.facts.values import Kind, Origin, Value
from aftercommit_check.findings import Confidence, Step
from aftercommit_check.index.scopes import Function, Scope
from aftercommit_check.rules.context import Context, text
from aftercommit_check.rules.fate import Fate, outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

WRITING = frozenset({"add", "add_all", "merge", "delete", "flush"})
STATEMENTS = frozenset({"execute", "exec", "scalars", "scalar", "query", "get", "flush", "refresh", "stream", "merge"})
ENDS = frozenset({"commit", "rollback", "close", "aclose"})
SLOW_ROOTS = frozenset(
    {
        "requests",
        "httpx",
        "smtplib",
        "openai",
        "anthropic",
        "boto3",
        "subprocess",
        "aiosmtplib",
        "urllib3",
        "stripe",
        "aiohttp",
    }
)
SLOW_NAMES = frozenset({"time.sleep", "asyncio.sleep", "urllib.request.urlopen"})
SLOW_METHODS = frozenset(
    {"get", "post", "put", "patch", "delete", "request", "send", "sendmail", "send_message", "run", "check_call", "check_output",
     "create", "urlopen", "upload_fileobj", "put_object"}
)  # fmt: skip


def check(context: Context, scope: Scope) -> None:
    """Report work of *scope* that is early, and transactions of it that are held."""
    if not isinstance(scope, Function):
        return
    calls = list(_session_calls(context, scope))
    if not calls:
        return
    _early(context, scope, calls)
    _held(context, scope, calls)


def _session_calls(context: Context, scope: Function) -> Iterator[tuple[ast.Call, str, Value]]:
    wanted = WRITING | STATEMENTS | ENDS
    for call, inner in scope.body.calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr in wanted:
            value = context.ev.infer(call.func.value, inner)
            if value.kind is Kind.SESSION:
                yield call, call.func.attr, value


def _early(context: Context, scope: Function, calls: list[tuple[ast.Call, str, Value]]) -> None:
    """Report hand-overs that follow a write and precede its commit."""
    for call, inner in scope.body.calls:
        if typehints.last_name(call.func) not in (*handovers.TASK_CALLS, "add_task", "submit", "Thread"):
            continue
        before = [(other, name, value) for other, name, value in calls if other.lineno < call.lineno]
        writes = [item for item in before if item[1] in WRITING]
        if not writes:
            continue
        last = writes[-1]
        if any(name in ("commit", "close") and other.lineno >= last[0].lineno for other, name, _ in before):
            continue
        if _within_commit_helper(scope, last[0], call):
            continue
        handover = handovers.find(context.ev, call, inner, context.wrappers)
        if handover is None or not _mentions_row(handover, [write for write, _, _ in writes]):
            continue
        after = [other for other, name, _ in calls if name == "commit" and other.lineno > call.lineno]
        if handover.way is Way.BACKGROUND:
            if after or not _commits_on_exit(context, last[2]) or context.pin.exits_before_tasks is True:
                continue
        elif not after or outcome(handover).fate is Fate.AWAITED:
            continue
        target = text(handover.target_node, 40) if handover.target_node is not None else "the task"
        when = (
            f"the commit comes on line {after[0].lineno}"
            if after
            else f"`{last[2].owner}` commits after the background tasks"
        )
        context.report(
            "AC107",
            call,
            f"`{target}` is started before the row it is about is committed: {when}.",
            confidence=Confidence.MEDIUM,
            runtime="The task reads in a transaction of its own and finds nothing, or the old row.",
            steps=(
                *last[2].steps,
                Step(context.module.shown, last[0].lineno, f"{text(last[0], 40)}: not committed yet"),
            ),
            plain="Commit first, then start the work.",
            aftercommit=f"after_commit({target}, …)  # starts with the commit, wherever that happens",
        )


def _mentions_row(handover: handovers.Handover, writes: list[ast.Call]) -> bool:
    """Return whether what is handed over names a row that was written."""
    names = {node.id for write in writes for arg in write.args for node in ast.walk(arg) if isinstance(node, ast.Name)}
    return any(
        isinstance(node, ast.Name) and node.id in names
        for argument in handover.arguments
        for node in ast.walk(argument.node)
    )


def _commits_on_exit(context: Context, session: Value) -> bool:
    """Return whether the dependency behind a session commits after its ``yield``."""
    if session.origin is not Origin.REQUEST or not session.owner.isidentifier():
        return False
    for step in session.steps:
        if "provides it" not in step.text:
            continue
        for path in context.ev.project.files:
            if path.endswith(step.path.rpartition("/")[2]):
                module = context.ev.project.load(path)
                if module is None or module.shown != step.path:
                    continue
                func = next(
                    (b.child for b in module.scope.bindings.get(session.owner, []) if isinstance(b.child, Function)),
                    None,
                )
                if func is not None and func.body.yields:
                    line = func.body.yields[0].lineno
                    in_with = any(
                        "begin" in ast.unparse(call.func) for call, _ in func.body.calls if call.lineno < line
                    )
                    return in_with or any(
                        isinstance(call.func, ast.Attribute) and call.func.attr == "commit" and call.lineno > line
                        for call, _ in func.body.calls
                    )
    return False


def _within_commit_helper(scope: Function, write: ast.Call, call: ast.Call) -> bool:
    """Return whether something between the write and the call says that it commits."""
    return any(
        write.lineno < other.lineno < call.lineno
        and any(word in ast.unparse(other.func).lower() for word in ("commit", "save"))
        for other, _ in scope.body.calls
    )


def _held(context: Context, scope: Function, calls: list[tuple[ast.Call, str, Value]]) -> None:
    """Report slow work between a statement and the end of its transaction, for sessions opened here."""
    done: set[ast.Call] = set()
    for call, inner in scope.body.calls:
        before = [
            (other, name, value)
            for other, name, value in calls
            if other.lineno < call.lineno and value.origin is Origin.OPENED
        ]
        started = [item for item in before if item[1] in STATEMENTS]
        ended = [item for item in before if item[1] in ENDS]
        if not started or (ended and ended[-1][0].lineno > started[-1][0].lineno):
            continue
        session = started[-1][2]
        opening = session.call[0] if session.call is not None else None
        if (
            opening is None
            or opening in done
            or not _still_open(scope, session, call)
            or not _slow(context, call, inner)
        ):
            continue
        done.add(opening)
        context.report(
            "AC108",
            opening,
            f"The transaction begun on line {started[-1][0].lineno} is held open while `{text(call, 50)}` waits (line {call.lineno}).",
            confidence=Confidence.MEDIUM,
            runtime="The connection is missing in the pool and row locks stay taken for as long as this takes.",
            steps=(
                *session.steps,
                Step(context.module.shown, call.lineno, f"slow work outside the database: {text(call, 50)}"),
            ),
            plain="Commit (or close the session) before the slow call, and write its result in a new transaction.",
            aftercommit="Commit inside the task before the slow call: it gives the connection back; mark the task repeatable=True.",
        )


def _slow(context: Context, call: ast.Call, scope: Scope, depth: int = 0) -> bool:
    """Return whether *call* waits for the world outside, itself or in what it calls."""
    if not isinstance(call.func, ast.Attribute | ast.Name):
        return False
    name = typehints.last_name(call.func)
    value = context.ev.infer(call.func, scope)
    if value.kind is Kind.EXTERNAL:
        root = library.root_of(value.name)
        return value.name in SLOW_NAMES or (root in SLOW_ROOTS and name in SLOW_METHODS)
    if value.kind is Kind.LIBRARY_METHOD and value.receiver is not None and value.receiver.kind is Kind.OBJECT:
        return library.root_of(value.receiver.name) in SLOW_ROOTS and name in SLOW_METHODS
    if value.kind in (Kind.FUNCTION, Kind.METHOD) and value.func is not None and depth < 3:
        return _slow_inside(context, value.func, depth + 1)
    return False


def _slow_inside(context: Context, func: Function, depth: int) -> bool:
    key: tuple[object, ...] = ("slow", func)
    known = context.ev.function_facts.get(key)
    if isinstance(known, bool):
        return known
    context.ev.function_facts[key] = False
    found = any(_slow(context, call, inner, depth) for call, inner in func.body.calls)
    context.ev.function_facts[key] = found
    return found


def _still_open(scope: Function, session: Value, call: ast.Call) -> bool:
    """Return whether the session is still open at *call*: its ``with`` goes on, or there is none."""
    if session.call is None:
        return False
    opening, where = session.call
    if (where.function or where) is not scope:
        return False
    node: ast.AST | None = opening
    while node is not None and not isinstance(node, ast.With | ast.AsyncWith | ast.Assign):
        node = scope.body.parents.get(node)
    if isinstance(node, ast.With | ast.AsyncWith):
        return node.lineno <= call.lineno <= (node.end_lineno or 0)
    return opening.lineno < call.lineno
