"""Traces go on from a request to its tasks, through retries and other processes; figures follow the conventions."""

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from uuid import UUID

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from opentelemetry import propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database, PoolSettings, Retry, current_run, signals
from aftercommit.errors import ConfigurationError, PoolExhausted
from aftercommit.fastapi import AfterCommitDep, SessionDep, install
from aftercommit.monitoring.opentelemetry import instrument, uninstrument
from aftercommit.testing import replace
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import serve
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop, async_held_elsewhere, held_elsewhere


class Telemetry:
    """What reaches the exporters."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])
        self.tracer = self.tracers.get_tracer("test")

    @contextmanager
    def on(self, *databases: Database) -> Iterator[None]:
        """Instrument, for the length of a ``with``."""
        instrument(*databases, tracer_provider=self.tracers, meter_provider=self.meters)
        try:
            yield
        finally:
            uninstrument()

    def named(self, name: str) -> list[ReadableSpan]:
        """The spans of a name that have ended, in order."""
        return [span for span in self._spans.get_finished_spans() if span.name == name]

    def points(self, name: str) -> list[Any]:
        """The points of a metric."""
        data = self._reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def total(self, name: str, **attributes: Any) -> float:
        """The sum of a counter's points that have these attributes."""
        wanted = {key.replace("_", "."): value for key, value in attributes.items()}
        return sum(point.value for point in self.points(name) if wanted.items() <= dict(point.attributes).items())


@pytest.fixture
def telemetry() -> Telemetry:
    """Real providers of the SDK, with exporters in memory."""
    return Telemetry()


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database, heartbeat=0.2)
    yield shop
    shop.close()


def effect(session: Session, label: str) -> None:
    """What most tasks here do."""
    session.add(Effect(label=label))


def ask_in_span(shop: Workshop, telemetry: Telemetry, task: Any, *args: Any) -> Any:
    """Hand a task over inside a span called "request"."""

    def ask(session: Session) -> Any:
        with telemetry.tracer.start_as_current_span("request"):
            return shop.db.after_commit(session, task, *args).id

    return shop.commit(ask)


# --- spans --------------------------------------------------------------------------------------------------------


def test_a_run_is_a_span_below_its_hand_over_and_linked_to_it(shop: Workshop, telemetry: Telemetry):
    """Request, hand-over and run are one trace; the run's span is linked to the hand-over's and surrounds its code."""

    @shop.task()
    def work(session: Session, label: str) -> None:
        with telemetry.tracer.start_as_current_span("inside"):
            effect(session, label)

    with telemetry.on(), shop.running():
        id = ask_in_span(shop, telemetry, work, "a")
        shop.drain()

    [request], [create], [process], [inside] = (
        telemetry.named(name) for name in ("request", "create work", "process work", "inside")
    )
    assert (create.kind, process.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert create.parent == request.context
    assert process.parent is not None
    assert process.parent.span_id == create.context.span_id
    assert [link.context.span_id for link in process.links] == [create.context.span_id]
    assert inside.parent == process.context
    assert {span.context.trace_id for span in (request, create, process, inside)} == {request.context.trace_id}
    common = {
        "messaging.system": "aftercommit",
        "messaging.destination.name": "work",
        "messaging.message.id": str(id),
        "messaging.aftercommit.pool": "default",
    }
    assert create.attributes == {
        **common,
        "messaging.operation.name": "create",
        "messaging.operation.type": "create",
    }
    assert process.attributes == {
        **common,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.aftercommit.attempt": 1,
    }
    assert process.status.status_code is StatusCode.UNSET


def test_the_commit_is_inside_of_the_span(shop: Workshop, telemetry: Telemetry):
    """The run's span ends after its commit: what the database is asked for by then is below it."""
    seen: list[int] = []

    @sa.event.listens_for(sa.Engine, "commit")
    def note(connection: sa.Connection) -> None:
        if current_run() is not None:
            seen.append(trace.get_current_span().get_span_context().span_id)

    try:
        with telemetry.on(), shop.running():
            shop.ask(shop.task()(effect), "a")
            shop.drain()
    finally:
        sa.event.remove(sa.Engine, "commit", note)

    [process] = telemetry.named("process effect")
    assert seen == [process.context.span_id]


def test_a_task_that_nobody_traced_begins_a_trace_at_its_hand_over(shop: Workshop, telemetry: Telemetry):
    """Without a request's span, the hand-over's is the first of the trace."""
    with telemetry.on(), shop.running():
        shop.ask(shop.task()(effect), "a")
        shop.drain()

    [create], [process] = telemetry.named("create effect"), telemetry.named("process effect")
    assert create.parent is None
    assert process.context.trace_id == create.context.trace_id


def test_a_failure_is_on_the_span(shop: Workshop, telemetry: Telemetry):
    """A run that failed for good ends its span with an error, its kind and its traceback."""

    @shop.task()
    def work(session: Session, label: str) -> None:
        raise ValueError("no use")

    with telemetry.on(), shop.running():
        shop.ask(work)
        shop.drain()

    [span] = telemetry.named("process work")
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "ValueError: no use")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ValueError"
    [event] = span.events
    assert (event.name, event.attributes is not None and event.attributes["exception.message"]) == (
        "exception",
        "no use",
    )


def test_each_attempt_has_a_span_that_is_linked_to_the_hand_over(shop: Workshop, telemetry: Telemetry):
    """What is tried again later is another span of the same trace, with its attempt; the first one says why."""

    @shop.task(retry=Retry(base=0.01, on=(ValueError,)))
    def work(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        if run.attempt == 1:
            raise ValueError("not yet")

    with telemetry.on(), shop.running(), Heard(signals.TaskSucceeded) as heard:
        shop.ask(work)
        heard.wait(signals.TaskSucceeded)
        shop.drain()

    [create] = telemetry.named("create work")
    first, second = telemetry.named("process work")
    for span in (first, second):
        assert [link.context.span_id for link in span.links] == [create.context.span_id]
        assert span.context.trace_id == create.context.trace_id
    assert first.attributes is not None
    assert second.attributes is not None
    assert [each.attributes["messaging.aftercommit.attempt"] for each in (first, second)] == [1, 2]
    assert (first.status.status_code, second.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)


@pytest.mark.drivers("pysqlite", "aiosqlite")
def test_a_repeat_in_place_is_an_event(shop: Workshop, telemetry: Telemetry):
    """What this worker repeats itself is one span with an event for each repeat, and no error if it comes out well."""
    tries: list[int] = []

    @shop.task(durable=False, retry=Retry(base=0.01, on=(ValueError,)))
    def work(session: Session, label: str) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("not yet")

    with telemetry.on(), shop.running():
        shop.ask(work)
        shop.drain()

    [span] = telemetry.named("process work")
    assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
        (
            "repeat",
            {"exception.type": "ValueError", "exception.message": "not yet", "messaging.aftercommit.attempt": 2},
        )
    ]
    assert span.attributes is not None
    assert (span.attributes["messaging.aftercommit.repeats"], span.status.status_code) == (1, StatusCode.UNSET)


def test_another_process_goes_on_with_the_trace(shop: Workshop, telemetry: Telemetry):
    """The link stands in the record: whoever runs the task later, without the request, continues its trace."""
    work = shop.task()(effect)
    with telemetry.on():
        id = ask_where_nothing_runs(shop, telemetry, work)
        with shop.running():
            shop.drain()

    [create], [process] = telemetry.named("create effect"), telemetry.named("process effect")
    assert shop.record(id).state == "succeeded"
    assert [link.context.span_id for link in process.links] == [create.context.span_id]
    assert process.context.trace_id == telemetry.named("request")[0].context.trace_id


def test_a_rescued_task_goes_on_with_the_trace(database: DatabaseUnderTest, telemetry: Telemetry):
    """The tasks of a worker that died are run by another one, as their next attempt, in the same trace."""
    shop = Workshop(database, heartbeat=0.1, silent_after=0.5)
    work = shop.task()(effect)
    with telemetry.on(), Heard(signals.TasksRescued) as heard:
        id = ask_where_nothing_runs(shop, telemetry, work)
        # As a process leaves it that dies in the middle of the run.
        shop.sql(
            "UPDATE aftercommit_task SET state = 'running', attempt = 1, claims = 1, worker = :worker",
            worker=UUID(int=7).hex,
        )
        with shop.running():
            rescued = heard.wait(signals.TasksRescued)
            shop.drain()
    shop.close()

    [create], [process] = telemetry.named("create effect"), telemetry.named("process effect")
    assert rescued.requeued == (id,)
    assert process.attributes is not None
    assert process.attributes["messaging.aftercommit.attempt"] == 2
    assert [link.context.span_id for link in process.links] == [create.context.span_id]
    assert process.context.trace_id == create.context.trace_id
    assert telemetry.total("aftercommit.tasks.rescued") == 1


def ask_where_nothing_runs(shop: Workshop, telemetry: Telemetry, task: Any) -> Any:
    """Hand a task over as another process would, which has no runner, inside a span called "request"."""
    url = shop.under_test.sync_url
    db = Database(url)

    @db.task(name=task.name)
    def mine(label: str = "") -> None: ...

    db.create_tables()
    with telemetry.tracer.start_as_current_span("request"), db.session() as session:
        id = db.after_commit(session, mine).id
    db.dispose()
    return id


def test_a_cancelled_run_says_so(shop: Workshop, telemetry: Telemetry):
    """The span of a run that lost its claim is an error, of that kind."""
    gate, begun = threading.Event(), threading.Event()
    task = shop.task(gate=gate, begun=begun.set)(effect)
    with telemetry.on(), shop.running(), Heard(signals.ClaimLost) as heard:
        id = shop.ask(task, "never")
        assert begun.wait(TIMEOUT)
        shop.on_loop(shop.db.async_cancel(id)) if shop.is_async else shop.db.cancel(id)
        gate.set()
        heard.wait(signals.ClaimLost)
        shop.drain()

    [span] = telemetry.named("process effect")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "aftercommit.errors.LostClaim"
    assert span.status.status_code is StatusCode.ERROR
    assert telemetry.total("aftercommit.claims.lost") == 1


@pytest.mark.drivers("psycopg", "pysqlite")
def test_a_thread_that_hangs_holds_no_span(shop: Workshop, telemetry: Telemetry):
    """The span of a run whose time is over ends with the record of that, although its thread goes on."""
    gate = threading.Event()
    task = shop.task(timeout=0.2, gate=gate)(effect)
    with telemetry.on(), shop.running(), Heard(signals.TaskFailed) as heard:
        shop.ask(task, "never")
        heard.wait(signals.TaskFailed)

        [span] = telemetry.named("process effect")
        gate.set()
        shop.drain()

    assert span.attributes is not None
    assert span.attributes["error.type"] == "aftercommit.errors.TaskTimeout"
    assert len(telemetry.named("process effect")) == 1


@pytest.mark.drivers("pysqlite")
def test_tasks_that_a_test_runs_have_spans(database: DatabaseUnderTest, telemetry: Telemetry, sqlite_url: str):
    """``aftercommit.testing`` runs tasks by hand, and traces go on there, too."""
    db = Database("sqlite:///not-this-one.db")

    @db.task
    def work(session: Session) -> None: ...

    with telemetry.on(), replace(db, url=sqlite_url) as tasks:
        with db.session() as session:
            db.after_commit(session, work)
        tasks.run()

    [create], [process] = telemetry.named("create work"), telemetry.named("process work")
    assert process.context.trace_id == create.context.trace_id


def test_a_request_and_its_tasks_are_one_trace(sqlite_url: str, telemetry: Telemetry):
    """A real server, tasks of both kinds: the trace that a client began goes on in what its request asked for.

    The request's span is FastAPI's own where it has one.
    """
    db = Database(sqlite_url.replace("+pysqlite", ""))
    is_native = "telemetry" in inspect.signature(FastAPI.__init__).parameters
    app = FastAPI(telemetry={"tracer_provider": telemetry.tracers}) if is_native else FastAPI()
    install(app, db)

    async def traced(request: Any, call_next: Any) -> Any:
        parent = propagate.extract(request.headers)
        with telemetry.tracer.start_as_current_span("POST /orders", context=parent, kind=SpanKind.SERVER):
            return await call_next(request)

    if not is_native:
        app.middleware("http")(traced)

    @db.task
    def plain(session: Session) -> None: ...

    @db.task
    async def native(session: AsyncSession) -> None: ...

    @app.post("/orders")
    def order(session: SessionDep, after_commit: AfterCommitDep) -> None:
        after_commit(plain)
        after_commit(native)

    with telemetry.on(db), serve(app) as url, Heard(signals.TaskSucceeded) as heard:
        began = {"traceparent": f"00-{7:032x}-{9:016x}-01"}
        assert httpx.post(f"{url}/orders", headers=began).status_code == 200
        heard.wait(signals.TaskSucceeded, count=2)

    for name in ("POST /orders", "create plain", "create native", "process plain", "process native"):
        [span] = telemetry.named(name)
        assert span.context.trace_id == 7


# --- metrics ------------------------------------------------------------------------------------------------------


def test_tasks_are_counted_by_the_conventions(shop: Workshop, telemetry: Telemetry):
    """Sent, consumed and processed messages, with the task as their destination; failures by their kind."""

    @shop.task(retry=Retry(base=0.01, on=(KeyError,)))
    def work(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        if label == "bad":
            raise ValueError("no use")
        if label == "later" and run.attempt == 1:
            raise KeyError("not yet")

    with telemetry.on(), shop.running(), Heard(signals.Signal) as heard:
        for label in ("good", "bad", "later"):
            shop.ask(work, label)
        heard.wait(signals.TaskSucceeded, count=2)
        shop.drain()

    destination: dict[str, Any] = {"messaging_system": "aftercommit", "messaging_destination_name": "work"}
    assert telemetry.total("messaging.client.sent.messages", messaging_operation_name="send", **destination) == 3
    assert telemetry.total("messaging.client.consumed.messages", messaging_operation_name="process", **destination) == 4
    assert telemetry.total("aftercommit.tasks.succeeded", **destination) == 2
    assert telemetry.total("aftercommit.tasks.failed", error_type="ValueError", **destination) == 1
    assert telemetry.total("aftercommit.tasks.retried", error_type="KeyError", **destination) == 1
    durations: list[HistogramDataPoint] = telemetry.points("messaging.process.duration")
    counts = {(point.attributes or {}).get("error.type"): point.count for point in durations}
    assert counts == {None: 2, "ValueError": 1, "KeyError": 1}
    assert durations[0].explicit_bounds[:2] == (0.005, 0.01)
    assert sum(point.count for point in telemetry.points("aftercommit.task.wait_time")) == 4
    everywhere = {key for name in ("messaging.client.sent.messages", "messaging.process.duration") for point in
                  telemetry.points(name) for key in point.attributes}  # fmt: skip
    assert "messaging.message.id" not in everywhere


@pytest.mark.drivers("psycopg", "asyncpg")
def test_connections_are_measured_by_the_conventions(database: DatabaseUnderTest, telemetry: Telemetry):
    """Used and idle connections, the most that there may be, who waits, who waited in vain, and for how long."""
    narrow = PoolSettings(pool_size=1, max_overflow=1, pool_timeout=0.05)
    db = Database(database.url, pools={"request": narrow})
    request = {"db_client_connection_pool_name": "request", "db_namespace": database.url.rpartition("/")[2]}

    def used_now() -> float:
        return telemetry.total("db.client.connection.count", db_client_connection_state="used", **request)

    async def hold_all_and_wait() -> float:
        engine = db.async_engine()
        async with async_held_elsewhere(engine), async_held_elsewhere(engine), db.async_session() as third:
            used = used_now()
            with pytest.raises(PoolExhausted):
                await third.connection()
        await db.async_dispose()
        return used

    def hold_and_wait() -> float:
        with held_elsewhere(db.engine()), held_elsewhere(db.engine()), db.session() as third:
            used = used_now()
            with pytest.raises(PoolExhausted):
                third.connection()
        return used

    with telemetry.on(db):
        used = asyncio.run(hold_all_and_wait()) if database.is_async else hold_and_wait()

        assert used == 2
        assert telemetry.total("db.client.connection.count", db_client_connection_state="used", **request) == 0
        assert telemetry.total("db.client.connection.max", **request) == 2
        assert telemetry.total("db.client.connection.pending_requests", **request) == 0
        assert telemetry.total("db.client.connection.timeouts", **request) == 1
        [waited] = telemetry.points("db.client.connection.wait_time")
        assert (waited.count, waited.attributes) == (1, {"db.client.connection.pool.name": "request"})
        assert waited.sum >= 0.05
    db.dispose()


def test_the_use_of_connections_is_measured(shop: Workshop, telemetry: Telemetry):
    """For how long a task had its connection is told when it comes back."""
    with telemetry.on(shop.db), shop.running():
        shop.ask(shop.task()(effect), "a")
        shop.drain()

    [used] = [
        point
        for point in telemetry.points("db.client.connection.use_time")
        if point.attributes == {"db.client.connection.pool.name": "default"}
    ]
    assert used.count == 1


def test_what_is_queued_is_seen_of_all_processes(shop: Workshop, telemetry: Telemetry):
    """What waits in the database, and how many processes run tasks, is measured for all of them."""
    task = shop.task()(effect).with_options(delay=3600.0)
    queued, workers = "aftercommit.cluster.tasks.queued", "aftercommit.cluster.workers"
    with telemetry.on(shop.db), shop.running():
        shop.ask(task, "a")
        runner = shop.db.runner
        assert runner is not None
        # The next look comes now, instead of in some seconds.
        runner.rounds._sweep_begun = float("-inf")
        runner.books.wake()
        deadline = time.monotonic() + TIMEOUT
        while not telemetry.total(queued, messaging_destination_name="effect"):
            assert time.monotonic() < deadline

        assert telemetry.total(queued, messaging_destination_name="effect") == 1
        assert telemetry.total(workers) == 1


def test_a_database_whose_url_is_not_known_yet_has_nothing_to_measure(telemetry: Telemetry):
    """Collecting metrics does not call the function that returns the URL: nothing is open before it was called."""

    def url() -> str:
        raise AssertionError("called too early")

    with telemetry.on(Database(url)):
        assert telemetry.points("db.client.connection.max") == []


# --- harm ---------------------------------------------------------------------------------------------------------


class Broken(SpanProcessor):
    """A processor that fails at both ends of a span."""

    def on_start(self, *_: Any, **__: Any) -> NoReturn:
        """Fail."""
        raise RuntimeError("the tracer is broken")

    def on_end(self, *_: Any, **__: Any) -> NoReturn:
        """Fail."""
        raise RuntimeError("the tracer is broken")


class BrokenAtTheEnd(SpanProcessor):
    """A processor that fails when a span ends."""

    def on_end(self, *_: Any, **__: Any) -> NoReturn:
        """Fail."""
        raise RuntimeError("the tracer is broken")


class BrokenExporter(SpanExporter):
    """An exporter that fails."""

    def export(self, *_: Any, **__: Any) -> SpanExportResult:
        """Fail."""
        raise RuntimeError("the exporter is broken")


@pytest.mark.parametrize(
    "broken", [Broken, BrokenAtTheEnd, lambda: SimpleSpanProcessor(BrokenExporter())], ids=["start", "end", "exporter"]
)
def test_a_tracer_that_fails_harms_no_task(shop: Workshop, broken: Any, caplog: pytest.LogCaptureFixture):
    """Whatever a tracer or an exporter raises is logged; tasks are handed over, run, fail and end as ever."""
    telemetry = Telemetry()
    telemetry.tracers.add_span_processor(broken())

    @shop.task()
    def work(session: Session, label: str) -> None:
        effect(session, label)
        if label == "bad":
            raise ValueError("no use")

    with telemetry.on(), shop.running(), Heard(signals.Signal) as heard, caplog.at_level(logging.ERROR):
        for label in ("a", "bad", "b"):
            shop.ask(work, label)
        heard.wait(signals.TaskSucceeded, count=2)
        shop.drain()

    assert shop.effects() == ["a", "b"]
    assert sorted(record.state for record in shop.records()) == ["failed", "succeeded", "succeeded"]
    assert any("is broken" in str(record.exc_info) for record in caplog.records)
    assert not [record for record in caplog.records if "error of the library" in record.getMessage()]


def test_instrumenting_twice_is_refused(telemetry: Telemetry):
    """A second call would count everything twice."""
    with telemetry.on(), pytest.raises(ConfigurationError, match="already"):
        instrument()
    uninstrument()


def test_uninstrumented_there_are_no_more_spans(shop: Workshop, telemetry: Telemetry):
    """After ``uninstrument`` nothing is told to OpenTelemetry any more."""
    with telemetry.on():
        pass
    with shop.running():
        shop.ask(shop.task()(effect), "a")
        shop.drain()

    assert telemetry.named("process effect") == telemetry.named("create effect") == []
    assert telemetry.points("messaging.client.sent.messages") == []
