"""What a contract test stands on: one body for every driver, run natively or in a greenlet."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.util import await_only, greenlet_spawn

from aftercommit import Database, Task, TaskRecord, signals
from tests.support.databases import DatabaseUnderTest

T = TypeVar("T")


class Base(DeclarativeBase):
    """Tables of an application."""


class Row(Base):
    """A row of the application."""

    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(default=0)


class Stand:
    """A ``Database`` with one task, and somebody else's engine on the same database.

    Attributes:
        db: The database.
        engine: An engine that the application made itself, by the driver under test; always its sync side.
        note: A task that takes a label.
        remember: The same, in memory.
        ran: The labels of what ran.
        lost: What was reported lost.
        handed_over: What was reported committed.
    """

    def __init__(self, under_test: DatabaseUnderTest, *, is_async: bool) -> None:
        self.under_test = under_test
        self.is_async = is_async
        self.runner = asyncio.Runner() if is_async else None
        self.db = Database(under_test.url)
        self.async_engine: AsyncEngine | None = None
        if is_async:
            self.async_engine = create_async_engine(under_test.url)
            self.engine: Engine = self.async_engine.sync_engine
        else:
            self.engine = create_engine(under_test.url)
        self.outside = create_engine(under_test.sync_url, isolation_level="AUTOCOMMIT")
        self.ran: list[str] = []
        self.lost: list[signals.TasksLost] = []
        self.handed_over: list[signals.TasksHandedOver] = []

        @self.db.task
        def note(label: str) -> None:
            self.ran.append(label)

        @self.db.task(durable=False)
        def remember(label: str) -> None:
            self.ran.append(label)

        self.note: Task[[str], None] = note
        self.remember: Task[[str], None] = remember
        self._subscribed: list[Any] = [
            signals.subscribe(signals.TasksLost)(self.lost.append),
            signals.subscribe(signals.TasksHandedOver)(self.handed_over.append),
        ]

    def create(self) -> None:
        """Make the tables."""
        Base.metadata.create_all(self.outside)
        if self.runner is not None:
            self.runner.run(self.db.async_create_tables())
        else:
            self.db.create_tables()

    def close(self) -> None:
        """Give everything back."""
        for each in self._subscribed:
            signals.unsubscribe(each)
        self.outside.dispose()
        if self.runner is not None:
            assert self.async_engine is not None
            self.runner.run(self.async_engine.dispose())
            self.runner.run(self.db.async_dispose())
            self.runner.close()
        else:
            self.engine.dispose()
            self.db.dispose()

    def run(self, body: Callable[[], T]) -> T:
        """Run *body*, which may use ``engine``, where the driver under test can work."""
        if self.runner is None:
            return body()
        return self.runner.run(greenlet_spawn(body))

    def run_async(self, body: Coroutine[Any, Any, T]) -> T:
        """Run *body* on the loop that the async engines belong to."""
        assert self.runner is not None
        return self.runner.run(body)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run tasks: on the loop of ``run`` where there is one, else on one of the runner's own."""
        if self.runner is None:
            with self.db.running(create_tables=True):
                yield
            return
        running = self.db.running(create_tables=True)
        self.runner.run(running.__aenter__())
        try:
            yield
        finally:
            self.runner.run(running.__aexit__(None, None, None))

    def drain(self) -> list[str]:
        """Wait for all that is due, inside ``run`` or outside; give the labels of what ran, sorted."""
        if self.runner is None:
            self.db.drain()
        elif self.runner.get_loop().is_running():
            await_only(self.db.async_drain())
        else:
            self.runner.run(self.db.async_drain())
        return sorted(self.ran)

    @property
    def our_engine(self) -> Engine:
        """The request pool's engine, by its sync side."""
        return self.db.async_engine().sync_engine if self.is_async else self.db.engine()

    def hand_over(self, session: Session, *labels: str) -> None:
        """Ask for ``note`` with each of *labels*."""
        for label in labels:
            self.db.after_commit(session, self.note, label)

    def look(self, statement: sa.Executable) -> list[Any]:
        """What somebody else sees, in a transaction of his own."""
        with self.outside.connect() as connection:
            return list(connection.execute(statement).scalars())

    @property
    def written(self) -> list[str]:
        """The labels of all records that are really committed, in order."""
        return [each["label"] for each in self.look(sa.select(TaskRecord.arguments).order_by(TaskRecord.id))]

    @property
    def rows(self) -> int:
        """How many rows of the application are committed."""
        return len(self.look(sa.select(Row.id)))

    @contextmanager
    def statements(self, engine: Engine) -> Iterator[list[str]]:
        """Collect what is sent over *engine*, BEGIN, COMMIT and the like as SQLAlchemy names them."""
        sent: list[str] = []

        def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            sent.append(statement)

        def note_savepoint(_connection: Any, name: str, *_: Any) -> None:
            sent.append(f"SAVEPOINT {name}")

        event.listen(engine, "before_cursor_execute", note)
        event.listen(engine, "savepoint", note_savepoint)
        try:
            yield sent
        finally:
            event.remove(engine, "before_cursor_execute", note)
            event.remove(engine, "savepoint", note_savepoint)
