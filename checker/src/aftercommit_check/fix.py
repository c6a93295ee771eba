"""Apply the corrections that are certain."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING

from aftercommit_check.index.modules import parse
from aftercommit_check.sources.files import UnreadableSourceError, decode, read_bytes

if TYPE_CHECKING:
    from aftercommit_check.findings import Edit, Finding


def corrected(text: str, edits: list[Edit]) -> str:
    """Return *text* with *edits* made; of two that touch the same lines the first is made."""
    lines = text.split("\n")
    taken: set[int] = set()
    for edit in sorted(set(edits), key=lambda edit: (-edit.first, edit.last)):
        span = set(range(edit.first, edit.last + 1)) or {-edit.first}
        if span & taken:
            continue
        taken |= span
        lines[edit.first - 1 : edit.last] = list(edit.lines)
    return "\n".join(lines)


def plan(findings: list[Finding], base: str) -> dict[str, tuple[str, str]]:
    """Return the old and the new text of every file with a certain correction.

    A file whose encoding or line ends a rewrite would change, or that would not parse afterwards, is left alone.
    """
    by_path: dict[str, list[Edit]] = {}
    for finding in findings:
        if finding.edits:
            by_path.setdefault(finding.path, []).extend(finding.edits)
    changes: dict[str, tuple[str, str]] = {}
    for path, edits in by_path.items():
        try:
            data = read_bytes(os.path.join(base, path))
        except UnreadableSourceError:
            continue
        old = decode(data)
        if old.encode("utf-8") != data:
            continue
        new = corrected(old, edits)
        try:
            parse(new)
        except UnreadableSourceError:
            continue
        if new != old:
            changes[path] = (old, new)
    return changes


def diff(changes: dict[str, tuple[str, str]]) -> str:
    """Return *changes* as a unified diff."""
    parts: list[str] = []
    for path, (old, new) in sorted(changes.items()):
        parts += difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), fromfile=path, tofile=path
        )
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def write(changes: dict[str, tuple[str, str]], base: str) -> None:
    """Write the new texts."""
    for path, (_, new) in changes.items():
        with open(os.path.join(base, path), "w", encoding="utf-8", newline="") as file:
            file.write(new)
