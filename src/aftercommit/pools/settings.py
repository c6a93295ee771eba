"""The settings of one pool of connections."""

from __future__ import annotations

from dataclasses import dataclass

from aftercommit.errors import ConfigurationError

__all__ = ["PoolSettings"]


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Connections for one kind of work. The names are ``create_engine``'s, so a settings dictionary can be splatted in.

    Attributes:
        pool_size: Connections kept open, at least 1.
        max_overflow: Connections opened beyond that under load, and closed after use.
        pool_timeout: Seconds to wait for a free connection before ``PoolExhausted``.
        pool_recycle: Seconds after which a connection is replaced at its next use; -1 for never.
        pool_pre_ping: Whether a connection that sat idle for more than a second, or that the server has ended, is tried
            before it is handed out.
        isolation_level: The level of *task runs* in this pool; None for ``REPEATABLE READ`` on PostgreSQL, and
            ``BEGIN IMMEDIATE`` on SQLite. Sessions that are not a task's keep the server's default.
        concurrency: How many tasks of this kind run at once in this process; None for
            ``pool_size + max_overflow``, so that a task never waits for a connection.
        warn_after: Seconds for which a connection may be held before that is reported; None for 10. A task with a
            ``timeout`` may hold its own for that long.
    """

    pool_size: int = 5
    max_overflow: int = 0
    pool_timeout: float = 30.0
    pool_recycle: int = 3600
    pool_pre_ping: bool = True
    isolation_level: str | None = None
    concurrency: int | None = None
    warn_after: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, at construction."""
        if self.pool_size < 1:
            # create_engine reads 0 as "no limit", which is the opposite of what most people mean by it.
            raise ConfigurationError(
                f"pool_size={self.pool_size}: a pool needs at least one connection. Use pool_size=1 or more; "
                "to keep none open between uses, pass engine_options={'poolclass': NullPool}."
            )
        if self.max_overflow < 0:
            raise ConfigurationError(
                f"max_overflow={self.max_overflow}: an unlimited pool can use up the server's connections. "
                "Give the number of connections that may be opened beyond pool_size."
            )
        if self.pool_timeout <= 0:
            raise ConfigurationError(f"pool_timeout={self.pool_timeout}: give a positive number of seconds.")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigurationError(
                f"concurrency={self.concurrency}: a pool runs at least one task at a time. To run none of its tasks "
                "in this process, leave it out of install(app, db, runs=...)."
            )
        if self.warn_after is not None and self.warn_after <= 0:
            raise ConfigurationError(f"warn_after={self.warn_after}: give a positive number of seconds, or None.")
        if self.isolation_level is not None:
            check_isolation_level(self.isolation_level)

    @property
    def connections(self) -> int:
        """The most connections that one flavour of this pool opens."""
        return self.pool_size + self.max_overflow

    @property
    def width(self) -> int:
        """How many tasks of this kind run at once."""
        return self.concurrency if self.concurrency is not None else self.connections


_LEVELS = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


def check_isolation_level(level: str) -> None:
    """Refuse a level at which a task's effects and its record could not commit as one.

    Raises:
        ConfigurationError: For ``AUTOCOMMIT`` and for names that are no isolation level.
    """
    if level.upper() not in _LEVELS:
        reason = (
            "every statement would commit by itself, so a task could neither be rolled back nor take effect once"
            if level.upper() == "AUTOCOMMIT"
            else "that is not a level of task runs"
        )
        raise ConfigurationError(f"isolation_level={level!r}: {reason}. Use one of {', '.join(_LEVELS)}.")
