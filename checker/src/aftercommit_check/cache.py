"""Results of earlier runs, kept by content: a file is checked again only if it, or what it leads to, has changed."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from aftercommit_check import __version__
from aftercommit_check.findings import Finding

FORMAT = f"1:{__version__}:{sys.version_info[0]}.{sys.version_info[1]}"
FOLDER = ".aftercommit_check_cache"


@dataclass(frozen=True, slots=True)
class Entry:
    """The result for one file.

    Attributes:
        findings: What was found.
        consulted: Every file that was read for it, with the hash of its content.
        pin: The FastAPI version that it was judged by.
        skipped: Why it could not be checked; empty if it could. Such entries are not kept.

    """

    findings: tuple[Finding, ...]
    consulted: dict[str, str]
    pin: str
    skipped: str


@dataclass(slots=True)
class Cache:
    """Everything known from earlier runs.

    Attributes:
        world: Hash of the list of files and of the wrappers among them.
        survey: By content: whether a file is worth a look, and the wrappers it defines.
        results: By path.

    """

    world: str = ""
    survey: dict[str, list[Any]] = field(default_factory=dict)
    results: dict[str, Entry] = field(default_factory=dict)
    surveyed: set[str] = field(default_factory=set)
    survey_before: frozenset[str] = frozenset()

    @classmethod
    def load(cls, folder: str | None) -> Cache:
        """Read the cache in *folder*; anything unreadable is an empty cache."""
        if folder is None:
            return cls()
        try:
            with open(os.path.join(folder, "results.json"), encoding="utf-8") as file:
                data = json.load(file)
            if data["format"] != FORMAT:
                return cls()
            names = data["names"]
            results = {
                path: Entry(
                    tuple(Finding.from_dict(found) for found in entry[0]),
                    {names[index]: content for index, content in entry[1]},
                    entry[2],
                    "",
                )
                for path, entry in data["results"].items()
            }
            survey = data["survey"]
            return cls(data["world"], survey, results, set(), frozenset(survey))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return cls()

    def keep(self, files: list[str]) -> None:
        """Forget what belongs to files that are gone."""
        present = set(files)
        self.results = {path: entry for path, entry in self.results.items() if path in present}
        self.survey = {content: known for content, known in self.survey.items() if content in self.surveyed}

    def save(self, folder: str | None) -> None:
        """Write the cache; a folder that cannot be written to is not worth an error."""
        if folder is None:
            return
        numbers: dict[str, int] = {}
        results = {
            path: [
                [found.to_dict() for found in entry.findings],
                [[numbers.setdefault(name, len(numbers)), content] for name, content in entry.consulted.items()],
                entry.pin,
            ]
            for path, entry in self.results.items()
        }
        data = {
            "format": FORMAT,
            "world": self.world,
            "survey": self.survey,
            "names": list(numbers),
            "results": results,
        }
        try:
            os.makedirs(folder, exist_ok=True)
            ignore = os.path.join(folder, ".gitignore")
            if not os.path.exists(ignore):
                with open(ignore, "w", encoding="utf-8") as file:
                    file.write("*\n")
            temporary = os.path.join(folder, f"results.{os.getpid()}.tmp")
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(data, file, separators=(",", ":"))
            os.replace(temporary, os.path.join(folder, "results.json"))
        except OSError:
            return
