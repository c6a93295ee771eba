"""What the checker has to say: findings, the steps that led there, and how sure it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Confidence(StrEnum):
    """How sure a finding is; ``low`` is shown only on request."""

    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"

    @property
    def rank(self) -> int:
        """Return 3 for high, 2 for medium, 1 for low, so that confidences compare."""
        return {"high": 3, "medium": 2, "low": 1}[self.value]


@dataclass(frozen=True, slots=True)
class Step:
    """One station on the way from where a session is born to where it is misused.

    Attributes:
        path: The file, relative to where the checker was started.
        line: The line, counted from 1.
        text: What happens there, in a few words.

    """

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace lines *first* to *last* (both included, counted from 1) by *lines*."""

    first: int
    last: int
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One misuse, at one call.

    Attributes:
        code: The rule, ``AC101`` and so on.
        category: ``C1`` to ``C8``, or ``own`` for rules about aftercommit itself.
        path: The file, relative to where the checker was started.
        line: First line of the call, counted from 1.
        column: First column of the call, counted from 1.
        end_line: Last line of the call.
        confidence: How sure the checker is.
        message: What is wrong, in one sentence.
        runtime: What happens at run time, by the FastAPI version that the project pins.
        steps: The way from the dependency to the call.
        plain: The corrected code in plain SQLAlchemy.
        aftercommit: The corrected code with aftercommit.
        edits: The certain correction, if there is one, for ``--fix``.

    """

    code: str
    category: str
    path: str
    line: int
    column: int
    end_line: int
    confidence: Confidence
    message: str
    runtime: str = ""
    steps: tuple[Step, ...] = ()
    plain: str = ""
    aftercommit: str = ""
    edits: tuple[Edit, ...] = field(default=(), compare=False)

    @property
    def sort_key(self) -> tuple[str, int, int, str]:
        """Return what findings are ordered by: place first, then code."""
        return (self.path, self.line, self.column, self.code)

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain data, for JSON and for the cache."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Finding:
        """Rebuild a finding from ``to_dict``."""
        rest = {key: value for key, value in data.items() if key not in {"steps", "edits", "confidence"}}
        return cls(
            **rest,
            confidence=Confidence(data["confidence"]),
            steps=tuple(Step(**step) for step in data["steps"]),
            edits=tuple(Edit(edit["first"], edit["last"], tuple(edit["lines"])) for edit in data["edits"]),
        )
