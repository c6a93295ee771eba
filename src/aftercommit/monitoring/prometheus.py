"""Prometheus: the figures of ``db.stats()``, and histograms of runs, for one scrape of one process.

```python
from aftercommit.monitoring.prometheus import metrics_router

app.include_router(metrics_router(db))
```

Names begin with ``aftercommit_``, times are in seconds, counters end in ``_total``. Labels are names of tasks, of pools
and of databases, never ids. Needs the extra ``prometheus``.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, ref

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from aftercommit import signals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fastapi import APIRouter

    from aftercommit.database import Database
    from aftercommit.stats import ClusterStats, PoolStats, Stats, TaskStats

__all__ = ["instrument", "metrics_router", "uninstrument"]

_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Seconds: from a task of one statement to one of minutes."""

_lock = threading.Lock()
_exporters: WeakKeyDictionary[CollectorRegistry, _Exporter] = WeakKeyDictionary()


def instrument(*databases: Database, registry: CollectorRegistry = REGISTRY) -> None:
    """Have *registry* collect the figures of *databases*, and count what their tasks do from now on.

    Harmless when it is called again; further databases are added to those that are known. A process without a web
    application (a worker) serves the registry with ``prometheus_client.start_http_server(port)``.

    Args:
        databases: Whose figures.
        registry: Where they are collected; the client's own by default.
    """
    with _lock:
        exporter = _exporters.get(registry)
        if exporter is None:
            exporter = _exporters[registry] = _Exporter(registry)
        exporter.add(databases)


def uninstrument(*, registry: CollectorRegistry = REGISTRY) -> None:
    """Undo ``instrument``; harmless where it was not called."""
    with _lock:
        exporter = _exporters.pop(registry, None)
    if exporter is not None:
        exporter.close()


def metrics_router(*databases: Database, path: str = "/metrics", registry: CollectorRegistry = REGISTRY) -> APIRouter:
    """Return a router for ``app.include_router`` that answers ``GET /metrics``, and ``instrument`` the databases.

    The page shows everything that is in *registry*: what other libraries put there, too. It is not in the
    application's schema. Whom it is shown to is the application's affair: ``include_router(…, dependencies=[…])``.

    Args:
        databases: As for ``instrument``.
        path: Where.
        registry: As for ``instrument``.
    """
    from fastapi import APIRouter, Request, Response

    instrument(*databases, registry=registry)
    router = APIRouter()

    # `def`: putting the page together computes, and other requests go on meanwhile.
    def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=content_type)

    # Annotations are text here, and FastAPI would look their names up in this module, which knows no FastAPI.
    metrics.__annotations__ = {"request": Request, "return": Response}
    router.add_api_route(path, metrics, methods=["GET"], include_in_schema=False, response_class=Response)
    return router


class _Exporter(Collector):
    """What one registry is told: figures are read when it collects, and only histograms are fed by signals."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = ref(registry)
        self._databases: list[ref[Database]] = []
        of_task = ["task", "pool"]
        self._handed_over = Counter(
            "aftercommit_tasks_handed_over", "Tasks that were handed over and committed.", of_task, registry=None
        )
        self._run = Histogram(
            "aftercommit_task_run_seconds",
            "From the start of a run here to its end.",
            [*of_task, "outcome"],
            buckets=_BUCKETS,
            registry=None,
        )
        self._wait = Histogram(
            "aftercommit_task_wait_seconds",
            "How long a task had been due when it began.",
            of_task,
            buckets=_BUCKETS,
            registry=None,
        )
        self._claims_lost = Counter(
            "aftercommit_claims_lost", "Runs that found their record in other hands.", of_task, registry=None
        )
        self._lost = Counter("aftercommit_tasks_lost", "Tasks that can never start.", ["task"], registry=None)
        self._rescued = Counter(
            "aftercommit_tasks_rescued", "Tasks that this process took from silent workers.", registry=None
        )
        self._held = Counter(
            "aftercommit_connections_held", "Connections reported as held for too long.", ["pool"], registry=None
        )
        self._blocked = Counter("aftercommit_loop_blocked", "Reports of an event loop that stood still.", registry=None)
        self._down = Counter("aftercommit_database_down", "How often the bookkeeping lost the database.", registry=None)
        self._fired, self._skipped, self._missed = (
            Counter(f"aftercommit_schedules_{name}", help_text, ["schedule"], registry=None)
            for name, help_text in (
                ("fired", "Ticks that this process fired."),
                ("skipped", "Ticks that were left out because the task of the one before had not ended."),
                ("missed", "Ticks that were not fired by themselves, because nobody could in time."),
            )
        )
        self._lag = Histogram(
            "aftercommit_schedule_lag_seconds", "From a tick to its firing.", buckets=_BUCKETS, registry=None
        )
        self._fed: tuple[Collector, ...] = (
            *(self._handed_over, self._run, self._wait, self._claims_lost, self._lost),
            *(self._rescued, self._held, self._blocked, self._down),
            *(self._fired, self._skipped, self._missed, self._lag),
        )
        self._subscribers: dict[type[signals.Signal], Callable[[Any], None]] = {
            signals.TasksHandedOver: self._on_handed_over,
            signals.TaskStarted: lambda signal: self._wait.labels(signal.task, signal.pool).observe(signal.waited),
            signals.TaskSucceeded: lambda signal: self._observe_run(signal, "done"),
            signals.TaskFailed: lambda signal: self._observe_run(signal, "expected" if signal.expected else "failed"),
            signals.TaskDiscarded: lambda signal: self._observe_run(signal, "discarded"),
            signals.ClaimLost: lambda signal: self._claims_lost.labels(signal.task, signal.pool).inc(),
            signals.TasksLost: self._on_lost,
            signals.TasksRescued: lambda signal: self._rescued.inc(len(signal.requeued) + len(signal.failed)),
            signals.ConnectionHeld: lambda signal: self._held.labels(signal.pool).inc(),
            signals.LoopBlocked: lambda _: self._blocked.inc(),
            signals.DatabaseDown: lambda _: self._down.inc(),
            signals.ScheduleFired: self._on_fired,
            signals.ScheduleSkipped: lambda signal: self._skipped.labels(_schedule(signal)).inc(),
            signals.ScheduleMissed: lambda signal: self._missed.labels(_schedule(signal)).inc(signal.count),
        }
        for kind, subscriber in self._subscribers.items():
            signals.subscribe(kind)(subscriber)
        registry.register(self)

    def add(self, databases: Iterable[Database]) -> None:
        known = {id(db) for each in self._databases if (db := each()) is not None}
        self._databases += [ref(db) for db in databases if id(db) not in known]

    def close(self) -> None:
        for subscriber in self._subscribers.values():
            signals.unsubscribe(subscriber)
        registry = self._registry()
        if registry is not None:
            registry.unregister(self)

    # --- fed by signals -----------------------------------------------------------------------------------------

    def _on_handed_over(self, signal: signals.TasksHandedOver) -> None:
        for task, pool in zip(signal.tasks, signal.pools, strict=True):
            self._handed_over.labels(task, pool).inc()

    def _observe_run(
        self, signal: signals.TaskSucceeded | signals.TaskFailed | signals.TaskDiscarded, outcome: str
    ) -> None:
        self._run.labels(signal.task, signal.pool, outcome).observe(signal.seconds)

    def _on_fired(self, signal: signals.ScheduleFired) -> None:
        name = _schedule(signal)
        self._fired.labels(name).inc()
        self._lag.observe(max(0.0, signal.lag))
        if signal.missed:
            self._missed.labels(name).inc(signal.missed)

    def _on_lost(self, signal: signals.TasksLost) -> None:
        for task in signal.tasks:
            self._lost.labels(task).inc()

    # --- read when somebody collects ----------------------------------------------------------------------------

    def describe(self) -> Iterable[Metric]:
        """Nothing: what is registered must not be asked for figures yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read the figures."""
        for each in self._fed:
            yield from each.collect()
        stats = list(self._stats())
        yield from _of_pools(stats)
        yield from _of_tasks(stats)
        yield from _of_clusters(stats)

    def _stats(self) -> Iterator[tuple[str, Stats]]:
        seen: dict[str, int] = {}
        for each in self._databases:
            db = each()
            name = None if db is None else db.sessions.pools.namespace
            if db is None or name is None:
                # Gone; or its URL is not known before something is opened.
                continue
            number = seen[name] = seen.get(name, 0) + 1
            yield name if number == 1 else f"{name}#{number}", db.stats()


def _schedule(signal: signals.ScheduleFired | signals.ScheduleSkipped | signals.ScheduleMissed) -> str:
    """What it is counted under: those that are made as data by their task, or there was a label for each customer."""
    return signal.schedule if signal.origin == "code" else signal.task


def _of_pools(every: list[tuple[str, Stats]]) -> Iterator[Metric]:
    connections = GaugeMetricFamily(
        "aftercommit_pool_connections", "Connections that are open.", labels=["database", "pool", "state"]
    )
    waits = SummaryMetricFamily(
        "aftercommit_pool_wait_seconds", "Those who had to wait for a connection.", labels=["database", "pool"]
    )
    exhausted = CounterMetricFamily(
        "aftercommit_pool_exhausted", "How often somebody waited in vain.", labels=["database", "pool"]
    )
    for database, stats in every:
        for name, pool in stats.pools.items():
            connections.add_metric([database, name, "used"], pool.in_use)
            connections.add_metric([database, name, "idle"], pool.idle)
            waits.add_metric([database, name], pool.waits.count, pool.waits.total)
            exhausted.add_metric([database, name], pool.exhausted)
    yield from (connections, waits, exhausted)
    for name, help_text, read in _POOL_GAUGES:
        gauge = GaugeMetricFamily(f"aftercommit_pool_{name}", help_text, labels=["database", "pool"])
        for database, stats in every:
            for pool_name, pool in stats.pools.items():
                gauge.add_metric([database, pool_name], read(pool))
        yield gauge


def _of_tasks(every: list[tuple[str, Stats]]) -> Iterator[Metric]:
    labels = ["database", "task", "pool"]
    for name, help_text, read in _TASK_COUNTERS:
        family = CounterMetricFamily(f"aftercommit_tasks_{name}", help_text, labels=labels)
        for database, stats in every:
            for task in stats.tasks.values():
                family.add_metric([database, task.name, task.pool], read(task))
        yield family


def _of_clusters(every: list[tuple[str, Stats]]) -> Iterator[Metric]:
    seen = [(database, stats.cluster) for database, stats in every if stats.cluster is not None]
    for name, help_text, read in _CLUSTER_GAUGES:
        gauge = GaugeMetricFamily(f"aftercommit_cluster_{name}", help_text, labels=["database"])
        for database, cluster in seen:
            gauge.add_metric([database], read(cluster))
        yield gauge
    queued, running, oldest = (
        GaugeMetricFamily(f"aftercommit_cluster_{name}", help_text, labels=["database", "task"])
        for name, help_text in (
            ("queued", "Tasks that are queued, in all processes."),
            ("running", "Tasks that run, in all processes."),
            ("oldest_due_seconds", "For how long the oldest task that is due has been due."),
        )
    )
    for database, cluster in seen:
        for name, task in cluster.tasks.items():
            queued.add_metric([database, name], task.queued)
            running.add_metric([database, name], task.running)
            oldest.add_metric([database, name], task.oldest_due or 0.0)
    yield from (queued, running, oldest)


_POOL_GAUGES: Final[tuple[tuple[str, str, Callable[[PoolStats], float]], ...]] = (
    ("connections_max", "Connections that may be open.", lambda pool: pool.size + pool.max_overflow),
    ("waiting", "How many wait for a connection.", lambda pool: pool.waiting),
    (
        "longest_held_seconds",
        "For how long the connection that is held longest has been held.",
        lambda pool: 0.0 if pool.longest is None else pool.longest.seconds,
    ),
    ("places", "Tasks that may run at once in this process.", lambda pool: pool.width),
    ("running", "Tasks that run in this process.", lambda pool: pool.running),
    ("backlog", "Tasks that this process has taken and that wait for a place.", lambda pool: pool.backlog),
    ("paused", "Whether the pool is paused: 1 or 0.", lambda pool: int(pool.is_paused)),
)
_TASK_COUNTERS: Final[tuple[tuple[str, str, Callable[[TaskStats], int]], ...]] = (
    ("done", "Runs that succeeded.", lambda task: task.done),
    ("failed", "Runs that failed for good.", lambda task: task.failed),
    ("retried", "Attempts that failed, and that another follows.", lambda task: task.retried),
    ("conflicts", "Repeats that cost no attempt.", lambda task: task.conflicts),
    ("given_back", "Runs that a stop has queued again.", lambda task: task.given_back),
    ("expected", "Runs that failed in a way that the application knows.", lambda task: task.expected),
    ("discarded", "Runs that said that there is nothing to do.", lambda task: task.discarded),
    ("postponed", "Runs that said that it is too early.", lambda task: task.postponed),
)
_CLUSTER_GAUGES: Final[tuple[tuple[str, str, Callable[[ClusterStats], float]], ...]] = (
    ("workers", "Processes that run tasks.", lambda cluster: cluster.workers),
    (
        "schedules_overdue",
        "Schedules that have been due for more than two minutes.",
        lambda cluster: cluster.schedules_overdue,
    ),
    ("age_seconds", "How long ago a process has looked at all of them.", lambda cluster: cluster.age),
)
