"""Pools that are paused: nobody, in any process, starts tasks in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aftercommit.records.notifying import notify
from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["pause", "resume"]

_PAUSE = Statement(
    "INSERT INTO aftercommit_pool (name, paused_at) VALUES (:pool, clock_timestamp()) ON CONFLICT (name) DO NOTHING",
    "INSERT INTO aftercommit_pool (name, paused_at) VALUES (:pool, strftime('%Y-%m-%d %H:%M:%f', 'now') || '000') "
    "ON CONFLICT (name) DO NOTHING",
)
_RESUME = Statement("DELETE FROM aftercommit_pool WHERE name = :pool")


def pause(connection: Connection, pool: str) -> None:
    """Pause *pool*; harmless if it is. Workers notice within seconds; what runs goes on."""
    _PAUSE.execute(connection, {"pool": pool})
    notify(connection, (), look=True)


def resume(connection: Connection, pool: str) -> None:
    """Open *pool* again; harmless if it is."""
    _RESUME.execute(connection, {"pool": pool})
    notify(connection, (), look=True)
