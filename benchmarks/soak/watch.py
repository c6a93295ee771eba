"""What must not even happen for a while: the library's bookkeeping, waiting for somebody's lock."""

import threading
import time
from contextlib import suppress
from typing import Self

import psycopg

from benchmarks.soak.books import Finding
from benchmarks.soak.stage import Stage

PATIENCE = 3.0
"""Seconds: the contract says one for a lock; a loaded machine, and what a thawed server has to catch up, the rest."""
_WAITS = (
    "SELECT pid, extract(epoch FROM clock_timestamp() - query_start), left(query, 200) FROM pg_stat_activity "
    "WHERE application_name = 'aftercommit:aftercommit' AND state = 'active' AND wait_event_type = 'Lock' "
    "AND query_start < clock_timestamp() - %s * interval '1 second'"
)


class Watch:
    """Looks at the server for the length of a ``with``.

    Attributes:
        findings: What it saw.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._over = threading.Event()
        self._seen: set[int] = set()
        self.findings: list[Finding] = []
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Self:
        if not self._stage.is_sqlite:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            with suppress(psycopg.Error, OSError):
                self.findings += self._look()

    def _look(self) -> list[Finding]:
        since = time.monotonic() - self._stage.thawed
        if since < 2 * PATIENCE:
            return []
        with self._stage.admin() as admin:
            rows = admin.execute(_WAITS, (PATIENCE,)).fetchall()
        fresh = [row for row in rows if row[0] not in self._seen]
        self._seen.update(row[0] for row in fresh)
        return [Finding(f"bookkeeping waits for a lock, for {seconds:.1f} s: {query}") for _, seconds, query in fresh]
