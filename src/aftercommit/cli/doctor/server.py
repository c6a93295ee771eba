"""What is thought of a PostgreSQL server: its version, limits, time limits, clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aftercommit.cli.doctor.findings import READ_ONLY, Finding, Level, ago, change

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aftercommit.pools.budget import Budget
    from aftercommit.records.server import Server
    from aftercommit.tasks import Task

__all__ = ["Clock", "check_budget", "check_clock", "check_server"]

_OLDEST: Final = 140000
_SKEW_SECONDS: Final = 1.0
_LONG_TRANSACTION: Final = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """One look at the database's clock.

    Attributes:
        before: This machine's time when it was asked, in seconds since 1970.
        there: The database's answer.
        after: This machine's time when the answer came.
    """

    before: float
    there: float
    after: float

    @property
    def round_trip(self) -> float:
        """Seconds that asking took."""
        return self.after - self.before

    @property
    def skew(self) -> float:
        """Seconds by which the database is ahead, taking its answer as given half-way."""
        return self.there - (self.before + self.after) / 2


def check_server(server: Server, tasks: Sequence[Task[Any, Any]]) -> list[Finding]:
    """Judge what the server says of itself."""
    findings = [*_basics(server), *_transactions(server), *_time_limits(server, tasks)]
    here = f"PostgreSQL {server.version}, database {server.database!r}, as {server.role!r}"
    if server.limits.is_pooled:
        here += ", through a pooler"
    return [Finding(check="server", level=Level.OK, found=here), *findings]


def _basics(server: Server) -> Iterable[Finding]:
    if server.number < _OLDEST:
        yield Finding(
            check="server",
            level=Level.WRONG,
            found=f"PostgreSQL {server.version} is too old",
            why="Nobody has tried this library on anything before PostgreSQL 14.",
        )
    if server.is_replica or server.settings.get(READ_ONLY) == "on":
        replica = server.is_replica
        yield Finding(
            check="server",
            level=Level.WRONG,
            found="The server is a replica" if replica else f"{READ_ONLY} is on",
            why="It takes no writes, and a task is a row that is written with yours.",
            remedy=("Database('postgresql://…the primary…')",) if replica else (change(server, READ_ONLY, "off"),),
        )
    if server.oldest_transaction > _LONG_TRANSACTION:
        yield Finding(
            check="transactions",
            level=Level.WARNING,
            found=f"A transaction has been open for {ago(server.oldest_transaction)}",
            why="As long as it is, no table of this database can be cleared of dead rows, and the queue gets slower.",
            remedy=(
                "SELECT pid, application_name, state, xact_start, query FROM pg_stat_activity ORDER BY xact_start;",
                "SELECT pg_terminate_backend(…its pid…);",
            ),
        )


def _transactions(server: Server) -> Iterable[Finding]:
    level = server.settings.get("default_transaction_isolation", "read committed")
    if level != "read committed":
        yield Finding(
            check="isolation",
            level=Level.WARNING,
            found=f"default_transaction_isolation is {level!r}",
            why="Runs of tasks are made again after a conflict (40001). Requests are not, and answer 500.",
            remedy=(change(server, "default_transaction_isolation", "'read committed'"),),
        )
    if server.settings.get("synchronous_commit") == "off":
        yield Finding(
            check="durability",
            level=Level.NOTE,
            found="synchronous_commit is off",
            why="A crash of the server may lose the commits of its last moments, tasks and their effects alike.",
            remedy=(change(server, "synchronous_commit", "on"),),
        )


def _time_limits(server: Server, tasks: Sequence[Task[Any, Any]]) -> Iterable[Finding]:
    whole = _seconds(server, "transaction_timeout")
    longer = sorted({t.name for t in tasks if t.settings.timeout is None or t.settings.timeout > whole})
    if whole and longer:
        yield Finding(
            check="time limits",
            level=Level.WARNING,
            found=f"transaction_timeout is {whole:g} s, and these tasks may take longer: {_some(longer)}",
            why="The server ends their transactions then, and each time it does uses up an attempt.",
            remedy=(
                change(server, "transaction_timeout", "0"),
                f"@db.task(timeout={whole:g})",
            ),
        )
    # A task with a time limit of its own sets these two for each of its transactions.
    unlimited = sorted({t.name for t in tasks if t.settings.timeout is None})
    for name, consequence in (
        (
            "idle_in_transaction_session_timeout",
            "One that waits that long in a transaction is tried again, as its next attempt.",
        ),
        ("statement_timeout", "One whose statement takes longer fails for good."),
    ):
        limit = _seconds(server, name)
        if limit and unlimited:
            yield Finding(
                check="time limits",
                level=Level.NOTE,
                found=f"{name} is {limit:g} s, and holds for tasks without a timeout: {_some(unlimited)}",
                why=f"{consequence} A timeout of a task's own takes its place.",
                remedy=("@db.task(timeout=…)",),
            )


def _seconds(server: Server, name: str) -> float:
    return int(server.settings.get(name, "0")) / 1000


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"  # noqa: PLR2004  # as many as are shown


def check_budget(budget: Budget, source: str) -> Finding:
    """Hold all pools times all processes against the server's limits.

    Args:
        budget: The arithmetic.
        source: Where the number of processes comes from.
    """
    limits = budget.limits
    if limits is not None and limits.is_pooled:
        return Finding(
            check="connections",
            level=Level.NOTE,
            found=f"{budget.verdict} ({source})",
            why="PgBouncer refuses clients beyond its max_client_conn, and lets them wait for one of its "
            "default_pool_size connections to the server.",
            remedy=(f"max_client_conn = {budget.total}    ; in pgbouncer.ini, at least",),
        )
    if not budget.is_over:
        return Finding(check="connections", level=Level.OK, found=f"{budget.verdict} ({source})")
    return Finding(
        check="connections",
        level=Level.WARNING,
        found=f"{budget.verdict} ({source})",
        why=f"Under load the server refuses the rest, and requests and tasks fail. {budget.advice}.",
        remedy=("Database(…, pool=PoolSettings(pool_size=…), pools={…: PoolSettings(pool_size=…)})",),
    )


def check_clock(looks: Sequence[Clock]) -> Finding:
    """Compare the clocks, by the quickest of several looks: its answer is the least uncertain."""
    best = min(looks, key=lambda each: each.round_trip)
    apart = abs(best.skew) - best.round_trip / 2
    if apart <= _SKEW_SECONDS:
        return Finding(check="clock", level=Level.OK, found="The clocks of the database and of this machine agree")
    direction = "ahead of" if best.skew > 0 else "behind"
    return Finding(
        check="clock",
        level=Level.WARNING,
        found=f"The database's clock is {abs(best.skew):.1f} s {direction} this machine's",
        why="Delays and heartbeats go by the database's alone, so nothing breaks; but logs, at= and dates of your own "
        "do not fit together.",
        remedy=("timedatectl status    # on both machines",),
    )
