"""Clients that go away, middleware, cancellation, several workers, and servers that run no lifespan."""

import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx
import pytest
from sqlalchemy import Connection, event, select
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response

from aftercommit import Database, TaskRecord
from aftercommit.errors import RunnerNotRunning
from aftercommit.fastapi import AfterCommitDep, AsyncSessionDep, SessionDep
from tests.acceptance.apps.orders import Effect, Order, Shop, make
from tests.acceptance.apps.traffic import new_test_client, post_at_once
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import Server, serve

WAIT = 20.0  # seconds, for what takes milliseconds


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Shop]:
    """A shop on an empty database, written for the driver at hand."""
    shop = make(database.url)
    yield shop
    shop.close()


class Meeting:
    """Where a test, its client and the application wait for each other."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.go = threading.Event()
        self.over = threading.Event()

    def meet(self) -> None:
        """Say that this point is reached, and wait for the test."""
        self.inside.set()
        assert self.go.wait(WAIT)

    async def async_meet(self) -> None:
        """Say that this point is reached, and wait for the test."""
        await asyncio.to_thread(self.meet)


def add_waiting_endpoint(shop: Shop, meeting: Meeting) -> None:
    """Give the shop an endpoint that waits in its middle, its rows flushed and its task handed over."""
    ship = shop.db.tasks["ship"]

    if shop.is_async:

        @shop.app.post("/wait")
        async def wait(sku: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> str:
            order = Order(sku=sku)
            session.add(order)
            after_commit(ship, order)
            await session.flush()
            await meeting.async_meet()
            return "done"
    else:

        @shop.app.post("/wait")
        def wait(sku: str, session: SessionDep, after_commit: AfterCommitDep) -> str:
            order = Order(sku=sku)
            session.add(order)
            after_commit(ship, order)
            session.flush()
            meeting.meet()
            return "done"


def add_middleware(shop: Shop) -> None:
    """Put a middleware of the kind that is known for its troubles with clients that go away around the shop."""

    async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await call_next(request)

    shop.app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)


class LosesItsClient:
    """An ASGI application around another, which notices when the client has gone; in which moment is chosen."""

    def __init__(self, app: Any, meeting: Meeting, moment: str) -> None:
        self._app = app
        self._meeting = meeting
        self._moment = moment

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def gone() -> None:
            self._meeting.inside.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            self._meeting.go.set()

        async def sending(message: Any) -> None:
            if self._moment == "after" and message["type"] == "http.response.start":
                await gone()
            await send(message)

        if self._moment == "before":
            await gone()
        listening = asyncio.create_task(gone()) if self._moment == "during" else None
        try:
            await self._app(scope, receive, sending)
        finally:
            if listening is not None:
                await listening
            self._meeting.over.set()


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("middleware", [False, True], ids=["plain", "BaseHTTPMiddleware"])
def test_a_client_that_has_gone_changes_nothing(shop: Shop, moment: str, middleware: bool):
    """Whenever the client closes its connection, what the endpoint finished is committed and its task runs."""
    meeting = Meeting()
    if middleware:
        add_middleware(shop)
    if moment == "during":
        add_waiting_endpoint(shop, meeting)
    app = LosesItsClient(shop.app, meeting, moment)

    with serve(app) as url:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port)) as client:
            path = "/wait" if moment == "during" else "/orders"
            client.sendall(f"POST {path}?sku=a HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\n\r\n".encode())
            assert meeting.inside.wait(WAIT)
        assert meeting.over.wait(WAIT)
        in_use = shop.in_use()
        shop.db.drain()

    assert in_use == 0
    assert shop.skus() == ["a"]
    assert shop.effects() == ["a"]


def test_base_http_middleware_changes_nothing(shop: Shop):
    """With BaseHTTPMiddleware around it a request still commits before its response, or rolls back."""
    add_middleware(shop)

    with serve(shop.app) as url, httpx.Client(base_url=url) as client:
        good = client.post("/orders", params={"sku": "a"})
        seen = shop.skus()
        bad = client.post("/raise/value", params={"sku": "b"})
        shop.db.drain()

    assert (good.status_code, bad.status_code) == (200, 500)
    assert seen == shop.skus() == shop.effects() == ["a"]


class Cancels:
    """An ASGI application around another, which it cancels when the test says so."""

    def __init__(self, app: Any, way: str) -> None:
        self._app = app
        self._way = way
        self.started = threading.Event()
        self.over = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._loop = asyncio.get_running_loop()
        try:
            if self._way == "anyio":
                with anyio.CancelScope() as self._scope:
                    await self._app(scope, receive, send)
            else:
                self._job = asyncio.create_task(self._app(scope, receive, send))
                await asyncio.wait([self._job])
                if not self._job.cancelled():
                    self._job.exception()
        finally:
            self.over.set()

    def cancel(self) -> None:
        """Cancel the request, from any thread; native cancellation comes twice."""

        def now() -> None:
            if self._way == "anyio":
                self._scope.cancel()
            else:
                self._job.cancel()
                self._loop.call_soon(self._job.cancel)

        self._loop.call_soon_threadsafe(now)


WAYS = pytest.mark.parametrize("way", ["asyncio", "anyio"])


@WAYS
def test_a_cancelled_endpoint_rolls_back(shop: Shop, way: str):
    """A request that is cancelled while its endpoint runs leaves no row, no task and no connection in use."""
    meeting = Meeting()
    add_waiting_endpoint(shop, meeting)
    app = Cancels(shop.app, way)

    def cancel() -> None:
        meeting.inside.wait(WAIT)
        app.cancel()
        meeting.go.set()

    with serve(app) as url, httpx.Client(base_url=url, timeout=WAIT) as client:
        threading.Thread(target=cancel).start()
        status = client.post("/wait", params={"sku": "a"}).status_code
        shop.db.drain()

    assert status == 500
    assert shop.in_use() == 0
    assert (shop.skus(), shop.states()) == ([], [])


@WAYS
def test_a_cancellation_cannot_stop_a_commit(shop: Shop, way: str):
    """A request that is cancelled while it commits has committed, its task runs, and its connection is back."""
    app = Cancels(shop.app, way)
    engine = shop.db.async_engine().sync_engine if shop.is_async else shop.db.engine()

    with serve(app) as url, httpx.Client(base_url=url, timeout=WAIT) as client:

        @event.listens_for(engine, "commit", once=True)
        def cancel(_connection: Connection) -> None:
            app.cancel()

        client.post("/orders", params={"sku": "a"})
        assert app.over.wait(WAIT)
        in_use = shop.in_use()
        shop.db.drain()

    assert in_use == 0
    assert shop.skus() == shop.effects() == ["a"]


# --- several processes ------------------------------------------------------------------------------------------


@pytest.mark.drivers("psycopg", "asyncpg", "pysqlite")
def test_two_workers_run_each_task_once(database: DatabaseUnderTest):
    """With two uvicorn workers on one database every task runs in exactly one of them."""
    shop = make(database.url)
    skus = [f"{number:02}" for number in range(30)]
    app = "tests.acceptance.apps.orders:app"

    with Server(app, env={"SHOP_URL": database.url}, workers=2, arguments=("--factory",)) as server:
        responses = post_at_once(server.url, [f"/orders?sku={sku}" for sku in skus])
        for sku in skus:
            server.log.wait_for(f"shipped {sku}")
        pids = set(server.worker_pids)
        server.stop()

    assert {response.status_code for response in responses} == {200}
    assert shop.effects() == skus
    assert shop.states() == ["succeeded"] * len(skus)
    with shop.onlooker() as connection:
        assert set(connection.scalars(select(Effect.pid))) <= pids
        assert set(connection.scalars(select(TaskRecord.attempt))) == {1}


# --- no lifespan ------------------------------------------------------------------------------------------------


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.drivers("psycopg", "pysqlite", "aiosqlite")
def test_a_test_client_without_with_queues_and_warns(database: DatabaseUnderTest, caplog: pytest.LogCaptureFixture):
    """Without its lifespan an application runs no tasks: they are queued, with one warning."""
    shop = make(database.url)
    _create_tables(shop.db)
    client = new_test_client(shop.app)

    statuses = [client.post("/orders", params={"sku": sku}).status_code for sku in "ab"]

    assert statuses == [200, 200]
    assert shop.states() == ["queued", "queued"]
    assert len(_warnings(caplog)) == 1
    assert "a TestClient without `with`" in _warnings(caplog)[0]
    shop.db.drain()
    shop.close()
    assert shop.effects() == ["a", "b"]


async def test_an_asgi_transport_queues_and_warns_once(sqlite_url: str, caplog: pytest.LogCaptureFixture):
    """httpx's ASGITransport runs no lifespan either."""
    shop = make(sqlite_url.replace("pysqlite", "aiosqlite"))
    await shop.db.async_create_tables()

    async with httpx.AsyncClient(transport=httpx.ASGITransport(shop.app), base_url="http://shop") as client:
        statuses = [(await client.post("/orders", params={"sku": sku})).status_code for sku in "ab"]

    assert statuses == [200, 200]
    assert shop.states() == ["queued", "queued"]
    assert len(_warnings(caplog)) == 1
    await shop.db.async_drain()
    await shop.db.async_dispose()
    assert shop.effects() == ["a", "b"]


def test_a_task_in_memory_without_a_lifespan_is_an_error(sqlite_url: str):
    """Work that nobody in this process could ever start is refused where it is asked for."""
    shop = make(sqlite_url)

    @shop.db.task(durable=False)
    def cheap() -> None: ...

    @shop.app.post("/cheap")
    def endpoint(session: SessionDep, after_commit: AfterCommitDep) -> None:
        after_commit(cheap)

    with pytest.raises(RunnerNotRunning, match="the application's lifespan"):
        new_test_client(shop.app).post("/cheap")
    shop.close()


def test_a_test_client_with_with_runs_tasks(shop: Shop):
    """With its lifespan an application under a TestClient runs its tasks as it does under a server."""
    with new_test_client(shop.app) as client:
        client.post("/orders", params={"sku": "a"}).raise_for_status()
        shop.db.drain()

    assert shop.effects() == ["a"]


def _create_tables(db: Database) -> None:
    if db.sessions.is_async_only:
        asyncio.run(_async_create_tables(db))
    else:
        db.create_tables()


async def _async_create_tables(db: Database) -> None:
    await db.async_create_tables()
    await db.async_dispose()
