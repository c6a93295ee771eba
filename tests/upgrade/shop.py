"""An application that old and new code run alike: ``python shop.py NAME NUMBER``.

It runs tasks, hands that many over under its name, one after the other, writes ``ASKED``, waits until nothing that is
due is left anywhere, and writes ``DRAINED``.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import aftercommit
from aftercommit import Database

db = Database(os.environ["DATABASE_URL"], heartbeat=0.2, silent_after=3.0, keep_finished=None)


class Base(DeclarativeBase):
    """The application's tables."""


class Asked(Base):
    """One row for each request that was committed."""

    __tablename__ = "asked"
    label: Mapped[str] = mapped_column(primary_key=True)


class Effect(Base):
    """One row for each time that a task took effect."""

    __tablename__ = "effect"
    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str]


@db.task
def note(session: Session, label: str) -> None:
    """Take effect, slowly enough for some to run at any time."""
    session.add(Effect(label=label))
    session.flush()
    time.sleep(0.01)


@contextmanager
def running() -> Iterator[None]:
    """Run tasks. An old release that finds a busy SQLite file locked gives up at its start, and is started again."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(db.running(create_tables=False))
            except OperationalError:
                continue
            break
        yield


def main() -> None:
    """Do what the arguments say."""
    name, number = sys.argv[1], int(sys.argv[2])
    print("CODE", Path(aftercommit.__file__).parent, flush=True)  # noqa: T201  # the parent reads it
    with running():
        print("RUNNING", flush=True)  # noqa: T201
        for each in range(number):
            label = f"{name} {each}"
            try:
                with db.session() as session:
                    session.add(Asked(label=label))
                    db.after_commit(session, note, label)
            except OperationalError:
                # SQLite's one write lock was somebody else's for too long: this one was not asked for.
                pass
            time.sleep(0.01)
        print("ASKED", flush=True)  # noqa: T201
        db.drain(60.0)
        print("DRAINED", flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
