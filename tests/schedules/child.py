"""A process that fires schedules until it is killed: ``python -m tests.schedules.child URL DRIVER``."""

import sys
import threading

from sqlalchemy.orm import Session

from aftercommit import Every, current_run
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Workshop

NAMES = ("one", "two", "three")


def make(url: str, driver: str) -> Workshop:
    """The application: schedules of a second that allow overlaps, and one that skips them."""
    shop = Workshop(DatabaseUnderTest(url=url, driver=driver), heartbeat=0.2, silent_after=1.0)

    def tell(session: Session, label: str) -> None:
        run = current_run()
        assert run is not None
        assert run.tick is not None
        window = (run.tick.previous.isoformat(), run.tick.at.isoformat())
        session.add(Effect(label=" ".join([run.tick.schedule, *window])))

    task = shop.task()(tell)
    for name in NAMES:
        shop.db.schedule(Every(1.0, name=name, overlap="allow"), task, name)
    shop.db.schedule(Every(1.0, name="skips"), task, "skips")
    return shop


def main() -> None:
    """Run until somebody ends it."""
    shop = make(*sys.argv[1:])
    with shop.running():
        print("RUNNING", flush=True)  # noqa: T201  # the parent reads it
        threading.Event().wait()


if __name__ == "__main__":
    main()
