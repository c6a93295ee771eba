"""Every line that a task writes says whose it is, and which request asked for it; nothing of it stays behind."""

import asyncio
import io
import logging
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI, Request
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, Retry, current_run, signals
from aftercommit.fastapi import AfterCommitDep, install
from aftercommit.monitoring.logging import TaskContextFilter, carry
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import serve
from tests.support.workshop import Heard, Workshop

tenant: ContextVar[str] = ContextVar("tenant")
carry(tenant)


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database, heartbeat=0.2, pools={"narrow": PoolSettings(pool_size=1)})
    yield shop
    shop.close()


class Lines(logging.Handler):
    """What a handler is given, with the context variables of structlog at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[logging.LogRecord, dict[str, Any]]] = []
        self.addFilter(TaskContextFilter())

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.seen.append((record, structlog.contextvars.get_contextvars()))

    def of(self, logger: str) -> list[tuple[str, Any, Any, Any]]:
        """Message, task, id and attempt of the lines of one logger."""
        return [
            (record.getMessage(), record.task, record.task_id, record.attempt)  # type: ignore[attr-defined]
            for record, _ in self.seen
            if record.name == logger
        ]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """All lines of this process."""
    lines = Lines()
    root = logging.getLogger()
    level = root.level
    root.addHandler(lines)
    root.setLevel(logging.INFO)
    yield lines
    root.removeHandler(lines)
    root.setLevel(level)


# --- the standard library -----------------------------------------------------------------------------------------


def test_every_line_says_which_task_wrote_it(shop: Workshop, lines: Lines):
    """Whichever logger it comes from, a line in a task has its name, id and attempt; outside they are None."""

    @shop.task(retry=Retry(base=0.01, on=(ValueError,)))
    def work(session: Session, label: str) -> None:
        logging.getLogger("somebody.elses").info("at work")
        run = current_run()
        if run is not None and run.attempt == 1:
            raise ValueError("not yet")

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        id = shop.ask(work)
        heard.wait(signals.TaskSucceeded)
        logging.getLogger("somebody.elses").info("outside")

    assert lines.of("somebody.elses") == [
        ("at work", "work", str(id), 1),
        ("at work", "work", str(id), 2),
        ("outside", None, None, None),
    ]


def test_a_format_may_name_the_task(shop: Workshop):
    """A formatter that names ``task``, ``task_id`` and ``attempt`` works for every line, the library's own too."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(TaskContextFilter())
    handler.setFormatter(logging.Formatter("%(name)s %(task)s %(task_id)s %(attempt)s %(message)s"))
    handler.setLevel(logging.ERROR)
    logging.getLogger().addHandler(handler)

    @shop.task()
    def work(session: Session, label: str) -> None:
        raise ValueError("no use")

    try:
        with shop.running(), Heard(signals.TaskFailed) as heard:
            id = shop.ask(work)
            heard.wait(signals.TaskFailed)
    finally:
        logging.getLogger().removeHandler(handler)

    assert written.getvalue().startswith(f"aftercommit.tasks work {id} 1 Task 'work'")


def test_what_was_said_of_a_record_stays(lines: Lines):
    """A record that says by itself which task it is about keeps that: the library's own lines do."""
    logging.getLogger("mine").warning("about another", extra={"task": "t", "task_id": "7", "attempt": 3})

    assert lines.of("mine") == [("about another", "t", "7", 3)]


# --- structlog ----------------------------------------------------------------------------------------------------


def test_structlog_sees_the_task_and_its_request(shop: Workshop):
    """structlog's context holds the task's name, id and attempt beside what the request had bound, try by try."""
    seen: list[dict[str, Any]] = []

    @shop.task(retry=Retry(base=0.01, on=(ValueError,)))
    def work(session: Session, label: str) -> None:
        seen.append(structlog.contextvars.get_contextvars())
        if len(seen) == 1:
            raise ValueError("not yet")

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        with structlog.contextvars.bound_contextvars(request_id="r1", task="not this one"):
            id = shop.ask(work) if not shop.is_async else shop.commit(_binding(shop, work))
        heard.wait(signals.TaskSucceeded)

    mine = {"request_id": "r1", "task": "work", "task_id": str(id)}
    assert seen == [{**mine, "attempt": 1}, {**mine, "attempt": 2}]


def _binding(shop: Workshop, task: Any) -> Any:
    # Async sessions live on the runner's loop, which knows nothing of what this thread has bound.
    def ask(session: Session) -> Any:
        with structlog.contextvars.bound_contextvars(request_id="r1", task="not this one"):
            return shop.db.after_commit(session, task).id

    return ask


@pytest.mark.drivers("pysqlite", "aiosqlite")
def test_a_repeat_in_place_has_its_own_attempt(shop: Workshop):
    """A task in memory is repeated in its place, and what it writes then carries the new attempt."""
    seen: list[int] = []

    @shop.task(durable=False, retry=Retry(base=0.01, on=(ValueError,)))
    def work(session: Session, label: str) -> None:
        seen.append(structlog.contextvars.get_contextvars()["attempt"])
        if len(seen) < 3:
            raise ValueError("not yet")

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        shop.ask(work)
        heard.wait(signals.TaskSucceeded)

    assert seen == [1, 2, 3]


def test_nothing_of_one_run_is_seen_by_the_next(shop: Workshop):
    """What a task, or its request, has bound is gone with it, although its thread runs the next one."""
    seen: list[tuple[str, dict[str, Any], str | None]] = []
    threads: set[str] = set()
    gate = threading.Event()

    @shop.task(pool="narrow", gate=gate)
    def work(session: Session, label: str) -> None:
        seen.append((label, structlog.contextvars.get_contextvars(), tenant.get(None)))
        threads.add(threading.current_thread().name)
        structlog.contextvars.bind_contextvars(left_behind=label)

    def ask(session: Session) -> Any:
        token = tenant.set("acme")
        try:
            with structlog.contextvars.bound_contextvars(request_id="r1"):
                one = shop.db.after_commit(session, work, "first").id
        finally:
            tenant.reset(token)
        return one, shop.db.after_commit(session, work, "second").id

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        one, two = shop.commit(ask)
        # The second waits for the first one's place, and so for its thread.
        gate.set()
        heard.wait(signals.TaskSucceeded, count=2)

    assert len(threads) == 1
    assert seen == [
        ("first", {"request_id": "r1", "task": "work", "task_id": str(one), "attempt": 1}, "acme"),
        ("second", {"task": "work", "task_id": str(two), "attempt": 1}, None),
    ]


def test_a_task_passes_on_its_requests_context_and_not_its_own(shop: Workshop):
    """What a task asks for is told as itself; the request that stands behind both is the same."""
    seen: list[dict[str, Any]] = []

    @shop.task()
    def child(session: Session, label: str) -> None:
        seen.append(structlog.contextvars.get_contextvars())

    @shop.task()
    def parent(session: Session, label: str) -> None:
        shop.db.after_commit(session, child)

    def ask(session: Session) -> None:
        with structlog.contextvars.bound_contextvars(request_id="r1"):
            shop.db.after_commit(session, parent)

    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        shop.commit(ask)
        heard.wait(signals.TaskSucceeded, count=2)

    record = next(each for each in shop.records() if each.task == "child")
    assert seen == [{"request_id": "r1", "task": "child", "task_id": str(record.id), "attempt": 1}]
    assert record.context == {"structlog": {"request_id": "r1"}}


def test_the_librarys_own_lines_carry_the_requests_context(shop: Workshop, lines: Lines):
    """The line that says that a task failed can be found by the request that asked for it."""

    @shop.task()
    def work(session: Session, label: str) -> None:
        raise ValueError("no use")

    def ask(session: Session) -> None:
        with structlog.contextvars.bound_contextvars(request_id="r1"):
            shop.db.after_commit(session, work)

    with shop.running(), Heard(signals.TaskFailed) as heard:
        shop.commit(ask)
        heard.wait(signals.TaskFailed)

    bound = [bound for record, bound in lines.seen if record.name == "aftercommit.tasks"]
    assert [each.get("request_id") for each in bound] == ["r1"]


# --- what is carried ----------------------------------------------------------------------------------------------


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_context_that_cannot_be_put_back_keeps_no_task_from_running(shop: Workshop, lines: Lines):
    """Somebody has written nonsense to the record: that is told, and the task runs."""
    seen: list[str] = []

    @shop.task()
    def work(session: Session, label: str) -> None:
        seen.append(label)

    shop.db.create_tables()
    shop.ask(work, "a")
    shop.sql("""UPDATE aftercommit_task SET context = '{"structlog": 7, "variables": {"tenant": "acme"}}'""")
    with shop.running(), Heard(signals.TaskSucceeded) as heard:
        heard.wait(signals.TaskSucceeded)

    assert seen == ["a"]
    assert [text for text, *_ in lines.of("aftercommit.tasks.context")] == [
        "What followed a task across the hand-over could not be put back"
    ]


def test_two_variables_of_one_name_are_refused():
    """A variable is known by its name, so a second one of the same name is an error where it is named."""
    with pytest.raises(ValueError, match="'tenant'"):
        carry(ContextVar("tenant"))
    carry(tenant)


def test_what_a_middleware_binds_reaches_the_tasks_lines(sqlite_url: str, lines: Lines):
    """A request's id, bound by a middleware, is on the lines of its tasks: of both kinds, from both kinds of endpoint.

    A real application. The variable of the application's own is carried as well.
    """
    db = Database(sqlite_url.replace("+pysqlite", ""))
    app = FastAPI()
    install(app, db)
    seen: list[tuple[str, Any, str | None]] = []

    @app.middleware("http")
    async def bind(request: Request, call_next: Any) -> Any:
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request.headers["x-request-id"])
        tenant.set("acme")
        return await call_next(request)

    def look(name: str) -> None:
        bound = structlog.contextvars.get_contextvars()
        seen.append((name, bound["request_id"], tenant.get(None)))

    @db.task
    def plain(session: Session) -> None:
        look("plain")

    @db.task
    async def native(session: AsyncSession) -> None:
        await asyncio.to_thread(look, "native")

    @app.post("/plain")
    def ask_plain(after_commit: AfterCommitDep) -> None:
        after_commit(plain)

    @app.post("/native")
    async def ask_native(after_commit: AfterCommitDep) -> None:
        after_commit(native)

    with serve(app) as url, httpx.Client(base_url=url) as client, Heard(signals.TaskSucceeded) as heard:
        for number, path in enumerate(("/plain", "/native", "/plain"), 1):
            assert client.post(path, headers={"x-request-id": f"r{number}"}).status_code == 200
        heard.wait(signals.TaskSucceeded, count=3)

    assert sorted(seen) == [("native", "r2", "acme"), ("plain", "r1", "acme"), ("plain", "r3", "acme")]


# --- the pools --------------------------------------------------------------------------------------------------


def test_pools_log_where_sqlalchemys_do(shop: Workshop):
    """Each check-out is a line of ``sqlalchemy.pool``, which has a switch of its own, and none of ours."""
    lines = Lines()
    root, theirs = logging.getLogger(), logging.getLogger("sqlalchemy.pool")
    levels = root.level, theirs.level
    root.addHandler(lines)
    root.setLevel(logging.DEBUG)
    try:
        with shop.running():
            shop.commit(lambda session: session.connection())
            quiet = [record for record, _ in lines.seen if "pool" in record.name and "returned" in record.getMessage()]
            theirs.setLevel(logging.DEBUG)
        other = Database(shop.under_test.sync_url)
        with other.session() as session:
            session.connection()
        other.dispose()
    finally:
        root.removeHandler(lines)
        root.setLevel(levels[0])
        theirs.setLevel(levels[1])

    names = {record.name for record, _ in lines.seen}
    assert quiet == []
    assert not any(name.startswith("aftercommit.pools.") for name in names), names
    assert "sqlalchemy.pool.impl.QueuePool" in names
