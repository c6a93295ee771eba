"""What the tests share: a project written to disk from strings, and the findings in it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from aftercommit_check.findings import Finding
from aftercommit_check.runner import Settings, run

DATABASE = """
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

engine = create_engine("sqlite://")
SessionLocal = sessionmaker(bind=engine)
AsyncSessionLocal = async_sessionmaker(create_async_engine("sqlite+aiosqlite://"))

class Base(DeclarativeBase):
    pass

class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    posts: Mapped[list["Post"]] = relationship()

class Post(Base):
    __tablename__ = "posts"
    id: Mapped[int] = mapped_column(primary_key=True)

def get_db():
    db = SessionLocal()
    try:
        yield db
    finally:
        db.close()

async def get_async_db():
    async with AsyncSessionLocal() as session:
        yield session
"""

Check = Callable[..., list[Finding]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Write ``app/main.py`` and further files, check the project, return the findings of medium confidence and up."""
    monkeypatch.setenv("AFTERCOMMIT_CHECK_DEBUG", "1")

    def run_checker(main: str = "", *, low: bool = False, files: dict[str, str] | None = None) -> list[Finding]:
        written = {"app/__init__.py": "", "app/database.py": DATABASE, "app/main.py": main, **(files or {})}
        for name, text in written.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
        (tmp_path / "pyproject.toml").touch()
        report = run([str(tmp_path)], Settings(base=str(tmp_path), jobs=1))
        return [found for found in report.findings if low or found.confidence != "low"]

    return run_checker
