"""A request's session, over a real uvicorn: committed before the response starts, or rolled back."""

from collections.abc import Iterator

import httpx
import pytest
from fastapi import Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import IntegrityError

from aftercommit import PoolSettings
from tests.acceptance.apps.orders import Shop, Watch, make
from tests.acceptance.apps.traffic import post_at_once
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import serve


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Shop]:
    """A shop on an empty database, written for the driver at hand."""
    shop = make(database.url)
    yield shop
    shop.close()


@pytest.fixture
def watch(shop: Shop) -> Watch:
    """Who looks at the shop's responses."""
    return Watch(shop)


@pytest.fixture
def client(watch: Watch) -> Iterator[httpx.Client]:
    """A client of the shop."""
    with serve(watch) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.mark.parametrize("path", ["/orders", "/unflushed", "/backgrounds", "/own-background", "/returned"])
def test_the_commit_comes_before_the_response_starts(shop: Shop, watch: Watch, client: httpx.Client, path: str):
    """When the first byte is sent, another connection sees the rows, and the request holds no connection."""
    response = client.post(path, params={"sku": "a"})

    assert response.status_code == (409 if path == "/returned" else 200)
    assert [(start.in_use, start.skus) for start in watch.starts] == [(0, ["a"])]


def test_reading_gives_the_connection_back_before_the_response(shop: Shop, watch: Watch, client: httpx.Client):
    """A request that only reads holds no connection while it is answered."""
    client.get("/orders/count").raise_for_status()

    assert [start.in_use for start in watch.starts] == [0]


@pytest.mark.parametrize("path", ["/orders", "/unflushed", "/backgrounds", "/own-background", "/returned", "/alone"])
def test_tasks_follow_the_commit(shop: Shop, client: httpx.Client, path: str):
    """Every way of returning commits, and what was handed over takes effect once."""
    client.post(path, params={"sku": "a"})

    shop.db.drain()

    assert shop.effects() == ["a"]
    assert shop.states() == ["succeeded"]


@pytest.mark.parametrize(("kind", "status"), [("http", 409), ("value", 500)])
def test_raising_rolls_back_and_drops_the_tasks(shop: Shop, watch: Watch, client: httpx.Client, kind: str, status: int):
    """After an exception there is no row and no task, and the connection is back before the answer starts."""
    response = client.post(f"/raise/{kind}", params={"sku": "a"})

    shop.db.drain()
    assert response.status_code == status
    assert [(start.in_use, start.skus) for start in watch.starts] == [(0, [])]
    assert (shop.skus(), shop.states()) == ([], [])


def test_a_response_that_cannot_be_built_rolls_back(shop: Shop, client: httpx.Client):
    """The response is validated before the commit: where that fails, nothing is committed."""
    response = client.post("/unreadable", params={"sku": "a"})

    shop.db.drain()
    assert response.status_code == 500
    assert (shop.skus(), shop.states()) == ([], [])


def test_the_response_is_built_before_the_session_ends(shop: Shop, client: httpx.Client):
    """A response model reads relations of the returned instance while the session lives."""
    response = client.post("/lazy", params={"sku": "a"})

    assert response.json() == {"id": 1, "lines": [{"text": "one"}, {"text": "two"}]}


def test_a_commit_that_fails_is_a_500(shop: Shop, watch: Watch, client: httpx.Client):
    """A duplicate that only the commit's flush finds is an error to the client, never a 200."""
    client.post("/unflushed", params={"sku": "a"}).raise_for_status()

    response = client.post("/unflushed", params={"sku": "a"})

    shop.db.drain()
    assert response.status_code == 500
    assert [start.in_use for start in watch.starts] == [0, 0]
    assert shop.effects() == ["a"]


def test_a_commit_that_fails_reaches_the_applications_handlers(shop: Shop, client: httpx.Client):
    """An application that maps IntegrityError to 409 does so for the commit, too."""

    @shop.app.exception_handler(IntegrityError)
    async def conflict(_request: Request, _error: IntegrityError) -> JSONResponse:
        return JSONResponse({"told": "conflict"}, status_code=409)

    shop.app.middleware_stack = shop.app.build_middleware_stack()
    client.post("/unflushed", params={"sku": "a"}).raise_for_status()

    response = client.post("/unflushed", params={"sku": "a"})

    assert (response.status_code, response.json()) == (409, {"told": "conflict"})


@pytest.mark.parametrize(
    ("path", "said"), [("/backgrounds", "background of a"), ("/own-background", "own background of a")]
)
def test_background_tasks_of_starlette_run_beside_ours(shop: Shop, client: httpx.Client, path: str, said: str):
    """Neither the injected BackgroundTasks nor a response's own background stop, or are stopped by, our tasks."""
    client.post(path, params={"sku": "a"}).raise_for_status()

    shop.db.drain()
    assert shop.heard.get(timeout=30) == said
    assert shop.effects() == ["a"]


def test_a_stream_is_told_to_open_a_session_of_its_own(shop: Shop, watch: Watch, client: httpx.Client):
    """While a response streams the session has ended; the error names its owner and what to write instead."""
    client.post("/orders", params={"sku": "a"}).raise_for_status()

    told = client.get("/stream").text

    assert "it belonged to GET /stream" in told
    assert f"`{'async with db.async_session()' if shop.is_async else 'with db.session()'} as session:`" in told
    assert "streaming response" in told
    assert told.endswith("a")
    assert watch.starts[-1].in_use == 0


def test_handing_over_after_the_request_is_refused(shop: Shop, client: httpx.Client):
    """A task that is asked for while the response streams could never start, so it is an error."""
    told = client.post("/late", params={"sku": "a"}).text

    shop.db.drain()
    assert told.startswith("HandOverError: POST /late has ended")
    assert shop.effects() == ["a"]


def test_a_swallowed_exception_rolls_back(shop: Shop, client: httpx.Client):
    """A dependency that swallows the endpoint's exception makes FastAPI answer 500: then nothing is committed."""
    response = client.post("/swallowed", params={"sku": "a"})

    shop.db.drain()
    assert shop.heard.get(timeout=30) == "swallowed"
    assert response.status_code == 500
    assert (shop.skus(), shop.states()) == ([], [])


def test_many_requests_share_a_small_pool(database: DatabaseUnderTest):
    """40 requests at once on a pool of 5, each with a task: all are answered, all tasks take effect."""
    shop = make(database.url, pool=PoolSettings(pool_size=5, max_overflow=0))

    with serve(shop.app) as url:
        responses = post_at_once(url, [f"/orders?sku={number}" for number in range(40)])
        shop.db.drain()

    assert [response.status_code for response in responses] == [200] * 40
    assert len(shop.effects()) == 40
    assert shop.states() == ["succeeded"] * 40


@pytest.mark.drivers("psycopg")
def test_waiting_requests_leave_a_thread_to_those_that_commit(database: DatabaseUnderTest):
    """200 sync requests at once: all 40 threads wait for a connection, and those that have one can still commit."""
    shop = make(database.url, pool=PoolSettings(pool_size=5, max_overflow=0, pool_timeout=10.0))

    with serve(shop.app) as url:
        responses = post_at_once(url, [f"/orders?sku={number}" for number in range(200)])
        shop.db.drain()

    assert [response.status_code for response in responses] == [200] * 200
    assert len(shop.effects()) == 200
