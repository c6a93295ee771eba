"""What is public: the names that people's code is written against."""

import importlib
import subprocess
import sys

import pytest

PUBLIC = {
    "aftercommit": {
        "AfterCommitError", "BatchFailure", "BatchReport", "ClusterStats", "ClusterTask", "CurrentRun", "Database",
        "Cron", "Discard", "EventHandle", "Every", "Holder", "PoolSettings", "PoolStats", "Retry", "RetryLater",
        "ScheduleRecord", "Stats", "Task", "TaskHandle", "TaskRecord", "TaskStats", "Tick",
        "Timing", "current_run", "errors", "signals",
    },
    "aftercommit.fastapi": {
        "AfterCommit", "AfterCommitDep", "AsyncSessionDep", "SessionDep", "TaskStatus", "after_commit_of",
        "async_session_of",
        "get_after_commit", "get_async_session", "get_session", "install", "session_of",
        "status_router",
    },
    "aftercommit.monitoring.logging": {"TaskContextFilter", "carry", "log_signals"},
    "aftercommit.monitoring.opentelemetry": {"instrument", "uninstrument"},
    "aftercommit.monitoring.prometheus": {"instrument", "metrics_router", "uninstrument"},
    "aftercommit.testing": {"PendingTask", "Tasks", "replace", "ticks"},
}  # fmt: skip


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_public_names_are_these(module: str) -> None:
    """The list of public names grows, or shrinks, by a decision that this test makes visible."""
    found = importlib.import_module(module)

    assert set(found.__all__) == PUBLIC[module]
    assert all(hasattr(found, name) for name in found.__all__)


def test_every_public_name_explains_itself() -> None:
    """Every public name has a docstring of its own."""
    silent = [
        f"{module}.{name}"
        for module, names in PUBLIC.items()
        for name in names
        if not name.endswith("Dep") and not (getattr(importlib.import_module(module), name).__doc__ or "").strip()
    ]

    assert silent == []


def test_declaring_tasks_imports_neither_tables_nor_pydantic() -> None:
    """Importing the package, and declaring a task, maps no tables and imports no Pydantic: both take their time."""
    code = (
        "import sys, aftercommit\n"
        "from sqlalchemy.orm import Session\n"
        "db = aftercommit.Database('sqlite:///unused.db')\n"
        "@db.task\n"
        "def nothing(session: Session) -> None: ...\n"
        "print([name for name in ('pydantic', 'aftercommit.records.tables') if name in sys.modules])\n"
    )

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert said.strip() == "[]"
