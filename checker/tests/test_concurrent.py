"""AC103: sessions shared with asyncio tasks, threads, executors and gathered coroutines."""

from __future__ import annotations

import pytest

HEAD = """
import asyncio, threading
from concurrent.futures import ThreadPoolExecutor
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session
from app.database import AsyncSession, AsyncSessionLocal, SessionLocal, User

async def load(db: AsyncSession, n=0): return await db.get(User, n)
async def other(n=0): return n
def sync_load(db: Session): return db.get(User, 1)
"""

CASES = {
    "create_task": (
        "async def f(db: AsyncSession): asyncio.create_task(load(db))",
        "async def f(db: AsyncSession): await asyncio.create_task(load(db))",
    ),
    "kept and awaited": (
        "async def f(db: AsyncSession):\n    t = asyncio.create_task(load(db))\n    await db.commit()\n    await t",
        "async def f(db: AsyncSession):\n    t = asyncio.create_task(load(db))\n    await t\n    await db.commit()",
    ),
    "two tasks": (
        "async def f(db: AsyncSession):\n    a = asyncio.create_task(load(db))\n    b = asyncio.create_task(load(db))\n    await a\n    await b",
        "async def f(db: AsyncSession):\n    a = asyncio.create_task(load(db))\n    b = asyncio.create_task(other())\n    await a\n    await b",
    ),
    "gather": (
        "async def f(db: AsyncSession): await asyncio.gather(load(db), load(db))",
        "async def f(db: AsyncSession): await asyncio.gather(load(db), other())",
    ),
    "gather of the session's own methods": (
        "async def f(db: AsyncSession): await asyncio.gather(db.execute(1), db.execute(2))",
        "async def f(db: AsyncSession): await asyncio.gather(db.execute(1))",
    ),
    "gather over a comprehension": (
        "async def f(db: AsyncSession, ns): await asyncio.gather(*[load(db, n) for n in ns])",
        "async def one(n):\n    async with AsyncSessionLocal() as db: await load(db, n)\n"
        "async def f(ns): await asyncio.gather(*[one(n) for n in ns])",
    ),
    "gather over a list filled in a loop": (
        "async def f(db: AsyncSession, ns):\n    jobs = []\n    for n in ns: jobs.append(load(db, n))\n    await asyncio.gather(*jobs)",
        "async def f(db: AsyncSession, ns):\n    jobs = []\n    for n in ns: jobs.append(other(n))\n    await asyncio.gather(*jobs)",
    ),
    "gather of a closure": (
        "async def f(db: AsyncSession, ns):\n    async def one(n): await load(db, n)\n    await asyncio.gather(*map(one, ns))",
        "async def f(db: AsyncSession, ns):\n    async def one(n): return n\n    await asyncio.gather(*map(one, ns))",
    ),
    "gather of methods": (
        "class R:\n    def __init__(self, db: AsyncSession): self.db = db\n    async def a(self): await self.db.execute(1)\n"
        "    async def both(self): await asyncio.gather(self.a(), self.a())",
        "class R:\n    def __init__(self, db: AsyncSession): self.db = db\n    async def a(self): return 1\n"
        "    async def both(self): await asyncio.gather(self.a(), self.a())",
    ),
    "task group": (
        "async def f(db: AsyncSession):\n    async with asyncio.TaskGroup() as tg:\n        tg.create_task(load(db))\n        tg.create_task(load(db))",
        "async def f(db: AsyncSession):\n    async with asyncio.TaskGroup() as tg:\n        tg.create_task(load(db))\n        tg.create_task(other())",
    ),
    "thread": (
        "def f(db: Session): threading.Thread(target=sync_load, args=(db,)).start()",
        "def f(db: Session): threading.Thread(target=print, args=(1,)).start()",
    ),
    "executor": (
        "def f(db: Session, ex: ThreadPoolExecutor): ex.submit(sync_load, db)",
        "def f(db: Session, ex: ThreadPoolExecutor): return ex.submit(sync_load, db).result()",
    ),
    "run_in_threadpool": (
        "async def f(db: Session):\n    t = asyncio.create_task(run_in_threadpool(sync_load, db))",
        "async def f(db: Session): await run_in_threadpool(sync_load, db)",
    ),
    "loop": (
        "async def f(db: Session):\n    asyncio.get_running_loop().run_in_executor(None, sync_load, db)",
        "async def f(db: Session):\n    await asyncio.get_running_loop().run_in_executor(None, sync_load, db)",
    ),
    "somebody else's create_task": (
        "async def f(db: AsyncSession): asyncio.ensure_future(load(db))",
        "class Tasks:\n    @staticmethod\n    async def create_task(db): ...\nasync def f(db: AsyncSession): await Tasks.create_task(db=db)",
    ),
    "decorator": (
        "def fire(fn):\n    def inner(*a, **k): return asyncio.create_task(fn(*a, **k))\n    return inner\n"
        "@fire\nasync def job(db: AsyncSession): await db.execute(1)\nasync def f(db: AsyncSession): job(db)",
        "def traced(fn):\n    async def inner(*a, **k): return await fn(*a, **k)\n    return inner\n"
        "@traced\nasync def job(db: AsyncSession): await db.execute(1)\nasync def f(db: AsyncSession): await job(db)",
    ),
    "method of a service": (
        "class S:\n    def __init__(self, db: AsyncSession): self.db = db\n    async def log(self): await self.db.execute(1)\n"
        "    async def go(self): asyncio.create_task(self.log())",
        "class S:\n    def __init__(self, db: AsyncSession): self.db = db\n    async def log(self): print(1)\n"
        "    async def go(self): asyncio.create_task(self.log())",
    ),
}


@pytest.mark.parametrize(("bad", "good"), [pytest.param(*pair, id=name) for name, pair in CASES.items()])
def test_variation_and_its_twin(check, bad, good):
    """Concurrent use is found; use one after another is left alone."""
    found = check(HEAD + bad)
    fine = check(HEAD + good)

    assert "AC103" in {finding.code for finding in found}
    assert [finding.message for finding in fine if finding.code == "AC103"] == []
