"""Findings that are not shown: ``# noqa`` comments and the baseline."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from aftercommit_check.sources.config import ConfigError
from aftercommit_check.sources.files import UnreadableSourceError, decode, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aftercommit_check.findings import Finding

NOQA = re.compile(r"#\s*noqa(?P<codes>\s*:\s*[A-Z]+\d+(?:[\s,]+[A-Z]+\d+)*)?", re.IGNORECASE)


class Sources:
    """The lines of the files that findings point at, read once.

    Args:
        base: The folder that the findings' paths are relative to.

    """

    def __init__(self, base: str) -> None:
        self.base = base
        self._lines: dict[str, list[str]] = {}

    def lines(self, path: str) -> list[str]:
        """Return the lines of *path*; none if it cannot be read."""
        if path not in self._lines:
            try:
                self._lines[path] = decode(read_bytes(os.path.join(self.base, path))).split("\n")
            except UnreadableSourceError:
                self._lines[path] = []
        return self._lines[path]

    def line(self, path: str, number: int) -> str:
        """Return one line, counted from 1."""
        lines = self.lines(path)
        return lines[number - 1] if 0 < number <= len(lines) else ""


def is_silenced(finding: Finding, sources: Sources) -> bool:
    """Return whether a ``# noqa`` on the first or last line of the call covers *finding*."""
    for number in {finding.line, finding.end_line}:
        match = NOQA.search(sources.line(finding.path, number))
        if match is None:
            continue
        codes = match.group("codes")
        if codes is None or finding.code in re.findall(r"[A-Z]+\d+", codes.upper()):
            return True
    return False


def fingerprint(finding: Finding, sources: Sources) -> str:
    """Return what a baseline knows a finding by: it survives moves within a file."""
    text = " ".join(sources.line(finding.path, finding.line).split())
    return "|".join((finding.path.replace(os.sep, "/"), finding.code, text))


def write_baseline(path: str, findings: Iterable[Finding], sources: Sources) -> int:
    """Write *findings* down as known and return how many there are."""
    counts = Counter(fingerprint(finding, sources) for finding in findings)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"version": 1, "findings": dict(sorted(counts.items()))}, file, indent=2)
        file.write("\n")
    return sum(counts.values())


def read_baseline(path: str) -> Counter[str]:
    """Return the known findings.

    Raises:
        ConfigError: If the file cannot be read.

    """
    try:
        with open(path, encoding="utf-8") as file:
            data: Any = json.load(file)
        return Counter({str(key): int(count) for key, count in data["findings"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the baseline {path}: {error}") from error


def without_known(findings: list[Finding], known: Counter[str], sources: Sources) -> list[Finding]:
    """Return the findings that the baseline does not know, as many of each as are new."""
    left = Counter(known)
    fresh = []
    for finding in findings:
        mark = fingerprint(finding, sources)
        if left[mark] > 0:
            left[mark] -= 1
        else:
            fresh.append(finding)
    return fresh
