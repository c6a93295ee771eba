"""A ``Database`` with a runner of its own, for tests that hand tasks over and look what became of them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aftercommit import Database, Task, TaskRecord, signals
from tests.support.databases import DatabaseUnderTest

T = TypeVar("T")
TIMEOUT = 30.0


class Base(DeclarativeBase):
    """Tables of an application."""


class Counter(Base):
    """A row that many tasks change."""

    __tablename__ = "counter"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(default=0)


class Effect(Base):
    """One line for each effect that really took place."""

    __tablename__ = "effect"
    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str]


class Heard:
    """The signals of some kinds, in order, and a way to wait for them."""

    def __init__(self, *kinds: type[signals.Signal]) -> None:
        self._kinds = kinds
        self._all: list[Any] = []
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        signals.subscribe(*self._kinds)(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signals.unsubscribe(self._note)

    def _note(self, signal: Any) -> None:
        with self._changed:
            self._all.append(signal)
            self._changed.notify_all()

    def of(self, kind: type[T]) -> list[T]:
        """Those of one kind so far."""
        with self._changed:
            return [each for each in self._all if isinstance(each, kind)]

    def wait(self, kind: type[T], *, count: int = 1, timeout: float = TIMEOUT) -> T:
        """Wait for the *count*-th of a kind."""
        with self._changed:
            found = self._changed.wait_for(lambda: sum(isinstance(each, kind) for each in self._all) >= count, timeout)
            assert found, f"no {count} {kind.__name__} in {timeout} s, only {self._all}"
        return self.of(kind)[count - 1]


def held_elsewhere(engine: sa.Engine) -> sa.Connection:
    """A connection that another thread has taken: whoever wants one, too, waits for it."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(engine.connect).result(TIMEOUT)


@asynccontextmanager
async def async_held_elsewhere(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection that another asyncio task has taken: whoever wants one, too, waits for it."""

    async def take() -> AsyncConnection:
        return await engine.connect()

    connection = await asyncio.create_task(take())
    try:
        yield connection
    finally:
        await connection.close()


class Workshop:
    """A ``Database`` on the driver under test. Tasks are written once, for a ``Session``.

    Attributes:
        db: The database.
        outside: Somebody else's engine on the same database.
    """

    def __init__(self, under_test: DatabaseUnderTest, **options: Any) -> None:
        self.under_test = under_test
        self.is_async = under_test.is_async
        self.db = Database(under_test.url, **options)
        self.outside = sa.create_engine(under_test.sync_url, isolation_level="AUTOCOMMIT")
        if under_test.is_sqlite:
            with self.outside.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        Base.metadata.create_all(self.outside)

    def close(self) -> None:
        """Give everything back."""
        self.outside.dispose()
        self.db.dispose()

    @contextmanager
    def running(self, **options: Any) -> Iterator[None]:
        """Run tasks."""
        with self.db.running(create_tables=True, **options):
            try:
                yield
            finally:
                if self.is_async:
                    self.on_loop(self.db.async_dispose())

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The runner's event loop."""
        runner = self.db.runner
        assert runner is not None
        assert runner.loop is not None
        return runner.loop

    def on_loop(self, body: Any) -> Any:
        """Run a coroutine on the runner's event loop, which async connections belong to."""
        return asyncio.run_coroutine_threadsafe(body, self.loop).result(TIMEOUT)

    def task(self, **options: Any) -> Callable[[Callable[[Session, str], None]], Task[..., None]]:
        """Make a task of a body, for the flavour under test.

        A body that waits is ``def``, and given the loop's own thread on async drivers: let it wait in ``gate``.
        """
        gate: threading.Event | None = options.pop("gate", None)
        begun: Callable[[], object] | None = options.pop("begun", None)

        def decorate(body: Callable[[Session, str], None]) -> Task[..., None]:
            def plain(session: Session, label: str = "") -> None:
                if begun is not None:
                    begun()
                if gate is not None:
                    gate.wait(TIMEOUT)
                body(session, label)

            async def native(session: AsyncSession, label: str = "") -> None:
                if begun is not None:
                    begun()
                if gate is not None:
                    await asyncio.to_thread(gate.wait, TIMEOUT)
                await session.run_sync(body, label)

            return self.db.task(name=body.__name__, **options)(native if self.is_async else plain)  # type: ignore[arg-type]

        return decorate

    def commit(self, body: Callable[[Session], T]) -> T:
        """Run *body* in a transaction of a request, and commit it."""
        if not self.is_async:
            with self.db.session() as session:
                return body(session)

        async def run() -> T:
            async with self.db.async_session() as session:
                return await session.run_sync(body)

        return self.on_loop(run())

    def ask(self, task: Task[..., Any], *args: Any) -> UUID:
        """Hand a task over in a transaction of its own; return its id."""
        return self.commit(lambda session: self.db.after_commit(session, task, *args).id)

    def drain(self) -> None:
        """Wait for all that is due."""
        self.db.drain(TIMEOUT)

    def sql(self, statement: str, **parameters: Any) -> Any:
        """Run a statement from outside; give the first column of its first row, if it has rows."""
        with self.outside.connect() as connection:
            result = connection.execute(sa.text(statement), parameters)
            return result.scalar() if result.returns_rows else None

    def record(self, id: UUID) -> TaskRecord:
        """The record, as somebody else sees it."""
        with Session(self.outside) as session:
            return session.get_one(TaskRecord, id)

    def records(self) -> list[TaskRecord]:
        """All records, oldest first."""
        with Session(self.outside) as session:
            return list(session.scalars(sa.select(TaskRecord).order_by(TaskRecord.id)))

    def effects(self) -> list[str]:
        """The labels of all effects that are committed, sorted."""
        with Session(self.outside) as session:
            return sorted(session.scalars(sa.select(Effect.label)))
