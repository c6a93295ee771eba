"""Findings for people: where, what, why, how it got there, and what to write instead."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aftercommit_check.findings import Finding
    from aftercommit_check.suppress import Sources

BOLD, RED, CYAN, GREEN, DIM, RESET = "\x1b[1m", "\x1b[31m", "\x1b[36m", "\x1b[32m", "\x1b[2m", "\x1b[0m"
WIDTH = 100


class Human:
    """Writes findings for people.

    Args:
        sources: Where the excerpts come from.
        color: Whether to use colours.

    """

    def __init__(self, sources: Sources, *, color: bool) -> None:
        self.sources = sources
        self.color = color

    def paint(self, text: str, *styles: str) -> str:
        """Return *text* in *styles*, if colours are on."""
        return f"{''.join(styles)}{text}{RESET}" if self.color and text else text

    def finding(self, finding: Finding) -> str:
        """Return one finding as a block of text."""
        where = self.paint(f"{finding.path}:{finding.line}:{finding.column}", BOLD)
        head = f"{where}: {self.paint(finding.code, RED, BOLD)} {finding.message}"
        if finding.confidence != "high":
            head += self.paint(f" ({finding.confidence} confidence)", DIM)
        parts = [head, self.excerpt(finding)]
        if finding.runtime:
            parts.append(self.block("at run time:", finding.runtime, CYAN))
        if len(finding.steps) > 1:
            parts.append(self.paint("  the way here:", CYAN))
            parts += [f"    {step}" for step in finding.steps]
        if finding.plain:
            parts += [self.paint("  plain SQLAlchemy:", GREEN), textwrap.indent(finding.plain, "    ")]
        if finding.aftercommit:
            parts += [self.paint("  with aftercommit:", GREEN), textwrap.indent(finding.aftercommit, "    ")]
        return "\n".join(part for part in parts if part)

    def excerpt(self, finding: Finding) -> str:
        """Return the lines of the call, with one before."""
        last = min(finding.end_line, finding.line + 7)
        numbers = range(max(1, finding.line - 1), last + 1)
        shown = []
        for number in numbers:
            mark = self.paint(">", RED) if number == finding.line else " "
            shown.append(
                f"  {mark} {self.paint(f'{number:5} |', DIM)} {self.sources.line(finding.path, number)[:WIDTH]}"
            )
        if last < finding.end_line:
            shown.append(f"    {self.paint('  ... |', DIM)}")
        return "\n".join(shown)

    def block(self, title: str, text: str, style: str) -> str:
        """Return a titled paragraph."""
        return f"{self.paint(f'  {title}', style)}\n{textwrap.fill(text, WIDTH, initial_indent='    ', subsequent_indent='    ')}"
