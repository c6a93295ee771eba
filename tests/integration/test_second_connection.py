"""A session on two connections: a task's may read on the second; a request's tasks exist if both have committed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import TaskRecord, current_run, signals
from aftercommit.errors import ConfigurationError, HandOverError
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Heard, Workshop

# The second database is sync, whatever the first is.
sync_drivers = pytest.mark.drivers("psycopg", "pysqlite")


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database)
    yield shop
    shop.close()


@pytest.fixture
def legacy(tmp_path: Path) -> Iterator[sa.Engine]:
    """Another database, with an engine of the application's own."""
    # Its connections are not used twice: behind a COMMIT that failed, SQLite is still in the transaction.
    engine = sa.create_engine(f"sqlite:///{tmp_path}/legacy.db", poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE old (text varchar(20))")
        connection.exec_driver_sql("INSERT INTO old VALUES ('tea')")
        # A key that is looked at only at the COMMIT, which then fails.
        connection.exec_driver_sql("CREATE TABLE parent (id integer primary key)")
        connection.exec_driver_sql(
            "CREATE TABLE child (id integer references parent (id) deferrable initially deferred)"
        )
    sa.event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys = ON"))
    engine.dispose()
    yield engine
    engine.dispose()


def count(engine: sa.Engine, table: str) -> Any:
    """Rows of a table of the second database."""
    with engine.connect() as connection:
        return connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar()


@sync_drivers
def test_a_task_reads_from_a_second_database(shop: Workshop, legacy: sa.Engine) -> None:
    """Its record, its checkpoint and its end go to its own database."""

    @shop.task()
    def takes_over(session: Session, label: str) -> None:
        rows = session.execute(sa.text("SELECT text FROM old"), bind_arguments={"bind": legacy}).scalars().all()
        run = current_run()
        assert run is not None
        session.add_all(Effect(label=each) for each in rows)
        run.checkpoint(len(rows))
        session.commit()
        session.execute(sa.text("SELECT text FROM old"), bind_arguments={"bind": legacy}).all()

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        id = shop.ask(takes_over)
        heard.wait(signals.TaskSucceeded)

    assert (shop.record(id).state, shop.record(id).checkpoint, shop.effects()) == ("succeeded", 1, ["tea"])


@sync_drivers
@pytest.mark.parametrize("writes_here", [True, False], ids=["both", "only there"])
def test_a_task_that_writes_to_both_is_refused(shop: Workshop, legacy: sa.Engine, *, writes_here: bool) -> None:
    """At its first commit, before anything of either has taken effect, naming both."""

    @shop.task()
    def writes(session: Session, label: str) -> None:
        if writes_here:
            session.add(Effect(label="never"))
        session.execute(sa.text("INSERT INTO old VALUES ('never')"), bind_arguments={"bind": legacy})

    with shop.running(), Heard(signals.TaskFailed) as heard:
        shop.ask(writes)
        error = heard.wait(signals.TaskFailed).error

    assert isinstance(error, ConfigurationError)
    assert "legacy.db" in str(error)
    assert str(shop.db.engine().url.database) in str(error)
    assert (shop.effects(), count(legacy, "old")) == ([], 1)


@sync_drivers
def test_tasks_exist_only_if_both_commits_succeeded(shop: Workshop, legacy: sa.Engine) -> None:
    """The database of the tasks commits last: a failure of the other one leaves neither tasks nor rows there."""

    @shop.task()
    def note(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    engine = shop.db.engine()
    with shop.running():
        for number in range(8):
            with Session(engine) as session:
                session.execute(sa.text("INSERT INTO child VALUES (1)"), bind_arguments={"bind": legacy})
                session.add(Effect(label=f"row {number}"))
                shop.db.after_commit(session, note, f"task {number}")
                with pytest.raises(sa.exc.IntegrityError):
                    session.commit()
        with Session(engine) as session:
            session.execute(sa.text("INSERT INTO old VALUES ('coffee')"), bind_arguments={"bind": legacy})
            shop.db.after_commit(session, note, "good")
            session.commit()
        shop.drain()

    assert (shop.effects(), count(legacy, "child"), count(legacy, "old")) == (["good"], 0, 2)
    assert [record.arguments for record in shop.records()] == [{"label": "good"}]


@sync_drivers
def test_tasks_of_two_databases_in_one_transaction_are_refused(shop: Workshop, tmp_path: Path) -> None:
    """Neither COMMIT can be the last one for both."""
    other = Workshop(DatabaseUnderTest(url=f"sqlite:///{tmp_path}/other.db", driver="pysqlite", path=tmp_path))
    other.db.create_tables()
    shop.db.create_tables()

    @shop.task()
    def here(session: Session, label: str) -> None: ...

    @other.task()
    def there(session: Session, label: str) -> None: ...

    binds = iter([shop.db.engine(), other.db.engine()])

    class Routed(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            return next(binds)

    with Routed() as session:
        shop.db.after_commit(session, here, "x")
        other.db.after_commit(session, there, "y")
        with pytest.raises(HandOverError, match="two databases"):
            session.commit()
    other.close()

    assert shop.sql("SELECT count(*) FROM aftercommit_task") == 0


@sync_drivers
def test_a_get_bind_by_sqlalchemy_s_recipe_is_asked_as_sqlalchemy_asks_it(shop: Workshop) -> None:
    """It reads ``mapper.class_``; what one of them raises is told as a refused hand-over that names it."""
    shop.db.create_tables()

    @shop.task()
    def note(session: Session, label: str) -> None: ...

    class Routed(Session):
        def get_bind(self, mapper: Any = None, **_: Any) -> Any:
            assert mapper.class_ is TaskRecord
            return shop.db.engine()

    class Refusing(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            raise LookupError("no shard")

    with Routed() as session:
        shop.db.after_commit(session, note, "x")
        session.commit()
    with Refusing() as session, pytest.raises(HandOverError, match=r"get_bind.*Refusing.*no shard"):
        shop.db.after_commit(session, note, "x")

    assert shop.sql("SELECT count(*) FROM aftercommit_task") == 1
