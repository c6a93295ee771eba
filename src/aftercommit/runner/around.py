"""What surrounds a run, from its claim to the record of its end: what followed it, and whoever watches."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from aftercommit.tasks.context import restored
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType
    from uuid import UUID

__all__ = ["Seen", "Watcher", "around", "unwatch", "watch"]

logger = logging.getLogger(__name__)


class Seen(Protocol):
    """What a watcher may know of a run; ``attempt`` goes up when it is repeated in its place."""

    id: UUID
    attempt: int
    pool: str

    @property
    def name(self) -> str:
        """The task's name."""
        ...


class Watcher(Protocol):
    """Surrounds runs, in their own thread and context."""

    def __call__(self, run: Seen, /) -> AbstractContextManager[object]:
        """Return what is entered before *run* begins, and left when its end is recorded."""
        ...


_watchers: tuple[Watcher, ...] = ()


def watch(watcher: Watcher) -> None:
    """Surround every run that begins from now on. What *watcher* raises is logged and harms no run."""
    global _watchers  # noqa: PLW0603  # replaced as a whole, so that runs on other threads need no lock
    _watchers = (*_watchers, watcher)


def unwatch(watcher: Watcher) -> None:
    """Surround no more runs; those that have begun are left in order."""
    global _watchers  # noqa: PLW0603  # as above
    _watchers = tuple(each for each in _watchers if each != watcher)


class around:  # noqa: N801  # reads as a preposition where it is used: `with around(run):`
    """Put back what followed *run* across the hand-over, and let everybody watch, for the length of a ``with``.

    Args:
        run: The run.
        watched: Whether it is the run itself, and not only what is left to be recorded of it.
    """

    __slots__ = ("_restored", "_run", "_watched")

    def __init__(self, run: Any, *, watched: bool = True) -> None:
        self._run = run
        self._watched = ExitStack() if watched and _watchers else None

    def __enter__(self) -> None:
        """Begin."""
        self._restored = restored(self._run.context)
        self._restored.__enter__()
        if self._watched is not None:
            for watcher in _watchers:
                try:
                    self._watched.enter_context(watcher(self._run))
                except Exception as exc:
                    # The work that is being watched must not fail because somebody's exporter did.
                    logger.error("A watcher of runs raised: %r", watcher, exc_info=without_values(exc))  # noqa: TRY400

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End, whatever happens on the way; an error of the run passes through."""
        try:
            if self._watched is not None:
                self._watched.__exit__(kind, error, traceback)
        except Exception as exc:
            logger.error("A watcher of runs raised at their end", exc_info=without_values(exc))  # noqa: TRY400
        finally:
            self._restored.__exit__(kind, error, traceback)
