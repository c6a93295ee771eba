"""What is said where a table of the application's own is missing: making those is not ours, and looks as if it were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aftercommit.wording import code_of, unit_of

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext

__all__ = ["explain_missing_table"]

_NOTE: Final = (
    "aftercommit makes its own tables only. The application's are made by a migration, or by "
    "Base.metadata.create_all(db.engine()), or by install(app, db, create_tables=Base.metadata)."
)


def explain_missing_table(context: ExceptionContext) -> None:
    """Add a note to an error about a table that is missing; a listener of the engines' ``handle_error``."""
    error = context.sqlalchemy_exception
    if error is None:
        return
    said = str(context.original_exception)
    # SQLite has no code for it, and speaks English only.
    is_missing = code_of(unit_of(error)) == "42P01" or said.startswith("no such table:")
    if is_missing and "aftercommit_" not in said and _NOTE not in getattr(error, "__notes__", ()):
        error.add_note(_NOTE)
