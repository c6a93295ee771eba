"""Progress is written by two: the bookkeeping, and on SQLite the task itself with its commits."""

import threading

import pytest
import sqlalchemy as sa

from aftercommit.records import moves
from aftercommit.records.ids import uuid7
from aftercommit.runner import rounds
from aftercommit.runner.run import Run
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import TIMEOUT, Workshop


@pytest.mark.drivers("pysqlite")
def test_no_older_progress_is_written_over_a_newer_one(database: DatabaseUnderTest):
    """While the bookkeeping waits for the write lock, the task commits a newer figure: that one stays."""
    shop = Workshop(database)
    shop.db.create_tables()

    @shop.task()
    def work(session: object, label: str) -> None:
        """Its run is made by hand."""

    run = Run(task=work, id=uuid7(), claim=None, attempt=1, max_attempts=1, arguments="{}")
    engine = shop.db.engine()
    asked = threading.Event()

    def keep_books() -> None:
        with engine.connect() as connection, connection.begin():
            sa.event.listen(connection, "before_cursor_execute", lambda *_: asked.set())
            rounds._progress_of(run)(connection)

    # The task has the lock, and tells of its progress twice: before and after the bookkeeping looked.
    with engine.connect() as task, task.begin():
        moves.take_lock(task)
        run.current.progress(1, 2)
        bookkeeper = threading.Thread(target=keep_books)
        bookkeeper.start()
        assert asked.wait(TIMEOUT)
        run.current.progress(2, 2)
        newest = run.current.take_progress()
        assert newest is not None
        moves.set_progress(task, run.id, *newest)
    bookkeeper.join(TIMEOUT)

    assert shop.sql("SELECT done FROM aftercommit_progress") == 2
    shop.close()
