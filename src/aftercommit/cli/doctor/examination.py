"""The doctor's way through the house: what is asked, in which order, and where to stop."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from aftercommit.cli.doctor.findings import Finding, Level, identifier, word
from aftercommit.cli.doctor.reaching import configuration, no_url, unreachable, who_has_open
from aftercommit.cli.doctor.schedules import check_schedules, take_schedules
from aftercommit.cli.doctor.server import Clock, check_budget, check_clock, check_server
from aftercommit.cli.doctor.setup import (
    check_drivers,
    check_environment,
    check_file,
    check_packages,
    file_of,
    installed,
)
from aftercommit.cli.doctor.vanishing import check_vanishing
from aftercommit.cli.doctor.work import WITHIN, Census, check_work
from aftercommit.errors import ConfigurationError
from aftercommit.pools.budget import Budget
from aftercommit.pools.pools import REQUEST
from aftercommit.records import backends, census, schema, server
from aftercommit.runner.budgeting import expected_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Connection

    from aftercommit.database import Database
    from aftercommit.pools import Pools
    from aftercommit.tasks import Task

__all__ = ["examine"]

T = TypeVar("T")

_PATIENCE: Final = {"psycopg": "connect_timeout", "asyncpg": "timeout", "pysqlite": "timeout", "aiosqlite": "timeout"}
"""What each driver calls the seconds for which it waits: for a connection, or for a lock."""

_SECONDS: Final = {"psycopg": 5, "asyncpg": 5.0, "pysqlite": 1.0, "aiosqlite": 1.0}
_LOOKS: Final = 3
_LOCK_SECONDS: Final = 3
_LOCKED: Final = "55P03"
_WHO_LOCKS: Final = (
    "SELECT DISTINCT pid, application_name, state, xact_start, query FROM pg_locks JOIN pg_stat_activity USING (pid) "
    "WHERE starts_with(relation::regclass::text, 'aftercommit') AND mode = 'AccessExclusiveLock' AND granted;"
)
_NOT_ALLOWED: Final = "42501"


def examine(db: Database, where: str, *, processes: int | None) -> list[Finding]:
    """Look at everything that can be reached; nothing is changed.

    Args:
        db: The database.
        where: What the command was told, ``module:name``, for what there is to type.
        processes: How many processes there are; None to count the live workers.
    """
    findings = [*check_packages(installed()), *check_environment()]
    try:
        pools = _impatient(db)
    except ConfigurationError as exc:
        return [*findings, configuration(exc)]
    except Exception as exc:  # noqa: BLE001  # the application's own function
        return [*findings, no_url(exc)]
    tasks = sorted(set(db.tasks.values()), key=lambda task: task.name)
    findings += check_drivers(pools.flavours, tasks)
    if pools.is_sqlite:
        findings += check_file(file_of(pools.flavours.given), where)
        if any(each.check == "file" and each.level is not Level.OK for each in findings):
            # Connecting would make the file, or fail with less of a reason.
            return findings
    try:
        _ask(pools, lambda connection: findings.extend(_look(connection, db, where, tasks, processes)))
    except ConfigurationError:
        pass  # a driver that is not installed, which has been said
    except (SQLAlchemyError, OSError, TimeoutError) as exc:
        findings.append(unreachable(pools, exc))
    return findings


def _look(
    connection: Connection, db: Database, where: str, tasks: Sequence[Task[Any, Any]], processes: int | None
) -> Iterator[Finding]:
    durable = [task for task in tasks if task.settings.durable]
    if connection.dialect.name == "sqlite":
        yield from _check_sqlite(connection)
        tables, found = _look_at_tables(connection, db, where, durable)
    else:
        # As long as this transaction lasts: whoever asks the doctor may do so because somebody has locked the tables.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
        there = server.look(connection)
        yield from check_server(there, durable)
        clock = check_clock([_clock(connection) for _ in range(_LOOKS)])
        try:
            with connection.begin_nested():
                tables, found = _look_at_tables(connection, db, where, durable)
        except DBAPIError as exc:
            tables, found = _refused(connection, exc, has_durable=bool(durable)), None
        if found is not None:
            yield from check_vanishing(there, backends.reach(connection))
        yield _budget(connection, db, processes, 0 if found is None else len(found.live))
        yield clock
    yield tables
    if found is not None:
        yield from check_work(found)
        yield from check_schedules(
            take_schedules(
                connection, silent_after=db.pace.silent_after, declared=db.schedules.declared.keys(), where=where
            )
        )


def _look_at_tables(
    connection: Connection, db: Database, where: str, durable: Sequence[Task[Any, Any]]
) -> tuple[Finding, Census | None]:
    finding, is_ready = _check_tables(connection, where, has_durable=bool(durable))
    return finding, _take_census(connection, db, where, durable) if is_ready else None


def _check_sqlite(connection: Connection) -> list[Finding]:
    findings = []
    path = word(file_of(connection.engine.url))
    mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    if mode != "wal":
        findings.append(
            Finding(
                check="journal mode",
                level=Level.WARNING,
                found=f"The file's journal mode is {mode!r}, and not 'wal'",
                why="Whoever writes then waits for everybody who reads. Each connection asks for WAL; somebody had the "
                "file locked, or it cannot be written.",
                remedy=(f"sqlite3 {path} 'PRAGMA journal_mode=WAL'    # while nobody uses it",),
            )
        )
    try:
        _try_to_write(connection)
    except sqlite3.Error as exc:
        reason = str(exc)
        is_busy = "locked" in reason
        findings.append(
            Finding(
                check="write lock",
                level=Level.WARNING if is_busy else Level.WRONG,
                found=f"Nothing can be written: {reason}",
                why="Somebody has held the only write lock for longer than a second: everybody else who writes waits."
                if is_busy
                else "Neither requests nor tasks can commit.",
                remedy=(who_has_open(connection.engine.url) if is_busy else f"ls -l {path}*",),
            )
        )
    version = connection.exec_driver_sql("SELECT sqlite_version()").scalar()
    return findings or [Finding(check="journal mode", level=Level.OK, found=f"SQLite {version}, write-ahead log")]


def _try_to_write(connection: Connection) -> None:
    """Take the lock and write what stands there already, in a transaction that is rolled back.

    By the driver: a connection that refuses to write is dropped otherwise, and there is more to be asked.
    """
    cursor = connection.connection.cursor()
    try:
        cursor.execute("PRAGMA user_version")
        [version] = cursor.fetchone() or (0,)
        cursor.execute("BEGIN IMMEDIATE")
        try:
            # The lock alone is given to those as well who may not write.
            cursor.execute(f"PRAGMA user_version = {version}")
        finally:
            cursor.execute("ROLLBACK")
    finally:
        cursor.close()


def _check_tables(connection: Connection, where: str, *, has_durable: bool) -> tuple[Finding, bool]:
    """Look whether our tables fit; also return whether they can be read."""
    is_sqlite = connection.dialect.name == "sqlite"
    problem = schema.schema_problem(connection)
    denied = [] if problem is not None or is_sqlite else census.denied(connection)
    if denied:
        return _denied(connection, denied, has_durable=has_durable), False
    if problem is None:
        version = census.version(connection) or 0
        is_newer = version > schema.SCHEMA_VERSION
        return Finding(
            check="tables",
            level=Level.NOTE if is_newer else Level.OK,
            found=f"They are there, in version {version}",
            why=f"This release writes version {schema.SCHEMA_VERSION}, and works with those that newer releases of the "
            "same minor version make."
            if is_newer
            else "",
        ), True
    level, why = _missed(has_durable=has_durable)
    if has_durable and is_sqlite and "missing" in problem:
        level, why = Level.WARNING, f"{why} On SQLite install(app, db) and db.running() make them at start-up."
    remedy = (f"aftercommit schema {where} --apply",)
    return Finding(check="tables", level=level, found=problem, why=why, remedy=remedy), False


def _missed(*, has_durable: bool) -> tuple[Level, str]:
    """How bad it is that our tables cannot be used."""
    if not has_durable:
        return Level.NOTE, "Nothing here declares a durable task, so nobody misses them yet."
    return (
        Level.WRONG,
        "Durable tasks are rows in them: the first one that is asked for fails, and its transaction with it.",
    )


def _refused(connection: Connection, error: DBAPIError, *, has_durable: bool) -> Finding:
    """Say why our tables cannot be looked at.

    Raises:
        DBAPIError: *error*, if it is none of those that are known.
    """
    code = getattr(error.orig, "sqlstate", None)
    if code == _NOT_ALLOWED and (denied := census.denied(connection)):
        return _denied(connection, denied, has_durable=has_durable)
    if code != _LOCKED:
        raise error
    level, _ = _missed(has_durable=has_durable)
    return Finding(
        check="tables",
        level=level,
        found=f"Somebody has locked them, for longer than {_LOCK_SECONDS} s",
        why="As a migration does, or a transaction that was left open: whoever hands over or runs tasks waits for it.",
        remedy=(
            _WHO_LOCKS,
            "SELECT pg_terminate_backend(…its pid…);",
        ),
    )


def _denied(connection: Connection, tables: Sequence[str], *, has_durable: bool) -> Finding:
    role = str(connection.exec_driver_sql("SELECT current_user").scalar())
    level, why = _missed(has_durable=has_durable)
    return Finding(
        check="tables",
        level=level,
        found=f"The role {role!r} may not read and write {', '.join(tables)}",
        why=why,
        remedy=(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(tables)} TO {identifier(role)};",),
    )


def _take_census(connection: Connection, db: Database, where: str, durable: Sequence[Task[Any, Any]]) -> Census:
    return Census(
        workers=census.workers(connection),
        queues=census.queues(connection),
        paused=census.paused(connection),
        held_by_nobody=census.held_by_nobody(connection),
        failures=census.failures(connection, within=WITHIN),
        kept=census.kept(connection),
        tuples=None if connection.dialect.name == "sqlite" else census.tuples(connection),
        silent_after=db.pace.silent_after,
        keep=db.pace.keep,
        names={name for name, task in db.tasks.items() if task.settings.durable},
        pools={task.settings.pool for task in durable},
        declared=db.pool_settings,
        where=where,
    )


def _budget(connection: Connection, db: Database, processes: int | None, live: int) -> Finding:
    expected = expected_processes()
    if processes is not None:
        counted, source = processes, "by --processes"
    elif expected > max(1, live):
        counted, source = expected, "by WEB_CONCURRENCY"
    elif live:
        counted, source = live, "those that are alive; say --processes if there are more"
    else:
        counted, source = 1, "none is alive; say --processes for how many there will be"
    # As if each ran all pools: this one may be started with other pools than the others.
    every = [name for name in db.pool_settings if name != REQUEST]
    budget = Budget(shares=db.shares(every), processes=counted, limits=server.limits(connection))
    return check_budget(budget, source)


def _clock(connection: Connection) -> Clock:
    before = time.time()
    there = server.clock(connection)
    return Clock(before=before, there=there, after=time.time())


# --- getting there ----------------------------------------------------------------------------------------------


def _impatient(db: Database) -> Pools:
    """Pools of the doctor's own, with the application's options: they give up sooner, unless it says otherwise."""
    given = db.sessions.pools
    options: dict[str, Any] = {}
    for name, flavour, url in (
        ("engine_options", "sync", given.flavours.sync),
        ("async_engine_options", "async", given.flavours.asynchronous),
    ):
        theirs = given.options(flavour)  # type: ignore[arg-type]  # one of the two
        driver = None if url is None else url.get_driver_name()
        patience = {} if driver is None else {_PATIENCE[driver]: _SECONDS[driver]}
        options[name] = {**theirs, "connect_args": {**patience, **(theirs.get("connect_args") or {})}}
    return db.make_pools(given.flavours.given, **options)


def _ask(pools: Pools, work: Callable[[Connection], T]) -> T:
    """Run ``work(connection)``, by whichever flavour the URL has, and take back what was begun."""
    pool = pools[REQUEST]

    async def run() -> T:
        try:
            async with pool.async_engine.connect() as connection:
                return await connection.run_sync(work)
        finally:
            await pool.async_dispose()

    if pools.is_async_only:
        with asyncio.Runner() as runner:
            return runner.run(run())
    try:
        with pool.engine.connect() as connection:
            return work(connection)
    finally:
        pool.dispose()
