"""Which files are worth a closer look, decided from their bytes; and the project's own wrappers by name."""

from __future__ import annotations

import ast
import re

from aftercommit_check.facts.handovers import TRIGGERS
from aftercommit_check.facts.typehints import last_name
from aftercommit_check.index.modules import parse
from aftercommit_check.sources.files import UnreadableSourceError, decode

INTERESTING = re.compile(
    rb"add_task|BackgroundTask|create_task|ensure_future|start_soon|threadsafe|gather|Thread\(|Timer\(|submit\(|executor"
    rb"|to_thread|threadpool|add_job|[Ss]ession|next\(|\.commit\(|after_commit|ContextVar|scope\s*=\s*[\"']function"
)
HANDING = re.compile(
    rb"add_task|BackgroundTask|create_task|ensure_future|start_soon|Thread\(|submit\(|run_in_executor|add_job"
)
DEFINITION = re.compile(rb"^[ \t]*(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)
TOO_COMMON = frozenset(
    {"main", "get", "run", "__init__", "__call__", "wrapper", "decorator", "inner", "set", "add", "append", "call"}
)


def is_interesting(data: bytes) -> bool:
    """Return whether a file with these bytes can contain a finding (wrappers' calls left aside)."""
    return INTERESTING.search(data) is not None


def wrapper_names(data: bytes) -> list[str]:
    """Return the names of functions in a file that hand one of their parameters over, and of decorators that do.

    A decorator's name is marked by a leading ``@``.
    """
    if HANDING.search(data) is None:
        return []
    try:
        tree = parse(decode(data))
    except UnreadableSourceError:
        return []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in TOO_COMMON:
            params = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)} - {
                "self",
                "cls",
            }
            if params:
                own, nested = _hands_over(node, params)
                if own:
                    found.add(node.name)
                if nested:
                    found.add(f"@{node.name}")
    return sorted(found)


def _hands_over(node: ast.FunctionDef | ast.AsyncFunctionDef, params: set[str]) -> tuple[bool, bool]:
    """Return whether the function, and whether a function nested in it, hands a parameter of it over."""
    own = nested = False
    stack: list[tuple[ast.AST, bool]] = [(statement, False) for statement in node.body]
    while stack:
        current, inside = stack.pop()
        if isinstance(current, ast.Call) and last_name(current.func) in TRIGGERS:
            targets = [
                *current.args[:2],
                *(word.value for word in current.keywords if word.arg in ("target", "func", "coro")),
            ]
            for target in targets:
                bare = target.func if isinstance(target, ast.Call) else target
                if isinstance(bare, ast.Name) and bare.id in params:
                    own, nested = own or not inside, nested or inside
        deeper = inside or isinstance(current, ast.FunctionDef | ast.AsyncFunctionDef)
        stack += [(child, deeper) for child in ast.iter_child_nodes(current)]
    return own, nested


def decorated_names(data: bytes, decorators: list[bytes]) -> list[str]:
    """Return the functions that one of *decorators* decorates."""
    found = []
    for match in re.finditer(
        rb"^[ \t]*@(?:\w+\.)*(?:" + b"|".join(map(re.escape, decorators)) + rb")\b", data, re.MULTILINE
    ):
        definition = DEFINITION.search(data, match.end())
        if definition is not None:
            found.append(definition.group(1).decode("ascii", errors="replace"))
    return found


def calls_any(data: bytes, names: re.Pattern[bytes] | None) -> bool:
    """Return whether a file mentions one of the wrappers' names."""
    return names is not None and names.search(data) is not None


def names_pattern(names: list[str]) -> re.Pattern[bytes] | None:
    """Return a pattern that finds calls of *names*."""
    if not names:
        return None
    return re.compile(rb"\b(?:" + b"|".join(re.escape(name.encode()) for name in names) + rb")\s*\(")
