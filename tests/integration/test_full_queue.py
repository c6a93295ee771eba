"""A queue of hundreds of thousands: what is asked again and again reads a few pages, whatever stands in the way."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from aftercommit.records import moves, schema, waiting, workers
from aftercommit.records.ids import uuid7
from tests.support.databases import DatabaseUnderTest

MANY = 100_000
NAMES = ["known", "other"]
WORKER = uuid7()

QUEUES = {
    # pool: (task, due, priority, how many)
    "due": [("known", "2020-01-01", 0, MANY)],
    "delayed": [("known", "2999-01-01", 0, MANY), ("known", "2020-01-01", 0, 20), ("other", "2020-01-01", -1, 20)],
    "unknown": [("gone", "2020-01-01", 5, MANY), ("known", "2020-01-01", 0, 20)],
    "only unknown": [("gone", "2020-01-01", 0, 20)],
}


@pytest.fixture
def connection(database: DatabaseUnderTest) -> Iterator[sa.Connection]:
    """A connection to a database with full queues, and with many records that are done."""
    engine = sa.create_engine(database.sync_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        if not database.is_sqlite:
            connection.exec_driver_sql("SET synchronous_commit = off")
        schema.create_tables(connection)
        for pool, kinds in QUEUES.items():
            for task, due, priority, count in kinds:
                fill(connection, count, task=task, pool=pool, run_at=due, priority=priority)
        fill(connection, MANY // 2, task="known", pool="due", state="succeeded", finished_at="2020-01-01")
        fill(connection, 10, task="known", pool="due", state="running", worker=WORKER.hex)
        connection.exec_driver_sql("ANALYZE" if database.is_sqlite else "VACUUM ANALYZE aftercommit_task")
        workers.register(connection, WORKER, host="here", pid=1, pools=[], names=[])
        yield connection
    engine.dispose()


def fill(connection: sa.Connection, count: int, **values: Any) -> None:
    """Write *count* records."""
    is_sqlite = connection.dialect.name == "sqlite"
    columns = {"state": "queued", "run_at": "2020-01-01", "enqueued_at": "2020-01-01", "arguments": "{}", **values}
    for name in ("run_at", "enqueued_at", "finished_at"):
        if name in columns:
            columns[name] += " 00:00:00.000000"
    listed = ", ".join(f"'{value}'" if isinstance(value, str) else str(value) for value in columns.values())
    id, rows = (
        ("lower(hex(randomblob(16)))", f"json_each('[{','.join('0' * count)}]')")
        if is_sqlite
        else ("gen_random_uuid()", f"generate_series(1, {count})")
    )
    connection.exec_driver_sql(
        f"INSERT INTO aftercommit_task (id, {', '.join(columns)}) SELECT {id}, {listed} FROM {rows}"
    )


def cost(connection: sa.Connection, work: Callable[[sa.Connection], Any]) -> tuple[Any, int]:
    """Do *work*; return what it gives, and how much was read: SQLite's steps by the thousand, PostgreSQL's pages."""
    if connection.dialect.name == "sqlite":
        steps: list[int] = []
        driver: Any = connection.connection.driver_connection
        driver.set_progress_handler(lambda: steps.append(1) and None, 1000)
        try:
            return work(connection), len(steps)
        finally:
            driver.set_progress_handler(None, 0)

    seen: list[tuple[str, Any]] = []

    @sa.event.listens_for(connection, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        seen.append((statement, parameters))

    result = work(connection)
    sa.event.remove(connection, "before_cursor_execute", note)
    pages = 0
    # Done once more, on what is left.
    for statement, parameters in seen:
        found = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters).scalar()
        plan = json.loads(found)[0]["Plan"] if isinstance(found, str) else found[0]["Plan"]  # type: ignore[index]
        pages += plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    return result, pages


@pytest.mark.drivers("psycopg", "pysqlite")
def test_what_is_asked_again_and_again_reads_little(connection: sa.Connection):
    """With 300 000 tasks queued, due, delayed and of a name that nobody knows, no look and no claim reads them."""
    look = waiting.look(connection, names=NAMES)
    answers = {"look": cost(connection, lambda c: waiting.look(c, names=NAMES))}
    for pool in QUEUES:

        def claim(c: sa.Connection, pool: str = pool) -> list[moves.Claimed]:
            return moves.claim(c, pool=pool, names=NAMES, worker=WORKER, count=5, crowded=look[pool].is_crowded)

        answers[f"claim {pool}"] = cost(connection, claim)
    answers["beat"] = cost(connection, lambda c: workers.beat(c, WORKER, silent_after=60.0))
    answers["rescue"] = cost(connection, lambda c: workers.rescue(c, silent_after=60.0))
    answers["prune"] = cost(connection, lambda c: workers.prune(c, keep=60.0, count=20))

    # A scan of the 100 000 takes some 600 pages of the index alone, and 400 000 steps at the very least.
    assert {what: read for what, (_, read) in answers.items() if read > 300} == {}
    assert {pool: (each.seconds is not None and each.seconds < 0, each.is_crowded) for pool, each in look.items()} == {
        "due": (True, False), "delayed": (True, True), "unknown": (True, True), "only unknown": (False, True),
    }  # fmt: skip
    assert [len(answers[f"claim {pool}"][0]) for pool in QUEUES] == [5, 5, 5, 0]
    assert answers["prune"][0] == 20


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_crowded_claim_takes_the_same_as_a_plain_one(database: DatabaseUnderTest):
    """Past strangers and delayed tasks, and across names, a claim takes the highest priority first, then the oldest."""
    engine = sa.create_engine(database.sync_url, isolation_level="AUTOCOMMIT")
    taken: list[list[tuple[str, int]]] = []

    with engine.connect() as connection:
        schema.create_tables(connection)
        for crowded in (False, True):
            connection.exec_driver_sql("DELETE FROM aftercommit_task")
            fill(connection, 5, task="gone", pool="p", priority=9)
            for number, (task, priority) in enumerate(
                [("known", 0), ("other", 0), ("known", 1), ("other", -1), ("known", 0), ("other", 2)]
            ):
                fill(connection, 1, task=task, pool="p", priority=priority, run_at=f"2020-02-0{9 - number}")
            fill(connection, 5, task="known", pool="p", priority=9, run_at="2999-01-01")
            order = []
            while found := moves.claim(connection, pool="p", names=NAMES, worker=WORKER, count=2, crowded=crowded):
                order.append(
                    sorted(
                        tuple(connection.execute(
                            sa.text("SELECT task, priority FROM aftercommit_task WHERE id = :id"),
                            {"id": each.claim.id.hex if database.is_sqlite else each.claim.id},
                        ).one())
                        for each in found
                    )
                )  # fmt: skip
            taken.append(order)
    engine.dispose()

    assert taken[0] == [[("known", 1), ("other", 2)], [("known", 0), ("other", 0)], [("known", 0), ("other", -1)]]
    assert taken[1] == taken[0]
