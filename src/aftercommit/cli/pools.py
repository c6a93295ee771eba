"""``aftercommit pools``: look, pause, resume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import case, func, select

from aftercommit.cli.target import DatabaseOption, fail, in_session, load
from aftercommit.plain import json_text, one_line
from aftercommit.records import pausing
from aftercommit.records.tables import PoolState, TaskRecord, WorkerRecord

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

app = typer.Typer(no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="For scripts: one JSON document on standard output.")]


@app.command("list")
def list_(
    target: Annotated[str | None, typer.Argument(help="The Database, as module:name.")] = None,
    db: DatabaseOption = None,
    as_json: AsJson = False,  # noqa: FBT002  # a flag
) -> None:
    """List the pools: what waits and runs in them, who runs them, which are paused."""
    database = load(target or db)
    names = [name for name in database.pool_settings if name != "request"]
    rows = in_session(database, lambda session: _look(session, names))
    if as_json:
        typer.echo(json_text(rows))
        return
    table = Table("pool", "state", "queued", "running", "failed", "workers", box=None, header_style="bold")
    for row in rows:
        state = Text("paused", "yellow") if row["paused"] else Text("open")
        workers = Text(str(row["workers"])) if row["workers"] else Text("none", "red")
        table.add_row(
            Text(one_line(row["pool"])), state, str(row["queued"]), str(row["running"]), str(row["failed"]), workers
        )
    Console().print(table)


@app.command()
def pause(
    pool: Annotated[str, typer.Argument(help="The pool.")],
    db: DatabaseOption = None,
) -> None:
    """Start no more tasks of a pool, in any process; those that run go on."""
    _set(pool, db, paused=True)


@app.command()
def resume(
    pool: Annotated[str, typer.Argument(help="The pool.")],
    db: DatabaseOption = None,
) -> None:
    """Start tasks of a paused pool again."""
    _set(pool, db, paused=False)


def _set(pool: str, db: str | None, *, paused: bool) -> None:
    database = load(db)
    if pool not in database.pool_settings or pool == "request":
        known = ", ".join(sorted(name for name in database.pool_settings if name != "request"))
        raise fail(f"There is no pool of tasks {pool!r}; this database has {known}.")
    move = pausing.pause if paused else pausing.resume
    in_session(database, lambda session: move(session.connection(), pool))
    typer.echo(f"Pool {pool!r} is {'paused' if paused else 'open'}.")


def _look(session: Session, names: list[str]) -> list[dict[str, Any]]:
    def number_of(state: str) -> Any:
        return func.sum(case((TaskRecord.state == state, 1), else_=0))

    columns = (number_of("queued"), number_of("running"), number_of("failed"))
    counted = {row[0]: row[1:] for row in session.execute(select(TaskRecord.pool, *columns).group_by(TaskRecord.pool))}
    paused = set(session.scalars(select(PoolState.name)))
    served = [pool for pools in session.scalars(select(WorkerRecord.pools)) for pool in pools]
    return [
        {
            "pool": name,
            "paused": name in paused,
            "queued": int(numbers[0]),
            "running": int(numbers[1]),
            "failed": int(numbers[2]),
            "workers": served.count(name),
        }
        for name in sorted({*names, *counted})
        for numbers in [counted.get(name, (0, 0, 0))]
    ]
