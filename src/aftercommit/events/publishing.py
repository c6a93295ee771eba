"""Publishing: what a publisher has in its hand, and the row that makes a second publishing with a key none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aftercommit.records import happenings
from aftercommit.records.happenings import NewEvent
from aftercommit.records.ids import uuid7
from aftercommit.runner import TaskHandle
from aftercommit.tasks.options import check_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from sqlalchemy import Connection

__all__ = ["EventHandle", "Unhandled", "UnhandledSink", "new_event"]


class EventHandle:
    """What publishing gives back.

    Attributes:
        id: The event's id.
        tasks: The handle of each handler's task, by the handler's name; none where nobody handles the event.
    """

    __slots__ = ("id", "tasks")

    def __init__(self, id: UUID, tasks: Mapping[str, TaskHandle]) -> None:
        self.id = id
        self.tasks = dict(tasks)

    if not TYPE_CHECKING:
        __await__ = TaskHandle.__await__

    def __repr__(self) -> str:
        """Its id and who handles it."""
        return f"<EventHandle {self.id}, handled by {', '.join(self.tasks) or 'nobody'}>"


def new_event(event: object, key: str | None) -> NewEvent | None:
    """Return the row of an event with a key; None without one.

    Raises:
        ConfigurationError: If no database could hold the key.
    """
    if key is None:
        return None
    check_key(key, such_as=", such as the order's number")
    return NewEvent(id=uuid7(), event=type(event).__name__[:255], key=key)


class Unhandled:
    """An event with a key that nobody handles here: its key is taken all the same."""

    __slots__ = ("event",)

    def __init__(self, event: NewEvent) -> None:
        self.event = event

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return self.event.event


class UnhandledSink:
    """Writes the keys of events that nobody handles here."""

    def __init__(self, lost: Any) -> None:
        self._lost = lost

    def write(self, connection: Connection, entries: Sequence[Unhandled], *, owns_commit: bool) -> None:  # noqa: ARG002
        """Write the keys."""
        happenings.insert(connection, [entry.event for entry in entries])

    def committed(self, entries: Sequence[Unhandled]) -> None:
        """Nothing starts."""

    def outcome_unknown(self, entries: Sequence[Unhandled], connection: Connection) -> None:
        """Nothing starts."""

    def dropped(self, entries: Sequence[Unhandled]) -> None:
        """Nothing was taken."""

    def lost(self, entries: Sequence[Unhandled], lines: Sequence[Any]) -> None:
        """It was published behind the last commit, as a task may be."""
        self._lost(entries, lines)
