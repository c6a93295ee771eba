"""A task exists if and only if the transaction that asked for it has really committed: on every driver."""

import gc
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker
from sqlmodel import Session as SQLModelSession

from aftercommit import TaskRecord
from aftercommit.commits.hooks import ConnectionHook, SessionHook
from aftercommit.commits.pending import Pending
from aftercommit.errors import HandOverError
from aftercommit.runner.outbox import Wanted
from tests.contract.stand import Row, Stand

MODES = ("conditional_savepoint", "rollback_only", "control_fully", "create_savepoint")


@pytest.fixture(params=["ours", "anybody's"])
def engine(request: pytest.FixtureRequest, stand: Stand) -> Engine:
    """The engine of a pool of ours, and one that the application made."""
    return stand.our_engine if request.param == "ours" else stand.engine


def touch(session: Session) -> None:
    """Have the session connected and in a transaction."""
    session.execute(text("SELECT 1"))


# --- the commit -------------------------------------------------------------------------------------------------


def test_a_commit_writes_what_was_asked_for_with_it(stand: Stand, engine: Engine):
    """Before the COMMIT nobody sees a record, after it everybody sees row and record."""

    def body() -> None:
        with Session(engine) as session:
            session.add(Row())
            stand.hand_over(session, "a", "b")
            session.flush()
            seen_before.append((stand.rows, stand.written))
            session.commit()

    seen_before: list[Any] = []
    stand.run(body)

    assert seen_before == [(0, [])]
    assert (stand.rows, stand.written) == (1, ["a", "b"])


@pytest.mark.parametrize("kind", ["Session", "sessionmaker", "scoped_session", "SQLModel", "begin()", "maker.begin()"])
def test_every_kind_of_session_can_be_asked(stand: Stand, kind: str):
    """Whatever made the session, its commit starts the task."""

    def body() -> None:
        if kind == "scoped_session":
            registry = scoped_session(sessionmaker(stand.engine))
            try:
                stand.db.after_commit(registry, stand.note, "x")
                registry.commit()
            finally:
                registry.remove()
            return
        if kind in {"begin()", "maker.begin()"}:
            with (
                sessionmaker(stand.engine).begin() if kind == "maker.begin()" else Session(stand.engine) as session,
                nullcontext() if kind == "maker.begin()" else session.begin(),
            ):
                stand.hand_over(session, "x")
            return
        made: Callable[..., Session] = {
            "Session": Session,
            "sessionmaker": sessionmaker(),
            "SQLModel": SQLModelSession,
        }[kind]
        with made(bind=stand.engine) as session:
            stand.hand_over(session, "x")
            session.commit()

    stand.run(body)

    assert stand.written == ["x"]


def test_a_rollback_leaves_nothing(stand: Stand, engine: Engine):
    """What was asked for before an explicit rollback never existed, and nobody is told of an error."""

    def body() -> None:
        with Session(engine) as session:
            session.add(Row())
            session.flush()
            stand.hand_over(session, "x")
            session.rollback()
            session.add(Row())
            stand.hand_over(session, "y")
            session.commit()

    stand.run(body)

    assert stand.written == ["y"]
    assert stand.lost == []


def test_each_commit_of_a_session_writes_its_own(stand: Stand, engine: Engine):
    """A session with many commits starts, with each, what was asked for since the last."""

    def body() -> list[list[str]]:
        seen = []
        with Session(engine) as session:
            for label in "abc":
                session.add(Row())
                stand.hand_over(session, label)
                session.commit()
                seen.append(stand.written)
        return seen

    seen = stand.run(body)

    assert seen == [["a"], ["a", "b"], ["a", "b", "c"]]
    assert stand.lost == []


def test_a_transaction_without_any_statement_counts(stand: Stand, engine: Engine):
    """A session that only hands over and commits, starts the task."""

    def body() -> None:
        with Session(engine) as session, session.begin():
            stand.hand_over(session, "x")

    stand.run(body)

    assert stand.written == ["x"]


def test_asking_does_no_io(stand: Stand, engine: Engine):
    """The hand-over connects to nothing; it begins the session's transaction, as ``add`` does."""

    def body() -> tuple[int, bool]:
        with Session(engine) as session, stand.statements(engine) as sent:
            stand.hand_over(session, "x")
            state = len(sent), session.in_transaction()
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            session.rollback()
            return state

    assert stand.run(body) == (0, True)


def test_all_tasks_of_a_transaction_cost_one_statement(stand: Stand, engine: Engine):
    """However many are asked for, one statement more is sent."""

    def body(labels: list[str]) -> int:
        with Session(engine) as session, stand.statements(engine) as sent:
            session.add(Row())
            stand.hand_over(session, *labels)
            session.commit()
            return len(sent)

    plain = stand.run(lambda: body([]))
    with_tasks = stand.run(lambda: body([str(n) for n in range(50)]))

    assert with_tasks == plain + 1
    assert len(stand.written) == 50


@pytest.mark.drivers("psycopg", "asyncpg")
def test_a_commit_that_fails_leaves_nothing(stand: Stand, engine: Engine):
    """A deferred constraint fails in COMMIT itself: the tasks of that transaction never existed."""
    with stand.outside.connect() as outside:
        outside.execute(text("CREATE TABLE child (id int PRIMARY KEY, row_id int)"))
        outside.execute(
            text("ALTER TABLE child ADD FOREIGN KEY (row_id) REFERENCES row (id) DEFERRABLE INITIALLY DEFERRED")
        )

    def body() -> None:
        with Session(engine) as session:
            session.execute(text("INSERT INTO child VALUES (1, 99)"))
            stand.hand_over(session, "x")
            with pytest.raises(DBAPIError):
                session.commit()
            session.rollback()
            stand.hand_over(session, "y")
            session.commit()

    stand.run(body)

    assert stand.written == ["y"]
    assert stand.lost == []


# --- asked for while the commit is under way --------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before_flush", "after_flush", "before_commit"])
@pytest.mark.parametrize("changes", [True, False])
def test_a_listener_may_ask_during_the_commit(stand: Stand, engine: Engine, moment: str, *, changes: bool):
    """What a flush or commit listener asks for belongs to this commit."""

    def body() -> None:
        with Session(engine) as session:
            asked = []

            def ask(*_: Any) -> None:
                if not asked:
                    asked.append(True)
                    stand.hand_over(session, "x")

            event.listen(session, moment, ask)
            row = Row()
            session.add(row)
            if not changes:
                session.flush()
                session.expunge(row)
                if moment != "before_commit":
                    session.info["dirty"] = session.get_one(Row, row.id)
                    session.info["dirty"].n = 7
            session.commit()

    stand.run(body)

    assert stand.written == ["x"]
    assert stand.lost == []


def test_a_listener_may_ask_in_a_commit_without_statements(stand: Stand, engine: Engine):
    """Nothing was read or written, and the only word comes from a listener of the commit: it counts."""

    def body() -> None:
        with Session(engine) as session:
            event.listen(session, "before_commit", lambda _: stand.hand_over(session, "x"), once=True)
            session.begin()
            session.commit()

    stand.run(body)

    assert stand.written == ["x"]


def test_asking_after_the_commit_is_reported(stand: Stand, engine: Engine):
    """A listener that runs after the COMMIT asks in vain, and that is said."""

    def body() -> None:
        with Session(engine) as session:
            touch(session)
            event.listen(session, "after_commit", lambda _: stand.hand_over(session, "x"), once=True)
            session.commit()

    stand.run(body)

    assert stand.written == []
    assert [each.tasks for each in stand.lost] == [("note",)]


# --- savepoints -------------------------------------------------------------------------------------------------


def test_a_savepoint_takes_its_own_with_it(stand: Stand, engine: Engine):
    """What was asked for inside a savepoint that is rolled back is gone; before and behind it stays."""

    def body() -> None:
        with Session(engine) as session:
            session.add(Row())
            stand.hand_over(session, "before")
            with suppress(ZeroDivisionError), session.begin_nested():
                session.add(Row())
                stand.hand_over(session, "inside")
                session.flush()
                raise ZeroDivisionError
            stand.hand_over(session, "behind")
            session.commit()

    stand.run(body)

    assert (stand.rows, stand.written) == (1, ["before", "behind"])
    assert stand.lost == []


@pytest.mark.parametrize("sql", [True, False])
def test_a_released_savepoint_passes_its_own_on(stand: Stand, engine: Engine, *, sql: bool):
    """What was asked for inside a released savepoint waits for what is around it, statements inside or not."""

    def body(*, commit: bool, label: str) -> None:
        with Session(engine) as session:
            with session.begin_nested():
                if sql:
                    session.add(Row())
                with session.begin_nested():
                    stand.hand_over(session, label)
            if commit:
                session.commit()
            else:
                session.rollback()

    stand.run(lambda: body(commit=False, label="rolled back"))
    stand.run(lambda: body(commit=True, label="committed"))

    assert stand.written == ["committed"]
    assert stand.lost == []


def test_an_inner_savepoint_goes_with_the_outer_one(stand: Stand, engine: Engine):
    """Released inside, rolled back outside: gone."""

    def body() -> None:
        with Session(engine) as session:
            session.add(Row())
            outer = session.begin_nested()
            with session.begin_nested():
                stand.hand_over(session, "inner")
                session.add(Row())
            outer.rollback()
            stand.hand_over(session, "kept")
            session.commit()

    stand.run(body)

    assert (stand.rows, stand.written) == (1, ["kept"])


@pytest.mark.parametrize("sql", [True, False])
def test_a_savepoint_still_open_is_committed_with_the_rest(stand: Stand, engine: Engine, *, sql: bool):
    """``with session.begin()`` ends while a savepoint is open: SQLAlchemy releases it, and the task starts."""

    def body() -> None:
        with Session(engine) as session, session.begin():
            stand.hand_over(session, "outside")
            session.begin_nested()
            if sql:
                session.add(Row())
            stand.hand_over(session, "inside")

    stand.run(body)

    assert stand.written == ["outside", "inside"]


def test_a_failed_flush_in_a_savepoint_takes_its_own_with_it(stand: Stand, engine: Engine):
    """Get-or-create as everybody writes it: the savepoint that failed is gone with its task."""

    def body() -> None:
        with Session(engine) as session:
            session.add(Row(id=1))
            session.flush()
            with suppress(DBAPIError), session.begin_nested():
                stand.hand_over(session, "inside")
                session.execute(sa.insert(Row).values(id=1))
            stand.hand_over(session, "outside")
            session.commit()

    stand.run(body)

    assert stand.written == ["outside"]


def test_a_savepoint_of_the_connection_counts(stand: Stand, engine: Engine):
    """A savepoint made past the session, on its connection, takes what was asked for since with it."""

    def body() -> None:
        with Session(engine) as session:
            session.add(Row())
            session.flush()
            stand.hand_over(session, "before")
            savepoint = session.connection().begin_nested()
            stand.hand_over(session, "inside")
            savepoint.rollback()
            stand.hand_over(session, "behind")
            session.commit()

    stand.run(body)

    assert stand.written == ["before", "behind"]
    assert stand.lost == []


# --- sessions joined to an outer transaction --------------------------------------------------------------------


@contextmanager
def in_outer(engine: Engine, mode: str, *, commit: bool) -> Iterator[tuple[Connection, Session]]:
    """A session joined to a connection that is in a transaction, which ends in one way or the other."""
    with engine.connect() as connection:
        outer = connection.begin()
        connection.execute(sa.insert(Row))
        with Session(bind=connection, join_transaction_mode=mode) as session:  # type: ignore[arg-type]
            yield connection, session
        if outer.is_active:
            if commit:
                outer.commit()
            else:
                outer.rollback()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sql", [True, False])
def test_a_joined_session_waits_for_the_outer_commit(stand: Stand, engine: Engine, mode: str, *, sql: bool):
    """Its own commit is not the real one, the connection's is; under ``control_fully`` they are the same."""

    def body() -> list[str]:
        with in_outer(engine, mode, commit=True) as (_, session):
            if sql:
                session.add(Row())
            stand.hand_over(session, "x")
            session.commit()
            return stand.written

    before = stand.run(body)

    assert before == (["x"] if mode == "control_fully" else [])
    assert stand.written == ["x"]
    assert stand.lost == []


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "control_fully"])
def test_the_outer_rollback_drops_what_a_joined_session_committed(stand: Stand, engine: Engine, mode: str):
    """The session committed, the transaction around it was rolled back: nothing ever existed, and nothing is said."""

    def body() -> None:
        with in_outer(engine, mode, commit=False) as (_, session):
            session.add(Row())
            stand.hand_over(session, "x")
            session.commit()

    stand.run(body)

    assert (stand.rows, stand.written) == (0, [])
    assert stand.lost == []


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "control_fully"])
def test_a_savepoint_around_a_joined_session_takes_its_tasks_with_it(stand: Stand, engine: Engine, mode: str):
    """A Core savepoint is rolled back after the session inside it has committed."""

    def body() -> None:
        with engine.connect() as connection, connection.begin():
            connection.execute(sa.insert(Row))
            savepoint = connection.begin_nested()
            with Session(bind=connection, join_transaction_mode=mode) as session:  # type: ignore[arg-type]
                session.add(Row())
                stand.hand_over(session, "inside")
                session.commit()
            savepoint.rollback()
            with Session(bind=connection, join_transaction_mode=mode) as session:  # type: ignore[arg-type]
                stand.hand_over(session, "behind")
                session.commit()

    stand.run(body)

    assert (stand.rows, stand.written) == (1, ["behind"])
    assert stand.lost == []


def test_a_savepoint_rolled_back_under_a_joined_session_takes_its_tasks_with_it(stand: Stand, engine: Engine):
    """A Core savepoint is rolled back before the session that asked inside it commits."""

    def body() -> None:
        with engine.connect() as connection, connection.begin():
            connection.execute(sa.insert(Row))
            with Session(bind=connection, join_transaction_mode="rollback_only") as session:
                savepoint = connection.begin_nested()
                stand.hand_over(session, "inside")
                savepoint.rollback()
                stand.hand_over(session, "behind")
                session.commit()

    stand.run(body)

    assert stand.written == ["behind"]
    assert stand.lost == []


def test_a_joined_session_that_commits_inside_a_savepoint_goes_with_it(stand: Stand, engine: Engine):
    """Asked for before the savepoint, committed inside it with what was written: both go when it is rolled back."""

    def body() -> None:
        with engine.connect() as connection, connection.begin():
            with Session(bind=connection, join_transaction_mode="rollback_only") as session:
                stand.hand_over(session, "x")
                savepoint = connection.begin_nested()
                session.add(Row())
                session.commit()
            savepoint.rollback()

    stand.run(body)

    assert (stand.rows, stand.written, stand.lost) == (0, [], [])


@pytest.mark.parametrize("mode", MODES)
def test_a_joined_session_that_rolls_back_leaves_the_rest(stand: Stand, engine: Engine, mode: str):
    """Its own are gone; what another session committed on the same connection goes with the connection."""

    def body() -> None:
        with in_outer(engine, mode, commit=True) as (_, session):
            stand.hand_over(session, "x")
            session.add(Row())
            session.flush()
            session.rollback()

    stand.run(body)

    assert stand.written == []
    assert stand.lost == []


def test_several_sessions_on_one_connection_share_its_commit(stand: Stand, engine: Engine):
    """Each has committed; one statement writes all, at the connection's commit."""

    def body() -> None:
        with engine.connect() as connection, connection.begin():
            connection.execute(sa.insert(Row))
            for label in "abc":
                with Session(bind=connection) as session:
                    session.add(Row())
                    stand.hand_over(session, label)
                    session.commit()

    stand.run(body)

    assert (stand.rows, stand.written) == (4, ["a", "b", "c"])


def test_a_commit_past_the_session_is_the_real_one(stand: Stand, engine: Engine):
    """Somebody commits the session's connection himself: that is the COMMIT that was waited for."""

    def body() -> None:
        with Session(engine) as session:
            session.add(Row())
            session.flush()
            stand.hand_over(session, "x")
            session.connection().commit()

    stand.run(body)

    assert (stand.rows, stand.written) == (1, ["x"])
    assert stand.lost == []


# --- forgotten --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sql", ["before", "after", "none"])
@pytest.mark.parametrize("how", ["close", "reset", "with", "savepoint"])
def test_closing_without_a_commit_is_reported(
    stand: Stand, engine: Engine, sql: str, how: str, caplog: pytest.LogCaptureFixture
):
    """Asked for after the last commit: an error with the line of the hand-over, and a signal."""

    def body() -> None:
        session = Session(engine)
        if sql == "before":
            touch(session)
        if how == "savepoint":
            session.begin_nested()
            touch(session)
        stand.hand_over(session, "x")
        if sql == "after":
            touch(session)
        if how == "with":
            with session:
                pass
        elif how == "reset":
            session.reset()
        else:
            session.close()

    with caplog.at_level(logging.ERROR):
        stand.run(body)

    assert stand.written == []
    (lost,) = stand.lost
    assert lost.tasks == ("note",)
    assert "stand.py" in lost.lines[0]
    assert "in hand_over" in lost.lines[0]
    (record,) = [each for each in caplog.records if "note" in each.getMessage()]
    assert record.levelno == logging.ERROR
    assert lost.lines[0] in record.getMessage()
    assert "AC110" in record.getMessage()


def test_asking_after_the_last_commit_is_reported(stand: Stand, engine: Engine):
    """The habit of most code bases, commit first and ask then, cannot be overlooked."""

    def body() -> None:
        with Session(engine) as session:
            session.add(Row())
            session.commit()
            stand.hand_over(session, "x")

    stand.run(body)

    assert (stand.rows, stand.written) == (1, [])
    assert [each.tasks for each in stand.lost] == [("note",)]


def test_a_closed_session_used_again_has_forgotten(stand: Stand, engine: Engine):
    """SQLAlchemy revives a closed session; its next commit does not start what was left waiting before."""

    def body() -> None:
        session = Session(engine)
        stand.hand_over(session, "x")
        session.close()
        session.add(Row())
        stand.hand_over(session, "y")
        session.commit()
        session.close()

    stand.run(body)

    assert stand.written == ["y"]
    assert len(stand.lost) == 1


@pytest.mark.drivers("psycopg", "pysqlite")
@pytest.mark.parametrize("sql", [True, False])
def test_a_session_that_is_garbage_collected_is_reported(stand: Stand, engine: Engine, *, sql: bool):
    """Nobody closed it: the report comes all the same, and its connection is back in the pool."""

    def body() -> None:
        session = Session(engine)
        if sql:
            touch(session)
        stand.hand_over(session, "x")

    body()
    gc.collect()

    assert [each.tasks for each in stand.lost] == [("note",)]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("sql", ["before", "after", "none"])
def test_an_exception_that_unwinds_is_silent(stand: Stand, engine: Engine, sql: str):
    """A session closed by an error that passed through was meant to leave nothing."""

    def body() -> None:
        with suppress(ZeroDivisionError), Session(engine) as session:
            if sql == "before":
                touch(session)
            stand.hand_over(session, "x")
            if sql == "after":
                touch(session)
            raise ZeroDivisionError

    stand.run(body)

    assert stand.written == []
    assert stand.lost == []


def test_asking_while_handling_an_error_is_still_reported(stand: Stand, engine: Engine):
    """The error that was being handled at the hand-over did not end the session: forgetting the commit did."""

    def body() -> None:
        try:
            raise ZeroDivisionError  # noqa: TRY301  # the hand-over is to come while it is handled
        except ZeroDivisionError:
            with Session(engine) as session:
                stand.hand_over(session, "x")

    stand.run(body)

    assert [each.tasks for each in stand.lost] == [("note",)]


# --- refused at hand-over ---------------------------------------------------------------------------------------


def test_an_unbound_session_is_refused(stand: Stand):
    """The record could be written nowhere."""
    with Session() as session, pytest.raises(HandOverError, match="no bind for the table aftercommit_task"):
        stand.hand_over(session, "x")


def test_a_session_that_autocommits_is_refused(stand: Stand):
    """By its engine, or by its connection: there is no commit to wait for."""

    def body() -> None:
        with (
            Session(stand.engine.execution_options(isolation_level="AUTOCOMMIT")) as session,
            pytest.raises(HandOverError, match="AUTOCOMMIT"),
        ):
            stand.hand_over(session, "x")
        with Session(stand.engine) as session:
            session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            with pytest.raises(HandOverError, match="AUTOCOMMIT"):
                stand.hand_over(session, "x")

    stand.run(body)

    assert stand.lost == []


def test_a_two_phase_session_is_refused(stand: Stand):
    """A task could start before the second phase."""
    with Session(stand.engine, twophase=True) as session, pytest.raises(HandOverError, match="two phases"):
        stand.hand_over(session, "x")


def test_a_session_that_does_not_begin_by_itself(stand: Stand):
    """Outside its transaction asking is refused, inside it works."""

    def body() -> None:
        with Session(stand.engine, autobegin=False) as session:
            with pytest.raises(HandOverError, match="autobegin"):
                stand.hand_over(session, "x")
            with session.begin():
                stand.hand_over(session, "y")

    stand.run(body)

    assert stand.written == ["y"]


def test_a_session_of_another_database_is_refused(stand: Stand, tmp_path_factory: pytest.TempPathFactory):
    """The record would be written where nobody looks for it."""
    other = sa.create_engine(f"sqlite:///{tmp_path_factory.mktemp('other')}/other.db")

    with Session(other) as session, pytest.raises(HandOverError, match="another database"):
        stand.hand_over(session, "x")


def test_what_is_no_session_is_refused(stand: Stand):
    """A connection, or anything else, is told what to pass."""

    def body() -> None:
        with stand.engine.connect() as connection, pytest.raises(HandOverError, match="got Connection"):
            stand.db.after_commit(connection, stand.note, "x")

    stand.run(body)


# --- several binds ----------------------------------------------------------------------------------------------


def test_a_session_with_several_binds_writes_where_our_table_is_bound(
    stand: Stand, tmp_path_factory: pytest.TempPathFactory
):
    """Rows go to one database, records to ours; both commit with the session."""
    other = sa.create_engine(f"sqlite:///{tmp_path_factory.mktemp('other')}/other.db")
    Row.metadata.create_all(other)

    def body() -> None:
        with Session(binds={Row: other, TaskRecord: stand.engine}) as session:
            session.add(Row())
            stand.hand_over(session, "x")
            session.commit()
        with Session(binds={Row: other}) as session, pytest.raises(HandOverError, match="no bind"):
            stand.hand_over(session, "y")

    stand.run(body)

    with Session(other) as session:
        assert session.scalar(select(sa.func.count(Row.id))) == 1
    assert stand.written == ["x"]
    other.dispose()


# --- leaks ------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_after_many_hand_overs(stand: Stand, engine: Engine):
    """After a thousand hand-overs, committed, rolled back, joined and failed, nothing of them is left."""
    kept: weakref.WeakSet[Any] = weakref.WeakSet()
    # What other tests have left to their threads is not ours to judge.
    before = alive()

    def body() -> None:
        with engine.connect() as connection:
            for number in range(250):
                with Session(engine) as session:
                    stand.hand_over(session, "committed")
                    session.commit()
                    stand.hand_over(session, "rolled back")
                    session.rollback()
                    with suppress(ZeroDivisionError), session.begin_nested():
                        stand.hand_over(session, "savepoint")
                        raise ZeroDivisionError
                    session.commit()
                    kept.add(session)
                with Session(bind=connection) as session:
                    stand.hand_over(session, "joined")
                    session.commit()
                    kept.add(session)
                connection.rollback() if number % 2 else connection.commit()
            kept.add(connection)

    stand.run(body)
    stand.handed_over.clear()

    # A driver's thread lets go of what it did last when it gets its turn, which on a busy machine takes a moment.
    deadline = time.monotonic() + 30
    while (left := (newly(before), list(kept))) != ([], []):
        assert time.monotonic() < deadline, left
        del left


def alive() -> list[Any]:
    """All that a hand-over is made of, of whatever test."""
    gc.collect()
    return [
        each
        for each in gc.get_objects()
        if isinstance(each, (Pending, SessionHook, ConnectionHook, Wanted, SessionTransaction))
    ]


def newly(before: list[Any]) -> list[Any]:
    """The same, without what was there *before*."""
    known = {id(each) for each in before}
    return [each for each in alive() if id(each) not in known]


def test_a_session_that_was_never_asked_is_left_alone(stand: Stand, engine: Engine):
    """No statement, and no error, is added to a session that hands nothing over."""

    def body() -> list[str]:
        with Session(engine) as session, stand.statements(engine) as sent:
            touch(session)
            session.commit()
            with pytest.raises(InvalidRequestError):
                session.prepare()
            return sent

    assert stand.run(body) == ["SELECT 1"]
