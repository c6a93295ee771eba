"""The tables of all scenarios: what an application that processes uploads would have."""

from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The applications' own tables."""


class File(Base):
    """An uploaded file."""

    __tablename__ = "file"

    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(default="uploaded")
    total: Mapped[int] = mapped_column(default=0)


class Stats(Base):
    """One row of figures that everybody counts up."""

    __tablename__ = "stats"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_count: Mapped[int] = mapped_column(default=0)


def create_tables(url: str) -> None:
    """Make the applications' tables."""
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()
