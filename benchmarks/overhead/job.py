"""The table of all three applications, and the clock in them."""

import os
from threading import Lock
from time import perf_counter_ns

from fastapi import APIRouter
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

URL = "BENCHMARK_URL"


class Base(DeclarativeBase):
    """The applications' own table."""


class Job(Base):
    """What a request asks for."""

    __tablename__ = "job"

    id: Mapped[int] = mapped_column(primary_key=True)
    is_done: Mapped[bool] = mapped_column(default=False)


def url() -> str:
    """Return the URL that the application is to use."""
    return os.environ[URL]


router = APIRouter()
_lock = Lock()
_committed: dict[int, int] = {}
_waited: list[float] = []


@router.get("/waited")
async def waited() -> list[float]:
    """Return how long each task waited between its request's commit and its start, in ms; forget it."""
    with _lock:
        figures = list(_waited)
        _waited.clear()
    return figures


@event.listens_for(Session, "after_commit")
def _note_commit(session: Session) -> None:
    if (job := session.info.pop("job", None)) is not None:
        _committed[job] = perf_counter_ns()


def note_start(job: int) -> None:
    """Call this first in the task."""
    now = perf_counter_ns()
    # A task on a thread may be faster than the listener of the commit that started it.
    with _lock:
        _waited.append((now - _committed.pop(job, now)) / 1e6)
