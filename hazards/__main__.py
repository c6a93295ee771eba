"""``python -m hazards``: run all scenarios and print both columns as a table."""

import platform
import sys
from collections.abc import Callable
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

from hazards import (
    counter,
    crowded_pool,
    failing_task,
    fresh_session,
    mapped_object,
    request_session,
    restart,
)
from hazards.measure import Outcome
from tests.support.postgres import PostgresServer

MODULES = (request_session, fresh_session, mapped_object, failing_task, crowded_pool, counter, restart)


def main() -> int:
    """Run every scenario on a database of its own; fail if aftercommit does not do what was meant."""
    console = Console()
    table = Table("what people write", "today", "with aftercommit", show_lines=True)
    all_right = True
    with PostgresServer() as server:
        for scenario in (scenario for module in MODULES for scenario in module.SCENARIOS):
            with console.status(scenario.title):
                today = outcome(server, scenario.today)
                better = outcome(server, scenario.better)
            all_right = all_right and better.is_right
            table.add_row(scenario.title, shown(today), shown(better))
        postgres = server.version
    console.print(table)
    packages = ", ".join(f"{name} {version(name)}" for name in ("fastapi", "starlette", "sqlalchemy", "uvicorn"))
    console.print(f"Python {platform.python_version()}, {packages}, PostgreSQL {postgres}")
    return 0 if all_right else 1


def outcome(server: PostgresServer, run: Callable[[str], Outcome]) -> Outcome:
    """Run one side on a database of its own; an error is an outcome, too."""
    with server.database() as name:
        try:
            return run(server.url(name))
        except Exception as error:  # noqa: BLE001 - one broken scenario must not hide the others
            return Outcome(said=f"{type(error).__name__}: {error}", is_right=False, facts={})


def shown(outcome: Outcome) -> str:
    """Return the cell of the table."""
    return f"[green]✓[/] {outcome.said}" if outcome.is_right else f"[red]✗[/] {outcome.said}"


if __name__ == "__main__":
    sys.exit(main())
