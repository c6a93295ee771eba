"""Whole runs, with the library's own way from the function to the record, and ``on_failure`` as a run of its own.

Functions and ``on_failure`` read a counter and write what follows it; others run in between. Statements of ours are
cancelled by the server. What must hold: the counters are exact, whoever fails has had his ``on_failure`` called and it
ends, and nobody fails because of a statement of ours.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock
from uuid import UUID

import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from aftercommit import Database, Task, current_run
from aftercommit.records import moves, workers, writing
from aftercommit.records.ids import uuid7
from aftercommit.runner import run as run_module
from aftercommit.runner.executor import SyncExecutor
from aftercommit.runner.on_failure import OnFailure, Recorded
from aftercommit.runner.run import Run
from aftercommit.runner.shells import run_sync
from aftercommit.sessions import SyncOpened
from aftercommit.tasks import retry
from aftercommit.tasks.retry import Again
from aftercommit.tasks.transient import Fault, fault_of
from tests.model.checking import Change, replacing

NAMES = ("task",)
SILENT_AFTER = 60.0
ENDLESS = 20
CANCELLED = "DO $$ BEGIN RAISE EXCEPTION 'canceling statement due to user request' USING ERRCODE = '57014'; END $$"

EXITS: dict[str, Callable[[], BaseException]] = {
    "an exception": lambda: ValueError("second"),
    "sys.exit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "CancelledError": asyncio.CancelledError,
}

# --- what is almost right -------------------------------------------------------------------------------------------


def _open_at_read_committed(executor: SyncExecutor, run: Run) -> SyncOpened:
    return SyncOpened(executor._context.sessions.task_scope(run.pool, run.owner, "READ COMMITTED"))


def _repeating_what_is_no_exception() -> AbstractContextManager[Any]:
    honest = OnFailure._judge

    def judge(call: OnFailure, error: BaseException) -> Any:
        if isinstance(error, Exception):
            return honest(call, error)
        return Again(delay=0.0, in_place=True, counts=False, drop_connection=False)

    return mock.patch.object(OnFailure, "_judge", judge)


def _recording_without_the_call() -> AbstractContextManager[Any]:
    honest = OnFailure._judge

    def judge(call: OnFailure, error: BaseException) -> Any:
        return honest(call, error) if call._was_called else Recorded.NOT_YET

    return mock.patch.object(OnFailure, "_judge", judge)


@contextmanager
def _judging_ours_as_the_tasks() -> Iterator[None]:
    def judge(error: BaseException) -> Fault:
        found = fault_of(error)
        return Fault.PERMANENT if found is Fault.CANCELLED else found

    with mock.patch.object(retry, "fault_of", judge), mock.patch.object(run_module, "cancels_ours", return_value=False):
        yield


BROKEN: dict[str, Change] = {
    "what is no exception is repeated": _repeating_what_is_no_exception,
}
BROKEN_ON_POSTGRESQL: dict[str, Change] = {
    **BROKEN,
    "on_failure runs at READ COMMITTED": replacing(SyncExecutor, "open_session", _open_at_read_committed),
    "a failure is recorded without the call": _recording_without_the_call,
    "a statement of ours is as good as the task's": _judging_ours_as_the_tasks,
}


# --- what a run stands on -------------------------------------------------------------------------------------------


class NoWait(threading.Event):
    """Never set, and waited for by nobody."""

    def wait(self, timeout: float | None = None) -> bool:  # time does not pass here
        """Time passes at once."""
        return False


class Context:
    """A worker, for one run at a time."""

    def __init__(self, db: Database, engine: Engine) -> None:
        self.sessions = db.sessions
        self.books = self
        self.stopping = NoWait()
        self.loop = None
        self._engine = engine

    def call(self, work: Callable[[Connection], Any]) -> Any:
        """A short transaction."""
        with self._engine.begin() as connection:
            return work(connection)

    async def async_call(self, work: Callable[[Connection], Any]) -> Any:
        """Nobody asks for it."""
        raise NotImplementedError

    def leave(self, run: Run) -> None:
        """Its record says ``running``, which the next heartbeat finds."""

    def expect(self, pool: str) -> None:
        """Nobody looks."""


# --- all that can happen --------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What one task does.

    Attributes:
        fails: Whether its function fails.
        saves: Whether it commits a checkpoint in the middle.
        exit: How its ``on_failure`` ends; None for well.
        lets_in: At which counter another task runs in the middle of it.
        calls: How often its ``on_failure`` was called.
    """

    fails: bool
    saves: bool
    exit: str | None
    lets_in: str
    calls: int = 0


class EndsMachine(RuleBasedStateMachine):
    """All that can happen."""

    db: Database
    task: Task[Any, Any]
    books_engine: Engine
    outside: Engine
    playing: "EndsMachine"

    @initialize()
    def start(self) -> None:
        """Two counters, and a worker."""
        EndsMachine.playing = self
        self.is_sqlite = self.outside.dialect.name == "sqlite"
        self.context = Context(self.db, self.books_engine)
        self.plans: dict[UUID, Plan] = {}
        self.cancelled: set[int] = set()
        self.statements = 0
        self.in_on_failure = 0
        with self.books_engine.begin() as connection:
            for table in ("aftercommit_task", "aftercommit_worker", "model_effect", "model_row"):
                connection.execute(sa.text(f"DELETE FROM {table}"))
            connection.execute(sa.text("INSERT INTO model_row (id, name) VALUES (0, 'done'), (0, 'failed')"))
            self.worker = uuid7()
            workers.register(connection, self.worker, host="model", pid=1, pools=["default"], names=list(NAMES))

    @rule(
        fails=st.sampled_from([True, True, False]),
        saves=st.booleans(),
        leaves=st.sampled_from([None, None, None, *EXITS]),
        lets_in=st.sampled_from(["done", "failed", "failed", ""]),
    )
    def ask(self, fails: bool, saves: bool, leaves: str | None, lets_in: str) -> None:  # drawn
        """Somebody asks for a task."""
        id = uuid7()
        self.plans[id] = Plan(fails, saves, leaves, lets_in)
        task = writing.NewTask(
            id=id, task="task", pool="default", arguments="{}", worker=None, key=None, priority=0, max_attempts=5,
            delay=0.0, at=None, parent=None, context=None,
        )  # fmt: skip
        self.context.call(lambda connection: writing.insert(connection, [task]))

    @rule(cancelled=st.sets(st.integers(1, 6), max_size=3))
    def run(self, cancelled: set[int]) -> None:
        """The worker runs one, and perhaps others in the middle of it; the server cancels some of our statements."""
        self.statements, self.cancelled = 0, set() if self.is_sqlite else cancelled
        try:
            with self.cancelling():
                self.run_one()
        finally:
            self.cancelled = set()
        self.run_orphans()

    def run_one(self) -> None:
        """Claim one, and run it to its end."""
        found = self.context.call(
            lambda connection: moves.claim(connection, pool="default", names=NAMES, worker=self.worker, count=1)
        )
        for each in found:
            made = Run(
                task=self.task, id=each.claim.id, claim=each.claim, attempt=each.claim.attempt,
                max_attempts=each.max_attempts, arguments=each.arguments, checkpoint=each.checkpoint,
                refunds=each.refunds,
            )  # fmt: skip
            run_sync(made, self.context)

    def run_orphans(self) -> None:
        """What could not be recorded is queued again."""
        with self.books_engine.begin() as connection:
            pulse = workers.beat(connection, self.worker, silent_after=SILENT_AFTER)
            assert pulse is not None
            orphans = workers.release_orphans(connection, self.worker, pulse.running) if pulse.running else []
        for _ in orphans:
            self.run_one()

    @contextmanager
    def cancelling(self) -> Iterator[None]:
        """Have the server cancel statements, by their number: ours, and those of ``on_failure``."""
        engine = self.db.engine("default")

        def cancel(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> tuple[str, Any]:
            if "aftercommit" in statement or self.in_on_failure:
                self.statements += 1
                if self.statements in self.cancelled:
                    return CANCELLED, ()
            return statement, parameters

        sa.event.listen(engine, "before_cursor_execute", cancel, retval=True)
        try:
            yield
        finally:
            sa.event.remove(engine, "before_cursor_execute", cancel)

    # --- what they do ---------------------------------------------------------------------------------------------

    def work(self, session: Session) -> None:
        """The function."""
        run = current_run()
        assert run is not None
        plan = self.plans[run.id]
        if plan.saves and run.restored is None:
            _effect(session, run.id, 1)
            run.checkpoint(1)
            session.commit()
        self.count(session, "done", plan)
        if plan.fails:
            raise ValueError("first")
        _effect(session, run.id, 2)

    def failed(self, session: Session) -> None:
        """Its ``on_failure``."""
        run = current_run()
        assert run is not None
        plan = self.plans[run.id]
        plan.calls += 1
        self.in_on_failure += 1
        try:
            self.count(session, "failed", plan)
            _effect(session, run.id, 3)
        finally:
            self.in_on_failure -= 1
        if plan.exit is not None and plan.calls <= ENDLESS:
            raise EXITS[plan.exit]()  # noqa: RSE102  # makes one

    def count(self, session: Session, name: str, plan: Plan) -> None:
        """Read, let others in, and write what follows what was read."""
        number = session.execute(sa.text("SELECT id FROM model_row WHERE name = :name"), {"name": name}).scalar_one()
        if plan.lets_in == name and not self.is_sqlite:
            plan.lets_in = ""
            cancelled, self.cancelled = self.cancelled, set()
            try:
                self.run_one()
            finally:
                self.cancelled = cancelled
        session.execute(sa.text("UPDATE model_row SET id = :id WHERE name = :name"), {"id": number + 1, "name": name})

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def the_books_balance(self) -> None:
        """Each task has come to what its plan says, and the counters say how often."""
        if not hasattr(self, "worker"):
            return
        with self.outside.connect() as connection:
            states = connection.execute(sa.text("SELECT CAST(id AS text), state FROM aftercommit_task")).all()
            counters = dict(connection.execute(sa.text("SELECT name, id FROM model_row")).all())  # type: ignore[arg-type]
            rows = connection.execute(sa.text("SELECT task, step FROM model_effect")).all()
        effects = sorted((UUID(task), step) for task, step in rows)
        expected: list[tuple[UUID, int]] = []
        for text, state in states:
            id = UUID(text)
            plan = self.plans[id]
            if state == "queued":
                continue
            assert state == ("failed" if plan.fails else "succeeded"), f"a task is {state} that should not be"
            assert plan.calls <= ENDLESS, "on_failure was called without end"
            assert bool(plan.calls) == plan.fails, "on_failure was not called"
            expected += [(id, 1)] * plan.saves + [(id, 2)] * (not plan.fails)
            expected += [(id, 3)] * (plan.fails and plan.exit is None)
        assert effects == sorted(expected), "effects and records disagree"
        assert counters["done"] == sum(step == 2 for _, step in expected), "an update was lost"
        assert counters["failed"] == sum(step == 3 for _, step in expected), "an update was lost"


def _effect(session: Session, id: UUID, step: int) -> None:
    session.execute(
        sa.text("INSERT INTO model_effect (task, step) VALUES (:task, :step)"), {"task": str(id), "step": step}
    )
