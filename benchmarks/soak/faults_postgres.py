"""What happens to PostgreSQL: stops, freezes, limits, locks, migrations, and administrators."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from random import Random

import psycopg

from benchmarks.soak.proxy import MOMENTS, WAYS, Strike
from benchmarks.soak.stage import Stage

TABLES = ("aftercommit_task", "aftercommit_worker", "aftercommit_progress", "effect", "counter", "key_row", "asked")
_OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND application_name NOT LIKE 'soak%'"


def stop_fast(stage: Stage, rng: Random) -> None:
    """The server is stopped, with 57P01 for everybody, and started again."""
    _halt(stage, signal.SIGINT, rng)


def stop_immediate(stage: Stage, rng: Random) -> None:
    """The server crashes, and recovers."""
    _halt(stage, signal.SIGQUIT, rng)


def freeze_server(stage: Stage, rng: Random) -> None:
    """The server and all that serves a connection stand still."""
    assert stage.server is not None
    with stage.frozen(), stage.server.frozen():
        time.sleep(rng.uniform(0.3, 5.0))


def freeze_backends(stage: Stage, rng: Random) -> None:
    """Some of those that serve a connection stand still, with whatever locks they have."""
    with stage.admin() as admin:
        pids = [pid for (pid,) in admin.execute(f"SELECT pid {_OTHERS} ORDER BY pid").fetchall()]
    chosen = [each for each in pids if rng.random() < 0.2]
    with stage.frozen():
        for sent, pause in ((signal.SIGSTOP, rng.uniform(0.3, 4.0)), (signal.SIGCONT, 0.0)):
            for pid in chosen:
                with suppress(ProcessLookupError):
                    os.kill(pid, sent)
            time.sleep(pause)


def read_only(stage: Stage, rng: Random) -> None:
    """The server takes no writes, as after a failover."""
    with _set(stage, "default_transaction_read_only", "on"):
        time.sleep(rng.uniform(0.2, 2.0))


def statement_timeout(stage: Stage, rng: Random) -> None:
    """Statements are cancelled after a few milliseconds."""
    with _set(stage, "statement_timeout", f"{rng.choice([1, 2, 5, 20, 100])}ms"):
        time.sleep(rng.uniform(0.3, 2.0))


def idle_timeout(stage: Stage, rng: Random) -> None:
    """Transactions that are idle are ended."""
    with _set(stage, "idle_in_transaction_session_timeout", f"{rng.choice([5, 20, 100])}ms"):
        time.sleep(rng.uniform(0.3, 2.0))


def transaction_timeout(stage: Stage, rng: Random) -> None:
    """Transactions that take long are ended (PostgreSQL 17 and later)."""
    with _set(stage, "transaction_timeout", f"{rng.choice([20, 100, 300])}ms"):
        time.sleep(rng.uniform(0.3, 2.0))


def lock_timeout(stage: Stage, rng: Random) -> None:
    """Nobody waits for a lock for long."""
    with _set(stage, "lock_timeout", f"{rng.choice([1, 5, 50])}ms"):
        time.sleep(rng.uniform(0.3, 2.0))


def cancel_backends(stage: Stage, rng: Random) -> None:
    """Statements of half of all connections are cancelled, several times."""
    _each(stage, "pg_cancel_backend", rng)


def terminate_backends(stage: Stage, rng: Random) -> None:
    """Connections are ended."""
    _each(stage, "pg_terminate_backend", rng)


def exhaust(stage: Stage, rng: Random) -> None:
    """Somebody takes every connection that the server has."""
    assert stage.server is not None
    url = stage.server.url("postgres", driver=None)
    with ExitStack() as stack, suppress(psycopg.Error):
        try:
            while True:
                stack.enter_context(psycopg.connect(url, connect_timeout=3, application_name="soak-crowd"))
        except psycopg.Error:
            time.sleep(rng.uniform(0.3, 2.0))


def lock_table(stage: Stage, rng: Random) -> None:
    """Somebody locks a table."""
    table, mode = rng.choice(TABLES), rng.choice(["ACCESS EXCLUSIVE", "SHARE", "EXCLUSIVE"])
    with suppress(psycopg.Error), stage.admin() as admin, admin.transaction():
        admin.execute("SET LOCAL lock_timeout = '3s'")
        admin.execute(f"LOCK TABLE {table} IN {mode} MODE")
        time.sleep(rng.uniform(0.2, 3.0))


def vacuum_full(stage: Stage, rng: Random) -> None:
    """VACUUM FULL."""
    _run(stage, f"VACUUM (FULL, ANALYZE) {rng.choice(TABLES)}")


def reindex(stage: Stage, rng: Random) -> None:
    """Indexes are made anew."""
    _run(stage, f"REINDEX TABLE {rng.choice(TABLES)}")


def add_column(stage: Stage, rng: Random) -> None:
    """A migration adds a column, to a table of the application's or of ours."""
    _run(stage, f"ALTER TABLE {rng.choice(TABLES)} ADD COLUMN added_{time.monotonic_ns()} integer DEFAULT 0")


def restart_pooler(stage: Stage, _rng: Random) -> None:
    """The pooler dies, and comes back."""
    if stage.pooler is not None:
        stage.pooler.restart()


def strike(stage: Stage, rng: Random) -> None:
    """The network hits some connections, at once and at their COMMIT."""
    for _ in range(rng.randint(1, 4)):
        one = Strike(
            way=rng.choice(WAYS),
            moment=rng.choice(MOMENTS),
            is_upward=rng.random() < 0.5,
            seconds=rng.uniform(0.02, 0.4) if rng.random() < 0.6 else rng.uniform(0.4, 5.0),
        )
        proxy = stage.pick(rng).proxy
        assert proxy is not None
        proxy.strike(one, rng)


def stall(stage: Stage, rng: Random) -> None:
    """A COMMIT stands still on its way for seconds, with all the locks of its transaction."""
    proxy = stage.pick(rng).proxy
    assert proxy is not None
    proxy.strike(Strike(way="delay", moment="commit", is_upward=True, seconds=rng.uniform(3.0, 9.0)), rng)


def calm(stage: Stage) -> None:
    """Whatever is left of faults goes away."""
    for slot in stage.slots:
        if slot.proxy is not None:
            slot.proxy.calm()
    with stage.admin() as admin:
        admin.execute("ALTER SYSTEM RESET ALL")
        admin.execute("SELECT pg_reload_conf()")


def _halt(stage: Stage, how: signal.Signals, rng: Random) -> None:
    assert stage.server is not None
    with stage.frozen():
        stage.server.halt(how)
        time.sleep(rng.uniform(0.0, 2.0))
        stage.server.resume()


@contextmanager
def _set(stage: Stage, name: str, value: str) -> Iterator[None]:
    with stage.admin() as admin:
        admin.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        admin.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        with stage.admin() as admin:
            admin.execute(f"ALTER SYSTEM RESET {name}")
            admin.execute("SELECT pg_reload_conf()")


def _each(stage: Stage, function: str, rng: Random) -> None:
    with stage.admin() as admin:
        for _ in range(rng.randint(1, 5)):
            admin.execute(f"SELECT {function}(pid) {_OTHERS} AND random() < {rng.uniform(0.1, 0.6)}")
            time.sleep(rng.uniform(0.0, 0.2))


def _run(stage: Stage, statement: str) -> None:
    # Whoever finds the table locked for longer than that gives up.
    with suppress(psycopg.Error), stage.admin() as admin:
        admin.execute(statement)


FAULTS: Mapping[str, Callable[[Stage, Random], None]] = {
    "stop fast": stop_fast,
    "stop immediate": stop_immediate,
    "freeze server": freeze_server,
    "freeze backends": freeze_backends,
    "read-only server": read_only,
    "statement_timeout": statement_timeout,
    "idle_in_transaction_session_timeout": idle_timeout,
    "transaction_timeout": transaction_timeout,
    "lock_timeout": lock_timeout,
    "cancel backends": cancel_backends,
    "terminate backends": terminate_backends,
    "max_connections": exhaust,
    "lock table": lock_table,
    "vacuum full": vacuum_full,
    "reindex": reindex,
    "add column": add_column,
}
LIGHT: Mapping[str, Callable[[Stage, Random], None]] = {
    "network": strike,
    "stalled COMMIT": stall,
    "cancel backends": cancel_backends,
    "terminate backends": terminate_backends,
}
"""Those that go on beside the others, all the time."""
