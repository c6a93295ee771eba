"""A state machine over everything that can happen to a record, checked against what ought to be true.

Workers are simulated, the database is real: each rule does with ``records`` what a runner does. A variant is a way of
completing a run, or of not reconciling; the honest one is the library's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from aftercommit.records import moves, workers, writing
from aftercommit.records.ids import uuid7
from aftercommit.records.moves import Claim
from aftercommit.tasks.transient import Fault, fault_of
from tests.model.variants import Stage, Variant, id_of

NAMES = ("task",)
SILENT_AFTER = 60.0
KEYS = st.sampled_from([None, None, "a", "b"])
WORKERS = st.integers(0, 1)


@dataclass
class Worker:
    """A simulated process.

    Attributes:
        id: As in its row.
        held: What it believes to run.
        stepped: Those of them whose first step it believes to be done.
        begun: Runs whose transaction is open: the snapshot has been taken.
    """

    id: UUID = field(default_factory=uuid7)
    held: dict[UUID, Claim] = field(default_factory=dict)
    stepped: set[UUID] = field(default_factory=set)
    begun: dict[UUID, Connection] = field(default_factory=dict)


class Machine(RuleBasedStateMachine):
    """All that can happen."""

    engine: Engine
    variant: Variant

    @initialize()
    def start(self) -> None:
        """An empty database and two workers."""
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self.asked: set[UUID] = set()
        self.never: set[UUID] = set()
        self.open: list[Connection] = []
        with self.transaction() as connection:
            for table in ("aftercommit_task", "aftercommit_worker", "model_effect"):
                connection.execute(sa.text(f"DELETE FROM {table}"))
        self.workers = [self.join() for _ in range(2)]

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A short one, of the bookkeeping's kind."""
        level = "SERIALIZABLE" if self.is_sqlite else "READ COMMITTED"
        with self.engine.execution_options(isolation_level=level).begin() as connection:
            yield connection

    def join(self) -> Worker:
        """A new process."""
        worker = Worker()
        with self.transaction() as connection:
            workers.register(connection, worker.id, host="model", pid=1, pools=["default"], names=list(NAMES))
        return worker

    # --- asking ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.asked) < 2)
    @rule(
        number=WORKERS, born=st.booleans(), key=KEYS, outcome=st.sampled_from(["commit", "commit", "roll back", "lost"])
    )
    def ask(self, number: int, born: bool, key: str | None, outcome: str) -> None:  # drawn
        """A request commits, rolls back, or commits and never hears of it."""
        worker = self.workers[number] if born and key is None else None
        id = uuid7()
        task = writing.NewTask(
            id=id, task="task", pool="default", arguments="{}", worker=None if worker is None else worker.id, key=key,
            priority=0, max_attempts=1000, delay=0.0, at=None, parent=None, context=None,
        )  # fmt: skip
        with self.transaction() as connection:
            written = writing.insert(connection, [task])
            if not self.variant.writes_with_the_asker:
                connection.commit()
            if outcome == "roll back":
                connection.rollback()
        if outcome == "roll back" or id not in written:
            self.never.add(id)
            return
        self.asked.add(id)
        if worker is not None and outcome == "commit":
            worker.held[id] = Claim(id, 1, 1)

    # --- running --------------------------------------------------------------------------------------------------

    @rule(number=WORKERS, count=st.integers(1, 3))
    def claim(self, number: int, count: int) -> None:
        """A worker takes what is due, as from a queue that nothing stands in the way of, and as from a crowded one."""
        worker = self.workers[number]
        with self.transaction() as connection:
            claimed = moves.claim(
                connection, pool="default", names=NAMES, worker=worker.id, count=count, crowded=count == 2
            )
        for each in claimed:
            # A process never runs one record twice at a time: the old run has been told, and is on its way out.
            self.drop(worker, each.claim.id)
            worker.held[each.claim.id] = each.claim
            if each.checkpoint is not None:
                worker.stepped.add(each.claim.id)

    @rule(number=WORKERS, data=st.data())
    def begin(self, number: int, data: st.DataObject) -> None:
        """A run begins: from here on it sees what was true now."""
        worker = self.workers[number]
        idle = sorted(worker.held.keys() - worker.begun.keys())
        if self.is_sqlite or not idle:
            return
        id = data.draw(st.sampled_from(idle))
        connection = self.engine.connect().execution_options(isolation_level="REPEATABLE READ")
        connection.execute(sa.text("SELECT count(*) FROM model_effect"))
        worker.begun[id] = connection
        self.open.append(connection)

    @rule(number=WORKERS, data=st.data())
    def step(self, number: int, data: st.DataObject) -> None:
        """A run commits its first step; if it may not, it ends."""
        worker = self.workers[number]
        todo = sorted(worker.held.keys() - worker.stepped)
        if todo:
            self.first(worker, data.draw(st.sampled_from(todo)))

    def first(self, worker: Worker, id: UUID) -> None:
        """The first step."""
        connection = worker.begun.pop(id, None)
        for stage in self.variant.first(worker.held[id]):
            if not self.stage(stage, connection):
                self.drop(worker, id)
                return
        worker.stepped.add(id)

    @rule(number=WORKERS, data=st.data(), survives=st.integers(0, 3))
    def run(self, number: int, data: st.DataObject, survives: int) -> None:
        """A run ends; its process may die between two of its transactions."""
        worker = self.workers[number]
        if not worker.held:
            return
        id = data.draw(st.sampled_from(sorted(worker.held)))
        if self.complete(worker, id, stages=99 if survives else 1):
            self.drop(worker, id)
        elif id in worker.held:
            self.crash(number)

    def complete(self, worker: Worker, id: UUID, *, stages: int = 99) -> bool:
        """Run it to its end; False if the process died on the way."""
        if id not in worker.stepped:
            self.first(worker, id)
            if id not in worker.held:
                return True
        todo = self.variant.stages(worker.held[id])
        connection = worker.begun.pop(id, None)
        for number, stage in enumerate(todo):
            if number == stages:
                return False
            if not self.stage(stage, connection):
                return True
            connection = None
        return True

    def stage(self, stage: Stage, connection: Connection | None) -> bool:
        """One transaction; a conflict is an end, as the claim is asked for before anything is repeated."""
        if connection is None:
            connection = self.engine.connect()
            if not self.is_sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection:
            try:
                done = stage(connection)
                if done:
                    connection.commit()
            except DBAPIError as exc:
                assert fault_of(exc) is Fault.CONFLICT, exc  # noqa: PT017  # all others are the model's own errors
                done = False
        return done

    @rule(number=WORKERS, data=st.data(), refund=st.booleans(), fails=st.booleans())
    def give_up(self, number: int, data: st.DataObject, refund: bool, fails: bool) -> None:  # drawn
        """A run fails: for good, or until later."""
        worker = self.workers[number]
        if not worker.held:
            return
        id = data.draw(st.sampled_from(sorted(worker.held)))
        claim, failure = worker.held[id], moves.Failure(error="no", traceback="no")
        with self.transaction() as connection:
            if fails:
                moves.fail(connection, claim, failure, at="2020-01-01")
            else:
                moves.give_back(connection, claim, failure, at="2020-01-01", delay=0.0, refund=refund)
        self.drop(worker, id)

    def drop(self, worker: Worker, id: UUID) -> None:
        """Forget a run."""
        worker.held.pop(id, None)
        worker.stepped.discard(id)
        connection = worker.begun.pop(id, None)
        if connection is not None:
            connection.close()

    # --- dying ----------------------------------------------------------------------------------------------------

    @rule(number=WORKERS)
    def crash(self, number: int) -> None:
        """A process dies, and another starts; the dead one will be seen as silent."""
        worker = self.workers[number]
        self.fall_silent(worker)
        for id in list(worker.held):
            self.drop(worker, id)
        self.workers[number] = self.join()

    @rule(number=WORKERS, then=st.sampled_from(["nothing yet", "rescued", "overtaken", "overtaken"]))
    def freeze(self, number: int, then: str) -> None:
        """A process stands still for so long that it counts as dead; what it holds, it goes on with."""
        self.fall_silent(self.workers[number])
        if then != "nothing yet":
            self.rescue()
        if then == "overtaken":
            self.claim(1 - number, 3)

    @rule(number=WORKERS, fails=st.booleans())
    def start_over(self, number: int, fails: bool) -> None:  # drawn
        """All that a process has fails or is cancelled, and somebody wants it once more; another one takes it."""
        for id, claim in list(self.workers[number].held.items()):
            with self.transaction() as connection:
                if fails:
                    moves.fail(connection, claim, moves.Failure(error="no", traceback="no"), at="2020-01-01")
                else:
                    moves.cancel(connection, id)
                moves.retry(connection, id)
            if fails:
                self.drop(self.workers[number], id)
        self.claim(number if fails else 1 - number, 3)
        for worker in self.workers:
            for id in sorted(worker.held.keys() - worker.stepped):
                self.first(worker, id)

    def fall_silent(self, worker: Worker) -> None:
        """Let its last heartbeat be long ago."""
        with self.transaction() as connection:
            connection.execute(
                sa.text("UPDATE aftercommit_worker SET seen_at = '2020-01-01 00:00:00' WHERE id = :id"),
                {"id": id_of(connection, worker.id)},
            )

    @rule()
    def rescue(self) -> None:
        """Somebody finds what the silent had."""
        with self.transaction() as connection:
            workers.rescue(connection, silent_after=SILENT_AFTER)

    @rule(number=WORKERS)
    def beat(self, number: int) -> None:
        """A heartbeat; what the record says and the worker does not know of is given back."""
        worker = self.workers[number]
        with self.transaction() as connection:
            pulse = workers.beat(connection, worker.id, silent_after=SILENT_AFTER)
            if pulse is None:
                return
            orphans = pulse.running - worker.held.keys()
            if orphans and self.variant.reconciles:
                workers.release_orphans(connection, worker.id, orphans)

    @rule(number=WORKERS)
    def shut_down(self, number: int) -> None:
        """A process stops in order."""
        worker = self.workers[number]
        with self.transaction() as connection:
            for claim in worker.held.values():
                moves.give_back(connection, claim, None, at="", delay=0.0, refund=True)
            workers.sign_off(connection, worker.id)
        for id in list(worker.held):
            self.drop(worker, id)
        self.workers[number] = self.join()

    # --- by hand --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), move=st.sampled_from([moves.cancel, moves.retry, moves.retry]))
    def intervene(self, data: st.DataObject, move: Callable[[Connection, UUID], bool]) -> None:
        """Somebody cancels a task, or wants it once more."""
        id = data.draw(st.sampled_from(sorted(self.asked)))
        with self.transaction() as connection:
            move(connection, id)

    # --- what must hold -------------------------------------------------------------------------------------------

    def look(self) -> tuple[dict[UUID, str], dict[tuple[UUID, int], int]]:
        """States, and numbers of effects."""
        with self.transaction() as connection:
            states = connection.execute(sa.text("SELECT CAST(id AS text), state FROM aftercommit_task")).all()
            found = connection.execute(sa.text("SELECT task, step, count(*) FROM model_effect GROUP BY task, step"))
            counts = {(UUID(id), step): count for id, step, count in found}
        return {UUID(id): state for id, state in states}, counts

    @invariant()
    def effects_are_what_the_records_say(self) -> None:
        """One effect where the record says ``succeeded``, none anywhere else, and no record of what never was."""
        states, counts = self.look()
        assert states.keys() == self.asked, "a record is missing, or of a task that was never asked for"
        assert self.never.isdisjoint(states)
        assert all(count == 1 for count in counts.values()), "an effect took place twice"
        done = {id for id, state in states.items() if state == "succeeded"}
        assert done == {id for id, step in counts if step == 2}, "the records and the effects disagree"
        assert done <= {id for id, step in counts if step == 1}, "the records and the effects disagree"

    def teardown(self) -> None:
        """Everybody goes on; in the end nothing is left unfinished."""
        try:
            if hasattr(self, "workers"):
                self.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Give all connections back."""
        for connection in getattr(self, "open", ()):
            connection.close()

    def finish(self) -> None:
        """Let live workers do their rounds until there is nothing to do."""
        for _ in range(4):
            for number, worker in enumerate(self.workers):
                for id in list(worker.held):
                    self.complete(worker, id)
                    self.drop(worker, id)
                self.beat(number)
                self.rescue()
                self.claim(number, 100)
        states, _ = self.look()
        unfinished = {state for state in states.values() if state in ("queued", "running")}
        assert not unfinished, f"left {unfinished}"
        self.effects_are_what_the_records_say()
