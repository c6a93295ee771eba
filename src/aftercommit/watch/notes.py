"""What is noted of a pooled connection for as long as it is open: past its ``info``, which is the application's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sqlalchemy.pool import ManagesConnection

__all__ = ["NOTES", "link_notes", "notes_of", "renew_notes"]

NOTES: Final = "_aftercommit_notes"
"""The attribute that has them."""


def notes_of(pooled: ManagesConnection) -> dict[str, Any]:
    """The notes of a connection, as it is in its pool or as the pool has given it out."""
    # Not by `getattr`: it would ask the driver, and whatever stands for one in a test.
    own: dict[str, Any] = getattr(pooled, "__dict__", {})
    notes: dict[str, Any] | None = own.get(NOTES)
    if notes is None:
        notes = own[NOTES] = {}
    return notes


def link_notes(entry: ManagesConnection, pooled: ManagesConnection) -> dict[str, Any]:
    """Have what a pool gives out know the notes of its *entry*, and return them: at each checkout."""
    notes = vars(pooled)[NOTES] = notes_of(entry)
    return notes


def renew_notes(_connection: object, entry: ManagesConnection) -> None:
    """Forget what was noted: the connection is a new one. The event ``connect``."""
    vars(entry)[NOTES] = {}
