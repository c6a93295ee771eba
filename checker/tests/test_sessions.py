"""AC104 and AC106 to AC108: how sessions are closed, rolled back, committed and held."""

from __future__ import annotations

import pytest

HEAD = """
import contextlib, requests, threading
from fastapi import BackgroundTasks, Depends
from sqlalchemy.orm import Session
from app.database import AsyncSessionLocal, SessionLocal, User, get_async_db, get_db

def done(s): s.close()
def mail(n): ...
def committing():
    with SessionLocal() as session:
        yield session
        session.commit()
"""

CASES = {
    "AC104 never": (
        "def f():\n    db = SessionLocal()\n    db.get(User, 1)",
        "def f():\n    with SessionLocal() as db:\n        db.get(User, 1)",
    ),
    "AC104 on success only": (
        "def f():\n    db = SessionLocal()\n    db.get(User, 1)\n    db.close()",
        "def f():\n    db = SessionLocal()\n    try:\n        db.get(User, 1)\n    finally:\n        db.close()",
    ),
    "AC104 next of a dependency": (
        "def f():\n    db = next(get_db())\n    db.get(User, 1)",
        "def f():\n    db = next(get_db())\n    try:\n        db.get(User, 1)\n    finally:\n        db.close()",
    ),
    "AC104 swallowed": (
        "def f():\n    try:\n        db = SessionLocal()\n        db.get(User, 1)\n        db.close()\n    except Exception:\n        print(1)",
        "def f():\n    db = SessionLocal()\n    try:\n        db.get(User, 1)\n        db.close()\n    except Exception:\n        db.close()",
    ),
    "AC104 closed by a helper": (
        "def f():\n    db = SessionLocal()\n    mail(db)",
        "def f():\n    db = SessionLocal()\n    try:\n        db.get(User, 1)\n    finally:\n        done(db)",
    ),
    "AC104 given away": (
        "def f():\n    SessionLocal().query(User).all()",
        "def f():\n    db = SessionLocal()\n    return db",
    ),
    "AC104 closing": (
        "async def f():\n    db = AsyncSessionLocal()\n    await db.get(User, 1)",
        "def f():\n    with contextlib.closing(SessionLocal()) as db:\n        db.get(User, 1)",
    ),
    "AC104 with next": (
        "async def f():\n    db = await anext(get_async_db())\n    await db.get(User, 1)",
        "def f():\n    with next(get_db()) as db:\n        db.get(User, 1)",
    ),
    "AC104 explicit exit": (
        "def f():\n    db = SessionLocal()\n    db.commit()\n    if db.info:\n        db.close()",
        "async def f():\n    db = AsyncSessionLocal()\n    s = await db.__aenter__()\n    try:\n        await s.commit()\n"
        "    finally:\n        await db.__aexit__(None, None, None)",
    ),
    "AC104 made by a helper": (
        "def make():\n    s = SessionLocal()\n    return s\ndef f():\n    db = make()\n    db.get(User, 1)",
        "class Keeper:\n    def get(self):\n        if self.s is None:\n            self.s = SessionLocal()\n        return self.s\n"
        "def make():\n    return Keeper().get()\ndef f():\n    db = make()\n    db.get(User, 1)",
    ),
    "AC106 goes on in the handler": (
        "def f(db: Session, u: User):\n    try:\n        db.commit()\n    except Exception:\n        u.email = ''\n        db.commit()",
        "def f(db: Session, u: User):\n    try:\n        db.commit()\n    except Exception:\n        db.rollback()\n        u.email = ''\n        db.commit()",
    ),
    "AC106 goes on in the loop": (
        "def f(db: Session, us):\n    for u in us:\n        try:\n            db.add(u)\n            db.commit()\n        except Exception:\n            print(1)",
        "def f(db: Session, us):\n    for u in us:\n        try:\n            db.add(u)\n            db.commit()\n        except Exception:\n            db.rollback()",
    ),
    "AC107 dependency commits": (
        "def f(bg: BackgroundTasks, db: Session = Depends(committing)):\n    u = User()\n    db.add(u)\n    db.flush()\n    bg.add_task(mail, u.id)",
        "def f(bg: BackgroundTasks, db: Session = Depends(committing)):\n    u = User()\n    db.add(u)\n    db.commit()\n    bg.add_task(mail, u.id)",
    ),
    "AC107 thread before the commit": (
        "def f(db: Session):\n    u = User()\n    db.add(u)\n    threading.Thread(target=mail, args=(u.id,)).start()\n    db.commit()",
        "def f(db: Session):\n    u = User()\n    db.add(u)\n    db.commit()\n    threading.Thread(target=mail, args=(u.id,)).start()",
    ),
    "AC108 network": (
        "def f():\n    with SessionLocal() as db:\n        u = db.get(User, 1)\n        requests.post('x')\n        db.commit()",
        "def f():\n    with SessionLocal() as db:\n        u = db.get(User, 1)\n        db.commit()\n        requests.post('x')",
    ),
}


@pytest.mark.parametrize(
    ("code", "bad", "good"), [pytest.param(name.partition(" ")[0], *pair, id=name) for name, pair in CASES.items()]
)
def test_variation_and_its_twin(check, code, bad, good):
    """The misuse is found, its twin is left alone."""
    found = check(HEAD + bad)
    fine = check(HEAD + good)

    assert code in {finding.code for finding in found if finding.path.endswith("main.py")}
    assert [finding.message for finding in fine if finding.code == code] == []
