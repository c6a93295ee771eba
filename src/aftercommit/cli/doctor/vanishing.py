"""What is thought of clients that vanish without a word: how long what they have locked stays locked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aftercommit.cli.doctor.findings import Finding, Level, change, identifier

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aftercommit.records.backends import Reach
    from aftercommit.records.server import Server

__all__ = ["check_vanishing", "locked_for"]

_LONG: Final = 600.0
_IDLE: Final = "idle_in_transaction_session_timeout"
_ADVICE: Final = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "'60s'",
    "client_connection_check_interval": "'10s'",
}
"""What every connection of ours has on its own side, so that both sides notice after a minute."""


def locked_for(server: Server) -> tuple[float, str]:
    """Return for how many seconds a vanished client's locks stay, at most, and how that comes about.

    By the server's own settings, where nobody ends the client's session: infinity where none is in force.
    """
    idle, interval, count = (_number(server, f"tcp_keepalives_{name}") for name in ("idle", "interval", "count"))
    user = _number(server, "tcp_user_timeout") / 1000
    limits = [(float("inf"), "nothing on the server ends its session")]
    if idle and user:
        # On Linux it takes the place of the number of probes.
        limits.append((max(idle + interval, user), f"tcp_keepalives_idle {idle} s, tcp_user_timeout {user:g} s"))
    elif idle and interval and count:
        limits.append((idle + interval * count, f"tcp_keepalives {idle} s + {count} × {interval} s"))
    if in_transaction := _number(server, _IDLE) / 1000:
        limits.append((in_transaction, f"{_IDLE} {in_transaction:g} s"))
    return min(limits)


def check_vanishing(server: Server, reach: Reach) -> Iterable[Finding]:
    """Say how long locks stay where no rescuer can free them; where one can, that is after a worker's silence."""
    if server.limits.is_pooled:
        yield from _behind_a_pooler(server)
        return
    seconds, how = locked_for(server)
    # Without a network in between, the system closes what a process leaves behind.
    if not reach.is_remote or seconds <= _LONG:
        return
    parts = []
    if reach.unlisted:
        parts.append(f"{reach.unlisted} connection(s) named aftercommit:… belong to no worker that lists them")
    if reach.roles:
        parts.append(f"{server.role!r} may not end those of {', '.join(map(repr, reach.roles))}")
    if not parts:
        return
    stays = "for ever" if seconds == float("inf") else f"up to {seconds:.0f} s"
    grants = tuple(f"GRANT {identifier(role)} TO {identifier(server.role)};" for role in reach.roles)
    yield Finding(
        check="vanished clients",
        level=Level.WARNING,
        found=f"A client that vanishes (power cut, dead host) may keep its row locks {stays} ({how})",
        why=f"A silent worker's sessions are ended by the others, but not all can be: {'; and '.join(parts)}. "
        f"Processes with runs=() and scripts are no workers. {_IDLE} would end them, too, and with them tasks that "
        "wait for the network in a transaction.",
        remedy=(*grants, *(change(server, name, value) for name, value in _ADVICE.items())),
    )


def _behind_a_pooler(server: Server) -> Iterable[Finding]:
    seconds = _number(server, _IDLE) / 1000
    if seconds and seconds <= _LONG:
        return
    yield Finding(
        check="vanished clients",
        level=Level.NOTE,
        found="Through a pooler, the sessions of a worker that vanishes cannot be ended by others"
        + (f"; {_IDLE} is {seconds:g} s" if seconds else f"; {_IDLE} is off"),
        why="Its row locks stay until the pooler notices that it is gone: by TCP keepalive after 7875 s where the "
        "system's defaults hold (7200 s + 9 × 75 s).",
        remedy=(
            change(server, _IDLE, "'60s'"),
            "tcp_keepidle = 30, tcp_keepintvl = 10, tcp_keepcnt = 3    ; in pgbouncer.ini, a line each",
        ),
    )


def _number(server: Server, name: str) -> int:
    return int(server.settings.get(name, "0"))
