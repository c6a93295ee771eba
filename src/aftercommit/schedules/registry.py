"""The schedules that the application's code declares, and how any schedule is written down and read back."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from aftercommit.errors import ScheduleError
from aftercommit.schedules.when import Cron, Every, When

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aftercommit.records.schedules import Definition
    from aftercommit.tasks import Task

__all__ = ["Declared", "Registry", "check_task", "definition_of", "redefined", "when_of"]

_OPTIONS = ("catch_up", "catch_up_within", "overlap", "jitter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A schedule of the application's code.

    Attributes:
        when: When it is due.
        task: What runs then, with its options.
        args: What crosses to each run.
        kwargs: The same, by name.
    """

    when: When
    task: Task[Any, Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name: as given, or the task's."""
        return self.when.name or self.task.name

    def definition(self, max_bytes: int) -> Definition:
        """What its row should say.

        Raises:
            UnsafeArgument: If an argument cannot cross.
        """
        handed = self.task.arguments.hand_over(None, self.args, dict(self.kwargs), max_bytes=max_bytes)
        return definition_of(self.when, self.task, handed.resolve())


class Registry:
    """The schedules that the code of one ``Database`` declares, by name."""

    def __init__(self) -> None:
        self._declared: dict[str, Declared] = {}
        self._lock = threading.Lock()

    def add(self, declared: Declared) -> None:
        """Take another.

        Raises:
            ScheduleError: If there is one of its name, or its task cannot be scheduled.
        """
        check_task(declared.task, declared.when)
        with self._lock:
            for name in (declared.name, *declared.when.aliases):
                other = self._declared.get(name)
                if other is not None and other.name == name:
                    raise ScheduleError(
                        f"Two schedules are called {name!r}: {other.when!r} of {other.task.name!r} and "
                        f"{declared.when!r} of {declared.task.name!r}. A schedule's row is found by its name: give one "
                        "of them another, with name='…'."
                    )
            self._declared[declared.name] = declared

    @property
    def declared(self) -> Mapping[str, Declared]:
        """All of them, by name."""
        return dict(self._declared)


def check_task(task: Task[Any, Any], when: object) -> None:
    """Refuse what cannot be scheduled.

    Raises:
        ScheduleError: If *when* is no schedule, or *task* is kept in memory or has options of a single hand-over.
    """
    if not isinstance(when, (Cron, Every)):
        raise ScheduleError(
            f"{when!r} is no schedule of task {task.name!r}. Write Cron('0 7 * * *', timezone='Europe/Berlin') or "
            "Every(30.0)."
        )
    if not task.settings.durable:
        raise ScheduleError(
            f"Task {task.name!r} is kept in memory (durable=False), and a schedule's tasks are records. Declare it "
            "durable, which is the default."
        )
    options = task.options
    if options.delay or options.at is not None or options.key is not None:
        raise ScheduleError(
            f"Task {task.name!r} has a delay, a time or a key: these belong to a single hand-over. A schedule says "
            "when it runs, and `overlap` what becomes of two at once; only with_options(priority=…) goes along."
        )


# --- as it is written -------------------------------------------------------------------------------------------


def definition_of(when: When, task: Task[Any, Any], arguments: str) -> Definition:
    """What the row of a schedule says; *arguments* is JSON text."""
    return _definition(when, when.name or task.name, task.name, arguments, task.options.priority)


def redefined(before: Definition, when: When) -> Definition:
    """The definition *before*, due at the times of *when* instead."""
    return _definition(when, before.name, before.task, before.arguments, int(before.options.get("priority") or 0))


def _definition(when: When, name: str, task: str, arguments: str, priority: int) -> Definition:
    from aftercommit.records.schedules import Definition

    options: dict[str, Any] = {name: getattr(when, name) for name in _OPTIONS}
    options["start"] = None if when.start is None else when.start.isoformat()
    options["end"] = None if when.end is None else when.end.isoformat()
    options["priority"] = priority
    if isinstance(when, Every):
        options["immediately"] = when.immediately
    return Definition(
        name=name,
        task=task,
        arguments=arguments,
        kind="every" if isinstance(when, Every) else "cron",
        expression=None if isinstance(when, Every) else when.expression,
        seconds=when.seconds if isinstance(when, Every) else None,
        timezone=None if isinstance(when, Every) else when.timezone,
        options=options,
    )


def when_of(row: Any) -> When:
    """The schedule that a row holds.

    Raises:
        ScheduleError: If this machine cannot make sense of it: an unknown time zone, a row changed by hand.
        ConfigurationError: If it needs cronsim, which is not installed.
    """
    try:
        stored = dict(row.options)
        common: dict[str, Any] = {name: stored[name] for name in _OPTIONS if name in stored}
        for word in ("start", "end"):
            if stored.get(word):
                common[word] = datetime.fromisoformat(stored[word]).astimezone(UTC)
        if row.kind == "cron":
            return Cron(row.expression, timezone=row.timezone, name=row.name, **common)
        return Every(row.seconds, immediately=bool(stored.get("immediately")), name=row.name, **common)
    except (TypeError, ValueError, AttributeError, KeyError) as exc:
        raise ScheduleError(
            f"The row of schedule {row.name!r} cannot be read: {type(exc).__name__}. It was changed by hand, or by a "
            "newer release."
        ) from exc
