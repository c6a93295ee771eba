"""Requests at the same moment."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

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
