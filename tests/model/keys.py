"""Hand-overs under a key, in transactions that stay open while workers claim, give back and die.

Each hand-over writes a row in its transaction, and a run handles the rows that it finds when it starts. What must hold:
each committed row is handled, and no bookkeeping waits for an asker.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from aftercommit.records import moves, positions, workers, writing
from aftercommit.records.ids import uuid7
from aftercommit.records.moves import Claim
from aftercommit.tasks.transient import Fault, fault_of
from tests.model.checking import Change, no_change
from tests.model.variants import id_of

NAMES = ("task",)
SILENT_AFTER = 60.0
LEVELS = st.sampled_from(["READ COMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
ASKERS = st.integers(0, 2)
KEYS = st.sampled_from(["a", "a", "b"])
RUNS = st.integers(0, 3)


@dataclass
class Asker:
    """A transaction of the application's that is open.

    Attributes:
        connection: Its.
        rows: What it wrote, with the key of each.
    """

    connection: Connection
    rows: dict[int, str] = field(default_factory=dict)


@dataclass
class Reader:
    """A run.

    Attributes:
        claim: Its claim.
        read: The rows that it found at its start; None before.
        connection: Its transaction, on PostgreSQL: as old as its start.
    """

    claim: Claim
    read: set[int] | None = None
    connection: Connection | None = None


class KeysMachine(RuleBasedStateMachine):
    """All that can happen."""

    engine: Engine
    change: Change = staticmethod(no_change)

    @initialize()
    def start(self) -> None:
        """An empty database and a worker."""
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self.numbers = count(1)
        self.askers: dict[int, Asker] = {}
        self.runs: list[Reader] = []
        self.key_of: dict[UUID, str] = {}
        self.committed: dict[int, str] = {}
        self.saved: dict[UUID, set[int]] = {}
        self.at_claim: dict[UUID, set[int]] = {}
        self.handled: set[int] = set()
        with self.books() as connection:
            for table in ("aftercommit_task", "aftercommit_worker", "aftercommit_batch", "model_row"):
                connection.execute(sa.text(f"DELETE FROM {table}"))
        self.join()

    @property
    def stands_still(self) -> bool:
        """Whether an asker has SQLite's write lock, so that all others wait."""
        return self.is_sqlite and bool(self.askers)

    @contextmanager
    def books(self) -> Iterator[Connection]:
        """A short transaction of the bookkeeping's, which waits for nobody."""
        level = "SERIALIZABLE" if self.is_sqlite else "READ COMMITTED"
        try:
            with self.engine.execution_options(isolation_level=level).begin() as connection:
                if not self.is_sqlite:
                    connection.exec_driver_sql("SET LOCAL lock_timeout = 400")
                yield connection
        except DBAPIError as exc:
            if fault_of(exc) is Fault.CONFLICT:
                raise AssertionError("the bookkeeping waited for somebody's lock") from exc
            raise

    def join(self) -> None:
        """A new process."""
        self.worker = uuid7()
        with self.books() as connection:
            workers.register(connection, self.worker, host="model", pid=1, pools=["default"], names=list(NAMES))

    # --- asking ---------------------------------------------------------------------------------------------------

    @rule(number=ASKERS, level=LEVELS)
    def open(self, number: int, level: str) -> None:
        """An asker looks at something: at some levels he goes on seeing it as it was."""
        if number in self.askers or self.stands_still:
            return
        level = "SERIALIZABLE" if self.is_sqlite else level
        connection = self.engine.connect().execution_options(isolation_level=level)
        if not self.is_sqlite:
            connection.exec_driver_sql("SET LOCAL lock_timeout = 20")
        connection.execute(sa.text("SELECT count(*) FROM model_row")).scalar()
        self.askers[number] = Asker(connection)

    @rule(
        number=ASKERS,
        level=LEVELS,
        key=KEYS,
        savepoint=st.sampled_from(["none", "none", "kept", "undone"]),
        attempts=st.sampled_from([1, 1000]),
        meanwhile=st.booleans(),
        then=st.sampled_from(["stand still", "stand still", "commit"]),
    )
    def hand_over(  # noqa: PLR0917  # drawn
        self, number: int, level: str, key: str, savepoint: str, attempts: int, meanwhile: bool, then: str
    ) -> None:
        """He writes a row and asks for a run that handles it; others may claim between our two statements."""
        self.open(number, level)
        asker = self.askers.get(number)
        if asker is None:
            return
        row = next(self.numbers)
        task = writing.NewTask(
            id=uuid7(), task="task", pool="default", arguments="{}", worker=None, key=key, priority=0,
            max_attempts=attempts, delay=0.0, at=None, parent=None, context=None,
        )  # fmt: skip
        try:
            nested = None if savepoint == "none" else asker.connection.begin_nested()
            asker.connection.execute(
                sa.text("INSERT INTO model_row (id, name) VALUES (:id, :name)"), {"id": row, "name": key}
            )
            self.key_of[task.id] = key
            with self.claiming_before_the_lock(asker.connection) if meanwhile else no_change():
                writing.insert(asker.connection, [task])
            if nested is not None:
                (nested.commit if savepoint == "kept" else nested.rollback)()
            if savepoint != "undone":
                asker.rows[row] = key
        except DBAPIError as exc:
            self.undo(number, exc)
            return
        if then == "commit":
            self.commit(number)

    @contextmanager
    def claiming_before_the_lock(self, connection: Connection) -> Iterator[None]:
        """Have a worker claim between an INSERT that met something and the lock on what it met."""

        def claim(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            if "FOR KEY SHARE" in statement or "WHERE false" in statement:
                self.claim(2, crowded=False)

        sa.event.listen(connection, "before_cursor_execute", claim)
        try:
            yield
        finally:
            sa.event.remove(connection, "before_cursor_execute", claim)

    @rule(number=ASKERS)
    def commit(self, number: int) -> None:
        """He commits."""
        asker = self.askers.get(number)
        if asker is None:
            return
        try:
            asker.connection.commit()
        except DBAPIError as exc:
            self.undo(number, exc)
            return
        del self.askers[number]
        asker.connection.close()
        self.committed |= asker.rows

    @rule(number=ASKERS)
    def roll_back(self, number: int) -> None:
        """He thinks better of it."""
        asker = self.askers.pop(number, None)
        if asker is not None:
            asker.connection.close()

    def undo(self, number: int, error: DBAPIError) -> None:
        """He met a conflict, or somebody else's INSERT of the same key."""
        assert fault_of(error) is Fault.CONFLICT, error
        self.roll_back(number)

    # --- running --------------------------------------------------------------------------------------------------

    @rule(number=st.integers(1, 3), crowded=st.booleans())
    def claim(self, number: int, crowded: bool) -> None:  # drawn
        """The worker takes what is due; what was begun too often fails instead."""
        if self.stands_still:
            return
        with self.books() as connection:
            claimed = moves.claim(
                connection, pool="default", names=NAMES, worker=self.worker, count=number, crowded=crowded
            )
        for each in claimed:
            if each.claim.attempt > each.max_attempts:
                with self.books() as connection:
                    moves.fail(connection, each.claim, moves.Failure(error="no", traceback="no"), at="2020-01-01")
                # It was under way, and everybody can see that it has failed.
                self.handled |= self.at_claim[each.claim.id]
                continue
            key = self.key_of[each.claim.id]
            self.at_claim[each.claim.id] = {row for row, name in self.committed.items() if name == key}
            self.runs.append(Reader(each.claim))

    @rule(number=RUNS)
    def begin(self, number: int) -> None:
        """A run starts: this is what it finds, if it does not go on from a checkpoint."""
        if self.runs and not self.is_sqlite:
            self.read(self.runs[number % len(self.runs)])

    def read(self, run: Reader) -> Connection:
        """Its transaction; on SQLite it has the write lock from here to its end."""
        if run.connection is not None:
            return run.connection
        level = "SERIALIZABLE" if self.is_sqlite else "REPEATABLE READ"
        run.connection = self.engine.connect().execution_options(isolation_level=level)
        if self.is_sqlite:
            moves.take_lock(run.connection)
        found = run.connection.execute(
            sa.text("SELECT id FROM model_row WHERE name = :name"), {"name": self.key_of[run.claim.id]}
        )
        rows = set(found.scalars())
        if run.read is None:
            run.read = self.saved.get(run.claim.id, rows)
        return run.connection

    @precondition(lambda self: not self.stands_still)
    @rule(number=RUNS, how=st.sampled_from(["checkpoint", "position"]))
    def save(self, number: int, how: str) -> None:
        """A run commits that it has read, or how far its batch is."""
        if not self.runs:
            return
        run = self.runs[number % len(self.runs)]
        connection = self.read(run)
        if how == "checkpoint":
            assert moves.save_checkpoint(connection, run.claim, "1")
        else:
            assert moves.lock(connection, run.claim)
            positions.prepare(connection, run.claim.id, "b", lanes=1)
        self.close(run, connection)
        assert run.read is not None
        self.saved[run.claim.id] = run.read

    @precondition(lambda self: not self.stands_still)
    @rule(number=RUNS)
    def finish(self, number: int) -> None:
        """A run has handled what it read."""
        if not self.runs:
            return
        run = self.runs[number % len(self.runs)]
        connection = self.read(run)
        assert moves.finish(connection, run.claim, None)
        self.close(run, connection)
        self.runs.remove(run)
        assert run.read is not None
        self.handled |= run.read

    @staticmethod
    def close(run: Reader, connection: Connection) -> None:
        """Commit."""
        connection.commit()
        connection.close()
        run.connection = None

    # --- queued again ---------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.stands_still)
    @rule(number=RUNS, refund=st.booleans())
    def give_back(self, number: int, refund: bool) -> None:  # drawn
        """A run fails for now, or its process stops."""
        if not self.runs:
            return
        run = self.drop(number % len(self.runs))
        with self.books() as connection:
            assert moves.give_back(connection, run.claim, None, at="", delay=0.0, refund=refund)

    @precondition(lambda self: not self.stands_still)
    @rule(refund=st.booleans())
    def release(self, refund: bool) -> None:  # drawn
        """The worker finds out that it does not run what it is said to run."""
        while self.runs:
            self.drop(0)
        with self.books() as connection:
            pulse = workers.beat(connection, self.worker, silent_after=SILENT_AFTER)
            assert pulse is not None
            if pulse.running:
                workers.release_orphans(connection, self.worker, pulse.running, refund=refund)

    @precondition(lambda self: not self.stands_still)
    @rule()
    def crash(self) -> None:
        """The process dies, and another one rescues what it had."""
        while self.runs:
            self.drop(0)
        with self.books() as connection:
            connection.execute(
                sa.text("UPDATE aftercommit_worker SET seen_at = '2020-01-01 00:00:00' WHERE id = :id"),
                {"id": id_of(connection, self.worker)},
            )
        self.join()
        with self.books() as connection:
            workers.rescue(connection, silent_after=SILENT_AFTER)

    @precondition(lambda self: not self.stands_still)
    @rule(
        how=st.sampled_from(["checkpoint", "position", "begun", "taken"]),
        end=st.sampled_from(["given back", "released", "rescued"]),
        number=ASKERS,
        key=KEYS,
    )
    def interrupt(self, how: str, end: str, number: int, key: str) -> None:
        """A run gets so far, and is queued again; then somebody asks for one under the same key."""
        self.hand_over(number, "READ COMMITTED", key, "none", 1000, meanwhile=False, then="commit")
        self.claim(100, crowded=False)
        mine = [place for place, run in enumerate(self.runs) if self.key_of[run.claim.id] == key]
        if not mine:
            return
        if how == "begun":
            self.begin(mine[-1])
        elif how != "taken":
            self.save(mine[-1], how)
        if end == "given back":
            self.give_back(mine[-1], refund=how == "begun")
        elif end == "released":
            self.release(refund=False)
        else:
            self.crash()
        self.hand_over(number, "READ COMMITTED", key, "none", 1, meanwhile=False, then="commit")

    @rule(
        number=ASKERS,
        level=LEVELS,
        key=KEYS,
        first=st.sampled_from(["asked", "asked between", "claimed"]),
        dies=st.booleans(),
    )
    def overtake(self, number: int, level: str, key: str, first: str, dies: bool) -> None:  # drawn
        """An asker has not committed yet, while the worker claims, finishes or gives back what has the same key."""
        if self.stands_still:
            return
        self.hand_over((number + 1) % 3, "READ COMMITTED", key, "none", 1000, meanwhile=False, then="commit")
        if first == "claimed":
            self.claim(100, crowded=False)
        self.hand_over(number, level, key, "none", 1000, meanwhile=first == "asked between", then="stand still")
        if first == "asked":
            self.claim(100, crowded=False)
        if self.stands_still:
            return
        if first == "claimed" and dies:
            self.crash()
        while self.runs:
            if first == "claimed":
                self.give_back(0, refund=False)
            else:
                self.finish(0)
        self.commit(number)

    def drop(self, number: int) -> Reader:
        """Let a run go: what it has not committed is gone."""
        run = self.runs.pop(number)
        if run.connection is not None:
            run.connection.close()
        return run

    # --- what must hold -------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Everybody commits, and the worker does what is left: then each committed row has been handled."""
        try:
            if hasattr(self, "worker"):
                for end in [partial(self.commit, number) for number in list(self.askers)]:
                    end()
                for _ in range(3):
                    while self.runs:
                        self.finish(0)
                    self.release(refund=False)
                    self.claim(100, crowded=False)
                assert self.committed.keys() <= self.handled, "a hand-over was lost"
        finally:
            for connection in [each.connection for each in self.askers.values()]:
                connection.close()
            while self.runs:
                self.drop(0)
