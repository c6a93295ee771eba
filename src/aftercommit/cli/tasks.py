"""``aftercommit tasks``: look, retry, cancel."""

from __future__ import annotations

import getpass
import re
from datetime import UTC, datetime, timedelta
from functools import partial
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import Select, func, select

from aftercommit import signals
from aftercommit.cli.target import DatabaseOption, fail, in_session, load
from aftercommit.plain import json_text, one_line, several_lines
from aftercommit.records import moves
from aftercommit.records.tables import TaskRecord
from aftercommit.tasks.options import check_by

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

app = typer.Typer(no_args_is_help=True)

_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
_WIDTHS = {"id": 36, "task": 12, "pool": 7, "state": 9, "tries": 5, "done": 5, "age": 4, "error": 20}
"""The columns, in their order, and the characters that each needs to be of use."""

_FIRST = ("id", "state", "task", "tries", "age", "pool", "error", "done")
"""What is shown first where there is not room for all: `tasks show` has the error whole."""

_COLOURS = {"queued": "cyan", "running": "yellow", "succeeded": "green", "failed": "red", "cancelled": "dim"}
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

State = Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")]
Name = Annotated[str | None, typer.Option("--task", help="Only tasks of this name.")]
PoolName = Annotated[str | None, typer.Option("--pool", help="Only tasks of this pool.")]
OlderThan = Annotated[str | None, typer.Option(help="Only tasks asked for longer ago than this: 90s, 15m, 2h, 7d.")]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts: one JSON document on standard output.")]
Ids = Annotated[list[UUID] | None, typer.Argument(help="Ids of tasks; or choose by filters.")]
By = Annotated[str | None, typer.Option("--by", help="Who cancels, for the record; your login by default.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command("list")
def list_(  # noqa: PLR0917  # options of a command
    target: Annotated[str | None, typer.Argument(help="The Database, as module:name.")] = None,
    db: DatabaseOption = None,
    state: State = None,
    task: Name = None,
    pool: PoolName = None,
    older_than: OlderThan = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, newest first.")] = 50,
    as_json: AsJson = False,  # noqa: FBT002  # a flag
) -> None:
    """List tasks, newest first."""
    chosen = _filtered(select(TaskRecord), state, task, pool, older_than)
    query = chosen.order_by(TaskRecord.id.desc()).limit(limit)

    def look(session: Session) -> tuple[list[dict[str, Any]], int]:
        total = session.scalar(select(func.count()).select_from(chosen.subquery()))
        return [_facts(record) for record in session.scalars(query)], total or 0

    rows, total = in_session(load(target or db), look)
    if as_json:
        _print_json(rows)
        return
    console = Console(highlight=False)
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    lines = [_cells(row) for row in rows]
    longest = {name: max([len(name), *(line[name].cell_len for line in lines)]) for name in _WIDTHS}
    names = _that_fit(console.width, longest)
    for name, width in names.items():
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=width)
    for line in lines:
        table.add_row(*(line[name] for name in names))
    console.print(table)
    left_out = [name for name in _WIDTHS if name not in names]
    more = f"; a wider terminal has room for {', '.join(left_out)}" if left_out else ""
    console.print(Text(f"{len(rows)} of {total}{more}", "dim"), soft_wrap=True)


@app.command()
def show(
    task_id: Annotated[UUID, typer.Argument(metavar="ID", help="The task's id.")],
    db: DatabaseOption = None,
    as_json: AsJson = False,  # noqa: FBT002  # a flag
) -> None:
    """Show all there is to know about one task."""

    def look(session: Session) -> dict[str, Any] | None:
        record = session.get(TaskRecord, task_id)
        return None if record is None else _facts(record, whole=True)

    facts = in_session(load(db), look)
    if facts is None:
        raise fail(f"There is no task {task_id}.")
    if as_json:
        _print_json(facts)
        return
    console = Console(highlight=False)
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if name not in ("traceback", "errors") and value is not None:
            table.add_row(name, Text(one_line(value) if isinstance(value, str) else json_text(value)))
    console.print(table)
    errors = facts["errors"]
    for entry in errors if isinstance(errors, list) else []:
        attempt, at, error = (one_line(str(dict(entry).get(name))) for name in ("attempt", "at", "error"))
        console.print(Text.assemble((f"\nAttempt {attempt}", "bold"), f", {at}: ", (error, "red")), soft_wrap=True)
    if facts["traceback"]:
        console.print()
        # A margin, so that none of its lines can be taken for one of ours.
        console.print(Text(indent(several_lines(facts["traceback"]), "  ")), soft_wrap=True)


@app.command()
def retry(  # noqa: PLR0917  # options of a command
    ids: Ids = None,
    db: DatabaseOption = None,
    state: State = None,
    task: Name = None,
    pool: PoolName = None,
    older_than: OlderThan = None,
    yes: Yes = False,  # noqa: FBT002  # a flag
    as_json: AsJson = False,  # noqa: FBT002  # a flag
) -> None:
    """Queue tasks that failed or were cancelled once more, with all their attempts."""
    if state not in (None, "failed", "cancelled"):
        raise fail(f"--state {state}: only tasks that failed or were cancelled can be retried.")
    _move("retry", moves.retry, ("failed", "cancelled"), ids, db, (state, task, pool, older_than), yes, as_json)


@app.command()
def cancel(  # noqa: PLR0917  # options of a command
    ids: Ids = None,
    db: DatabaseOption = None,
    state: State = None,
    task: Name = None,
    pool: PoolName = None,
    older_than: OlderThan = None,
    yes: Yes = False,  # noqa: FBT002  # a flag
    by: By = None,
    as_json: AsJson = False,  # noqa: FBT002  # a flag
) -> None:
    """Cancel tasks that are queued or running; a running one is stopped and can commit nothing more."""
    if state not in (None, "queued", "running"):
        raise fail(f"--state {state}: only tasks that are queued or running can be cancelled.")
    check_by(by)
    who = by or f"{getpass.getuser()}, with aftercommit tasks cancel"[:255]
    move = partial(moves.cancel, by=who)
    _move("cancel", move, ("queued", "running"), ids, db, (state, task, pool, older_than), yes, as_json, by=who)


def _move(  # noqa: PLR0917  # two commands share it
    verb: str,
    move: Callable[[Connection, UUID], bool],
    states: tuple[str, ...],
    ids: list[UUID] | None,
    db: str | None,
    filters: tuple[str | None, str | None, str | None, str | None],
    yes: bool,  # noqa: FBT001  # a flag
    as_json: bool,  # noqa: FBT001  # a flag
    *,
    by: str | None = None,
) -> None:
    if not ids and not any(filters):
        raise fail(f"Which tasks? Give ids, or a filter such as --state {states[0]} or --task NAME.")
    if ids and any(filters):
        raise fail("Give ids or filters, not both.")
    database = load(db)
    if not ids:
        query = _filtered(select(TaskRecord.id), *filters).where(TaskRecord.state.in_(states)).order_by(TaskRecord.id)
        ids = in_session(database, lambda session: list(session.scalars(query)))
        if ids and not yes and not as_json:
            typer.confirm(f"{verb.capitalize()} {len(ids)} task(s)?", abort=True)
    chosen = list(ids)

    def act(session: Session) -> dict[UUID, bool]:
        connection = session.connection()
        return {each: move(connection, each) for each in chosen}

    done = in_session(database, act)
    _tell(verb, tuple(each for each, moved in done.items() if moved), by)
    left = [str(each) for each, moved in done.items() if not moved]
    if as_json:
        _print_json({"done": [str(each) for each, moved in done.items() if moved], "left": left})
    else:
        typer.echo(f"{verb}: {len(done) - len(left)} task(s)")
        for each in left:
            typer.secho(f"{each} is not {' or '.join(states)}, or does not exist", fg=typer.colors.YELLOW, err=True)
    if left:
        raise typer.Exit(1)


def _tell(verb: str, ids: tuple[UUID, ...], by: str | None) -> None:
    """What the application's own module has subscribed to hears of it, as from ``db.cancel`` and ``db.retry``."""
    if ids and verb == "cancel":
        signals.emit(signals.TasksCancelled(ids=ids, by=by))
    elif ids:
        signals.emit(signals.TasksRequeued(ids=ids, reason="aftercommit tasks retry"))


def _filtered(
    query: Select[Any], state: str | None, task: str | None, pool: str | None, older_than: str | None
) -> Select[Any]:
    if state is not None:
        if state not in _STATES:
            raise fail(f"--state {state}: use one of {', '.join(_STATES)}.")
        query = query.where(TaskRecord.state == state)
    if task is not None:
        query = query.where(TaskRecord.task == task)
    if pool is not None:
        query = query.where(TaskRecord.pool == pool)
    if older_than is not None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", older_than)
        if found is None:
            raise fail(f"--older-than {older_than}: write a number and s, m, h or d, such as 15m.")
        query = query.where(
            TaskRecord.enqueued_at < datetime.now(UTC) - timedelta(**{_UNITS[found[2]]: float(found[1])})
        )
    return query


_SHORT = (
    "id", "task", "pool", "state", "key", "priority", "attempt", "max_attempts", "run_at", "enqueued_at",
    "started_at", "finished_at", "worker", "progress_done", "progress_total", "error",
)  # fmt: skip
_WHOLE = (
    *_SHORT,
    "parent",
    "arguments",
    "result",
    "context",
    "checkpoint",
    "claims",
    "cancelled_by",
    "expected",
    "errors",
    "traceback",
)


def _facts(record: TaskRecord, *, whole: bool = False) -> dict[str, Any]:
    facts = {name: getattr(record, name) for name in (_WHOLE if whole else _SHORT)}
    return {name: _json_ready(value) for name, value in facts.items()}


def _json_ready(value: Any) -> Any:
    if isinstance(value, UUID):
        return str(value)
    return value.isoformat() if isinstance(value, datetime) else value


def _print_json(value: Any) -> None:
    typer.echo(json_text(value))


def _cells(row: dict[str, Any]) -> dict[str, Text]:
    return {
        **{name: Text(one_line(str(row[name] or ""))) for name in ("id", "task", "pool", "error")},
        "state": Text(one_line(row["state"]), _COLOURS.get(row["state"], "")),
        "tries": Text(f"{row['attempt']}/{row['max_attempts']}"),
        "done": Text(_progress(row)),
        "age": Text(_ago(row["enqueued_at"])),
    }


def _that_fit(width: int, longest: Mapping[str, int]) -> dict[str, int]:
    """Return the columns that a terminal has room for, in their order, and how wide each may be.

    Args:
        width: The terminal's.
        longest: What stands in each column.
    """
    room = width
    given: dict[str, int] = {}
    for name in _FIRST:
        least = min(_WIDTHS[name], longest[name]) + 1  # and the space behind it
        if least > room and name not in _FIRST[:2]:
            break
        given[name] = least - 1
        room -= least
    for name, least in given.items():
        more = max(0, min(room, longest[name] - least))
        given[name] = least + more
        room -= more
    return {name: given[name] for name in _WIDTHS if name in given}


def _progress(row: dict[str, Any]) -> str:
    done, total = row["progress_done"], row["progress_total"]
    if done is None:
        return ""
    return f"{done}" if total is None else f"{done}/{total}"


def _ago(moment: str) -> str:
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    except (ValueError, TypeError):  # written by hand
        return "?"
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"
