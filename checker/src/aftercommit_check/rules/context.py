"""What a rule gets to work with, and how it writes a finding down."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aftercommit_check.codes import RULES
from aftercommit_check.findings import Confidence, Edit, Finding, Step

if TYPE_CHECKING:
    from aftercommit_check.facts.infer import Evaluator
    from aftercommit_check.index.modules import Module
    from aftercommit_check.sources.pins import Pin


@dataclass(slots=True)
class Context:
    """One file under examination.

    Attributes:
        ev: The evaluator.
        module: The file.
        pin: The FastAPI version that its project pins.
        wrappers: Names of the project's own wrappers around ``add_task`` and the like.
        findings: What was found so far.
        uses_aftercommit: Whether the file names aftercommit; None until somebody asks.

    """

    ev: Evaluator
    module: Module
    pin: Pin
    wrappers: dict[str, str]
    findings: list[Finding] = field(default_factory=list)
    uses_aftercommit: bool | None = None

    def report(
        self,
        code: str,
        node: ast.AST,
        message: str,
        *,
        confidence: Confidence = Confidence.HIGH,
        runtime: str = "",
        steps: tuple[Step, ...] = (),
        plain: str = "",
        aftercommit: str = "",
        edits: tuple[Edit, ...] = (),
    ) -> None:
        """Write a finding down; each code once a place."""
        line = getattr(node, "lineno", 1)
        column = getattr(node, "col_offset", 0) + 1
        if self.module.is_test:
            confidence = Confidence.LOW
        finding = Finding(
            code=code,
            category=RULES[code].category,
            path=self.module.shown,
            line=line,
            column=column,
            end_line=getattr(node, "end_lineno", line) or line,
            confidence=confidence,
            message=message,
            runtime=runtime,
            steps=steps,
            plain=plain,
            aftercommit=aftercommit,
            edits=edits,
        )
        for index, known in enumerate(self.findings):
            if known.sort_key == finding.sort_key:
                if finding.confidence.rank > known.confidence.rank:
                    self.findings[index] = finding
                return
        self.findings.append(finding)


def text(node: ast.AST, limit: int = 70) -> str:
    """Return the source of *node* on one line, shortened."""
    found = " ".join(ast.unparse(node).split())
    return found if len(found) <= limit else f"{found[: limit - 1]}…"
