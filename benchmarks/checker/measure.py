"""Print recall and precision of ``aftercommit-check`` per rule, on labelled places in real repositories.

    python benchmarks/checker/measure.py LABELS SNAPSHOTS [--hold-out FILE]

``LABELS`` holds one JSON object a line: ``repo``, ``commit``, ``path``, ``line``, ``category``, ``label`` (``bug`` or
``ok``). ``SNAPSHOTS`` holds the checked-out trees as ``<owner>+<name>/<commit>/``. Every tree is checked as a whole,
without a cache. A labelled place counts as found if a finding of its category of at least medium confidence stands
on its line. ``--hold-out`` names a JSON list of repositories that were not looked at during development; they get a
table of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from aftercommit_check.runner import Settings, run
from aftercommit_check.sources.files import find_sources

GROUPS = {"C1+C2": ("C1", "C2"), "C3..C5": ("C3", "C4", "C5")}


def main() -> int:
    """Check the snapshots and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("snapshots", type=Path)
    parser.add_argument("--hold-out", type=Path)
    options = parser.parse_args()
    places = [json.loads(line) for line in options.labels.read_text(encoding="utf-8").splitlines() if line.strip()]
    held = set(json.loads(options.hold_out.read_text(encoding="utf-8"))) if options.hold_out else set()
    by_tree: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for place in places:
        by_tree[place["repo"], place["commit"]].append(place)
    counts: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    lines = 0
    missing = 0
    began = time.perf_counter()
    for (repo, commit), labelled in sorted(by_tree.items()):
        tree = options.snapshots / repo.replace("/", "+") / commit
        if not tree.is_dir():
            missing += 1
            continue
        lines += sum(Path(path).read_bytes().count(b"\n") for path in find_sources([str(tree)]))
        report = run([str(tree)], Settings(base=str(tree)))
        found = {
            (finding.path, finding.line, finding.category) for finding in report.findings if finding.confidence != "low"
        }
        for place in labelled:
            hit = (place["path"], place["line"], place["category"]) in found
            outcome = {("bug", True): "tp", ("bug", False): "fn", ("ok", True): "fp", ("ok", False): "tn"}
            counts[repo][place["category"], outcome[place["label"], hit]] += 1
            if hit != (place["label"] == "bug"):
                sys.stderr.write(
                    f"{'missed' if not hit else 'cried wolf'}: {repo} {commit[:7]} "
                    f"{place['path']}:{place['line']} {place['category']}\n"
                )
    seconds = time.perf_counter() - began
    developed = {repo: found for repo, found in counts.items() if repo not in held}
    table("repositories used during development" if held else "all repositories", developed)
    if held:
        table("repositories held back", {repo: found for repo, found in counts.items() if repo in held})
    print(f"\n{lines:,} lines in {seconds:.1f} s, cold: {lines / seconds:,.0f} lines/s; {missing} snapshots missing")
    return 0


def table(title: str, counts: dict[str, Counter[tuple[str, str]]]) -> None:
    """Print recall and precision per category and per group, in total and averaged per repository."""
    print(f"\n{title} ({len(counts)})\n")
    print("| rules | found | missed | false | quiet | recall | precision | recall per repo | precision per repo |")
    print("|---|---|---|---|---|---|---|---|---|")
    categories = sorted({category for found in counts.values() for category, _ in found})
    for name, members in [*((category, (category,)) for category in categories), *GROUPS.items()]:
        total = {
            key: sum(found[category, key] for found in counts.values() for category in members)
            for key in ("tp", "fn", "fp", "tn")
        }
        per_repo = [
            {key: sum(found[category, key] for category in members) for key in ("tp", "fn", "fp")}
            for found in counts.values()
        ]
        recalls = [one["tp"] / (one["tp"] + one["fn"]) for one in per_repo if one["tp"] + one["fn"]]
        precisions = [one["tp"] / (one["tp"] + one["fp"]) for one in per_repo if one["tp"] + one["fp"]]
        print(
            f"| {name} | {total['tp']} | {total['fn']} | {total['fp']} | {total['tn']} "
            f"| {share(total['tp'], total['fn'])} | {share(total['tp'], total['fp'])} "
            f"| {mean(recalls)} | {mean(precisions)} |"
        )


def share(part: int, rest: int) -> str:
    """Return a percentage, or a dash where there is nothing to share."""
    return f"{100 * part / (part + rest):.0f} %" if part + rest else "–"


def mean(values: list[float]) -> str:
    """Return the mean as a percentage."""
    return f"{100 * sum(values) / len(values):.0f} %" if values else "–"


if __name__ == "__main__":
    sys.exit(main())
