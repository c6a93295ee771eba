"""AC101, AC102, AC105: each way in which a session, a row or a connection crosses, and its harmless twin."""

from __future__ import annotations

import textwrap

import pytest

HEAD = """
from typing import Annotated
import functools
from fastapi import BackgroundTasks, Depends, FastAPI
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse
from sqlalchemy import select
from sqlalchemy.orm import Session
from app.database import AsyncSession, Post, SessionLocal, User, get_async_db, get_db

app = FastAPI()

def work(db: Session, n: int): db.add(n)
def plain(n, m=None): print(n)
def close_it(session): session.close()
def bind_only(session): return Session(session.get_bind())
def query(conn): conn.execute('select 1')
def greet(user): print(user.email)
"""

SESSION = {
    "positional": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(work, db, 1)",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(plain, 1)",
    ),
    "keyword": (
        "def f(background_tasks: BackgroundTasks, db: Session = Depends(get_db)): background_tasks.add_task(work, n=1, db=db)",
        "def f(background_tasks: BackgroundTasks, db: Session = Depends(get_db)): background_tasks.add_task(plain, n=1, m=None)",
    ),
    "function by keyword": (
        "def f(tasks: BackgroundTasks, db: Session = Depends(get_db)): tasks.add_task(func=work, db=db, n=1)",
        "def f(tasks: BackgroundTasks, db: Session = Depends(get_db)): tasks.add_task(func=plain, n=1)",
    ),
    "annotated": (
        "def f(bg: BackgroundTasks, db: Annotated[Session, Depends(get_db)]): bg.add_task(work, db, 1)",
        "def f(bg: BackgroundTasks, db: Annotated[Session, Depends(get_db)]): bg.add_task(close_it, db)",
    ),
    "alias": (
        "Db = Annotated[Session, Depends(get_db)]\ndef f(bg: BackgroundTasks, db: Db): bg.add_task(work, db, 1)",
        "Db = Annotated[Session, Depends(get_db)]\ndef f(bg: BackgroundTasks, db: Db): bg.add_task(bind_only, db)",
    ),
    "unannotated": (
        "def f(bg: BackgroundTasks, db=Depends(get_db)): bg.add_task(work, db, 1)",
        "def f(bg: BackgroundTasks, db=Depends(get_db)): bg.add_task(plain, db.get(User, 1).id)",
    ),
    "helper's plain parameter": (
        "def f(bg: BackgroundTasks, session: Session): bg.add_task(work, session, 1)",
        "def f(bg: BackgroundTasks, session: dict): bg.add_task(plain, session, 1)",
    ),
    "untyped helper": (
        "def f(background_tasks, db):\n    db.query(User)\n    background_tasks.add_task(work, db, 1)",
        "def f(background_tasks, db):\n    db.find_one({})\n    background_tasks.add_task(plain, db, 1)",
    ),
    "sessionmaker under a session's name": (
        "def f(bg: BackgroundTasks):\n    db_session = SessionLocal()\n    bg.add_task(work, db_session, 1)",
        "def f(bg: BackgroundTasks):\n    db_session = SessionLocal\n    bg.add_task(plain, db_session, 1)",
    ),
    "lambda": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(lambda: work(db, 1))",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(lambda: plain(1))",
    ),
    "closure": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    def job(): db.commit()\n    bg.add_task(job)",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n"
        "    def job():\n        with SessionLocal() as db: db.commit()\n    bg.add_task(job)",
    ),
    "partial": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(functools.partial(work, db), 1)",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(functools.partial(plain, 2), 1)",
    ),
    "double star": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    kw = {'db': db, 'n': 1}\n    bg.add_task(work, **kw)",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    kw = {'n': 1}\n    bg.add_task(plain, **kw)",
    ),
    "star": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    args = (db, 1)\n    bg.add_task(work, *args)",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    args = (2, 1)\n    bg.add_task(plain, *args)",
    ),
    "background of a response": (
        "def f(db: Session = Depends(get_db)): return JSONResponse({}, background=BackgroundTask(work, db, 1))",
        "def f(db: Session = Depends(get_db)): return JSONResponse({}, background=BackgroundTask(plain, 1))",
    ),
    "self.background_tasks and self.db": (
        "class S:\n    def __init__(self, background_tasks: BackgroundTasks, db: Session):\n"
        "        self.background_tasks = background_tasks\n        self.db = db\n"
        "    def go(self): self.background_tasks.add_task(work, self.db, 1)",
        "class S:\n    def __init__(self, background_tasks: BackgroundTasks, db: Session):\n"
        "        self.background_tasks = background_tasks\n        self.db = db\n"
        "    def go(self): self.background_tasks.add_task(plain, 1)",
    ),
    "bound method": (
        "class S:\n    def __init__(self, db: Session): self.db = db\n    def run(self): self.db.commit()\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(S(db).run)",
        "class S:\n    def __init__(self, db: Session): self.db = db\n    def run(self): print(1)\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(S(db).run)",
    ),
    "session several attributes deep": (
        "class R:\n    def __init__(self, s: Session): self.s = s\n    def save(self): self.s.commit()\n"
        "class S:\n    def __init__(self, r: R): self.r = r\n    def run(self): self.r.save()\n"
        "def make(db: Session = Depends(get_db)): return S(R(db))\n"
        "def f(bg: BackgroundTasks, s: S = Depends(make)): bg.add_task(s.run)",
        "class R:\n    def __init__(self, s: Session): self.s = s\n    def name(self): return 'r'\n"
        "class S:\n    def __init__(self, r: R): self.r = r\n    def run(self): self.r.name()\n"
        "def make(db: Session = Depends(get_db)): return S(R(db))\n"
        "def f(bg: BackgroundTasks, s: S = Depends(make)): bg.add_task(s.run)",
    ),
    "an object that holds it": (
        "class R:\n    def __init__(self, s: Session): self.s = s\n    def save(self): self.s.commit()\n"
        "def use(r): r.save()\ndef f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(use, R(db))",
        "class R:\n    def __init__(self, s: Session): self.s = s\n    def name(self): return 'r'\n"
        "def use(r): r.name()\ndef f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(use, R(db))",
    ),
    "callable object": (
        "class Job:\n    def __init__(self, s: Session): self.s = s\n    def __call__(self): self.s.commit()\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(Job(db))",
        "class Job:\n    def __init__(self, n: int): self.n = n\n    def __call__(self): print(self.n)\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(Job(1))",
    ),
    "object that opens its own": (
        "class S:\n    def __init__(self, db: Session): self.db = db\n    def run(self): self.db.commit()\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    s: S = S(db)\n    bg.add_task(s.run)",
        "class S:\n    db: Session\n    def run(self):\n        with SessionLocal() as db:\n            self.db = db\n"
        "            self.work()\n    def work(self): self.db.commit()\n"
        "def f(bg: BackgroundTasks, s: S): bg.add_task(s.run)",
    ),
    "wrapper": (
        "def defer(tasks: BackgroundTasks, fn, *args): tasks.add_task(fn, *args)\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): defer(bg, work, db, 1)",
        "def defer(tasks: BackgroundTasks, fn, *args): tasks.add_task(fn, *args)\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): defer(bg, plain, 1)",
    ),
    "somebody else's add_task": (
        "def f(background_tasks: BackgroundTasks, db: Session = Depends(get_db)): background_tasks.add_task(work, db, 1)",
        "class Progress:\n    def add_task(self, fn, *a): fn(*a)\n"
        "def f(p: Progress, db: Session = Depends(get_db)): p.add_task(work, db, 1)",
    ),
    "session of something else": (
        "def f(bg: BackgroundTasks, session: Session = Depends(get_db)): bg.add_task(work, session, 1)",
        "import requests\ndef f(bg: BackgroundTasks):\n    session = requests.Session()\n    bg.add_task(plain, session)",
    ),
    "task started by its class": (
        "class T:\n    @classmethod\n    def run(cls, db: Session): db.commit()\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(T.run, db)",
        "class T:\n    @staticmethod\n    def run(n): print(n)\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(T.run, 1)",
    ),
}

ROW = {
    "current user": (
        "def me(db: Session = Depends(get_db)) -> User: return db.get(User, 1)\n"
        "def f(bg: BackgroundTasks, user: User = Depends(me)): bg.add_task(greet, user)",
        "def me(db: Session = Depends(get_db)) -> User: return db.get(User, 1)\n"
        "def f(bg: BackgroundTasks, user: User = Depends(me)): bg.add_task(plain, user.id)",
    ),
    "loaded": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    u = db.query(User).filter_by(id=1).first()\n    bg.add_task(greet, u)",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    u = db.query(User.id).all()\n    bg.add_task(greet, u)",
    ),
    "selected": (
        "async def f(bg: BackgroundTasks, db: AsyncSession = Depends(get_async_db)):\n"
        "    r = await db.execute(select(User))\n    bg.add_task(greet, r.scalars().all())",
        "async def f(bg: BackgroundTasks, db: AsyncSession = Depends(get_async_db)):\n"
        "    r = await db.execute(select(User.email))\n    bg.add_task(greet, r.scalars().all())",
    ),
    "created": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    u = User()\n    db.add(u)\n    bg.add_task(greet, u)",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    u = User()\n    bg.add_task(greet, u)",
    ),
    "created elsewhere": (
        "def new(db: Session):\n    u = User()\n    db.add(u)\n    return u\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    bg.add_task(greet, new(db))",
        "def new(db: Session):\n    u = User()\n    db.add(u)\n    return u.id\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    bg.add_task(greet, new(db))",
    ),
    "appended in a loop": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    found = []\n"
        "    for u in db.query(User): found.append(u)\n    bg.add_task(greet, found)",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    found = []\n"
        "    for u in db.query(User): found.append(u.email)\n    bg.add_task(greet, found)",
    ),
    "relationship": (
        "def f(bg: BackgroundTasks, user: User): bg.add_task(plain, [post for post in user.posts])",
        "def f(bg: BackgroundTasks, user: User): bg.add_task(plain, [post.id for post in user.posts])",
    ),
    "bound to the row": (
        "class Account(User):\n    def notify(self): print(self.email)\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(db.get(Account, 1).notify)",
        "class Mailer:\n    def notify(self): print(1)\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)): bg.add_task(Mailer().notify)",
    ),
    "captured": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    u = db.get(User, 1)\n    bg.add_task(lambda: greet(u))",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    n = db.get(User, 1).id\n    bg.add_task(lambda: greet(n))",
    ),
    "generic repository": (
        "from typing import Generic, TypeVar\nT = TypeVar('T')\n"
        "class Repo(Generic[T]):\n    def __init__(self, db: Session): self.db = db\n    def get(self, id: int) -> T | None: ...\n"
        "class Users(Repo[User]): pass\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    u = Users(db).get(1)\n    bg.add_task(greet, u)",
        "from typing import Generic, TypeVar\nT = TypeVar('T')\n"
        "class Repo(Generic[T]):\n    def __init__(self, db: Session): self.db = db\n    def get(self, id: int) -> T | None: ...\n"
        "class Names(Repo[str]): pass\n"
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    u = Names(db).get(1)\n    bg.add_task(greet, u)",
    ),
    "expunged": (
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    u = db.get(User, 1)\n    bg.add_task(greet, u)",
        "def f(bg: BackgroundTasks, db: Session = Depends(get_db)):\n    u = db.get(User, 1)\n    db.expunge(u)\n    bg.add_task(greet, u)",
    ),
    "Pydantic copy": (
        "def f(bg: BackgroundTasks, user: User): bg.add_task(greet, user)",
        "from pydantic import BaseModel\nclass Out(BaseModel):\n    email: str\n"
        "def f(bg: BackgroundTasks, user: User):\n    user = Out.model_validate(user)\n    bg.add_task(greet, user)",
    ),
    "judged by the task's parameter": (
        "def hello(user: User): ...\ndef f(bg: BackgroundTasks, request):\n    bg.add_task(hello, request.state.user)",
        "def hello(user: str): ...\ndef f(bg: BackgroundTasks, request):\n    bg.add_task(hello, request.state.user)",
    ),
}

CONNECTION = {
    "psycopg": (
        "from psycopg import Connection\ndef f(bg: BackgroundTasks, db: Connection): bg.add_task(query, db)",
        "from psycopg_pool import ConnectionPool\ndef f(bg: BackgroundTasks, db: ConnectionPool): bg.add_task(query, db)",
    ),
    "cursor": (
        "import sqlite3\ndef f(bg: BackgroundTasks):\n    cur = sqlite3.connect('x').cursor()\n    bg.add_task(query, cur)",
        "import sqlite3\ndef f(bg: BackgroundTasks):\n    rows = sqlite3.connect('x').cursor().fetchall()\n    bg.add_task(query, rows)",
    ),
    "engine's": (
        "from app.database import engine\ndef f(bg: BackgroundTasks):\n    with engine.connect() as c: bg.add_task(query, c)",
        "from app.database import engine\ndef f(bg: BackgroundTasks):\n    bg.add_task(query, engine)",
    ),
}


def cases(table, code):
    return [pytest.param(code, bad, good, id=f"{code} {name}") for name, (bad, good) in table.items()]


@pytest.mark.parametrize(
    ("code", "bad", "good"), [*cases(SESSION, "AC101"), *cases(ROW, "AC102"), *cases(CONNECTION, "AC105")]
)
def test_variation_and_its_twin(check, code, bad, good):
    """The misuse is found on the line of the call, its harmless twin is left alone."""
    source = HEAD + bad
    line = max(
        n
        for n, text in enumerate(source.split("\n"), 1)
        if any(w in text for w in ("add_task(", "BackgroundTask(", "defer(bg"))
    )

    found = check(source)
    fine = check(HEAD + good)

    assert (code, line) in {(finding.code, finding.line) for finding in found}
    assert [finding for finding in fine if finding.code in ("AC101", "AC102", "AC105")] == []


def test_across_packages(check):
    """Aliases, re-exports, relative imports and a src layout are followed."""
    found = check(
        files={
            "src/shop/__init__.py": "",
            "src/shop/deps.py": """
                from typing import Annotated
                from fastapi import Depends
                from sqlalchemy.orm import Session
                from .db import get_db
                SessionDep = Annotated[Session, Depends(get_db)]
            """,
            "src/shop/db.py": "def get_db(): ...",
            "src/shop/api/__init__.py": "from ..deps import SessionDep as Db",
            "src/shop/api/orders.py": """
                from fastapi import BackgroundTasks
                from shop.api import Db
                from shop import tasks

                def order(bg: BackgroundTasks, db: Db):
                    bg.add_task(tasks.mail, db)
            """,
            "src/shop/tasks.py": "def mail(db): db.commit()",
        }
    )

    assert [(finding.code, finding.path.replace("\\", "/"), finding.line) for finding in found] == [
        ("AC101", "src/shop/api/orders.py", 7)
    ]


def test_message_teaches(check):
    """A finding names the way from the dependency, and the corrected line in the user's own names."""
    source = textwrap.dedent(HEAD) + (
        "def notify(db: Session, user: User): db.add(user)\n"
        "def f(bg: BackgroundTasks, user: User, db: Session = Depends(get_db)): bg.add_task(notify, db, user)\n"
    )

    finding = next(finding for finding in check(source) if finding.code == "AC101")

    assert [step.text for step in finding.steps][:2] == ["get_db provides it", "`db` comes from Depends(get_db)"]
    assert finding.plain.startswith("bg.add_task(notify, user.id)")
    assert finding.aftercommit == "after_commit(notify, user)"
    assert "0.118" in finding.runtime


def test_newer_syntax(check):
    """Type parameters and type statements are understood on every Python, on the right lines."""
    source = HEAD + textwrap.dedent("""
            class Repo[
                T: object,
            ](object):
                def __init__(self, db: Session): self.db = db
                def get(self) -> T: ...

            class Users(Repo[User]): pass

            type Db = Annotated[Session, Depends(get_db)]

            def pick[X](x: X) -> X: return x

            def f(bg: BackgroundTasks, db: Db):
                bg.add_task(greet, Users(db).get())
                bg.add_task(work, db, 1)
        """)
    first = next(n for n, line in enumerate(source.split("\n"), 1) if "greet, Users" in line)

    found = check(source)

    assert [(finding.code, finding.line) for finding in found] == [("AC102", first), ("AC101", first + 1)]
