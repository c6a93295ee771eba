"""Errors of the database reach the application as what they are."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from aftercommit import Database


def test_an_error_while_batches_are_being_imported_is_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The first batch of a process imports its room, and meanwhile an error on another thread stays what it is."""
    half_imported = ModuleType("aftercommit.batches.chunks")
    monkeypatch.setitem(sys.modules, half_imported.__name__, half_imported)
    db = Database(f"sqlite:///{tmp_path}/app.db")

    with pytest.raises(OperationalError, match="no such table"), db.engine().connect() as connection:
        connection.execute(sa.text("SELECT * FROM nowhere"))

    db.dispose()
