"""Which FastAPI version a project pins: it decides what happens to a session handed to a task."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from aftercommit_check.sources.files import UnreadableSourceError, read_bytes

LOCK = re.compile(r"name\s*=\s*\"fastapi\"\s*\n\s*version\s*=\s*\"([\d.]+)", re.IGNORECASE)
REQUIREMENT = re.compile(
    r"(?<![\w.-])fastapi(?:\[[\w,\s-]*\])?[\"']?\s*(=\s*[\"'{][^\n]*|[<>=~!^][^#\n;\"']*)", re.IGNORECASE
)
VERSION = re.compile(r"(==|>=|~=|\^|<=|<|>|=)?\s*[\"']?v?(\d+)\.(\d+)")
NAMES = (
    "uv.lock",
    "poetry.lock",
    "Pipfile.lock",
    "pyproject.toml",
    "requirements.txt",
    "Pipfile",
    "setup.py",
    "setup.cfg",
)


@dataclass(frozen=True, slots=True)
class Pin:
    """The FastAPI version of a project.

    Attributes:
        minor: The ``118`` of ``0.118.0``; None if unknown.
        source: The file that says so.
        exact: Whether it is the installed version rather than a lower bound.

    """

    minor: int | None = None
    source: str = ""
    exact: bool = False

    @property
    def shown(self) -> str:
        """Return the version for a message."""
        if self.minor is None:
            return "unpinned"
        return f"0.{self.minor}" if self.exact else f"0.{self.minor} or later"

    @property
    def exits_before_tasks(self) -> bool | None:
        """Return whether ``yield`` dependencies exit before background tasks run; None if unknown."""
        if self.minor is None or not (self.exact or self.minor >= 118):
            return None
        return 106 <= self.minor < 118


def find_pin(path: str, root: str) -> Pin:
    """Return the version pinned nearest above *path*, not further up than *root*."""
    folder = os.path.dirname(os.path.abspath(path))
    while True:
        pin = _pin_in(folder)
        if pin.minor is not None:
            return pin
        parent = os.path.dirname(folder)
        if folder in (root, parent) or not folder.startswith(root):
            return Pin()
        folder = parent


_KNOWN: dict[str, Pin] = {}


def _pin_in(folder: str) -> Pin:
    if folder not in _KNOWN:
        _KNOWN[folder] = _read_pin(folder)
    return _KNOWN[folder]


def forget_pins() -> None:
    """Forget what was read (a new run may find other files)."""
    _KNOWN.clear()


def _read_pin(folder: str) -> Pin:
    names = list(NAMES)
    nested = os.path.join(folder, "requirements")
    if os.path.isdir(nested):
        names += [
            os.path.join("requirements", name) for name in sorted(os.listdir(nested)) if name.endswith((".txt", ".in"))
        ]
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            text = read_bytes(path).decode("utf-8", errors="replace")
        except UnreadableSourceError:
            continue
        pin = pin_in_text(text, name)
        if pin.minor is not None:
            return pin
    return Pin()


def pin_in_text(text: str, name: str) -> Pin:
    """Return the FastAPI version that a lock file or a list of requirements names."""
    locked = LOCK.search(text) if name.endswith(".lock") else None
    if locked:
        parts = locked.group(1).split(".")
        return Pin(int(parts[1]) if len(parts) > 1 else 0, name, exact=True)
    if name.endswith(".lock"):
        return Pin()
    for match in REQUIREMENT.finditer(text):
        versions = [(sign or "=", int(major), int(minor)) for sign, major, minor in VERSION.findall(match.group(1))]
        lower = [
            (sign, minor) for sign, major, minor in versions if major == 0 and sign in ("==", ">=", "~=", "^", ">", "=")
        ]
        if lower:
            sign, minor = lower[0]
            return Pin(minor, name, exact=sign in ("==", "~=", "^", "="))
        upper = [minor for sign, major, minor in versions if major == 0 and sign in ("<", "<=")]
        if upper and upper[0] <= 118:
            return Pin(upper[0] - 1, name, exact=True)
    return Pin()
