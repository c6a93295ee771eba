"""``make soak``: worker processes that die, freeze and lose their connections at random, while requests go on.

At the end every committed request has taken effect exactly once, or this ends with status 1. The seed is printed
first; the same seed gives the same blows, though not at the same moments.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, suppress

import psycopg
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import Retry, TaskRecord
from tests.crash.child import make, request
from tests.support.databases import DatabaseUnderTest
from tests.support.postgres import PostgresServer
from tests.support.processes import spawn
from tests.support.servers import ROOT
from tests.support.workshop import Counter, Effect

PATIENT = Retry(attempts=1_000_000, base=0.05, cap=0.5)


def serve(url: str, driver: str) -> None:
    """Run tasks until killed."""
    shop = make(url, driver, retry=PATIENT)
    with shop.running():
        while True:
            time.sleep(3600)


def soak(driver: str, seconds: float, rng: random.Random) -> bool:
    """Strike at random for *seconds*; tell whether everything came out right."""
    with ExitStack() as stack:
        if "sqlite" in driver:
            url = f"sqlite+{driver}:///{stack.enter_context(tempfile.TemporaryDirectory())}/soak.db"
        else:
            server = stack.enter_context(PostgresServer())
            url = server.url(stack.enter_context(server.database()), driver=driver)
        under_test = DatabaseUnderTest(url=url, driver=driver)
        shop = make(under_test.sync_url, "pysqlite" if "sqlite" in driver else "psycopg", retry=PATIENT)
        stack.callback(shop.close)
        shop.db.create_tables()
        command = [sys.executable, "-m", "benchmarks.soak", "--serve", url, "--driver", driver]
        start = lambda: spawn(command, cwd=ROOT, env=dict(os.environ))  # noqa: E731  # three uses, one line
        workers = [start() for _ in range(3)]
        blows, asked, until = 0, 0, time.monotonic() + seconds
        while time.monotonic() < until:
            for _ in range(rng.randint(1, 20)):
                asked += 1
                with suppress(Exception):
                    request(shop, str(asked))
            number = rng.randrange(len(workers))
            blow = rng.choice(["kill", "stop", "freeze", "terminate", "nothing"])
            blows += blow != "nothing"
            if blow == "kill":
                workers[number].kill()
            elif blow == "stop":
                workers[number].terminate()
            elif blow == "freeze":
                workers[number].send_signal(signal.SIGSTOP)
                time.sleep(rng.uniform(0.5, 2.5))
                workers[number].send_signal(signal.SIGCONT)
            elif blow == "terminate" and "sqlite" not in driver:
                with psycopg.connect(url.replace(f"+{driver}", ""), autocommit=True) as admin:
                    admin.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                        "AND datname = current_database() AND random() < 0.5"
                    )
            if workers[number].poll() is not None or blow in ("kill", "stop"):
                workers[number].wait()
                workers[number] = start()
            time.sleep(rng.uniform(0.0, 0.5))
        shop.outside.dispose()
        with shop.running():
            shop.db.drain(120.0)
        for worker in workers:
            worker.kill()
        with Session(shop.outside) as session:
            requests = sorted(str(each) for each in session.scalars(sa.select(Counter.id)))
            effects = sorted(session.scalars(sa.select(Effect.label)))
            states = set(session.scalars(sa.select(TaskRecord.state)))
        is_right = requests == effects and states <= {"succeeded"}
        print(f"{driver}: {asked} requests, {len(requests)} committed, {len(effects)} effects, {blows} blows, "
              f"states {sorted(states)}: {'exactly once' if is_right else 'WRONG'}", flush=True)  # fmt: skip
        return is_right


def main() -> int:
    """Soak every driver in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each driver")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--driver", action="append", choices=["psycopg", "asyncpg", "pysqlite", "aiosqlite"])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    drivers = arguments.driver or ["psycopg", "asyncpg", "pysqlite", "aiosqlite"]
    if arguments.serve:
        serve(arguments.serve, drivers[0])
    print(f"seed {arguments.seed}", flush=True)
    right = [soak(each, arguments.seconds, random.Random(arguments.seed)) for each in drivers]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
