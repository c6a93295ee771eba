"""``python -m benchmarks.events.child URL SIDE EVENTS WIDTH hot|cold``: do it, and print what it took, as JSON."""

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.events import by_hand, ways, with_aftercommit
from benchmarks.events.table import events_of

Run = Callable[[ways.Job], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Side:
    """One way to handle events.

    Attributes:
        run: Does it; returns the seconds from the start of the handlers to the last event's effect.
        postgresql_only: Whether there is nothing to compare on SQLite.
    """

    run: Run
    postgresql_only: bool = False


async def _faststream(job: ways.Job) -> float:
    from benchmarks.events import with_faststream

    return await with_faststream.run(job)


SIDES = {
    "by hand, outbox": Side(by_hand.outbox),
    "by hand, from memory": Side(by_hand.from_memory),
    "faststream-outbox": Side(_faststream, postgresql_only=True),
    "db.on, read and write": Side(with_aftercommit.on(ways.naive)),
    "db.on, FOR UPDATE": Side(with_aftercommit.on(ways.for_update), postgresql_only=True),
    "db.on, n = n + 1": Side(with_aftercommit.on(ways.in_the_database)),
    "db.on, upsert": Side(with_aftercommit.on(ways.upsert)),
    "db.on, FOR UPDATE, RC": Side(with_aftercommit.on(ways.for_update, "READ COMMITTED"), postgresql_only=True),
    "db.on, n = n + 1, RC": Side(with_aftercommit.on(ways.in_the_database, "READ COMMITTED"), postgresql_only=True),
    "db.on, upsert, RC": Side(with_aftercommit.on(ways.upsert, "READ COMMITTED"), postgresql_only=True),
}


def main() -> None:
    """Do what the arguments say."""
    url, side, count, width, kind = sys.argv[1:]
    logging.basicConfig(level=logging.ERROR)
    job = ways.Job(url, events_of(int(count), hot=kind == "hot"), int(width))
    seconds = asyncio.run(SIDES[side].run(job))
    print(json.dumps({"seconds": seconds, "calls": job.calls}))


if __name__ == "__main__":
    main()
