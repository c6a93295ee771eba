"""Whatever is in a file, the checker ends without an error, and says the same thing twice."""

from __future__ import annotations

import random
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aftercommit_check.runner import Settings, run

SOURCES = [
    """
    from fastapi import APIRouter, BackgroundTasks, Depends
    from sqlalchemy import select
    from sqlalchemy.ext.asyncio import AsyncSession
    from .db import get_session, Order, Repo, SessionLocal

    router = APIRouter()

    class OrderService:
        def __init__(self, session: AsyncSession, tasks: BackgroundTasks):
            self.session = session
            self.tasks = tasks
            self.repo = Repo(session)

        async def place(self, data):
            order = Order(**data)
            self.session.add(order)
            await self.session.commit()
            self.tasks.add_task(self.notify, order)
            return order

        async def notify(self, order):
            async with SessionLocal() as session:
                await session.merge(order)

    @router.post("/orders")
    async def place(data: dict, tasks: BackgroundTasks, session: AsyncSession = Depends(get_session)):
        service = OrderService(session, tasks)
        orders = [order for order in (await session.execute(select(Order))).scalars().all() if order.open]
        tasks.add_task(lambda: service.repo.save(orders))
        return await service.place({**data, "n": 1})
    """,
    """
    import asyncio, threading
    from functools import partial
    from sqlalchemy.orm import Session, sessionmaker

    Local = sessionmaker()

    def get_db():
        db = Local()
        try:
            yield db
            db.commit()
        except Exception:
            db.rollback()
            raise
        finally:
            db.close()

    async def gathered(db: Session, ids: list[int]):
        jobs = []
        for n in ids:
            jobs.append(asyncio.create_task(one(db, n)))
        results = await asyncio.gather(*jobs, *[one(db, n) for n in ids], return_exceptions=True)
        for r in results:
            try:
                db.add(r)
                db.commit()
            except Exception as e:
                print(f"failed {e!r}")
        match results:
            case [first, *rest] if (n := len(rest)) > 1:
                threading.Thread(target=partial(work, db, n=n), kwargs={"x": first}).start()

    async def one(db, n): return db.get(int, n)

    def work(db, n, x=None):
        other = next(get_db())
        other.execute("select 1")
    """,
    """
    from typing import Annotated, Generic, TypeVar
    from sqlmodel import Field, Relationship, Session, SQLModel, create_engine, select
    from fastapi import Depends

    T = TypeVar("T", bound=SQLModel)
    engine = create_engine("sqlite://")

    class Hero(SQLModel, table=True):
        id: int | None = Field(default=None, primary_key=True)
        team: "Team" = Relationship(back_populates="heroes")

    class Team(SQLModel, table=True):
        heroes: list[Hero] = Relationship(back_populates="team")

    class Crud(Generic[T]):
        model: type[T]
        def all(self, session: Session) -> list[T]:
            return session.exec(select(self.model)).all()

    class Heroes(Crud[Hero]):
        model = Hero

    def session():
        with Session(engine) as s:
            yield s

    Db = Annotated[Session, Depends(session)]

    def endpoint(db: Db, background_tasks):
        for hero in Heroes().all(db):
            background_tasks.add_task(print, hero.team, hero.team.heroes[0], db)
    """,
]
LINES = [line for source in SOURCES for line in textwrap.dedent(source).split("\n") if line.strip()]
WORDS = sorted(
    {word for line in LINES for word in line.replace("(", " ( ").replace(")", " ) ").replace(".", " . ").split()}
)


def answer(folder, text):
    (folder / "db.py").write_text(
        textwrap.dedent(SOURCES[1]) + "\nfrom main import *\nfrom db import *\n", encoding="utf-8"
    )
    (folder / "main.py").write_text(text, encoding="utf-8", errors="surrogatepass")
    report = run([str(folder)], Settings(base=str(folder), jobs=1))
    return [finding.to_dict() for finding in report.findings], report.skipped


def mutate(source, rng):
    lines = textwrap.dedent(source).split("\n")
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            del lines[at : at + rng.randint(1, 3)]
            lines = lines or [""]
        elif kind == 1:
            indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
            lines.insert(at, indent + rng.choice(LINES).strip())
        elif kind == 2:
            lines[at] = lines[at].replace("async ", "").replace("await ", "")
        elif kind == 3:
            words = lines[at].split(" ")
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            lines[at] = " ".join(words)
        elif kind == 4:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 5:
            first, second = rng.sample(
                ["session", "db", "order", "self", "tasks", "Session", "Depends", "get_db", "Hero", "T"], 2
            )
            lines = [line.replace(first, second) for line in lines]
        else:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(60))
def test_mutated_sources(tmp_path, monkeypatch, seed):
    """Mutations of real-looking code neither crash the checker nor shake its answer."""
    monkeypatch.setenv("AFTERCOMMIT_CHECK_DEBUG", "1")
    rng = random.Random(seed)

    for source in SOURCES:
        text = mutate(source, rng)
        assert answer(tmp_path, text) == answer(tmp_path, text)


@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=25))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shuffled_lines(tmp_path, monkeypatch, lines):
    """Statements in any order and indentation are survived."""
    monkeypatch.setenv("AFTERCOMMIT_CHECK_DEBUG", "1")
    text = "\n".join(line if line[0] != " " else "if session:\n" + line for line in lines)

    assert answer(tmp_path, text) == answer(tmp_path, text)


@given(st.text(max_size=200))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text(tmp_path, monkeypatch, text):
    """Any text at all is survived."""
    monkeypatch.setenv("AFTERCOMMIT_CHECK_DEBUG", "1")

    assert answer(tmp_path, f"session = 1\n{text}") == answer(tmp_path, f"session = 1\n{text}")
