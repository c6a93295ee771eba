"""How many connections all processes may open together, held against what the server allows. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aftercommit.pools.pools import BOOKKEEPING, REQUEST

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from aftercommit.pools.settings import PoolSettings
    from aftercommit.pools.urls import Flavour

__all__ = ["Budget", "Limits", "Share", "shares"]

LISTENING: Final = "listening"
"""What the one connection that LISTENs is called in the arithmetic; it belongs to no pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process may open for one kind of work.

    Attributes:
        pool: The pool's name.
        connections: At most this many, all its flavours together.
    """

    pool: str
    connections: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server allows one role in one database.

    Attributes:
        max_connections: Of the whole server.
        reserved: Of these, kept for administrators: ``superuser_reserved_connections`` and, from PostgreSQL 16 on,
            ``reserved_connections``.
        role: The role's own limit, or None.
        database: The database's own limit, or None.
        is_pooled: Whether a pooler stands between: then these are its server's limits, and ours are the pooler's.
    """

    max_connections: int
    reserved: int
    role: int | None = None
    database: int | None = None
    is_pooled: bool = False

    @property
    def allowed(self) -> int:
        """How many connections there may be."""
        own = [limit for limit in (self.role, self.database) if limit is not None]
        return min(self.max_connections - self.reserved, *own, self.max_connections)

    @property
    def reason(self) -> str:
        """Which of the limits it is, with the figures."""
        if self.role == self.allowed:
            return f"the role's CONNECTION LIMIT {self.role}"
        if self.database == self.allowed:
            return f"the database's CONNECTION LIMIT {self.database}"
        return f"max_connections {self.max_connections} - {self.reserved} reserved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """All pools times all processes, beside what the server allows.

    Attributes:
        shares: What one process may open.
        processes: How many there are.
        limits: What the server allows; None where there is no server, as on SQLite.
    """

    shares: tuple[Share, ...]
    processes: int
    limits: Limits | None

    @property
    def per_process(self) -> int:
        """How many connections one process may open."""
        return sum(share.connections for share in self.shares)

    @property
    def total(self) -> int:
        """How many connections all processes may open."""
        return self.processes * self.per_process

    @property
    def is_over(self) -> bool:
        """Whether that is more than the server allows; never known behind a pooler."""
        limits = self.limits
        return limits is not None and not limits.is_pooled and self.total > limits.allowed

    @property
    def verdict(self) -> str:
        """The sum, what the server allows, and where a process's share comes from, without a full stop."""
        limits = self.limits
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        text = f"{processes} × {self.per_process} connections = {self.total}"
        if limits is not None and limits.is_pooled:
            text += ", to a pooler, whose limits are the ones that count"
        elif limits is not None:
            text += f", {'but' if self.is_over else 'and'} the server allows {limits.allowed} ({limits.reason})"
        return f"{text}. Each process: " + " + ".join(f"{each.pool} {each.connections}" for each in self.shares)

    @property
    def advice(self) -> str:
        """What to do where it is over, without a full stop."""
        fits = 0 if self.limits is None else self.limits.allowed // self.per_process
        fewer = f" or run at most {fits} process{'' if fits == 1 else 'es'}," if fits else ""
        return f"Lower pool_size or max_overflow,{fewer} or put a pooler in between"


def shares(
    settings: Mapping[str, PoolSettings],
    *,
    runs: Sequence[str],
    flavours: Mapping[str, Collection[Flavour]],
    listens: bool,
) -> tuple[Share, ...]:
    """Return what one process may open.

    A pool counts once for each flavour that is used in it, and at least once. A pool of tasks that run elsewhere does
    not count. The library's own are counted at their most: two for bookkeeping, and one that listens.

    Args:
        settings: Of every pool, the library's own among them.
        runs: The pools whose tasks run in the process.
        flavours: By pool, the flavours that are used in it, as far as that is known.
        listens: Whether the process LISTENs: on PostgreSQL, where it runs durable tasks.
    """
    names = [REQUEST, *(name for name in settings if name in runs and name != REQUEST)]
    found = [
        Share(pool=name, connections=settings[name].connections * max(1, len(flavours.get(name, ())))) for name in names
    ]
    found.append(Share(pool="bookkeeping", connections=settings[BOOKKEEPING].connections))
    if listens:
        found.append(Share(pool=LISTENING, connections=1))
    return tuple(found)
