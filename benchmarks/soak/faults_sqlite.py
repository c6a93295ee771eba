"""What happens to an SQLite file: foreign locks, a full disk, VACUUM, checkpoints, schema changes."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from random import Random
from sqlite3 import Error

from benchmarks.soak.stage import Stage

OURS_AND_THEIRS = ("aftercommit_task", "effect", "counter", "key_row")


def long_write(stage: Stage, rng: Random) -> None:
    """Another program holds the write lock."""
    _hold(stage, "BEGIN IMMEDIATE", rng.uniform(0.3, 8.0))


def exclusive(stage: Stage, rng: Random) -> None:
    """Another program lets nobody write, and in other journal modes nobody read."""
    _hold(stage, "BEGIN EXCLUSIVE", rng.uniform(0.3, 3.0))


def long_read(stage: Stage, rng: Random) -> None:
    """Another program reads for long, so that the log grows."""
    _hold(stage, "BEGIN", rng.uniform(0.5, 4.0), then="SELECT count(*) FROM effect")


def full_disk(stage: Stage, rng: Random) -> None:
    """The disk is full, if the file is on one of its own."""
    directory = stage.path.parent
    if not os.path.ismount(directory):
        return
    ballast = directory / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while shutil.disk_usage(directory).free:
            file.write(bytes(min(1 << 20, shutil.disk_usage(directory).free)))
    time.sleep(rng.uniform(0.5, 3.0))
    ballast.unlink()


def read_only(stage: Stage, rng: Random) -> None:
    """The file may not be written, which stops everybody but root."""
    stage.path.chmod(0o444)
    time.sleep(rng.uniform(0.3, 2.0))
    stage.path.chmod(0o644)


def vacuum(stage: Stage, _rng: Random) -> None:
    """VACUUM."""
    _run(stage, "VACUUM")


def checkpoint(stage: Stage, _rng: Random) -> None:
    """The log is written back and cut to nothing."""
    _run(stage, "PRAGMA wal_checkpoint(TRUNCATE)")


def add_column(stage: Stage, rng: Random) -> None:
    """A migration adds a column, to a table of the application's or of ours."""
    _run(stage, f"ALTER TABLE {rng.choice(OURS_AND_THEIRS)} ADD COLUMN added_{time.monotonic_ns()} INTEGER")


def reindex(stage: Stage, rng: Random) -> None:
    """Indexes are made anew."""
    _run(stage, f"REINDEX {rng.choice(OURS_AND_THEIRS)}")


def _hold(stage: Stage, begin: str, seconds: float, *, then: str = "SELECT 1") -> None:
    with closing(stage.sqlite()) as connection, suppress(Error):
        connection.execute(begin)
        connection.execute(then).fetchall()
        time.sleep(seconds)
        connection.execute("ROLLBACK")


def _run(stage: Stage, statement: str) -> None:
    # Whoever finds the file locked tries no harder than others do.
    with closing(stage.sqlite()) as connection, suppress(Error):
        connection.execute(statement)


FAULTS: Mapping[str, Callable[[Stage, Random], None]] = {
    "long write": long_write,
    "exclusive lock": exclusive,
    "long read": long_read,
    "full disk": full_disk,
    "read-only file": read_only,
    "vacuum": vacuum,
    "checkpoint": checkpoint,
    "add column": add_column,
    "reindex": reindex,
}
