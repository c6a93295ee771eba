"""``make soak``: faults of every kind at random while an application works, and books that must balance.

The seed is printed first; the same seed gives the same schedule of faults and the same work, though not at the same
moments. Ends with status 1 at a finding, and prints the record and its history.
"""

import argparse
import os
import random
import sys

from benchmarks.soak.application import VARIANTS
from benchmarks.soak.kinds import KINDS
from benchmarks.soak.soak import Options, faults_of, soak

DRIVERS = ("psycopg", "asyncpg", "pysqlite", "aiosqlite", "psycopg+pgbouncer", "asyncpg+pgbouncer")


def main() -> int:
    """Soak every driver in turn."""
    names = sorted({name for driver in DRIVERS for part in faults_of(driver) for name in part})
    parser = argparse.ArgumentParser(
        prog='make soak ARGS="…"',
        description=__doc__,
        epilog=f"Faults: {', '.join(names)}. Work: {', '.join(KINDS)}.",
    )
    parser.add_argument(
        "--driver", action="append", choices=DRIVERS, help="several times for several; default: all four"
    )
    parser.add_argument("--seconds", type=float, default=45.0, help="of faults, for each driver; default: 45")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--only", action="append", metavar="FAULT", choices=names, help="these faults only")
    parser.add_argument("--work", action="append", metavar="KIND", choices=KINDS, help="requests of this kind only")
    parser.add_argument("--without", action="append", metavar="KIND", choices=KINDS, default=[], help="not these")
    parser.add_argument("--no-faults", action="store_true", help="the work alone")
    parser.add_argument("--broken", choices=VARIANTS, help="break the application, to see that it is found")
    given = parser.parse_args()
    if given.broken:
        os.environ["SOAK_BROKEN"] = given.broken
        print(f"broken on purpose: {VARIANTS[given.broken]}")
    print(f"seed {given.seed}", flush=True)
    is_right = True
    for driver in given.driver or DRIVERS[:4]:
        only = [] if given.no_faults else given.only
        work = [kind for kind in given.work or KINDS if kind not in given.without]
        options = Options(driver=driver, seconds=given.seconds, seed=given.seed, only=only, work=work)
        is_right &= soak(options)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
