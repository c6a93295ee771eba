"""A process that hands tasks over and runs them, and stands still at the point where it is to be killed.

``python -m tests.crash.child URL DRIVER POINT [FIFO]``: it writes ``AT <point>`` and blocks there, or, without a point
to stop at, runs all that is due, writes ``DRAINED`` and ends.
"""

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy import event
from sqlalchemy.orm import Session

from aftercommit import Retry, current_run, signals
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Counter, Effect, Workshop

POINTS = (
    "before the commit",
    "after the commit",
    "after the claim",
    "in the effect",
    "before the end",
    "after the end",
)
OWN_CLAIM = "after its own claim"
"""Where a child stands still that asks for nothing itself, and claims what another process handed over."""
BETWEEN_CHECKPOINTS = "between two checkpoints"
"""Where a child stands still that asks for a task of several steps: two are committed, the third is not."""
HEARTBEAT, SILENT_AFTER = 0.2, 1.0


def stand_still(*_: Any) -> NoReturn:
    """Say where we are, and do nothing more."""
    print("AT", sys.argv[3], flush=True)  # noqa: T201  # the parent reads it
    threading.Event().wait()
    raise AssertionError


class Fifo:
    """A gate that another process opens."""

    def __init__(self, path: str) -> None:
        self._path = path

    def wait(self, _timeout: float) -> None:
        """Say that we wait, and wait until somebody writes."""
        print("AT", sys.argv[3], flush=True)  # noqa: T201  # the parent reads it
        with Path(self._path).open("rb") as fifo:
            fifo.read()


def make(url: str, driver: str, *, point: str = "", fifo: str | None = None, retry: Retry | None = None) -> Workshop:
    """The application: one task with one effect, and one with four, each committed with a checkpoint."""
    shop = Workshop(DatabaseUnderTest(url=url, driver=driver), heartbeat=HEARTBEAT, silent_after=SILENT_AFTER)

    @shop.task(gate=None if fifo is None else Fifo(fifo), retry=retry or Retry())  # type: ignore[arg-type]
    def pay(session: Session, label: str) -> None:
        session.add(Effect(label=label))
        session.flush()
        if point == "in the effect":
            stand_still()

    @shop.task()
    def pay_in_steps(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        for step in range(run.restored or 0, 4):
            session.add(Effect(label=f"{label}, step {step}"))
            session.flush()
            if step == 2 and point == BETWEEN_CHECKPOINTS:
                stand_still()
            run.checkpoint(step + 1)
            session.commit()

    shop.pay = pay_in_steps if point == BETWEEN_CHECKPOINTS else pay  # type: ignore[attr-defined]
    return shop


def request(shop: Workshop, label: str) -> None:
    """A request: a row of its own, and the task for it."""

    def body(session: Session) -> None:
        session.add(Counter(id=int(label)))
        shop.db.after_commit(session, shop.pay, label)  # type: ignore[attr-defined]

    shop.commit(body)


def stop_at(shop: Workshop, point: str) -> None:
    """Have this process stand still at *point*."""
    db = shop.db
    if point == "before the commit":
        event.listen((db.async_engine().sync_engine if shop.is_async else db.engine()), "commit", stand_still)
    elif point == "after the commit":
        signals.subscribe(signals.TasksHandedOver)(stand_still)
    elif point in ("after the claim", OWN_CLAIM):
        signals.subscribe(signals.TaskStarted)(stand_still)
    elif point == "before the end":
        pool = db.async_engine("default").sync_engine if shop.is_async else db.engine("default")
        event.listen(pool, "commit", stand_still)
    elif point == "after the end":
        signals.subscribe(signals.TaskSucceeded)(stand_still)


def main() -> None:
    """Do what the arguments say."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    url, driver, point, *fifo = sys.argv[1:]
    shop = make(url, driver, point=point, fifo=fifo[0] if fifo else None)
    if point == OWN_CLAIM:
        # Before there is a runner: it looks for work at once.
        stop_at(shop, point)
    with shop.running():
        if point and point != OWN_CLAIM:
            shop.drain()
            stop_at(shop, point)
            request(shop, "1")
        shop.db.drain(60.0)
        print("DRAINED", flush=True)  # noqa: T201  # the parent reads it
    shop.close()


if __name__ == "__main__":
    main()
    # Whatever is left must not keep the process: that is what the parent waits for.
    os._exit(0)
