"""Everything that was noted and written, read once, after the end."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from aftercommit import TaskRecord
from benchmarks.soak import ledger, tables
from benchmarks.soak.ledger import Noted

_COLUMNS = (
    *("id", "task", "pool", "state", "key", "attempt", "max_attempts", "claims", "enqueued_at", "run_at", "started_at"),
    *("finished_at", "worker", "parent", "arguments", "checkpoint", "error", "traceback"),
)
OPEN = ("queued", "running")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be.

    Attributes:
        what: In one line.
        record: The record that it is about, if it is about one.
        label: Of the request that it is about, if it is about one.
    """

    what: str
    record: str | None = None
    label: str | None = None


@dataclass(slots=True)
class Books:
    """Everything that was noted, read once, after the end.

    Attributes:
        noted: The ledgers, by label.
        asked: The rows that requests committed, by label: kind and shared label.
        records: All records, by id as hex.
        effects: All effects.
    """

    noted: dict[str, Noted]
    asked: dict[str, tuple[str, str | None]]
    records: dict[str, dict[str, Any]]
    effects: list[Any]
    counted: dict[str, int]
    named: dict[str, int]
    key_rows: list[Any]
    items: list[Any]
    statuses: dict[str, str]
    loose: Counter[str]
    of_record: dict[str, Counter[str]] = field(default_factory=dict)
    of_label: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, engine: sa.Engine, directory: Path) -> "Books":
        """Read them."""
        columns = [getattr(TaskRecord, each) for each in _COLUMNS]
        with engine.connect() as connection:

            def rows(*what: Any) -> list[Any]:
                return list(connection.execute(sa.select(*what)).all())

            records = [dict(zip(_COLUMNS, each, strict=True)) for each in rows(*columns)]
            books = cls(
                noted=ledger.read(directory),
                asked={row.label: (row.kind, row.shared) for row in rows(*tables.Asked.__table__.c)},
                records={each["id"].hex: each for each in records},
                effects=rows(*tables.Effect.__table__.c),
                counted={row.name: row.n for row in rows(*tables.Counter.__table__.c)},
                named={row.name: row.n for row in rows(*tables.Named.__table__.c)},
                key_rows=rows(*tables.KeyRow.__table__.c),
                items=rows(*tables.Item.__table__.c),
                statuses={row.label: row.value for row in rows(*tables.Status.__table__.c)},
                loose=Counter(row.label for row in rows(tables.Loose.label)),
            )
        of_record: dict[str, Counter[str]] = defaultdict(Counter)
        of_label: dict[str, Counter[str]] = defaultdict(Counter)
        for each in books.effects:
            of_record[each.record][each.name] += 1
            of_label[each.label][each.name] += 1
        books.of_record, books.of_label = of_record, of_label
        return books

    def history(self, finding: Finding, diary: Iterable[tuple[float, str]]) -> str:
        """All that is known of what a finding is about."""
        lines = []
        record = self.records.get(finding.record or "")
        label = finding.label or (None if record is None else label_of(record))
        if label is not None and label in self.noted:
            lines.append(f"asked: {self.noted[label]}")
        mine = [record] if record else [each for each in self.records.values() if label and label_of(each) == label]
        for each in mine[:4]:
            lines += [f"record {name}: {_shown(each[name])}" for name in _COLUMNS if each[name] is not None]
            lines += [f"effect {row.id}: {row.name} {row.label} attempt {row.attempt}" for row in self.effects
                      if row.record == each["id"].hex][:20]  # fmt: skip
        begun = _epoch(mine[0]["enqueued_at"]) if mine else self.noted[label].began if label in self.noted else None
        if begun is not None:
            ended = _epoch(mine[0]["finished_at"]) if mine else None
            until = (ended or begun) + 5.0
            near = [f"{at - begun:+.1f} s {name}" for at, name in diary if begun - 3.0 <= at <= until]
            lines.append(f"faults meanwhile: {', '.join(near[:60]) or 'none'}")
        return "\n".join(f"    {part}" for line in lines for part in line.splitlines())


def label_of(record: dict[str, Any]) -> str:
    """The label that a record carries."""
    arguments = record["arguments"] or {}
    argument = arguments.get("label", arguments.get("event"))
    return str(argument.get("label") if isinstance(argument, dict) else argument)


def _shown(value: Any) -> str:
    """The end of a long text says most."""
    text = str(value)
    return text if len(text) < 700 else f"… {text[-700:]}"


def _epoch(moment: datetime | None) -> float | None:
    return None if moment is None else moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
