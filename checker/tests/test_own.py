"""AC109 to AC113: rules for users of aftercommit, and sessions that live too long."""

from __future__ import annotations

import pytest

HEAD = """
from contextvars import ContextVar
from fastapi import Depends, FastAPI, UploadFile
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from aftercommit import Database
from aftercommit.fastapi import AfterCommitDep, SessionDep
from app.database import SessionLocal, User, get_db

db = Database("sqlite:///x.db")
app = FastAPI()
current = ContextVar("current")

@db.task
def send(session: Session, user: User, subject: str = "") -> None: ...
@db.task
def count(session: Session, n: int) -> None: ...
"""

CASES = {
    "AC109 session": (
        "def f(after_commit: AfterCommitDep, session: Session): after_commit(count, session)",
        "def f(after_commit: AfterCommitDep, session: Session): after_commit(count, 1)",
    ),
    "AC109 upload": (
        "def f(after_commit: AfterCommitDep, file: UploadFile): after_commit(count, file)",
        "def f(after_commit: AfterCommitDep, file: UploadFile): after_commit(count, file.size)",
    ),
    "AC109 row": (
        "def f(after_commit: AfterCommitDep, user: User): after_commit(count, user)",
        "def f(after_commit: AfterCommitDep, user: User): after_commit(send, user)",
    ),
    "AC110": (
        "def f(session: Session):\n    session.commit()\n    db.after_commit(session, count, 1)",
        "def f(session: Session):\n    db.after_commit(session, count, 1)\n    session.commit()",
    ),
    "AC111 unannotated": (
        "@db.task\ndef t(session, n: int): ...",
        "@db.task\ndef t(session: Session, n: int): ...",
    ),
    "AC111 wrong kind": (
        "@db.task(pool='x')\nasync def t(session: Session, n: int): ...",
        "@db.task(pool='x')\nasync def t(session: AsyncSession, n: int): ...",
    ),
    "AC112 module": (
        "session = SessionLocal()",
        "Factory = SessionLocal",
    ),
    "AC112 global": (
        "def f():\n    global kept\n    kept = SessionLocal()",
        "def f():\n    with SessionLocal() as kept: kept.commit()",
    ),
    "AC112 context variable": (
        "def f(session: Session): current.set(session)",
        "def f(session: Session): current.set(1)",
    ),
    "AC113": (
        "def dep():\n    try:\n        yield 1\n    except Exception:\n        print(1)\n"
        'def f(d=Depends(dep, scope="function")): ...',
        "def dep():\n    try:\n        yield 1\n    except Exception:\n        raise\n"
        'def f(d=Depends(dep, scope="function")): ...',
    ),
}


@pytest.mark.parametrize(
    ("code", "bad", "good"), [pytest.param(name.partition(" ")[0], *pair, id=name) for name, pair in CASES.items()]
)
def test_variation_and_its_twin(check, code, bad, good):
    """The misuse is found, its twin is left alone."""
    found = check(HEAD + bad)
    fine = check(HEAD + good)

    assert code in {finding.code for finding in found}
    assert [finding.message for finding in fine if finding.code == code] == []
