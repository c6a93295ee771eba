"""What happens in the process of one measurement: ``python -m benchmarks.queue.child CONTESTANT MEASUREMENT``."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from itertools import count
from time import perf_counter_ns

CALLS = "BENCHMARK_CALLS"


def say(line: str) -> None:
    """Tell the process that measures."""
    print(line, flush=True)


def begin() -> None:
    """Call this when everything is made ready, and the clock is to start."""
    if os.environ.get(CALLS):
        _count_calls()
    # The monotonic clock is the machine's: the process that measures has the same.
    say(f"begun {perf_counter_ns()}")


def _count_calls() -> None:
    """Count the calls of functions in this thread and in those to come; tell of them when asked by a signal."""
    number = count()

    def note(_frame: object, event: str, _argument: object) -> None:
        if event in {"call", "c_call"}:
            next(number)

    signal.signal(signal.SIGUSR1, lambda *_: say(f"calls {next(number)}"))
    threading.setprofile(note)
    sys.setprofile(note)


async def wait_to_be_stopped() -> None:
    """Stay, so that the CPU time can be read; whoever measures stops this process."""
    await asyncio.Event().wait()


def main(contestant: str, measurement: str) -> None:
    """Do one measurement's part."""
    from benchmarks.queue import by_hand, ours, peers

    found: dict[tuple[str, str], Callable[[], None]] = {
        ("by hand", "backlog"): by_hand.backlog,
        ("by hand", "sustained 1"): lambda: by_hand.sustained(1),
        ("by hand", "sustained 100"): lambda: by_hand.sustained(100),
        ("aftercommit", "backlog"): lambda: ours.backlog(100),
        ("aftercommit", "sustained 1"): lambda: ours.sustained(1),
        ("aftercommit", "sustained 100"): lambda: ours.sustained(100),
        ("by hand", "calls"): by_hand.backlog,
        ("aftercommit", "calls"): lambda: ours.backlog(100),
        ("aftercommit", "start, alone"): lambda: ours.ask_at(0.0),
        ("aftercommit", "start, steady"): lambda: ours.ask_at(ours.PER_SECOND),
        ("aftercommit", "start elsewhere"): lambda: ours.ask_elsewhere_at(ours.PER_SECOND),
        ("aftercommit", "serve"): ours.serve,
        **{(name, "backlog"): peer.backlog for name, peer in peers.PEERS.items()},
    }
    found[contestant, measurement]()


if __name__ == "__main__":
    main(*sys.argv[1:])
