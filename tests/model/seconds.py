"""A run with real sessions, and whatever else works on its connection, or takes that away.

Each effect has a number, and each commit of a run saves the numbers that it has by then: as its checkpoint, or as its
result. What must hold: the effects in the database are exactly those that the record tells of.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlmodel import Session as SQLModelSession

from aftercommit import Database, Task
from aftercommit.pools.taking import take
from aftercommit.records import moves, workers, writing
from aftercommit.records.ids import uuid7
from aftercommit.runner import outcome
from aftercommit.runner.run import Run
from aftercommit.sessions.scopes import Scope
from aftercommit.tasks.current import as_current
from tests.model.broken_seconds import Commits
from tests.model.variants import id_of

NAMES = ("task",)
SILENT_AFTER = 60.0
LIVES = st.integers(0, 2)
MODES = ("conditional_savepoint", "rollback_only", "create_savepoint", "control_fully")
KINDS = st.sampled_from([*MODES, "scoped", "sqlmodel", "nested", "savepoint of Core"])
COMMITS = st.sampled_from(["session", "session", "second", "Core"])


@dataclass(eq=False)
class Life:
    """A run, for as long as its thread goes on, whatever has become of its claim.

    Attributes:
        run: The run.
        scope: Its session's.
        raw: The driver's connection, on SQLite.
        seconds: What else was opened on its connection: a session, or a savepoint.
    """

    run: Run
    scope: Scope
    raw: Any = None
    seconds: list[Any] = field(default_factory=list)

    @property
    def session(self) -> Session:
        """Its session."""
        return self.scope.session


class SecondsMachine(RuleBasedStateMachine):
    """All that can happen."""

    db: Database
    task: Task[Any, Any]
    books_engine: Engine
    outside: Engine

    @initialize()
    def start(self) -> None:
        """One task, which is queued."""
        self.is_sqlite = self.outside.dialect.name == "sqlite"
        self.numbers = count(1)
        self.lives: list[Life] = []
        self.record = uuid7()
        with self.books() as connection:
            for table in ("aftercommit_task", "aftercommit_worker", "model_effect"):
                connection.execute(sa.text(f"DELETE FROM {table}"))
            task = writing.NewTask(
                id=self.record, task="task", pool="default", arguments="{}", worker=None, key=None, priority=0,
                max_attempts=1000, delay=0.0, at=None, parent=None, context=None,
            )  # fmt: skip
            writing.insert(connection, [task])
        self.join()

    def join(self) -> None:
        """A new process."""
        self.worker = uuid7()
        with self.books() as connection:
            workers.register(connection, self.worker, host="model", pid=1, pools=["default"], names=list(NAMES))

    @contextmanager
    def books(self) -> Iterator[Connection]:
        """A short transaction of the bookkeeping's."""
        with self.books_engine.begin() as connection:
            yield connection

    def is_free_for(self, life: Life | None) -> bool:
        """Whether nobody else has SQLite's write lock."""
        others = (each.raw for each in self.lives if each is not life and each.raw is not None)
        return not any(_is_in_transaction(raw) for raw in others)

    # --- a run ----------------------------------------------------------------------------------------------------

    @rule()
    def claim(self) -> None:
        """A worker takes the task, if it is queued."""
        if len(self.lives) > 2 or not self.is_free_for(None):
            return
        with self.books() as connection:
            found = moves.claim(connection, pool="default", names=NAMES, worker=self.worker, count=1)
        for each in found:
            run = self.run_of(each)
            life = Life(run, self.db.sessions.task_scope("default", run.owner, None))
            run.prepare(life.session)
            self.lives.append(life)

    def run_of(self, claimed: moves.Claimed) -> Run:
        """As a worker makes it."""
        return Run(
            task=self.task, id=claimed.claim.id, claim=claimed.claim, attempt=claimed.claim.attempt,
            max_attempts=claimed.max_attempts, arguments=claimed.arguments, checkpoint=claimed.checkpoint,
            refunds=claimed.refunds,
        )  # fmt: skip

    def life(self, number: int) -> Life | None:
        """The run that a rule is about: the newest one most of the time."""
        if not self.lives:
            self.claim()
        if not self.lives:
            return None
        life = self.lives[-1 - number % len(self.lives)]
        return life if self.is_free_for(life) else None

    @contextmanager
    def inside(self, life: Life) -> Iterator[None]:
        """Do something in a run; what that raises ends it."""
        try:
            with as_current(life.run.current):
                if self.is_sqlite and life.run.abandoned is None:
                    life.raw = life.session.connection().connection.driver_connection
                yield
        except AssertionError:
            raise
        except Exception as exc:  # noqa: BLE001  # whatever it is
            self.end(life, exc)

    def end(self, life: Life, error: Exception) -> None:
        """A run has failed; it is queued again, if it is still its own."""
        assert life.run.claim is not None
        self.lives.remove(life)
        with suppress(Exception):
            life.scope.end()
        failure = moves.Failure(error=type(error).__name__, traceback="")
        if self.is_free_for(None):
            with self.books() as connection:
                moves.give_back(connection, life.run.claim, failure, at="2020-01-01", delay=0.0, refund=False)

    @rule(number=LIVES, into=st.integers(-1, 2), past=st.booleans())
    def write(self, number: int, into: int, past: bool) -> None:  # drawn
        """An effect: by its session, by another one on its connection, or past them by the driver's connection."""
        life = self.life(number)
        if life is None:
            return
        with self.inside(life):
            sessions = [each for each in life.seconds if isinstance(each, Session)]
            session = life.session if into < 0 or not sessions else sessions[into % len(sessions)]
            if past and life.raw is not None:
                life.raw.execute(
                    "INSERT INTO model_effect (task, step) VALUES (?, ?)", (str(self.record), next(self.numbers))
                )
            else:
                _insert(session.connection(), self.record, next(self.numbers))

    @rule(number=LIVES, kind=KINDS, writes=st.booleans(), end=st.sampled_from(["stays", "commit", "rollback", "close"]))
    def open_second(self, number: int, kind: str, writes: bool, end: str) -> None:  # drawn
        """A second session on its connection, or a savepoint; it may stay open."""
        life = self.life(number)
        if life is None:
            return
        with self.inside(life):
            second = _SECONDS.get(kind, _of_mode(kind))(life.session)
            life.seconds.append(second)
            if isinstance(second, Session):
                second.execute(sa.text("SELECT count(*) FROM model_effect")).scalar()
                if writes:
                    _insert(second.connection(), self.record, next(self.numbers))
        if end != "stays":
            self.end_second(number, 0, end)

    @rule(number=LIVES, which=st.integers(0, 2), how=st.sampled_from(["commit", "rollback", "close", "drop"]))
    def end_second(self, number: int, which: int, how: str) -> None:
        """It ends: the newest one most of the time."""
        life = self.life(number)
        if life is None or not life.seconds:
            return
        second = life.seconds.pop(-1 - which % len(life.seconds))
        if how == "drop":
            return
        with self.inside(life):
            getattr(second, how)()

    # --- its commits ----------------------------------------------------------------------------------------------

    def numbers_of(self, life: Life) -> list[int]:
        """The effects that its next commit stands for."""
        found = life.session.execute(
            sa.text("SELECT step FROM model_effect WHERE task = :task ORDER BY step"), {"task": str(self.record)}
        )
        return list(found.scalars())

    @rule(number=LIVES, how=COMMITS, saves=st.booleans())
    def commit(self, number: int, how: str, saves: bool) -> None:  # drawn
        """A commit in the middle, with a checkpoint or without, by one of those who can."""
        life = self.life(number)
        if life is None:
            return
        with self.inside(life):
            if saves:
                life.run.current.checkpoint(self.numbers_of(life))
            self.commit_by(life, how)

    def commit_by(self, life: Life, how: str) -> None:
        """Commit, really."""
        if how == "session":
            Commits.by_session = True
            try:
                life.session.commit()
            finally:
                Commits.by_session = False
        elif how == "second":
            with Session(bind=life.session.connection(), join_transaction_mode="control_fully") as second:
                second.connection()
                second.commit()
        else:
            life.session.connection().commit()

    @rule(number=LIVES, raises=st.booleans())
    def finish(self, number: int, raises: bool) -> None:  # drawn
        """Its function ends."""
        life = self.life(number)
        if life is None:
            return
        with self.inside(life):
            if raises:
                raise ValueError
            life.run.finish_with(self.numbers_of(life))
            self.commit_by(life, "session")
            life.run.is_committed = True
            self.lives.remove(life)
            life.scope.end()
            assert self.state() == "succeeded", "a run was done, and its record does not say so"

    # --- meanwhile ------------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["cancel", "cancel and retry", "rescue", "rescue"]))
    def lose(self, how: str) -> None:
        """Somebody cancels the task, or its worker counts as dead."""
        if not self.is_free_for(None):
            return
        with self.books() as connection:
            if how == "rescue":
                connection.execute(
                    sa.text("UPDATE aftercommit_worker SET seen_at = '2020-01-01 00:00:00' WHERE id = :id"),
                    {"id": id_of(connection, self.worker)},
                )
                workers.rescue(connection, silent_after=SILENT_AFTER)
                return
            moves.cancel(connection, self.record)
            if how != "cancel":
                moves.retry(connection, self.record)

    @rule(number=LIVES, writes=st.booleans())
    def take(self, number: int, writes: bool) -> None:  # drawn
        """A stop gives a run back whose thread goes on: past each check of ours, it is about to send a statement."""
        if writes:
            self.write(number, -1, past=False)
        life = self.life(number)
        if life is None:
            return
        run = life.run
        run.stop_with(run.lost())
        is_over = take(run.connection)
        assert is_over(), "a transaction that was taken goes on"
        assert run.claim is not None
        if self.is_free_for(None):
            with self.books() as connection:
                moves.give_back(connection, run.claim, None, at="", delay=0.0, refund=True)
        if writes:
            self.write(number, -1, past=True)

    @rule()
    def in_vain(self) -> None:
        """It is claimed again and again, and comes to nothing without using an attempt up."""
        if self.lives or not self.is_free_for(None):
            return
        failure = moves.Failure(error="conflict", traceback="")
        for _ in range(100):
            with self.books() as connection:
                found = moves.claim(connection, pool="default", names=NAMES, worker=self.worker, count=1)
                if not found:
                    return
                run = self.run_of(found[0])
                assert run.claim is not None
                if outcome.worn_out(run) is not None:
                    moves.fail(connection, run.claim, failure, at="2020-01-01")
                    return
                moves.give_back(connection, run.claim, failure, at="2020-01-01", delay=0.0, refund=True)
        raise AssertionError("it was claimed without end")

    # --- what must hold -------------------------------------------------------------------------------------------

    def state(self) -> str:
        """The record's."""
        with self.outside.connect() as connection:
            return str(connection.execute(sa.text("SELECT state FROM aftercommit_task")).scalar_one())

    @invariant()
    def effects_are_what_the_record_says(self) -> None:
        """No effect but those that were saved with it, each once."""
        if not hasattr(self, "worker"):
            return
        with self.outside.connect() as connection:
            row = connection.execute(
                sa.text("SELECT state, CAST(checkpoint AS text), CAST(result AS text) FROM aftercommit_task")
            ).one()
            effects = list(connection.execute(sa.text("SELECT step FROM model_effect ORDER BY step")).scalars())
        said = json.loads((row[2] if row[0] == "succeeded" else row[1]) or "[]")
        assert effects == said, f"the record ({row[0]}) says {said}, and there are {effects}: they disagree"

    def teardown(self) -> None:
        """All runs end; then the task runs to its end, if there is one left."""
        try:
            if hasattr(self, "worker"):
                for life in list(reversed(self.lives)):
                    self.end(life, ValueError("the end"))
                with self.books() as connection:
                    pulse = workers.beat(connection, self.worker, silent_after=SILENT_AFTER)
                    if pulse is not None and pulse.running:
                        workers.release_orphans(connection, self.worker, pulse.running)
                if self.state() == "queued":
                    self.write(0, -1, past=False)
                    self.finish(0, raises=False)
                assert self.state() in ("succeeded", "cancelled", "failed"), f"left {self.state()}"
                self.effects_are_what_the_record_says()
        finally:
            for life in self.lives:
                with suppress(Exception):
                    life.scope.end()


def _insert(connection: Connection, task: UUID, step: int) -> None:
    connection.execute(
        sa.text("INSERT INTO model_effect (task, step) VALUES (:task, :step)"), {"task": str(task), "step": step}
    )


def _is_in_transaction(raw: Any) -> bool:
    try:
        return bool(raw.in_transaction)
    except Exception:  # noqa: BLE001  # closed
        return False


def _of_mode(mode: str) -> Callable[[Session], Any]:
    return lambda session: Session(bind=session.connection(), join_transaction_mode=mode)  # type: ignore[arg-type]


_SECONDS: dict[str, Callable[[Session], Any]] = {
    "scoped": lambda session: scoped_session(sessionmaker(session.connection()))(),
    "sqlmodel": lambda session: SQLModelSession(bind=session.connection()),
    "nested": lambda session: session.begin_nested(),
    "savepoint of Core": lambda session: session.connection().begin_nested(),
}
