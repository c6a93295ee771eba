"""``status_router`` on a real uvicorn: one answer, a stream of events, and a stop that waits for no stream."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from aftercommit import Database
from aftercommit.errors import ConfigurationError
from aftercommit.fastapi import status_router
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import Server

APP = "tests.acceptance.apps.status:app"
ANN = {"user": "ann"}


def text_of(url: Any) -> str:
    """The URL, with its password."""
    return url if isinstance(url, str) else str(url.render_as_string(hide_password=False))


@pytest.fixture
def server(database: DatabaseUnderTest) -> Iterator[Server]:
    """The application, on an async driver."""
    with Server(APP, env={"STATUS_URL": text_of(database.url)}) as server:
        yield server


def ask(server: Server, to: int, seconds: float) -> str:
    """Hand a task over."""
    return str(httpx.post(f"{server.url}/tasks", params={"to": to, "seconds": seconds}).json()["id"])


def events(server: Server, id: str, headers: dict[str, str] = ANN) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a stream, until it ends."""
    with httpx.stream("GET", f"{server.url}/tasks/{id}/events", headers=headers, timeout=60.0) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_an_answer_says_how_the_task_stands(server: Server) -> None:
    """202 while it is open, 200 when it has ended; never arguments, result or traceback."""
    id = ask(server, 3, 0.5)
    open_ = httpx.get(f"{server.url}/tasks/{id}", headers=ANN)
    kinds = list(events(server, id))
    ended = httpx.get(f"{server.url}/tasks/{id}", headers=ANN)

    assert (open_.status_code, open_.headers["retry-after"]) == (202, "1")
    assert (ended.status_code, ended.json()["state"]) == (200, "succeeded")
    assert set(ended.json()) == {
        *("id", "state", "progress_done", "progress_total"),
        *("enqueued_at", "run_at", "started_at", "finished_at", "error"),
    }
    assert "result" not in ended.text
    assert kinds[0][0] == "state"
    assert (kinds[-1][0], kinds[-1][1]["state"]) == ("end", "succeeded")


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_a_stream_tells_of_progress(server: Server) -> None:
    """Every figure comes from the database, once a second at most."""
    seen = list(events(server, ask(server, 5, 0.7)))

    progress = [data["progress_done"] for kind, data in seen if kind == "progress"]
    assert progress == sorted(progress)
    assert len(progress) >= 2
    assert seen[-1][0] == "end"


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_who_may_not_see_it_learns_nothing(server: Server) -> None:
    """The same 404 as for what is not there; and an error only for those who may see it."""
    id = ask(server, 0, 0.0)
    list(events(server, id))
    absent = "00000000-0000-0000-0000-000000000001"
    answers = [
        httpx.get(f"{server.url}/tasks/{each}{path}", headers={"user": user})
        for each, user in ((id, "bob"), (absent, "admin"))
        for path in ("", "/events")
    ]
    ann, admin = (httpx.get(f"{server.url}/tasks/{id}", headers={"user": user}).json() for user in ("ann", "admin"))

    assert {(each.status_code, each.text) for each in answers} == {(404, '{"detail":"Not Found"}')}
    assert (ann["state"], ann["error"]) == ("failed", None)
    assert "secret detail" in admin["error"]


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_a_browser_that_comes_again_behind_the_end_is_sent_away(server: Server) -> None:
    """204 is what ends its attempts; a new page gets the end."""
    id = ask(server, 1, 0.0)
    list(events(server, id))
    again = httpx.get(f"{server.url}/tasks/{id}/events", headers={**ANN, "Last-Event-ID": "ended"})

    assert again.status_code == 204
    assert [kind for kind, _ in events(server, id)] == ["end"]


def looks_of(server: Server) -> int:
    """How often the server has asked its database how tasks stand."""
    found: int = httpx.get(f"{server.url}/looks", timeout=60.0).json()
    return found


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_two_hundred_pages_cost_one_query_a_second(server: Server) -> None:
    """Whatever they watch."""
    id = ask(server, 1, 20.0)
    opened = threading.Barrier(201)

    def watch() -> str:
        with httpx.stream("GET", f"{server.url}/tasks/{id}/events", headers=ANN, timeout=60.0) as response:
            lines = response.iter_lines()
            next(lines)
            opened.wait(60.0)
            return [line for line in lines if line.startswith("event:")][-1]

    with ThreadPoolExecutor(200) as pages:
        watching = [pages.submit(watch) for _ in range(200)]
        opened.wait(60.0)
        before, since = looks_of(server), time.monotonic()
        while (looks := looks_of(server) - before) < 4:
            assert time.monotonic() - since < 60.0
        rate = looks / (time.monotonic() - since)
        httpx.post(f"{server.url}/tasks/{id}/cancel")
        ends = {each.result(30.0) for each in watching}

    # The first of the four may have come at once.
    assert rate <= 1.4
    assert ends == {"event: end"}


@pytest.mark.drivers("asyncpg", "aiosqlite")
def test_a_stop_waits_for_no_stream(server: Server) -> None:
    """The server ends the stream, stops in its grace, and the next one tells the rest."""
    id = ask(server, 1, 20.0)
    begun, over = threading.Event(), threading.Event()

    def watch() -> list[str]:
        seen = []
        for kind, _ in events(server, id):
            seen.append(kind)
            begun.set()
        over.set()
        return seen

    with ThreadPoolExecutor(1) as page:
        watching = page.submit(watch)
        assert begun.wait(30.0)
        since = time.monotonic()
        server.stop(timeout=15.0)
        took = time.monotonic() - since
        assert "end" not in watching.result(5.0)
    assert took < 8.0
    assert over.is_set()


@pytest.mark.parametrize("allow", [None, True, "ann"])
def test_whose_tasks_they_are_must_be_said(allow: Any) -> None:
    """Nothing is shown to everybody by default."""
    db = Database("sqlite:///unused.db")

    with pytest.raises(ConfigurationError, match="whose task"):
        status_router(db, allow=allow)
    with pytest.raises(TypeError):
        status_router(db)  # type: ignore[call-arg]
