"""Let processes with and without ``import aftercommit`` take turns, and print what a plain session takes in each.

``python -m benchmarks.plain``
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import Final

_CHILD: Final = """
import sys, time
if sys.argv[1] == "with":
    import aftercommit, aftercommit.fastapi
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

engine = create_engine("sqlite://")

def once():
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        with session.begin_nested():
            session.execute(text("SELECT 1"))
        session.commit()

for _ in range(500):
    once()
best = []
for _ in range(int(sys.argv[2])):
    since = time.process_time()
    for _ in range(200):
        once()
    best.append((time.process_time() - since) / 200)
print(min(best) * 1e6)
"""


def main() -> None:
    """Measure, and print a line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plain", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="processes of each kind")
    parser.add_argument(
        "--stretches", type=int, default=20, help="stretches of 200 sessions in each, of which the best counts"
    )
    options = parser.parse_args()
    taken: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(options.rounds):
        for kind, figures in taken.items():
            command = [sys.executable, "-c", _CHILD, kind, str(options.stretches)]
            figures.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    without, with_it = (statistics.median(taken[kind]) for kind in ("without", "with"))
    ratios = sorted(b / a for a, b in zip(taken["without"], taken["with"], strict=True))
    print(f"without: {without:.1f} µs   with: {with_it:.1f} µs   ratio {with_it / without:.3f}", end="   ")
    print(f"(of the rounds: {ratios[0]:.3f} – {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
