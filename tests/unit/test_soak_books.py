"""The soak's own eyes: the wire that it reads, the ledgers, and each thing that its books must not let pass."""

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from benchmarks.soak import ledger
from benchmarks.soak.balance import findings
from benchmarks.soak.books import Books
from benchmarks.soak.ledger import Ledger, Noted
from benchmarks.soak.wire import FromClient, FromServer

ONE, TWO = UUID(int=1), UUID(int=2)


def message(kind: bytes, body: bytes) -> bytes:
    """One message of the protocol."""
    return kind + (len(body) + 4).to_bytes(4) + body


STARTUP = (16).to_bytes(4) + (196608).to_bytes(4) + b"user\0me\0"
SSL = (8).to_bytes(4) + (80877103).to_bytes(4)


@pytest.mark.parametrize(
    "stream",
    [
        [message(b"Q", b"SELECT 1\0"), message(b"Q", b"COMMIT\0")],
        [message(b"P", b"\0commit\0\0\0"), message(b"B", b"\0\0\0\0\0\0\0\0")],
        [message(b"P", b"s1\0COMMIT;\0\0\0"), message(b"S", b""), message(b"B", b"p\0s1\0\0\0\0\0\0\0")],
    ],
    ids=["simple", "extended", "prepared"],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_commit_is_seen_on_its_way(stream: list[bytes], size: int):
    """However the bytes are cut, only the message that commits is marked, and nothing is lost or moved."""
    frames, sent = FromClient(), SSL + STARTUP + b"".join(stream) + message(b"X", b"")

    pieces = [piece for at in range(0, len(sent), size) for piece in frames.cut(sent[at : at + size])]

    assert b"".join(piece for piece, _ in pieces) == sent
    assert [piece for piece, is_commit in pieces if is_commit] == [stream[-1]]


@pytest.mark.parametrize("size", [1, 10_000])
def test_an_acknowledgement_is_seen(size: int):
    """After the bare byte that refuses encryption, the server's answers are read in whole messages."""
    client = FromClient()
    list(client.cut(SSL + STARTUP))
    answer = message(b"C", b"COMMIT\0")
    sent = b"N" + message(b"R", bytes(4)) + message(b"C", b"SELECT 1\0") + answer + message(b"Z", b"I")
    frames = FromServer(client)

    pieces = [piece for at in range(0, len(sent), size) for piece in frames.cut(sent[at : at + size])]

    assert b"".join(piece for piece, _ in pieces) == sent
    assert [piece for piece, is_commit in pieces if is_commit] == [answer]


def test_a_ledger_outlives_a_kill(tmp_path: Path):
    """A request without an outcome is in doubt, and a torn last line says nothing."""
    book = Ledger(tmp_path / "0.1.ledger")
    for label in ("a", "b", "c"):
        book.begin(label, "count")
    book.end("a", "done")
    book.end("b", "undone", ValueError("no"))
    with (tmp_path / "0.1.ledger").open("a") as file:
        file.write(json.dumps({"label": "c", "outcome": "done"})[:-5])

    found = ledger.read(tmp_path)

    assert {label: each.outcome for label, each in found.items()} == {"a": "done", "b": "undone", "c": "doubt"}


def record(id: UUID, task: str, state: str = "succeeded", **more: Any) -> dict[str, Any]:
    """A record, as the books read it."""
    given = {"id": id, "task": task, "state": state, "key": None, "parent": None, "arguments": {"label": "x-0.1"},
             "error": None, "traceback": None, "enqueued_at": datetime.now(UTC), "finished_at": None}  # fmt: skip
    return {**given, **more}


def line(id: UUID, name: str, **more: Any) -> Any:
    """One effect."""
    return SimpleNamespace(**{"id": 1, "record": id.hex, "label": "x-0.1", "name": name, "counter": None, **more})


def books(kind: str, records: list[dict[str, Any]], effects: list[Any], **more: Any) -> Books:
    """Books of one request."""
    of_record, of_label = {}, {}
    for each in effects:
        of_record.setdefault(each.record, Counter())[each.name] += 1
        of_label.setdefault(each.label, Counter())[each.name] += 1
    given: dict[str, Any] = {
        "noted": {"x-0.1": Noted(kind, "done", 0.0)}, "asked": {"x-0.1": (kind, None)}, "counted": {}, "named": {},
        "key_rows": [], "items": [], "statuses": {}, "loose": Counter(),
    }  # fmt: skip
    return Books(
        **{**given, **more},
        records={each["id"].hex: each for each in records},
        effects=effects,
        of_record=of_record,
        of_label=of_label,
    )


def whole(**more: Any) -> Books:
    """Books of one task that is done."""
    return books("count", [record(ONE, "count")], [line(ONE, "count", counter="c")], **{"counted": {"c": 1}, **more})


FAILED = record(ONE, "doomed", "failed")
KEY_ROW = SimpleNamespace(label="x-0.1", key="k", handled=1)
BALANCED: dict[str, Callable[[], Books]] = {
    "a task that is done": whole,
    "a doubt that came true": lambda: whole(noted={"x-0.1": Noted("count", "doubt", 0.0)}),
    "a doubt that did not": lambda: books("count", [], [], asked={}, noted={"x-0.1": Noted("count", "doubt", 0.0)}),
    "a failure": lambda: books("doomed", [FAILED], [line(ONE, "on_failure")]),
}
WRONG: dict[str, tuple[Callable[[], Books], str]] = {
    "lost": (lambda: books("count", [], []), "wants the records"),
    "twice": (
        lambda: books("count", [record(ONE, "count")], [line(ONE, "count"), line(ONE, "count")]), "instead of",
    ),
    "done without an effect": (lambda: books("count", [record(ONE, "count")], []), "instead of"),
    "acknowledged and gone": (lambda: whole(asked={}), "its row is gone"),
    "rolled back and there": (lambda: whole(noted={"x-0.1": Noted("count", "undone", 0.0)}), "its row is there"),
    "never ended": (lambda: books("count", [record(ONE, "count", "running")], []), "is still running"),
    "effects of a failure": (
        lambda: books("doomed", [FAILED], [line(ONE, "doomed"), line(ONE, "on_failure")]), "instead of",
    ),
    "on_failure not called": (lambda: books("doomed", [FAILED], []), "instead of"),
    "on_failure twice": (lambda: books("doomed", [FAILED], [line(ONE, "on_failure")] * 2), "instead of"),
    "failed for no reason of its own": (
        lambda: books("count", [record(ONE, "count", "failed", error="QueryCanceled")], [line(ONE, "on_failure")]),
        "nothing in its own work did",
    ),
    "an update that was lost": (lambda: whole(counted={"c": 0}), "stands at 0 after 1"),
    "a row that no run saw": (
        lambda: books("key", [], [], key_rows=[SimpleNamespace(label="x-0.1", key="k", handled=0)]), "handled 0 times",
    ),
    "a row handled twice": (
        lambda: books("key", [], [line(ONE, "handled"), line(ONE, "handled")], key_rows=[KEY_ROW]), "with 2 effects",
    ),
    "a child too many": (
        lambda: books(
            "count", [record(ONE, "count"), record(TWO, "count", parent=ONE)], [line(ONE, "count"), line(TWO, "count")]
        ),
        "asked for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BALANCED)
def test_what_is_right_balances(case: str):
    """Nothing is found where nothing is wrong."""
    found = list(findings(BALANCED[case]()))

    assert found == []


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(case: str):
    """Each way of being wrong is a finding that says so."""
    make, expected = WRONG[case]

    found = [each.what for each in findings(make())]

    assert any(expected in what for what in found), found
