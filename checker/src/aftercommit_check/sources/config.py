"""``[tool.aftercommit-check]`` in ``pyproject.toml``."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, replace
from typing import Any

from aftercommit_check.codes import RULES
from aftercommit_check.findings import Confidence


class ConfigError(Exception):
    """The configuration, or the command line, asks for something that does not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What to report and where to look.

    Attributes:
        select: Codes to report; a prefix stands for all that begin with it.
        ignore: Codes not to report.
        exclude: Globs of files and folders to leave out.
        baseline: File with known findings, which are not reported.
        confidence: The lowest confidence that is reported.
        folder: Where the configuration was found; paths in it are relative to that.

    """

    select: tuple[str, ...] = ("AC",)
    ignore: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    baseline: str | None = None
    confidence: Confidence = Confidence.MEDIUM
    folder: str = "."

    def reports(self, code: str, confidence: Confidence) -> bool:
        """Return whether findings of *code* with *confidence* are shown."""
        return (
            confidence.rank >= self.confidence.rank
            and any(code.startswith(prefix) for prefix in self.select)
            and not any(code.startswith(prefix) for prefix in self.ignore)
        )

    def but(self, **changes: Any) -> Config:
        """Return a copy with *changes*."""
        return replace(self, **changes)


KEYS = frozenset({"select", "ignore", "exclude", "baseline", "confidence"})


def load_config(path: str | None, start: str) -> Config:
    """Read the configuration from *path*, or from the nearest ``pyproject.toml`` above *start* that has one.

    Raises:
        ConfigError: If it cannot be read, or has a key or value that does not exist.

    """
    if path is not None:
        if not os.path.isfile(path):
            raise ConfigError(f"no such configuration file: {path}")
        return _parse(path)
    folder = os.path.abspath(start if os.path.isdir(start) else os.path.dirname(start) or ".")
    while True:
        candidate = os.path.join(folder, "pyproject.toml")
        if os.path.isfile(candidate):
            table = _table(candidate)
            if table is not None:
                return _parse(candidate)
        parent = os.path.dirname(folder)
        if parent == folder:
            return Config()
        folder = parent


def _table(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return None  # somebody else's broken file is not our error
    table = data.get("tool", {}).get("aftercommit-check")
    return table if isinstance(table, dict) else None


def _parse(path: str) -> Config:
    table = _table(path)
    if table is None:
        raise ConfigError(f"{path} has no [tool.aftercommit-check] table, or is not valid TOML")
    unknown = sorted(set(table) - KEYS)
    if unknown:
        raise ConfigError(
            f"{path}: unknown key {unknown[0]!r} in [tool.aftercommit-check]; known are {', '.join(sorted(KEYS))}"
        )
    for key in ("select", "ignore", "exclude"):
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{path}: {key} must be a list of strings")
    folder = os.path.dirname(os.path.abspath(path))
    baseline = table.get("baseline")
    if baseline is not None and not isinstance(baseline, str):
        raise ConfigError(f"{path}: baseline must be a path")
    return Config(
        select=check_codes(table.get("select", ["AC"])),
        ignore=check_codes(table.get("ignore", [])),
        exclude=tuple(table.get("exclude", [])),
        baseline=os.path.join(folder, baseline) if baseline else None,
        confidence=parse_confidence(table.get("confidence", "medium")),
        folder=folder,
    )


def check_codes(codes: list[str]) -> tuple[str, ...]:
    """Return *codes* if each is a rule or the beginning of one.

    Raises:
        ConfigError: If one is not.

    """
    if codes == ["ALL"]:
        return ("AC",)
    for code in codes:
        if not code or not any(known.startswith(code) for known in RULES):
            raise ConfigError(f"unknown rule {code!r}; known are {', '.join(RULES)}")
    return tuple(codes)


def parse_confidence(name: object) -> Confidence:
    """Return the confidence called *name*.

    Raises:
        ConfigError: If there is none.

    """
    try:
        return Confidence(str(name))
    except ValueError:
        raise ConfigError(f"confidence must be high, medium or low, not {name!r}") from None
