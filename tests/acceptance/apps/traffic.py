"""Requests at the same moment."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import httpx


def post_at_once(url: str, paths: Sequence[str]) -> list[httpx.Response]:
    """POST to every path at the same moment, each on a connection of its own."""
    barrier = Barrier(len(paths))

    def post(path: str) -> httpx.Response:
        with httpx.Client(base_url=url, timeout=60) as client:
            barrier.wait()
            return client.post(path)

    with ThreadPoolExecutor(len(paths)) as threads:
        return list(threads.map(post, paths))


def new_test_client(app: Any, **options: Any) -> Any:
    """Return Starlette's TestClient, which wants another httpx than we test with, and says so at its import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.testclient import TestClient
    return TestClient(app, **options)
