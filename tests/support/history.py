"""The code of an earlier release, out of git, for tests that run it beside today's."""

import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

from tests.support.servers import ROOT

VERSION_1 = "18a3715ec2058da56d2e5a2b15be96d3d5b3e89f"
"""The last commit whose tables were of version 1."""

MISSING = (
    f"The commit {VERSION_1} is not in this copy of the repository (a shallow clone, or no git), so the tests that run "
    "its code beside today's are LEFT OUT. Its tables, and records in them, are a fixture, and those tests are run. "
    "Fetch the whole history (git fetch --unshallow) to see both."
)


def unpack(commit: str, into: Path) -> Path | None:
    """Unpack ``src`` of *commit*; return its path, or None where the commit is not there."""
    try:
        archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(into, filter="data")
    return into / "src"
