"""``aftercommit worker``: tasks in a process of their own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from aftercommit.cli.target import DatabaseOption, fail, import_module, load, option_for_tasks
from aftercommit.errors import AfterCommitError
from aftercommit.plain import one_line

if TYPE_CHECKING:
    from types import FrameType

    from aftercommit.database import Database

logger = logging.getLogger("aftercommit.worker")

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)


def worker(  # noqa: PLR0917  # options of a command
    target: Annotated[str | None, typer.Argument(help="The Database, as module:name.")] = None,
    db: DatabaseOption = None,
    pools: Annotated[str | None, typer.Option(help="The pools to run, separated by commas; all by default.")] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Modules that declare tasks, if the first one does not import them."),
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds that running tasks get after SIGTERM.")] = 15.0,
    processes: Annotated[
        int | None, typer.Option(help="Processes that share the server's connections; by default those that live.")
    ] = None,
    strict: Annotated[  # noqa: FBT002  # an option of a command
        bool, typer.Option("--strict", help="Do not start where all of them may open more than the server allows.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="Of the log on standard error.")] = "INFO",
) -> None:
    """Run the tasks of a database, until SIGTERM or Ctrl+C."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    database = load(target or db)
    for module in imports or ():
        import_module(module)
    chosen = None if pools is None else tuple(name.strip() for name in pools.split(",") if name.strip())
    try:
        with asyncio.Runner() as runner:
            runner.run(_serve(database, str(target or db), chosen, grace, processes, strict=strict))
    except AfterCommitError as exc:
        raise fail(str(exc)) from exc


async def _serve(
    db: Database,
    where: str,
    pools: tuple[str, ...] | None,
    grace: float,
    processes: int | None,
    *,
    strict: bool,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOPPING:
        # Not the loop's own handlers: they go when it closes, and what came then would kill a process that has stopped
        # in order.
        signal.signal(number, partial(_heard, loop, stop))
    try:
        async with db.running(runs=pools, grace=grace, processes=processes, strict=strict):
            runner = db.runner
            if runner is None:
                raise fail("There is nothing to run: no pool was chosen (--pools, or AFTERCOMMIT_RUNS).")
            names = sorted(name for name, task in db.tasks.items() if task.settings.pool in runner.lanes)
            pools_run = one_line(", ".join(runner.lanes))
            if names:
                logger.info("Worker %s runs %s: %s", runner.id, pools_run, one_line(", ".join(names)))
            else:
                logger.warning(
                    "Worker %s runs %s, and knows no task of them: what waits there goes on waiting. A worker knows "
                    "what the modules that it imports declare; name those that %s does not import: aftercommit worker "
                    "%s %s", runner.id, pools_run, where.partition(":")[0], where, option_for_tasks(where),
                )  # fmt: skip
            await stop.wait()
            logger.info("Stopping: tasks that run have %.0f s to finish", grace)
    finally:
        with contextlib.suppress(Exception):
            await db.async_dispose()
    for number in _STOPPING:
        # Python takes its handlers away, too, before the process has ended; what is ignored stays ignored.
        signal.signal(number, signal.SIG_IGN)
    logger.info("Stopped")


def _heard(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, number: int, _frame: FrameType | None) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(_stop, stop, number)


def _stop(stop: asyncio.Event, number: int) -> None:
    if stop.is_set():
        # The stop in order is under way, and a second signal must not tear it apart; SIGKILL always works.
        logger.info("%s again: the stop is under way", signal.Signals(number).name)
    stop.set()
