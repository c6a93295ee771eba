"""A worker on a host whose clock is wrong: ``python -m tests.crash.clock_child URL DRIVER SECONDS FIFO``.

Its clock is SECONDS ahead, or behind if negative. It runs the pools ``there`` and ``delayed`` until it is killed, and
hands over one task of its own. It writes ``READY``, ``AT the gate`` and ``RESCUED``.
"""

import datetime as dt
import sys
import threading
import time
from typing import Any

# Before the clock goes wrong: it is this library that is to be deceived, and nobody else.
import asyncpg  # noqa: F401  # see above
import psycopg  # noqa: F401  # see above
import pydantic  # noqa: F401  # see above
from sqlalchemy.orm import Session

from tests.support.databases import DatabaseUnderTest

HEARTBEAT, SILENT_AFTER, LATER = 0.2, 3.0, 1800.0


def set_the_clock(seconds: float) -> None:
    """Have this process see another time, in every way that a library may ask for it."""
    right, right_ns = time.time, time.time_ns

    class Shifted(dt.datetime):
        """Knows a wrong now; what it returns are the usual ones."""

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return right_datetime.fromtimestamp(time.time(), tz)

    right_datetime = dt.datetime
    time.time = lambda: right() + seconds
    time.time_ns = lambda: right_ns() + int(seconds * 1e9)
    dt.datetime = Shifted  # type: ignore[misc]


def make(url: str, driver: str, gates: Any) -> Any:
    """The application: tasks that wait at a gate of their own, and one that is done at once.

    Args:
        url: The database.
        driver: Its driver.
        gates: What ``here`` and ``there`` wait at, by name.
    """
    from aftercommit import PoolSettings
    from tests.support.workshop import Effect, Workshop

    shop = Workshop(
        DatabaseUnderTest(url=url, driver=driver),
        heartbeat=HEARTBEAT,
        silent_after=SILENT_AFTER,
        pools={"here": PoolSettings(), "there": PoolSettings(), "delayed": PoolSettings()},
    )

    @shop.task(pool="here", gate=gates["here"])
    def here(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    @shop.task(pool="there", gate=gates["there"])
    def there(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    # In a pool of its own, because tasks that are not yet due have the others of their pool claimed in another way.
    @shop.task(pool="delayed")
    def quick(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    return shop, here, there, quick


def main() -> None:
    """Do what the arguments say."""
    url, driver, seconds, fifo = sys.argv[1:]
    set_the_clock(float(seconds))
    from aftercommit import signals
    from tests.crash.child import Fifo

    def rescued(_: signals.TasksRescued) -> None:
        print("RESCUED", flush=True)  # noqa: T201  # the parent reads it

    signals.subscribe(signals.TasksRescued)(rescued)
    # What the gate says of itself is in the same place for every child.
    sys.argv[3] = "the gate"
    shop, _, _, quick = make(url, driver, {"here": None, "there": Fifo(fifo)})
    with shop.running(runs=["there", "delayed"]):
        shop.ask(quick.with_options(delay=LATER), "too early, by the clock of its asker")
        print("READY", flush=True)  # noqa: T201  # the parent reads it
        threading.Event().wait()


if __name__ == "__main__":
    main()
