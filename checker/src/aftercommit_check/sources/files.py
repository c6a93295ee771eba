"""Find and read Python sources: no loops, no surprises, whatever is in the tree."""

from __future__ import annotations

import fnmatch
import io
import os
import tokenize
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_BYTES = 8 * 1024 * 1024
"""Larger files are data in Python's clothes; they are skipped with a note."""

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "node_modules", "site-packages", "venv", "env", "__pypackages__", "build", "dist",
        "buck-out", "_build",
    }
)  # fmt: skip

PROJECT_MARKERS = ("pyproject.toml", "setup.py", "setup.cfg", ".git", "requirements.txt", "Pipfile")


class UnreadableSourceError(Exception):
    """A file that cannot be read as Python; its text says why."""


def find_sources(paths: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Return the Python files below *paths*, each once, sorted.

    Hidden folders, virtual environments and folders matching *exclude* are left out. A file named on the command
    line is always taken. Symbolic links to folders are not followed, so that a loop cannot catch us.
    """
    found: set[str] = set()
    for path in paths:
        if os.path.isfile(path):
            found.add(os.path.normpath(path))
            continue
        for folder, folders, files in os.walk(path, followlinks=False):
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".")
                and name not in SKIPPED_FOLDERS
                and not is_excluded(os.path.join(folder, name), exclude)
                and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
            )
            for name in files:
                full = os.path.normpath(os.path.join(folder, name))
                if name.endswith((".py", ".pyi")) and not is_excluded(full, exclude) and os.path.isfile(full):
                    found.add(full)
    return sorted(found)


def is_excluded(path: str, patterns: Iterable[str]) -> bool:
    """Return whether *path*, or a part of it, matches one of *patterns* (globs, as in ruff's ``exclude``)."""
    normal = path.replace(os.sep, "/")
    parts = normal.split("/")
    for pattern in patterns:
        bare = pattern.rstrip("/")
        if fnmatch.fnmatch(normal, bare) or fnmatch.fnmatch(normal, f"*/{bare}") or normal.startswith(f"{bare}/"):
            return True
        if "/" not in bare and any(fnmatch.fnmatch(part, bare) for part in parts):
            return True
    return False


def read_bytes(path: str) -> bytes:
    """Return the bytes of *path*.

    Raises:
        UnreadableSourceError: If it is too large or cannot be opened.

    """
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise UnreadableSourceError(f"larger than {MAX_BYTES // 1024 // 1024} MB")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableSourceError(f"cannot be read: {error.strerror or error}") from error


def decode(data: bytes) -> str:
    """Return *data* as text, by its byte-order mark or coding line, else as UTF-8.

    Bytes that do not fit the declared encoding are replaced rather than refused: names and calls are ASCII nearly
    everywhere, and an accent in a comment should not hide a finding.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    except (SyntaxError, UnicodeError):
        encoding = "utf-8"
    try:
        text = data.decode(encoding, errors="replace")
    except LookupError:
        text = data.decode("utf-8", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", " ").removeprefix("\ufeff")


def project_root(path: str) -> str:
    """Return the topmost folder around *path* that still looks like part of the same project.

    Imports are looked up from there, so that checking one file finds what the file imports.
    """
    folder = os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path) or ".")
    best = folder
    current = folder
    for _ in range(12):
        if any(os.path.exists(os.path.join(current, marker)) for marker in PROJECT_MARKERS):
            best = current
            if os.path.exists(os.path.join(current, ".git")):
                break
        elif os.path.exists(os.path.join(current, "__init__.py")):
            best = os.path.dirname(current)
        parent = os.path.dirname(current)
        if parent == current:
            break
        current = parent
    return best
