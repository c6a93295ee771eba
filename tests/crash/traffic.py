"""Requests without a pause, from several clients, and what was answered."""

import threading
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Self

import httpx

PATIENCE = 20.0
"""Far more than an answer takes, and less than the pool's own patience."""


class Traffic:
    """POSTs numbers, one after another, from *clients* threads, for as long as the ``with`` lasts.

    Args:
        url: Of the application.
        clients: How many ask at once.
        patience: Seconds for one answer.

    Attributes:
        answers: Status by number; 0 where no answer came in time.
    """

    def __init__(self, url: str, *, clients: int = 8, patience: float = PATIENCE) -> None:
        self._url = url
        self._patience = patience
        self._numbers = count(1)
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, name="traffic") for _ in range(clients)]
        self.answers: dict[int, int] = {}

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask nothing more, and wait for the answers."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, enough: Callable[[int], bool], *, more: int, timeout: float = 60.0) -> None:
        """Wait for *more* answers, from now on, whose status is *enough*."""

        def seen() -> int:
            return sum(enough(status) for status in self.answers.values())

        with self._changed:
            wanted = seen() + more
            assert self._changed.wait_for(lambda: seen() >= wanted, timeout), Counter(self.answers.values())

    def _ask(self) -> None:
        # A connection for each: uvicorn closes one after a 500, perhaps under the next request on it.
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=self._url, timeout=self._patience, limits=limits) as client:
            while not self._over.is_set():
                number = next(self._numbers)
                try:
                    status = client.post(f"/{number}").status_code
                except httpx.HTTPError:
                    status = 0
                with self._changed:
                    self.answers[number] = status
                    self._changed.notify_all()
