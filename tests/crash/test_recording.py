"""The database goes away just when the end of a run, its retry or its checkpoint is to be written."""

import logging
import threading
from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session

from aftercommit import Retry, current_run, signals
from tests.crash.child import HEARTBEAT, SILENT_AFTER
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.workshop import TIMEOUT, Effect, Heard, Workshop


class Said(logging.Handler):
    """Waits for a line of the log."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Look for the part."""
        if self._part in record.getMessage():
            self.came.set()


@pytest.fixture
def given_up() -> Iterator[Said]:
    """That the end of a run could not be recorded."""
    said, logger = Said("could not be recorded"), logging.getLogger("aftercommit.runner.recording")
    logger.addHandler(said)
    yield said
    logger.removeHandler(said)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL to be taken away."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["psycopg", "asyncpg"])
def shop(request: pytest.FixtureRequest, server: PostgresServer) -> Iterator[Workshop]:
    """A workshop on an empty database of that server."""
    with server.database() as name:
        under_test = DatabaseUnderTest(url=server.url(name, driver=request.param), driver=request.param)
        shop = Workshop(under_test, heartbeat=HEARTBEAT, silent_after=SILENT_AFTER)
        yield shop
        shop.close()


@pytest.mark.parametrize("soon", [True, False], ids=["while it is tried", "after it was given up"])
@pytest.mark.parametrize("what", ["a failure", "a failure that may happen once", "a retry", "a checkpoint", "the end"])
def test_what_cannot_be_written_is_made_up_for(
    server: PostgresServer, shop: Workshop, given_up: Said, what: str, soon: bool
):
    """Back again, the database is told, or the run is made again: no effect is lost, and none takes place twice."""
    calls: list[int] = []
    begun, gate = threading.Event(), threading.Event()
    retry = {
        "a failure that may happen once": Retry(attempts=1),
        "a retry": Retry(on=ValueError, base=0.01),
    }.get(what, Retry(base=0.01))

    def mark(session: Session, error: BaseException, label: str) -> None:
        session.add(Effect(label=f"{label} failed"))

    @shop.task(begun=begun.set, gate=gate, retry=retry, on_failure=mark)
    def work(session: Session, label: str) -> None:
        calls.append(1)
        run = current_run()
        assert run is not None
        if what.startswith("a failure") or (what == "a retry" and len(calls) == 1):
            raise ValueError("no")
        if what == "a checkpoint" and run.restored is None:
            session.add(Effect(label=f"{label} begun"))
            run.checkpoint(1)
            session.commit()
        session.add(Effect(label=label))

    with Heard(signals.TaskSucceeded, signals.TaskFailed) as heard:
        with shop.running():
            shop.drain()
            id = shop.ask(work, "x")
            assert begun.wait(TIMEOUT)
            server.halt()
            gate.set()
            if not soon:
                assert given_up.came.wait(TIMEOUT)
            server.resume()
            shop.outside.dispose()
            ended = signals.TaskFailed if what.startswith("a failure") else signals.TaskSucceeded
            heard.wait(ended)
            shop.drain()

        record = shop.record(id)

    assert len(heard.of(ended)) == 1
    assert record.state == ("failed" if ended is signals.TaskFailed else "succeeded"), record.traceback
    assert shop.effects() == {"a failure": ["x failed"], "a checkpoint": ["x", "x begun"]}.get(
        what.removesuffix(" that may happen once"), ["x"]
    )
    if what == "a failure that may happen once":
        assert calls == [1]
