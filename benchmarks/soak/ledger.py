"""What the server acknowledged, written down by each asker outside the database, and read again for the balance."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["done", "undone", "doubt"]


class Ledger:
    """A file of one process. What is told to an asker is on the disk before it goes on.

    Args:
        path: Of the file; it is made.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def begin(self, label: str, kind: str) -> None:
        """Note that a request begins: without an outcome it stays in doubt."""
        self._write({"label": label, "kind": kind})

    def end(self, label: str, outcome: Outcome, error: BaseException | None = None) -> None:
        """Note what became of it."""
        why = None if error is None else f"{type(error).__name__}: {str(error)[:200]}"
        self._write({"label": label, "outcome": outcome, "why": why})
        os.fsync(self._file)

    def _write(self, entry: dict[str, object]) -> None:
        # One write, so that what several threads note is not mixed up.
        os.write(self._file, (json.dumps({"at": round(time.time(), 3), **entry}) + "\n").encode())


@dataclass(slots=True)
class Noted:
    """What the ledgers say of one request.

    Attributes:
        kind: What it asked for.
        outcome: What became of it.
        began: When, seconds since the epoch.
        why: The error, if it had one.
    """

    kind: str
    outcome: Outcome
    began: float
    why: str | None = None


def read(directory: Path) -> dict[str, Noted]:
    """Read all ledgers of *directory*; a line that a kill has torn says nothing."""
    found: dict[str, Noted] = {}
    for path in sorted(directory.glob("*.ledger")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if "kind" in entry:
                found[entry["label"]] = Noted(entry["kind"], "doubt", entry["at"])
            elif entry["label"] in found:
                found[entry["label"]].outcome = entry["outcome"]
                found[entry["label"]].why = entry["why"]
    return found
