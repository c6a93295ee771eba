"""Find PgBouncer for the tests that go through a real one; they are an extra, where it happens to be installed."""

import os
import shutil

MISSING = (
    "PgBouncer is missing, so the tests that go through a real one are LEFT OUT. The test of the server's log, in the "
    "same file, holds what we promise without it. Install it (Debian: apt-get install pgbouncer) to see both."
)


def find() -> str | None:
    """Return the path of PgBouncer, or None."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
