"""``python -m benchmarks.telemetry``: what watching adds to a hand-over and to a run, each way in a process of its own.

Only what surrounds a task is measured, not the task: processor time, the best of some repeats.
"""

import subprocess
import sys
import timeit
from collections.abc import Callable
from time import process_time
from uuid import UUID

from aftercommit import signals
from aftercommit.runner.around import around
from aftercommit.tasks.context import capture, logged
from aftercommit.tasks.current import CurrentRun

NUMBER = 5000
REPEATS = 7
ID = UUID(int=1)
FACTS = {"task": "work", "id": ID, "pool": "default", "attempt": 1}


class Watched:
    """As much of a run as its surroundings look at."""

    context: str | None = None
    name, id, pool, attempt = "work", ID, "default", 1


def nothing() -> None:
    """Nobody watches but the log, at its usual level."""


def structlog() -> None:
    """The application has imported structlog, and its request has bound an id."""
    import structlog as log

    log.contextvars.bind_contextvars(request_id="r1")


def prometheus() -> None:
    """A registry of its own."""
    from prometheus_client import CollectorRegistry

    from aftercommit.monitoring.prometheus import instrument

    instrument(registry=CollectorRegistry())


def opentelemetry_without_sdk() -> None:
    """The interface alone: all spans and metrics lead nowhere."""
    from aftercommit.monitoring.opentelemetry import instrument

    instrument()


def opentelemetry() -> None:
    """The SDK, every span recorded, and no exporter."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider

    from aftercommit.monitoring.opentelemetry import instrument

    instrument(tracer_provider=TracerProvider(), meter_provider=MeterProvider([InMemoryMetricReader()]))


WAYS: dict[str, Callable[[], None]] = {
    "nothing": nothing,
    "structlog": structlog,
    "Prometheus": prometheus,
    "OpenTelemetry without an SDK": opentelemetry_without_sdk,
    "OpenTelemetry": opentelemetry,
}


def hand_over() -> None:
    """What a hand-over of one task does for whoever watches."""
    Watched.context = capture("work", ID, "default")
    signals.emit(signals.TasksHandedOver(tasks=("work",), ids=(ID,), pools=("default",)))


def run() -> None:
    """What a run does for whoever watches."""
    with around(Watched()):
        signals.emit(signals.TaskStarted(**FACTS, waited=0.0))
        with logged(CurrentRun(id=ID, name="work", attempt=1, restored=None, on_progress=None)):
            pass
        signals.emit(signals.TaskSucceeded(**FACTS, seconds=0.1, repeats=0))


def measure(work: Callable[[], None]) -> float:
    """Microseconds of processor time for one call."""
    return min(timeit.repeat(work, number=NUMBER, repeat=REPEATS, timer=process_time)) / NUMBER * 1e6


def main() -> None:
    """Measure one way, or all of them."""
    if len(sys.argv) > 1:
        WAYS[sys.argv[1]]()
        print(f"| {sys.argv[1]} | {measure(hand_over):.0f} | {measure(run):.0f} |", flush=True)
        return
    print("| watched by | per hand-over, µs | per run, µs |\n|---|---|---|", flush=True)
    for way in WAYS:
        subprocess.run([sys.executable, "-m", "benchmarks.telemetry", way], check=True)


if __name__ == "__main__":
    main()
