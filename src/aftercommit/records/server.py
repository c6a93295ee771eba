"""What a PostgreSQL server says of itself: its limits and its settings. SQLite has no server, and is not asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aftercommit.pools.backends import pid_told_to
from aftercommit.pools.budget import Limits
from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["Server", "clock", "limits", "look"]

_LIMITS = Statement(
    "SELECT CAST(current_setting('max_connections') AS integer), "
    "CAST(current_setting('superuser_reserved_connections') AS integer) "
    "+ COALESCE(CAST(current_setting('reserved_connections', true) AS integer), 0), "
    "CASE WHEN rolsuper OR rolconnlimit < 0 THEN NULL ELSE rolconnlimit END, "
    "CASE WHEN rolsuper OR datconnlimit < 0 THEN NULL ELSE datconnlimit END, pg_backend_pid() "
    "FROM pg_roles, pg_database WHERE rolname = session_user AND datname = current_database()"
)
_SETTINGS: Final = (
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",  # from PostgreSQL 17 on
    "default_transaction_isolation",
    "default_transaction_read_only",
    "synchronous_commit",
    "tcp_keepalives_idle",
    "tcp_keepalives_interval",
    "tcp_keepalives_count",
    "tcp_user_timeout",
    "client_connection_check_interval",
)
_LOOK = Statement(
    "SELECT current_setting('server_version'), CAST(current_setting('server_version_num') AS integer), session_user, "
    "current_database(), pg_is_in_recovery(), (SELECT EXTRACT(EPOCH FROM MAX(now() - xact_start)) "
    "FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend')"
)
# In milliseconds, whatever unit they were written in: pg_settings has them so.
_OF_SETTINGS = Statement(
    "SELECT name, setting, source FROM pg_settings WHERE name IN (" + ", ".join(f"'{name}'" for name in _SETTINGS) + ")"
)
_CLOCK = Statement("SELECT EXTRACT(EPOCH FROM clock_timestamp())")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a server says of itself.

    Attributes:
        version: Such as ``"18.4"``.
        number: The same as a number, such as 180004.
        role: Who we are.
        database: Where we are.
        is_replica: Whether it takes no writes, because it follows another.
        oldest_transaction: Seconds since the oldest transaction in this database began, as far as we may see it.
        settings: By name, as ``pg_settings`` has them: times in milliseconds, but for TCP's
            keepalives, which are in seconds.
        limits: How many connections it allows.
        sources: By name, where a setting comes from, in the words of ``pg_settings``: ``"user"`` for the role.
    """

    version: str
    number: int
    role: str
    database: str
    is_replica: bool
    oldest_transaction: float
    settings: dict[str, str]
    limits: Limits
    sources: dict[str, str] = field(default_factory=dict)


def limits(connection: Connection) -> Limits:
    """Return how many connections the server allows us."""
    row = _LIMITS.execute(connection, {}).one()
    return Limits(
        max_connections=row[0],
        reserved=row[1],
        role=row[2],
        database=row[3],
        is_pooled=pid_told_to(connection.connection.driver_connection) != row[4],
    )


def look(connection: Connection) -> Server:
    """Ask the server for all of it."""
    row = _LOOK.execute(connection, {}).one()
    found = _OF_SETTINGS.execute(connection, {}).all()
    return Server(
        version=str(row[0]).partition(" ")[0],
        number=row[1],
        role=row[2],
        database=row[3],
        is_replica=row[4],
        oldest_transaction=float(row[5] or 0.0),
        settings={name: setting for name, setting, _ in found},
        limits=limits(connection),
        sources={name: source for name, _, source in found},
    )


def clock(connection: Connection) -> float:
    """Return the server's time, in seconds since 1970."""
    return float(_CLOCK.execute(connection, {}).scalar() or 0.0)
