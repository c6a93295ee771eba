"""Print how fast ``aftercommit-check`` is, cold and warm, and how much memory it takes.

    python benchmarks/checker/speed.py TREE [--jobs 2] [--lines 1000000]

Without ``--lines`` the tree is checked as it is; with it, the tree is copied side by side until it has that many lines.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aftercommit_check.sources.files import find_sources


def main() -> int:
    """Run the command twice and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tree", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--lines", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = options.tree
        if options.lines:
            tree = copies(options.tree, Path(folder) / "tree", options.lines)
        lines = count(tree)
        command = [sys.executable, "-m", "aftercommit_check", str(tree), "--format", "json", "-q", "--exit-zero",
                   "--jobs", str(options.jobs), "--cache-dir", str(Path(folder) / "cache")]  # fmt: skip
        for name in ("cold", "warm"):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            began = time.perf_counter()
            peak = run(command)
            seconds = time.perf_counter() - began
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(
                f"{name}: {lines:,} lines in {seconds:.2f} s ({lines / seconds:,.0f} lines/s; {cpu:.2f} s of CPU), "
                f"{peak / 1024:.0f} MB in all processes at the peak; load {os.getloadavg()[0]:.1f}"
            )
    return 0


def copies(source: Path, target: Path, lines: int) -> Path:
    """Copy *source* next to itself until there are *lines* lines."""
    step = count(source)
    for number in range(max(1, -(-lines // step))):
        shutil.copytree(source, target / f"part{number}", ignore=shutil.ignore_patterns(".git"), symlinks=True)
    return target


def count(tree: Path) -> int:
    """Return how many lines of Python are in *tree*."""
    return sum(Path(path).read_bytes().count(b"\n") for path in find_sources([str(tree)]))


def run(command: list[str]) -> int:
    """Run *command* and return its peak memory with all children, in kB (sampled, shared pages counted once each)."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, family(process.pid))
        time.sleep(0.05)
    return peak


def family(pid: int) -> int:
    """Return the memory of *pid* and its children in kB (proportional set size, where the system tells)."""
    pids = [pid]
    try:
        tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        pids += [int(child) for child in tasks.split()]
    except OSError:
        pass
    total = 0
    for one in pids:
        try:
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total


if __name__ == "__main__":
    sys.exit(main())
