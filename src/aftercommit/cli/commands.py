"""The command and its parts."""

from __future__ import annotations

import typer

from aftercommit.cli import pools, schedules, schema, tasks, worker
from aftercommit.cli.doctor import doctor

__all__ = ["app"]

app = typer.Typer(
    name="aftercommit",
    help="Background tasks that start after the commit: run them, look at them, mend them.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # they may hold a password
)
app.command("worker")(worker.worker)
app.command("schema")(schema.schema)
app.command("doctor")(doctor)
app.add_typer(tasks.app, name="tasks", help="Look at tasks, retry and cancel them.")
app.add_typer(schedules.app, name="schedules", help="Look at schedules, pause, resume, trigger and delete them.")
app.add_typer(pools.app, name="pools", help="Look at pools, pause and resume them.")
