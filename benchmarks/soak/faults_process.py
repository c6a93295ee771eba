"""What happens to processes: they are killed, frozen, and stopped in order, once, twice, and while they start."""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from random import Random

from benchmarks.soak.application import SILENT_AFTER
from benchmarks.soak.stage import Slot, Stage

STOPS_WITHIN = 25.0
"""Seconds after which a process that was asked to stop, and did not, is killed."""


def kill(stage: Stage, rng: Random) -> None:
    """SIGKILL."""
    slot = stage.pick(rng)
    with slot.lock:
        if slot.process is not None:
            slot.process.kill()
            slot.process.wait()
    slot.ensure()


def freeze(stage: Stage, rng: Random) -> None:
    """SIGSTOP, often for longer than it takes to be given up: a zombie wakes up then."""
    slot, seconds = stage.pick(rng), rng.uniform(0.3, 2.5 * SILENT_AFTER)
    with slot.lock, suppress(ProcessLookupError):
        if slot.process is None:
            return
        slot.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        slot.process.send_signal(signal.SIGCONT)


def stop(stage: Stage, rng: Random) -> None:
    """One SIGTERM."""
    slot = stage.pick(rng)
    with slot.lock:
        _stop(stage, slot, [0.0])
    slot.ensure()


def stop_twice(stage: Stage, rng: Random) -> None:
    """Two SIGTERM, the second while the stop is under way."""
    slot = stage.pick(rng)
    with slot.lock:
        _stop(stage, slot, [0.0, rng.uniform(0.05, 1.2)])
    slot.ensure()


def stop_at_start(stage: Stage, rng: Random) -> None:
    """SIGTERM to a process that has just been started."""
    slot = stage.pick(rng)
    with slot.lock:
        if slot.process is not None:
            slot.process.kill()
            slot.process.wait()
        slot.start()
        _stop(stage, slot, [rng.uniform(0.3, 2.5)])
    slot.ensure()


def vanish(stage: Stage, rng: Random) -> None:
    """The machine of a process loses its power: the process is gone, and the server hears nothing of it."""
    slot = stage.pick(rng)
    with slot.lock:
        if slot.proxy is not None:
            slot.proxy.vanish()
        if slot.process is not None:
            slot.process.kill()
            slot.process.wait()
    slot.ensure()


def _stop(stage: Stage, slot: Slot, pauses: list[float]) -> None:
    process = slot.process
    if process is None:
        return
    for each in pauses:
        time.sleep(each)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOPS_WITHIN)
    except subprocess.TimeoutExpired:
        stage.done["(a stop that took too long)"] += 1
        process.kill()
        process.wait()


FAULTS: Mapping[str, Callable[[Stage, Random], None]] = {
    "kill": kill,
    "freeze": freeze,
    "stop": stop,
    "stop twice": stop_twice,
    "stop at start": stop_at_start,
    "vanish": vanish,
}
