"""Findings for programs: JSON, SARIF 2.1.0 and GitHub's workflow commands."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from aftercommit_check import __version__
from aftercommit_check.codes import RULES

if TYPE_CHECKING:
    from aftercommit_check.findings import Finding

LEVELS = {"high": "error", "medium": "warning", "low": "note"}


def to_json(findings: list[Finding]) -> str:
    """Return the findings as a JSON list of objects."""
    rows: list[dict[str, Any]] = [
        {
            "code": finding.code,
            "category": finding.category,
            "path": finding.path.replace(os.sep, "/"),
            "line": finding.line,
            "column": finding.column,
            "end_line": finding.end_line,
            "confidence": finding.confidence.value,
            "message": finding.message,
            "runtime": finding.runtime,
            "steps": [{"path": step.path, "line": step.line, "text": step.text} for step in finding.steps],
            "plain": finding.plain,
            "aftercommit": finding.aftercommit,
            "fixable": bool(finding.edits),
        }
        for finding in findings
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False)


def to_sarif(findings: list[Finding]) -> str:
    """Return the findings as a SARIF 2.1.0 log."""
    codes = list(RULES)
    rules = [
        {
            "id": rule.code,
            "name": rule.title.title().replace(" ", "").replace("'", ""),
            "shortDescription": {"text": rule.title},
            "fullDescription": {"text": rule.why},
            "defaultConfiguration": {"level": "note" if rule.category == "C8" else "warning"},
        }
        for rule in RULES.values()
    ]
    results = [
        {
            "ruleId": finding.code,
            "ruleIndex": codes.index(finding.code),
            "level": LEVELS[finding.confidence.value],
            "message": {"text": f"{finding.message} {finding.runtime}".strip()},
            "locations": [_location(finding.path, finding.line, finding.end_line, finding.column)],
            "relatedLocations": [
                {**_location(step.path, step.line, step.line, 1), "message": {"text": step.text}}
                for step in finding.steps
            ],
        }
        for finding in findings
    ]
    driver = {"name": "aftercommit-check", "version": __version__, "rules": rules}
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints"}],
    }
    return json.dumps(log, indent=2, ensure_ascii=False)


def _location(path: str, line: int, end_line: int, column: int) -> dict[str, Any]:
    return {
        "physicalLocation": {
            "artifactLocation": {"uri": path.replace(os.sep, "/")},
            "region": {"startLine": line, "startColumn": column, "endLine": max(line, end_line)},
        }
    }


def to_github(findings: list[Finding]) -> str:
    """Return the findings as GitHub Actions workflow commands."""
    lines = []
    for finding in findings:
        level = {"high": "error", "medium": "warning", "low": "notice"}[finding.confidence.value]
        place = f"file={_property(finding.path)},line={finding.line},endLine={finding.end_line},col={finding.column}"
        lines.append(
            f"::{level} {place},title={finding.code}::{_escape(f'{finding.message} {finding.runtime}'.strip())}"
        )
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escape(text.replace(os.sep, "/")).replace(":", "%3A").replace(",", "%2C")
