"""The balance: what was acknowledged, against what is there."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from benchmarks.soak.books import OPEN, Books, Finding, label_of
from benchmarks.soak.kinds import KINDS
from benchmarks.soak.plans import PLANS, Plan

_ON_FAILURE = "on_failure raised"


def findings(books: Books) -> Iterator[Finding]:
    """Whatever does not balance."""
    yield from _requests(books)
    yield from _asked_for(books)
    yield from _records(books)
    yield from _children(books)
    yield from _counters(books)
    yield from _rows(books)


def _requests(books: Books) -> Iterator[Finding]:
    """Acknowledged and there, rolled back and not there, in doubt and either."""
    for label, noted in books.noted.items():
        is_there = label in books.asked
        if noted.outcome == "done" and not is_there:
            yield Finding("acknowledged, and its row is gone", label=label)
        if noted.outcome == "undone" and is_there:
            yield Finding("failed before its COMMIT, and its row is there", label=label)
    for label in books.asked.keys() - books.noted.keys():
        yield Finding("its row is there, and nobody asked for it", label=label)


def _asked_for(books: Books) -> Iterator[Finding]:
    """Each request that is there has all of its records, and one that is not there has none, and no effects."""
    wanted: dict[str, Counter[str]] = defaultdict(Counter)
    for label, (kind, shared) in books.asked.items():
        if shared is not None and shared in wanted:
            continue
        wanted[shared or label].update(KINDS[kind].records)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for record in books.records.values():
        label = label_of(record)
        if record["parent"] is None and record["key"] is None:
            found[label][record["task"]] += 1
    for label in wanted.keys() | found.keys():
        if wanted[label] != found[label]:
            yield Finding(f"wants the records {_all(wanted[label])}, and has {_all(found[label])}", label=label)
    for label in books.of_label.keys() - {label_of(each) for each in books.records.values()} - books.asked.keys():
        yield Finding("has effects, and there is no record and no request of it", label=label)


def _records(books: Books) -> Iterator[Finding]:
    """Each record has ended as its task must end, and has left exactly what this end leaves."""
    for id, record in books.records.items():
        kind = books.asked.get(label_of(record), ("", None))[0]
        plan = PLANS.get(record["task"])
        wrong = _wrong_end(record, plan, may_be_cancelled=kind in KINDS and KINDS[kind].may_be_cancelled)
        if wrong is None and plan is not None:
            left = +books.of_record.get(id, Counter())
            # Where on_failure itself failed, what it wrote was rolled back, and the record says so.
            is_excused = not left["on_failure"] and (plan.is_careless or _on_failure_failed(record))
            wrong = _wrong_effects(record["state"], plan, left, is_excused=is_excused)
        if wrong is not None:
            yield Finding(wrong, record=id)


def _wrong_end(record: dict[str, Any], plan: Plan | None, *, may_be_cancelled: bool) -> str | None:
    state = record["state"]
    if state in OPEN:
        return f"is still {state}"
    if state == "cancelled" and not may_be_cancelled:
        return "is cancelled, and nobody cancelled it"
    if state == "succeeded" and plan is not None and plan.fails:
        return "succeeded, and must fail"
    if state == "failed" and (plan is None or not (plan.fails or may_fail(record))):
        return "failed, and nothing in its own work did"
    return None


def _wrong_effects(state: str, plan: Plan, left: Counter[str], *, is_excused: bool) -> str | None:
    expected = Counter(plan.effects if state == "succeeded" else {})
    if state == "failed" and not is_excused:
        expected["on_failure"] = 1
    if plan.is_in_steps and state != "succeeded" and left <= expected + Counter(plan.effects):
        # What it had committed by then stays.
        return None if left["on_failure"] == expected["on_failure"] else "on_failure was not called"
    return None if left == +expected else f"ended {state} and left {_all(left)} instead of {_all(expected)}"


def _children(books: Books) -> Iterator[Finding]:
    """A run that succeeded has asked for what it asks for, once; others for nothing."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for record in books.records.values():
        if record["parent"] is not None:
            found[record["parent"].hex][record["task"]] += 1
    for id, record in books.records.items():
        asks = PLANS[record["task"]].asks if record["task"] in PLANS else {}
        expected = Counter(asks if record["state"] == "succeeded" else {})
        if found[id] != expected:
            yield Finding(f"asked for {_all(found[id])} instead of {_all(expected)}", record=id)


def _counters(books: Books) -> Iterator[Finding]:
    """A counter stands where its effects say."""
    counted = Counter(each.counter for each in books.effects if each.counter)
    for name, n in books.counted.items():
        if n != counted[name]:
            yield Finding(f"{name} stands at {n} after {counted[name]} effects")
    named: Counter[str] = Counter(each.label.rpartition("-")[0] for each in books.effects if each.name == "named")
    for name in books.named.keys() | named.keys():
        if books.named.get(name) != named[name]:
            yield Finding(f"the row named {name} stands at {books.named.get(name)} after {named[name]} effects")


def _rows(books: Books) -> Iterator[Finding]:
    """What keyed tasks, batches, repeatable tasks and second sessions were to do is done."""
    for row in books.key_rows:
        effects = books.of_label.get(row.label, Counter())["handled"]
        if row.handled != 1 or effects != 1:
            what = f"its row of key {row.key} was handled {row.handled} times, with {effects} effects"
            yield Finding(what, label=row.label)
    succeeded = {label_of(each): each for each in books.records.values() if each["state"] == "succeeded"}
    for item in books.items:
        expected = (0, 1) if item.number % 5 == 4 else (1, 0)
        is_right = (item.done, item.failed) == expected
        if not is_right and (item.label in succeeded or item.done > 1 or item.failed > 1):
            yield Finding(f"item {item.number}: done {item.done}, failed {item.failed}", label=item.label)
    for label, record in succeeded.items():
        if record["task"] == "twice" and books.statuses.get(label) != "whole":
            yield Finding("its status is not whole", record=record["id"].hex)
        if record["task"] == "second" and not books.loose[label]:
            yield Finding("what it wrote in a second session is not there", record=record["id"].hex)


def may_fail(record: dict[str, Any]) -> bool:
    """Whether one of the task's own statements was cancelled: that never passes by itself, and is its failure."""
    text = f"{record['error']} {record['traceback']}".partition(_ON_FAILURE)[0]
    return _is_cancelled(text) and any(each in text for each in ("soak/tasks.py", "soak/tables.py"))


def _on_failure_failed(record: dict[str, Any]) -> bool:
    """Whether a statement that the application's ``on_failure`` made was cancelled, and not one of ours."""
    text = str(record["traceback"]).partition(_ON_FAILURE)[2]
    return _is_cancelled(text) and "aftercommit_" not in text


def _is_cancelled(text: str) -> bool:
    return any(each in text for each in ("QueryCanceled", "57014", "canceling statement"))


def _all(counts: Any) -> str:
    return json.dumps({name: n for name, n in sorted(counts.items()) if n})
