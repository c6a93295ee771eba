"""Looks, once a second, for connections that are held for too long."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Watchdog"]

logger = logging.getLogger(__name__)

_EVERY: Final = 1.0


class Watchdog:
    """A thread that looks around for as long as tasks run, or an application is up.

    Args:
        look: One round.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="aftercommit-watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._stop.wait(_EVERY):
            try:
                self._look()
            except Exception as exc:
                # Whatever it stumbled over must not end the watch.
                logger.error("A round of the watchdog failed", exc_info=without_values(exc))  # noqa: TRY400
