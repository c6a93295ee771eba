"""``python -m benchmarks.batch.child URL SIDE``: do it once, and print what it took, as JSON."""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.batch import by_hand, with_aftercommit


@dataclass(frozen=True, slots=True)
class Side:
    """One way to do it.

    Attributes:
        run: Does it to the database of a URL.
        share: The part of the rows that it is given: those that are slow would take the most of an hour.
        bad: Whether one per cent of the records is bad.
    """

    run: Callable[[str], None]
    share: float = 1.0
    bad: bool = False


SIDES = {
    "loop": Side(by_hand.loop),
    "loop, savepoints": Side(by_hand.loop_with_savepoints, share=0.1),
    "loop, commits": Side(by_hand.loop_with_commits, share=0.1),
    "run_batch": Side(with_aftercommit.batch),
    "run_batch, 1 % bad": Side(with_aftercommit.batch, bad=True),
    "run_batch in a task": Side(with_aftercommit.batch_in_task),
    "one UPDATE": Side(by_hand.one_update),
    "per_chunk, rows": Side(with_aftercommit.per_chunk),
    "per_chunk, keys": Side(with_aftercommit.per_chunk_of_keys),
}


def main() -> None:
    """Do what the arguments say."""
    url, name = sys.argv[1:]
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    SIDES[name].run(url)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # KiB on Linux, bytes on macOS.
    peak = after.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    print(json.dumps({"seconds": seconds, "computed": computed, "peak": peak}))


if __name__ == "__main__":
    main()
