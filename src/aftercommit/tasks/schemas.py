"""Rows that are in another schema for the session that hands them over than for the one that loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aftercommit.errors import HandOverError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import Connection, Engine

    from aftercommit.tasks.definition import Task

__all__ = ["refuse_translated"]


def refuse_translated(
    task: Task[Any, Any], bind: Engine | Connection, engine_options: Iterable[Mapping[str, Any]]
) -> None:
    """Refuse rows from a session whose engine has a ``schema_translate_map`` that the task's session has not.

    Args:
        task: What is handed over.
        bind: What the asking session works on.
        engine_options: What the database's own engines are made with.

    Raises:
        HandOverError: If the task takes rows, which would be those of the same keys in another schema.
    """
    found = bind.get_execution_options().get("schema_translate_map")
    if not found or not task.arguments.has_rows:
        return
    if any(found == options.get("execution_options", {}).get("schema_translate_map") for options in engine_options):
        return
    raise HandOverError(
        f"task {task.name!r} takes a row, and this session's engine has schema_translate_map={found!r}, which the "
        "task's session has not: it would load the row of the same key from another schema. Pass the key and the "
        "schema as plain data and load the row in the task, or select the schema by search_path with @db.around, "
        "for requests and tasks alike."
    )
