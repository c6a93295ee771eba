"""What is sent past SQLAlchemy, on the driver's own connection, is in the session's transaction.

psycopg begins with the first statement, whoever sends it, and SQLite's connections see to it themselves (``gate``).
SQLAlchemy's asyncpg begins with the first statement of *SQLAlchemy's*: a COPY before that would commit by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aftercommit.pools.steps import steps_of

if TYPE_CHECKING:
    from sqlalchemy import Engine, PoolProxiedConnection

__all__ = ["set_up"]


def set_up(engine: Engine) -> None:
    """Have asyncpg begin when SQLAlchemy does."""
    if engine.dialect.driver == "asyncpg":
        steps_of(engine).before_begin.append(_begin)


def _begin(pooled: PoolProxiedConnection) -> None:
    adapted: Any = pooled.dbapi_connection
    if not adapted.driver_connection.is_in_transaction():
        # Not public, and tried (see private_names). A statement that does nothing would have it done, too, for two
        # round trips more.
        adapted.run_async(lambda _driver: adapted._start_transaction())  # noqa: SLF001  # see above
