"""``aftercommit schedules``: look, pause, resume, trigger, delete; and what an expression means, without a database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import select

from aftercommit import signals
from aftercommit.cli.target import DatabaseOption, fail, import_module, in_session, load
from aftercommit.errors import AfterCommitError, ConfigurationError, ScheduleError, ScheduleStateError
from aftercommit.plain import json_text, one_line
from aftercommit.records import schedules
from aftercommit.records.tables import ScheduleRecord
from aftercommit.schedules import operations
from aftercommit.schedules.registry import when_of
from aftercommit.schedules.ticks import ticks_after
from aftercommit.schedules.when import Cron

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

app = typer.Typer(no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="For scripts: one JSON document on standard output.")]
Name = Annotated[str, typer.Argument(help="The schedule's name.")]

_PREVIEWED = 10
_COLUMNS = tuple(ScheduleRecord.__table__.c.keys())


@app.command("list")
def list_(
    target: Annotated[str | None, typer.Argument(help="The Database, as module:name.")] = None,
    db: DatabaseOption = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the next ones first.")] = 100,
    as_json: AsJson = False,  # noqa: FBT002  # a flag
) -> None:
    """List schedules, those that are due next first."""
    query = select(ScheduleRecord).order_by(
        ScheduleRecord.next_at.is_(None), ScheduleRecord.next_at, ScheduleRecord.name
    )
    rows = in_session(
        load(target or db), lambda session: [_facts(each) for each in session.scalars(query.limit(limit))]
    )
    if as_json:
        typer.echo(json_text(rows))
        return
    table = Table("name", "state", "when", "next", "last", "fired", "skipped", "missed", box=None, header_style="bold")
    for row in rows:
        table.add_row(
            *(Text(one_line(str(row[name]))) for name in ("name",)),
            Text(*_state(row)),
            *(Text(one_line(str(row[name] or ""))) for name in ("when", "next_at", "last_at")),
            *(str(row[name]) for name in ("fired", "skipped", "missed")),
        )
    Console(highlight=False).print(table)


@app.command()
def show(
    name: Name,
    db: DatabaseOption = None,
    as_json: AsJson = False,  # noqa: FBT002  # a flag
) -> None:
    """Show all there is to know about one schedule."""

    def look(session: Session) -> dict[str, Any] | None:
        record = session.get(ScheduleRecord, name)
        return None if record is None else _facts(record)

    facts = in_session(load(db), look)
    if facts is None:
        raise fail(f"There is no schedule {name!r}. `aftercommit schedules list` shows those that there are.")
    if as_json:
        typer.echo(json_text(facts))
        return
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value is not None:
            table.add_row(key, Text(one_line(value) if isinstance(value, str) else json_text(value)))
    Console(highlight=False).print(table)


@app.command()
def pause(
    name: Name,
    db: DatabaseOption = None,
    by: Annotated[str | None, typer.Option(help="Who asks, for the record.")] = None,
) -> None:
    """Fire nothing of a schedule, in any process, until it is resumed."""
    _in(load(db), lambda connection: operations.pause(connection, name, by))
    _told(name, "paused", by)


@app.command()
def resume(
    name: Name,
    db: DatabaseOption = None,
    catch_up: Annotated[  # noqa: FBT002  # a flag
        bool, typer.Option("--catch-up", help="Treat the ticks of the pause as missed, and not as refused.")
    ] = False,
) -> None:
    """Fire a paused schedule again, from its next tick on."""
    _in(load(db), lambda connection: operations.resume(connection, name, catch_up=catch_up))
    _told(name, "resumed")


@app.command()
def trigger(
    name: Name,
    db: DatabaseOption = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Modules that declare tasks, if the first one does not import them."),
    ] = None,
) -> None:
    """Run a schedule's task now, beside its ticks; print the id of its record."""
    database = load(db)
    for module in imports or ():
        import_module(module)
    made, _ = _in(database, lambda connection: operations.trigger(connection, name, database.tasks))
    signals.emit(signals.ScheduleChanged(schedule=name, what="triggered", by=None))
    typer.echo(str(made))


@app.command()
def delete(
    name: Name,
    db: DatabaseOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,  # noqa: FBT002  # a flag
) -> None:
    """Delete a schedule that was made as data; what it asked for stays."""
    database = load(db)
    if not yes:
        typer.confirm(f"Delete the schedule {one_line(repr(name))}?", abort=True)

    def act(connection: Connection) -> None:
        row = schedules.found(connection, name)
        if row is None:
            raise ScheduleStateError(f"There is no schedule {name!r}.")
        if row.origin == "code":
            raise ScheduleStateError(
                f"The schedule {name!r} is declared in the code, which would write it again at the next start. Take it "
                "out there: its row is deleted after keep_finished."
            )
        schedules.remove(connection, name)

    _in(database, act)
    _told(name, "deleted")


@app.command()
def preview(
    expression: Annotated[str, typer.Argument(help='Five fields, such as "0 2 * * *", or @daily and its like.')],
    timezone: Annotated[str, typer.Option(help="The time zone, such as Europe/Berlin.")] = "UTC",
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many ticks.")] = _PREVIEWED,
    since: Annotated[str | None, typer.Option(help="From this moment on, as 2026-03-28 or 2026-03-28T12:00.")] = None,
    as_json: AsJson = False,  # noqa: FBT002  # a flag
) -> None:
    """Print the next ticks of an expression; days on which the clocks are changed are marked. Needs no database."""
    try:
        when = Cron(expression, timezone=timezone)
    except AfterCommitError as exc:
        raise fail(str(exc)) from exc
    try:
        begin = datetime.now(UTC) if since is None else datetime.fromisoformat(since)
    except ValueError as exc:
        raise fail(f"--since {since}: write it as 2026-03-28 or 2026-03-28T12:00.") from exc
    if begin.tzinfo is None:
        begin = begin.replace(tzinfo=when.zone)
    found = [tick.astimezone(when.zone) for tick in islice(ticks_after(when, begin, begin), count)]
    if as_json:
        typer.echo(json_text([{"at": tick.isoformat(), "clocks": _change_of_day(tick)} for tick in found]))
        return
    typer.echo(one_line(when.describe()))
    for tick in found:
        change = _change_of_day(tick)
        mark = f"   clocks go {'forward' if change > 0 else 'back'} on this day" if change else ""
        typer.echo(f"{tick:%a %Y-%m-%d %H:%M %z}{mark}")


def _change_of_day(tick: datetime) -> int:
    """By how many minutes the clocks go forward on the day of a tick; 0 on most days."""
    midnight = tick.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    before, after = midnight.utcoffset(), (midnight + timedelta(days=1)).utcoffset()
    return 0 if before is None or after is None else round((after - before).total_seconds() / 60)


def _in(database: Any, work: Callable[[Connection], Any]) -> Any:
    return in_session(database, lambda session: work(session.connection()))


def _told(name: str, what: str, by: str | None = None) -> None:
    """What the application's own module has subscribed to hears of it, as from ``db.pause_schedule``."""
    signals.emit(signals.ScheduleChanged(schedule=name, what=what, by=by))
    typer.echo(f"Schedule {one_line(repr(name))} is {what}.")


def _facts(record: ScheduleRecord) -> dict[str, Any]:
    facts = {name: _json_ready(getattr(record, name)) for name in _COLUMNS}
    try:
        facts["when"] = when_of(record).describe()
    except (ScheduleError, ConfigurationError):
        facts["when"] = f"{record.expression or record.seconds} {record.timezone or ''}".strip()
    return facts


def _json_ready(value: Any) -> Any:
    if isinstance(value, UUID):
        return str(value)
    return value.isoformat() if isinstance(value, datetime) else value


def _state(row: dict[str, Any]) -> tuple[str, str]:
    if row["ended_at"]:
        return "ended", "dim"
    return ("paused", "yellow") if row["paused_at"] else ("open", "")
