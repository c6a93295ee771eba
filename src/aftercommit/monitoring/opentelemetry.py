"""Spans and metrics of OpenTelemetry, by its semantic conventions 1.44.0 for messaging and for databases.

```python
from aftercommit.monitoring.opentelemetry import instrument

instrument(db)
```

A task is a message: its destination is the task's name, and its id that of the record. A hand-over is a span
``create <task>``, a run a span ``process <task>``: a child of the former, in whatever process it runs, and linked to
it. Needs ``opentelemetry-api`` (FastAPI brings it along); what becomes of spans and metrics is the affair of the SDK.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import metrics, trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from aftercommit import signals
from aftercommit.errors import ConfigurationError
from aftercommit.monitoring.opentelemetry_pools import BUCKETS, PoolMetrics
from aftercommit.runner.around import Seen, unwatch, watch
from aftercommit.tasks.context import hand_over_in
from aftercommit.wording import told, without_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from aftercommit.database import Database

__all__ = ["instrument", "uninstrument"]

_SCHEMA: Final = "https://opentelemetry.io/schemas/1.44.0"
_SYSTEM: Final = "messaging.system"
_OPERATION: Final = "messaging.operation.name"
_OPERATION_TYPE: Final = "messaging.operation.type"
_DESTINATION: Final = "messaging.destination.name"
_MESSAGE: Final = "messaging.message.id"
_ERROR: Final = "error.type"
# What the conventions have no name for stands under the system's own.
_POOL: Final = "messaging.aftercommit.pool"
_ATTEMPT: Final = "messaging.aftercommit.attempt"
_SCHEDULE: Final = "messaging.aftercommit.schedule"
_REPEATS: Final = "messaging.aftercommit.repeats"

_lock = threading.Lock()
_running: _Instrumentation | None = None


def instrument(
    *databases: Database,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Make spans of hand-overs and runs, and metrics of tasks and of the connections of *databases*.

    Call it once, where the application is put together, also in that of a worker.

    Args:
        databases: Whose connection pools are measured; tasks are, whichever database they belong to.
        tracer_provider: Makes the tracer; the global one by default.
        meter_provider: Makes the meter; the global one by default.

    Raises:
        ConfigurationError: If it was called before.
    """
    global _running  # noqa: PLW0603  # one per process, as subscribers of signals are
    with _lock:
        if _running is not None:
            raise ConfigurationError(
                "aftercommit is instrumented for OpenTelemetry already, and every task would be counted twice. Call "
                "instrument(…) once, with all databases; or uninstrument() first."
            )
        _running = _Instrumentation(databases, tracer_provider, meter_provider)
        _running.start()


def uninstrument() -> None:
    """Undo ``instrument``; harmless where it was not called. Runs under way end their spans in order."""
    global _running
    with _lock:
        running, _running = _running, None
        if running is not None:
            running.stop()


class _Processing:
    """A run under way, and its span."""

    __slots__ = ("attributes", "is_over", "since", "span", "thread")

    def __init__(self, span: Span, attributes: dict[str, Any]) -> None:
        self.span = span
        self.attributes = attributes
        self.since = time.monotonic()
        self.thread = threading.get_ident()
        self.is_over = False

    def fail(self, error: BaseException) -> None:
        """Say that it came to nothing."""
        kind = _type_of(error)
        self.attributes[_ERROR] = kind
        self.span.set_attribute(_ERROR, kind)
        # Not the error itself: the exporter would send the values in it.
        self.span.record_exception(without_values(error))
        self.span.set_status(Status(StatusCode.ERROR, told(error)))


class _Instrumentation:
    def __init__(
        self,
        databases: tuple[Database, ...],
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
    ) -> None:
        own = version("aftercommit")
        self._tracer = trace.get_tracer("aftercommit", own, tracer_provider, _SCHEMA)
        meter = metrics.get_meter("aftercommit", own, meter_provider, _SCHEMA)
        self._open: dict[UUID, _Processing] = {}
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Tasks that were handed over and committed."
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Runs that began, each attempt counted."
        )
        self._duration = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "From the start of a run to the record of its end.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self._waited = meter.create_histogram(
            "aftercommit.task.wait_time",
            "s",
            "From when a task was due to its start.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self._counters = {
            kind: meter.create_counter(f"aftercommit.{name}", unit, description)
            for kind, name, unit, description in _COUNTED
        }
        self._expected = meter.create_counter(
            "aftercommit.tasks.expected", "{task}", "Tasks that failed in a way that the application knows."
        )
        self._lag = meter.create_histogram(
            "aftercommit.schedule.lag", "s", "From a tick to its firing.", explicit_bucket_boundaries_advisory=BUCKETS
        )
        self._missed = self._counters[signals.ScheduleMissed]
        self._pools = PoolMetrics(databases, meter)
        self._subscribers: dict[type[signals.Signal], Callable[[Any], None]] = {
            signals.TasksHandedOver: self._handed_over,
            signals.TaskStarted: self._started,
            signals.TaskSucceeded: self._succeeded,
            signals.TaskRetried: self._retried,
            signals.TaskFailed: self._failed,
            signals.TaskGivenBack: self._given_back,
            signals.TaskDiscarded: partial(self._ended_in_order, "discarded"),
            signals.TaskPostponed: partial(self._ended_in_order, "postponed"),
            signals.ClaimLost: self._claim_lost,
            signals.TasksLost: self._lost,
            signals.TasksRescued: self._rescued,
            signals.ScheduleFired: self._fired,
            signals.ScheduleSkipped: lambda signal: self._counters[signals.ScheduleSkipped].add(1, _schedule(signal)),
            signals.ScheduleMissed: lambda signal: self._missed.add(signal.count, _schedule(signal)),
            **self._pools.subscribers,
        }

    def start(self) -> None:
        for kind, subscriber in self._subscribers.items():
            signals.subscribe(kind)(subscriber)
        watch(self._process)
        hand_over_in(self._create)

    def stop(self) -> None:
        self._pools.databases = ()
        hand_over_in(None)
        unwatch(self._process)
        for subscriber in self._subscribers.values():
            signals.unsubscribe(subscriber)

    # --- spans --------------------------------------------------------------------------------------------------

    @contextmanager
    def _create(self, task: str, id: UUID, pool: str) -> Iterator[None]:
        """Surround a hand-over: the record carries this span's context."""
        attributes = {**_attributes("create", task, pool), _OPERATION_TYPE: "create", _MESSAGE: str(id)}
        with self._tracer.start_as_current_span(f"create {task}", kind=SpanKind.PRODUCER, attributes=attributes):
            yield

    @contextmanager
    def _process(self, run: Seen) -> Iterator[None]:
        """Surround a run: what its code does is below this span."""
        asked = trace.get_current_span().get_span_context()
        attributes = _attributes("process", run.name, run.pool)
        span = self._tracer.start_span(
            f"process {run.name}",
            kind=SpanKind.CONSUMER,
            attributes={
                **attributes,
                _OPERATION_TYPE: "process",
                _MESSAGE: str(run.id),
                _ATTEMPT: run.attempt,
            },
            links=[Link(asked)] if asked.is_valid else None,
        )
        this = self._open[run.id] = _Processing(span, attributes)
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            try:
                yield
            finally:
                if self._open.get(run.id) is this:
                    # It may have been queued and claimed again by now, and the new run has the same id.
                    del self._open[run.id]
                self._end(this)

    def _end(self, this: _Processing) -> None:
        if this.is_over:
            return
        this.is_over = True
        self._duration.record(time.monotonic() - this.since, this.attributes)
        this.span.end()

    def _told(self, signal: signals.RunSignal) -> _Processing | None:
        this = self._open.get(signal.id)
        return None if this is None or this.is_over else this

    def _end_if_hanging(self, this: _Processing) -> None:
        """A thread that hangs was given up by another one, and may never end its span itself."""
        if this.thread != threading.get_ident():
            self._end(this)

    # --- signals ------------------------------------------------------------------------------------------------

    def _handed_over(self, signal: signals.TasksHandedOver) -> None:
        for task, pool in zip(signal.tasks, signal.pools, strict=True):
            self._sent.add(1, _attributes("send", task, pool))

    def _started(self, signal: signals.TaskStarted) -> None:
        attributes = _attributes("process", signal.task, signal.pool)
        self._consumed.add(1, attributes)
        self._waited.record(signal.waited, attributes)

    def _succeeded(self, signal: signals.TaskSucceeded) -> None:
        this = self._told(signal)
        if this is not None and signal.repeats:
            this.span.set_attribute(_REPEATS, signal.repeats)
        self._count(signal)

    def _retried(self, signal: signals.TaskRetried) -> None:
        this = self._told(signal)
        if this is not None and signal.in_place:
            this.span.set_attribute(_ATTEMPT, signal.attempt)
            this.span.add_event(
                "repeat",
                {
                    "exception.type": _type_of(signal.error),
                    "exception.message": str(without_values(signal.error)),
                    _ATTEMPT: signal.attempt,
                },
            )
        elif this is not None:
            this.fail(signal.error)
        self._count(signal, signal.error)

    def _failed(self, signal: signals.TaskFailed) -> None:
        this = self._told(signal)
        if this is not None:
            if signal.expected:
                # An outcome, not an error: what looks for errors in traces leaves it alone.
                this.span.add_event("failed as expected", {"reason": told(signal.error)})
            else:
                this.fail(signal.error)
            self._end_if_hanging(this)
        if signal.expected:
            self._expected.add(1, _attributes("process", signal.task, signal.pool))
        else:
            self._count(signal, signal.error)

    def _ended_in_order(self, what: str, signal: signals.TaskDiscarded | signals.TaskPostponed) -> None:
        this = self._told(signal)
        if this is not None:
            this.span.add_event(what, {"reason": signal.reason})
        self._count(signal)

    def _given_back(self, signal: signals.TaskGivenBack) -> None:
        this = self._told(signal)
        if this is not None:
            this.span.add_event("given back", {"reason": signal.reason})
            self._end_if_hanging(this)
        self._count(signal)

    def _claim_lost(self, signal: signals.ClaimLost) -> None:
        this = self._told(signal)
        if this is not None:
            this.attributes[_ERROR] = "aftercommit.errors.LostClaim"
            this.span.set_attribute(_ERROR, "aftercommit.errors.LostClaim")
            this.span.set_status(Status(StatusCode.ERROR, "rescued by another worker, or cancelled: rolled back"))
            self._end_if_hanging(this)
        self._count(signal)

    def _lost(self, signal: signals.TasksLost) -> None:
        for task in signal.tasks:
            self._counters[signals.TasksLost].add(1, {_SYSTEM: "aftercommit", _DESTINATION: task})

    def _rescued(self, signal: signals.TasksRescued) -> None:
        self._counters[signals.TasksRescued].add(len(signal.requeued) + len(signal.failed), {_SYSTEM: "aftercommit"})

    def _fired(self, signal: signals.ScheduleFired) -> None:
        attributes = _schedule(signal)
        self._counters[signals.ScheduleFired].add(1, attributes)
        self._lag.record(max(0.0, signal.lag), attributes)
        if signal.missed:
            self._missed.add(signal.missed, attributes)

    def _count(self, signal: signals.RunSignal, error: BaseException | None = None) -> None:
        attributes = _attributes("process", signal.task, signal.pool)
        if error is not None:
            attributes[_ERROR] = _type_of(error)
        self._counters[type(signal)].add(1, attributes)


_COUNTED: Final[tuple[tuple[type[signals.Signal], str, str, str], ...]] = (
    (signals.TaskSucceeded, "tasks.succeeded", "{task}", "Runs whose own commit is done."),
    (signals.TaskRetried, "tasks.retried", "{attempt}", "Runs that failed in a way that may pass."),
    (signals.TaskFailed, "tasks.failed", "{task}", "Tasks that failed for good."),
    (signals.TaskDiscarded, "tasks.discarded", "{task}", "Runs that said that there is nothing to do."),
    (signals.TaskPostponed, "tasks.postponed", "{task}", "Runs that said that it is too early."),
    (signals.TaskGivenBack, "tasks.given_back", "{task}", "Runs that an orderly stop has interrupted."),
    (signals.ClaimLost, "claims.lost", "{claim}", "Runs that found their record in other hands."),
    (signals.TasksLost, "tasks.lost", "{task}", "Tasks that can never start."),
    (signals.ScheduleFired, "schedules.fired", "{tick}", "Ticks that this process fired."),
    (signals.ScheduleSkipped, "schedules.skipped", "{tick}", "Ticks left out because the last run had not ended."),
    (signals.ScheduleMissed, "schedules.missed", "{tick}", "Ticks that nobody could fire in time."),
    (signals.TasksRescued, "tasks.rescued", "{task}", "Tasks that this process took from silent workers."),
)


def _attributes(operation: str, task: str, pool: str) -> dict[str, Any]:
    return {_SYSTEM: "aftercommit", _OPERATION: operation, _DESTINATION: task, _POOL: pool}


def _schedule(signal: signals.ScheduleFired | signals.ScheduleSkipped | signals.ScheduleMissed) -> dict[str, Any]:
    """Those that are made as data are counted under their task alone: no series for each customer."""
    named = {_SCHEDULE: signal.schedule} if signal.origin == "code" else {}
    return {_SYSTEM: "aftercommit", _DESTINATION: signal.task, **named}


def _type_of(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
