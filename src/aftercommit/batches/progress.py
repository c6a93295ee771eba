"""Where the progress of a batch is shown: on the task's record, or on a terminal."""

from __future__ import annotations

import importlib.util
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

from aftercommit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aftercommit.tasks import CurrentRun

__all__ = ["Teller", "teller"]


class Teller:
    """Tells nobody.

    Attributes:
        wants_total: Whether it is worth asking the database how many records there are.
        is_on_record: Whether the batch itself says it on the record, with the commits of its chunks.
    """

    wants_total = False
    is_on_record = False

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End."""

    def tell(self, done: int, total: int | None) -> None:
        """Say how far it is; from any lane."""


class _Caller(Teller):
    wants_total = True

    def __init__(self, function: Callable[[int, int | None], Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._last = -1

    def tell(self, done: int, total: int | None) -> None:
        with self._lock:
            if done > self._last:
                self._last = done
                self._function(done, total)


class _Record(Teller):
    # Not by `run.progress`: what the runner has taken it would write later, perhaps over what is newer.
    wants_total = True
    is_on_record = True


class _Bar(Teller):
    wants_total = True

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(title, total=None, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, done: int, total: int | None) -> None:
        speed = self._bar.tasks[0].speed
        self._bar.update(self._task, completed=done, total=total, rate="" if speed is None else f"{speed:.0f}/s")


def teller(wanted: bool | Callable[[int, int | None], Any] | None, run: CurrentRun | None, title: str) -> Teller:  # noqa: FBT001  # three kinds of answer
    """Return who tells of a batch.

    Args:
        wanted: True, False or None as given (None: on the record inside a task, on a terminal outside), or a
            function that is called with what is done and the total.
        run: The run at hand.
        title: What the bar is called.

    Raises:
        ConfigurationError: If a bar is demanded and rich is not installed.
    """
    if wanted is False:
        return Teller()
    if callable(wanted):
        return _Caller(wanted)
    if run is not None:
        return _Record()
    has_rich = importlib.util.find_spec("rich") is not None
    if wanted and not has_rich:
        raise ConfigurationError("progress=True shows a bar, which needs rich: pip install rich.")
    return _Bar(title) if has_rich and (wanted or sys.stderr.isatty()) else Teller()
