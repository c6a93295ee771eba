"""What a scenario is, and how one looks at an application from outside."""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import httpx
from fastapi import FastAPI
from sqlalchemy import Engine, NullPool, create_engine, text

from aftercommit import Database
from tests.support.servers import serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was seen of one application.

    Attributes:
        said: For people, one line.
        is_right: Whether that is what the author of the application meant.
        facts: The figures behind the line, for the test that holds them.
    """

    said: str
    is_right: bool
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One thing that people write.

    Attributes:
        title: What they write.
        today: Runs it as it is written today, on the empty PostgreSQL database with this URL.
        better: Runs it with aftercommit, on another empty database.
    """

    title: str
    today: Callable[[str], Outcome]
    better: Callable[[str], Outcome]


def post(url: str, *, times: int, width: int) -> list[httpx.Response]:
    """Send *times* POSTs to *url*, *width* at once, the first *width* of them at the same moment."""
    barrier = Barrier(width)
    limits = httpx.Limits(max_connections=width, max_keepalive_connections=width)
    with httpx.Client(timeout=60, limits=limits) as client, ThreadPoolExecutor(width) as threads:

        def send(number: int) -> httpx.Response:
            if number < width:
                barrier.wait()
            return client.post(url)

        return list(threads.map(send, range(times)))


def statuses(responses: list[httpx.Response]) -> Counter[int]:
    """Count the status codes."""
    return Counter(response.status_code for response in responses)


@contextmanager
def engine_of(url: str, **options: Any) -> Iterator[Engine]:
    """Give the engine of an application, and close what it left open."""
    engine = create_engine(url, **options)
    try:
        yield engine
    finally:
        # A session that was used after its end has its connection until the collector comes by.
        gc.collect()
        engine.dispose()


@contextmanager
def running(app: FastAPI, db: Database) -> Iterator[str]:
    """Serve an application with aftercommit; at the end, wait until all its tasks are done."""
    try:
        with serve(app) as base:
            yield base
            db.drain(timeout=120)
    finally:
        db.dispose()


@contextmanager
def onlooker(url: str) -> Iterator[Engine]:
    """Give an engine that has nothing in common with the application's, not even a pool."""
    engine = create_engine(url, poolclass=NullPool)
    try:
        yield engine
    finally:
        engine.dispose()


def ask(url: str, question: str, **values: Any) -> Any:
    """Return the one value that *question* (SQL) asks for, over a connection of its own."""
    with onlooker(url) as engine, engine.connect() as connection:
        return connection.scalar(text(question), values)


def idle_in_transaction(url: str) -> int:
    """Return how many connections of this database sit in a transaction that nobody works on or ends."""
    question = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    )
    return int(ask(url, question))


@contextmanager
def log_kept() -> Iterator[list[logging.LogRecord]]:
    """Keep what is logged as an error, by anybody, off the terminal: it is part of what is measured."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[assignment] # a handler that is a list
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield records
    finally:
        root.removeHandler(handler)


def errors_in(records: list[logging.LogRecord]) -> list[str]:
    """Return the names of the exceptions that were logged."""
    return [type(record.exc_info[1]).__name__ for record in records if record.exc_info and record.exc_info[1]]
