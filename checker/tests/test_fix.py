"""What ``--fix`` makes of a function loses no row that was kept before, and none that the function reports as kept."""

from __future__ import annotations

import itertools
import textwrap

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session, sessionmaker

from aftercommit_check.fix import corrected
from aftercommit_check.runner import Settings, run

MODELS = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Row(Base):
    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str] = mapped_column(default="")

    def annotate(self) -> None:
        self.note = "annotated"

def keep(db, id):
    db.add(Row(id=id))
"""
HEAD = """
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from models import Row, keep

SessionLocal = sessionmaker(create_engine("sqlite://"))

"""
OPENED = {
    "by with": ("def f(numbers):", "with SessionLocal() as db:"),
    "by assignment": ("def f(numbers):", "db = SessionLocal()\nif True:"),
    "by the caller": ("def f(numbers, db: Session):", "if True:"),
}
BEFORE = {
    "nothing": "pass",
    "a row": "db.add(Row(id=100))",
    "a committed row": "db.add(Row(id=100))\ndb.commit()",
    "a row of a helper's": "keep(db, 100)",
    "a row committed perhaps": "db.add(Row(id=100))\nif len(numbers) > 3:\n    db.commit()",
    "a changed row": "mark = db.get(Row, 50)\nmark.note = 'changed'",
    "a row that changes itself": "mark = db.get(Row, 50)\nmark.annotate()",
}
ROUND = {
    "commit": "row = Row(id=number)\ndb.add(row)\ndb.commit()\nkept.append(number)",
    "flush": "db.add(Row(id=number))\ndb.flush()\nkept.append(number)",
    "only add": "db.add(Row(id=number))\nkept.append(number)",
    "commit now and then": "db.add(Row(id=number))\nif number % 2:\n    db.commit()\nelse:\n    db.flush()\nkept.append(number)",
    "work behind the commit": "db.add(Row(id=number))\ndb.commit()\ndb.add(Row(id=number + 200))\nkept.append(number)",
    "a savepoint": "with db.begin_nested():\n    db.add(Row(id=number))\nkept.append(number)",
}
HANDLER = {
    "note": "failed.append(number)",
    "write": "db.add(Row(id=number + 300))\ndb.commit()\nkept.append(number + 300)",
    "write and leave": "db.add(Row(id=number + 300))\ndb.commit()\nkept.append(number + 300)\nreturn kept",
    "write for later": "db.add(Row(id=number + 300))\nkept.append(number + 300)",
    "use what was made": "row.note = 'failed'\ndb.commit()\nkept.append(-1)",
}
ROUNDS = ("for number in numbers:", "number = numbers[-1]\nif True:")
BESIDE = {"nothing": "pass", "a row": "db.add(Row(id=number + 400))\nkept.append(number + 400)"}
BEHIND = {"commit": "db.commit()", "nothing": "pass"}


def nested(indent: int, text: str) -> str:
    """Return *text*, indented."""
    return textwrap.indent(text, "    " * indent)


def shapes():
    """Yield programs."""
    for opened, before, body, handler, rounds, beside, behind in itertools.product(
        OPENED.values(), BEFORE.values(), ROUND.values(), HANDLER.values(), ROUNDS, BESIDE.values(), BEHIND.values()
    ):
        if "row." in handler and "row =" not in body:
            continue
        signature, block = opened
        yield HEAD + "\n".join(
            (
                signature, nested(1, "kept = []\nfailed = []"), nested(1, block), nested(2, before), nested(2, rounds),
                nested(3, "try:"), nested(4, body), nested(3, "except Exception:"), nested(4, handler), nested(3, beside),
                nested(2, behind), nested(1, "return kept"), "",
            )
        )  # fmt: skip


def outcome(source: str, numbers: list[int], models) -> tuple[bool, set[int], dict[int, str]]:
    """Return whether *source* ends well, what it reports as kept, and the rows that are there afterwards."""
    engine = create_engine("sqlite://")
    models["Base"].metadata.create_all(engine)
    with Session(engine) as session:
        session.add(models["Row"](id=50))
        session.commit()
    made = sessionmaker(engine)
    scope: dict = {**models, "__name__": "program"}
    exec(compile(source.replace("from models import Row, keep", ""), "program.py", "exec", dont_inherit=True), scope)
    scope["SessionLocal"] = made
    kept: set[int] = set()
    quiet = True
    try:
        if "db: Session" in source:
            with made() as db:
                db.add(models["Row"](id=500))
                kept = set(scope["f"](numbers, db))
                db.commit()
        else:
            kept = set(scope["f"](numbers))
    except Exception:  # noqa: BLE001  # whatever it is, the program was loud
        quiet = False
    with Session(engine) as session:
        rows = dict(session.execute(select(models["Row"].id, models["Row"].note)).all())
    engine.dispose()
    return quiet, kept, rows


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning", "ignore::ResourceWarning")
def test_no_row_is_lost_by_a_correction(tmp_path):
    """Each corrected program keeps what it kept, what it reports, and what it keeps where nothing fails."""
    (tmp_path / "models.py").write_text(MODELS)
    sources = list(shapes())
    for place, source in enumerate(sources):
        (tmp_path / f"program_{place}.py").write_text(source)
    models: dict = {"__name__": "models"}
    exec(compile(MODELS, "models.py", "exec", dont_inherit=True), models)
    fixed = {}
    for finding in run([str(tmp_path)], Settings(base=str(tmp_path), jobs=1)).findings:
        if finding.code == "AC106" and finding.edits:
            place = int(finding.path.removeprefix("program_").removesuffix(".py"))
            fixed[place] = corrected(sources[place], list(finding.edits))

    lost = []
    for place, new in fixed.items():
        for numbers in ([1, 2, 50, 3], [50, 1], [1, 50], [50, 50], [1, 2, 3, 4, 50]):
            well = [number for number in numbers if number != 50] or [1]
            _, kept_when_well, rows_when_well = outcome(sources[place], well, models)
            _, _, rows_before = outcome(sources[place], numbers, models)
            quiet, kept, rows = outcome(new, numbers, models)
            promised = {*rows_before.items()}
            if quiet:
                promised |= {(number, note) for number, note in rows_when_well.items() if 50 <= number < 200}
                if kept_when_well <= rows_when_well.keys():
                    promised |= {(number, "") for number in kept}
            if not promised <= {*rows.items()}:
                lost.append((numbers, sorted(promised - {*rows.items()}), new))

    # A row that the rollback undid can be written to, and that goes nowhere: the program says -1 when it has done so.
    assert not lost, f"{len(lost)} programs lose rows: {lost[0][:2]}\n{lost[0][2]}"
    assert len(fixed) >= 20
    assert len(sources) > 2000
