"""Metrics of connection pools, by OpenTelemetry's conventions for database clients, and of what is queued.

Read from ``db.stats()`` whenever somebody collects, so that work itself pays only for the two histograms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.metrics import CallbackOptions, Observation

from aftercommit import signals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from opentelemetry.metrics import Meter

    from aftercommit.database import Database
    from aftercommit.stats import ClusterStats, PoolStats, Stats

__all__ = ["BUCKETS", "PoolMetrics"]

BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Seconds; what the conventions advise for durations of messaging."""

_POOL_NAME: Final = "db.client.connection.pool.name"
_STATE: Final = "db.client.connection.state"
_NAMESPACE: Final = "db.namespace"
_DESTINATION: Final = "messaging.destination.name"


class PoolMetrics:
    """The connections of some databases, and their queues.

    Attributes:
        databases: Whose; emptied, there is nothing more to read.
        subscribers: Who wants to hear of what.
    """

    def __init__(self, databases: tuple[Database, ...], meter: Meter) -> None:
        self.databases = databases
        pools, tasks = self._of_pools, self._of_cluster
        meter.create_observable_up_down_counter(
            "db.client.connection.count",
            [pools(lambda pool: (("used", pool.in_use), ("idle", pool.idle)))],
            "{connection}",
            "Connections that are open, by their state.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.max",
            [pools(lambda pool: ((None, pool.size + pool.max_overflow),))],
            "{connection}",
            "Connections that may be open.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.pending_requests",
            [pools(lambda pool: ((None, pool.waiting),))],
            "{request}",
            "How many wait for a connection.",
        )
        meter.create_observable_counter(
            "db.client.connection.timeouts",
            [pools(lambda pool: ((None, pool.exhausted),))],
            "{timeout}",
            "How often somebody waited for a connection in vain.",
        )
        meter.create_observable_gauge(
            "aftercommit.cluster.tasks.queued",
            [tasks(lambda cluster: ((name, task.queued) for name, task in cluster.tasks.items()))],
            "{task}",
            "Tasks that are queued, in all processes.",
        )
        meter.create_observable_gauge(
            "aftercommit.cluster.tasks.running",
            [tasks(lambda cluster: ((name, task.running) for name, task in cluster.tasks.items()))],
            "{task}",
            "Tasks that run, in all processes.",
        )
        meter.create_observable_gauge(
            "aftercommit.cluster.oldest_due",
            [tasks(lambda cluster: ((name, task.oldest_due or 0.0) for name, task in cluster.tasks.items()))],
            "s",
            "For how long the oldest task that is due has been due.",
        )
        meter.create_observable_gauge(
            "aftercommit.cluster.workers",
            [tasks(lambda cluster: ((None, cluster.workers),))],
            "{process}",
            "Processes that run tasks.",
        )
        meter.create_observable_gauge(
            "aftercommit.cluster.schedules_overdue",
            [tasks(lambda cluster: ((None, cluster.schedules_overdue),))],
            "{schedule}",
            "Schedules that have been due for more than two minutes.",
        )
        self._waits = meter.create_histogram(
            "db.client.connection.wait_time",
            "s",
            "How long those waited for a connection who had to.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self._uses = meter.create_histogram(
            "db.client.connection.use_time",
            "s",
            "For how long requests and tasks had a connection.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self.subscribers: dict[type[signals.Signal], Callable[[Any], None]] = (
            {signals.ConnectionAwaited: self._awaited, signals.ConnectionUsed: self._used} if databases else {}
        )

    def _of_pools(
        self, read: Callable[[PoolStats], Iterable[tuple[str | None, int]]]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            for namespace, stats in self._stats():
                for name, pool in stats.pools.items():
                    for state, number in read(pool):
                        attributes = {_POOL_NAME: name, _NAMESPACE: namespace}
                        if state is not None:
                            attributes[_STATE] = state
                        yield Observation(number, attributes)

        return observe

    def _of_cluster(
        self, read: Callable[[ClusterStats], Iterable[tuple[str | None, float]]]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            for namespace, stats in self._stats():
                if stats.cluster is None:
                    continue
                for task, number in read(stats.cluster):
                    attributes = {_NAMESPACE: namespace}
                    if task is not None:
                        attributes[_DESTINATION] = task
                    yield Observation(number, attributes)

        return observe

    def _stats(self) -> Iterator[tuple[str, Stats]]:
        for db in self.databases:
            namespace = db.sessions.pools.namespace
            # Before a callable URL was called, nothing is open.
            if namespace is not None:
                yield namespace, db.stats()

    def _awaited(self, signal: signals.ConnectionAwaited) -> None:
        self._waits.record(signal.seconds, {_POOL_NAME: signal.pool})

    def _used(self, signal: signals.ConnectionUsed) -> None:
        self._uses.record(signal.seconds, {_POOL_NAME: signal.pool})
