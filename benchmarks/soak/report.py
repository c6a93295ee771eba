"""What is printed at the end of a soak."""

import re
from collections import Counter
from dataclasses import dataclass

from benchmarks.soak.balance import may_fail
from benchmarks.soak.books import Books, Finding
from benchmarks.soak.stage import Stage

_SHOWN = 8
_KINDS = 40


@dataclass(frozen=True, slots=True)
class Found:
    """What came out.

    Attributes:
        findings: What must not be.
        books: The books.
        seconds: For how long the application worked.
        quiet_after: How many seconds after the last fault everything had ended; None if not within a minute.
    """

    findings: list[Finding]
    books: Books
    seconds: float
    quiet_after: float | None


def report(driver: str, stage: Stage, found: Found) -> None:
    """Print it: faults by kind, work by kind, findings with their histories, and one line as a summary."""
    books, findings = found.books, found.findings
    outcomes = Counter(each.outcome for each in books.noted.values())
    states = Counter(each["state"] for each in books.records.values())
    cancelled = sum(each["state"] == "failed" and may_fail(each) for each in books.records.values())
    print(f"  faults: {_list(stage.done) or 'none'}")
    print(f"  requests: {_list(Counter(kind for kind, _ in books.asked.values()))}")
    print(
        f"  asked {len(books.noted)}: acknowledged {outcomes['done']}, failed before COMMIT {outcomes['undone']}, "
        f"in doubt {outcomes['doubt']}; {len(books.effects)} effects; {_list(states)} "
        f"({cancelled} by a cancelled statement of their own); {len(books.records) / found.seconds:.0f} tasks/s"
    )
    for finding in findings[:_SHOWN]:
        print(f"  FINDING {finding.record or finding.label or ''}: {finding.what}")
        print(books.history(finding, stage.diary))
    if findings:
        for what, n in Counter(_kind_of(each, books) for each in findings).most_common(_KINDS):
            print(f"  {n} × {what}")
        print(f"  ledgers and logs: {stage.directory}")
    strikes = sum(n for name, n in stage.done.items() if not name.startswith("("))
    ended = "NOT all ended in a minute" if found.quiet_after is None else f"all ended in {found.quiet_after:.1f} s"
    verdict = f"{len(findings)} FINDINGS" if findings else "the books balance"
    print(f"{driver}: {strikes} faults, {len(books.records)} tasks, {ended}: {verdict}", flush=True)


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))


def _kind_of(finding: Finding, books: Books) -> str:
    record = books.records.get(finding.record or "")
    noted = books.noted.get(finding.label or "")
    where = record["task"] if record else noted.kind if noted else "all"
    # What differs from one to the next is left out.
    what = re.sub(r" of key \S+|\d+\.\d+ s|: [A-Z]{4,} .*", "", finding.what)
    return f"{where}: {what}"
