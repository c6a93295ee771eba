"""Askers: they make requests one after the other, beside the runner of the same process, and note the answers."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.soak.application import Shop
from benchmarks.soak.kinds import Request, body_of
from benchmarks.soak.ledger import Ledger

STOP, PAUSE = "stop", "pause"
"""Files in the soak's directory: nobody asks any more; nobody asks while it is there."""


class GivesUp(Exception):  # what a request does
    """A request that raises at its end."""


class Askers:
    """What the askers of one process share.

    Args:
        shop: The application.
        ledger: Where answers are noted.
        directory: Of the soak.
    """

    def __init__(self, shop: Shop, ledger: Ledger, directory: Path) -> None:
        self._shop = shop
        self._ledger = ledger
        self._directory = directory
        self.over = threading.Event()

    @property
    def _is_over(self) -> bool:
        return self.over.is_set() or (self._directory / STOP).exists()

    @property
    def _is_paused(self) -> bool:
        return (self._directory / PAUSE).exists()

    def serve(self, requests: Iterator[Request]) -> None:
        """Ask until all is over, on this thread."""
        while not self._is_over:
            if self._is_paused:
                time.sleep(0.05)
                continue
            request = next(requests)
            time.sleep(request.pause)
            self._ask(request)

    async def async_serve(self, requests: Iterator[Request]) -> None:
        """Ask until all is over, on this event loop."""
        while not self._is_over:
            if self._is_paused:
                await asyncio.sleep(0.05)
                continue
            request = next(requests)
            await asyncio.sleep(request.pause)
            await self._async_ask(request)

    def _ask(self, request: Request) -> None:
        answer = _Answer(self._ledger, request)
        db, body = self._shop.db, body_of(self._shop, request)
        with answer, db.session() as session:
            handle: Any = body(session)
            if request.gives_up:
                raise GivesUp
            answer.is_at_commit = True
            session.commit()
        if answer.is_done and request.kind == "cancel":
            with suppress(Exception):
                db.cancel(handle.id)

    async def _async_ask(self, request: Request) -> None:
        answer = _Answer(self._ledger, request)
        db, body = self._shop.db, body_of(self._shop, request)
        with answer:
            async with db.async_session() as session:
                handle: Any = await session.run_sync(body)
                if request.gives_up:
                    raise GivesUp
                answer.is_at_commit = True
                await session.commit()
        if answer.is_done and request.kind == "cancel":
            with suppress(Exception):
                await db.async_cancel(handle.id)


class _Answer:
    """Notes what a request was told, by where it was when it ended."""

    def __init__(self, ledger: Ledger, request: Request) -> None:
        self._ledger = ledger
        self._request = request
        self.is_at_commit = False
        self.is_done = False

    def __enter__(self) -> None:
        self._ledger.begin(self._request.label, self._request.kind)

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        self.is_done = error is None
        # What failed before its COMMIT has not been committed; after that only the server knows.
        self._ledger.end(
            self._request.label, "done" if error is None else "doubt" if self.is_at_commit else "undone", error
        )
        return isinstance(error, Exception)
