"""Check one file: build what the rules need, run them over every function, return the findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aftercommit_check.facts.infer import Evaluator
from aftercommit_check.index.scopes import Scope, all_functions
from aftercommit_check.rules import closing, gathered, handed, own, swallowed, timing
from aftercommit_check.rules.context import Context
from aftercommit_check.sources.pins import find_pin

if TYPE_CHECKING:
    from collections.abc import Callable

    from aftercommit_check.findings import Finding
    from aftercommit_check.index.modules import Project

CHECKS: tuple[Callable[[Context, Scope], None], ...] = (
    handed.check,
    gathered.check,
    closing.check,
    swallowed.check,
    timing.check,
    own.check,
)


def check_file(project: Project, path: str, wrappers: dict[str, str]) -> list[Finding]:
    """Return the findings in the file at *path*, sorted by place."""
    module = project.load(path)
    if module is None:
        return []
    context = Context(Evaluator(project), module, find_pin(path, project.root), wrappers)
    for scope in (module.scope, *all_functions(module.scope)):
        for check in CHECKS:
            check(context, scope)
    return sorted(context.findings, key=lambda finding: finding.sort_key)
