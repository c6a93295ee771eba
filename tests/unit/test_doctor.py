"""What the doctor thinks of facts: pure judgement, without a database."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftercommit import Database
from aftercommit.cli.doctor.findings import Finding, Level, ago
from aftercommit.cli.doctor.reaching import unreachable
from aftercommit.cli.doctor.server import Clock, check_clock, check_server
from aftercommit.cli.doctor.setup import check_packages, file_of, installed, network_file_system
from aftercommit.cli.doctor.vanishing import check_vanishing, locked_for
from aftercommit.cli.doctor.work import Census, check_work
from aftercommit.pools.budget import Limits
from aftercommit.pools.urls import flavours
from aftercommit.records.backends import Reach
from aftercommit.records.census import Failures, Kept, Queue, Tuples, Worker
from aftercommit.records.server import Server

SERVER = Server(
    version="18.4",
    number=180004,
    role="shop",
    database="shop",
    is_replica=False,
    oldest_transaction=0.0,
    settings={"default_transaction_isolation": "read committed", "synchronous_commit": "on"},
    limits=Limits(max_connections=100, reserved=3),
)
CENSUS = Census(
    workers=[
        Worker(host="one", pid=1, seen=1.0, pools=frozenset({"default"}), names=frozenset({"quick", "slow"}), running=0)
    ],
    queues=[],
    paused=[],
    held_by_nobody=0,
    failures=[],
    kept=Kept(number=0, oldest=0.0),
    tuples=Tuples(live=0, dead=0),
    silent_after=30.0,
    keep=7 * 24 * 3600.0,
    names={"quick", "slow"},
    pools={"default"},
    declared={"request", "default"},
    where="shop:db",
)


@pytest.fixture
def tasks() -> list[Any]:
    """One task with a time limit of a minute, and one without."""
    db = Database("postgresql://localhost/shop")

    @db.task(timeout=60)
    def quick() -> None: ...

    @db.task
    def slow() -> None: ...

    return [quick, slow]


def bad(findings: list[Finding]) -> list[Finding]:
    """What is not as it should be."""
    return [each for each in findings if each.level in (Level.WARNING, Level.WRONG)]


def settings(**given: str) -> Server:
    """The healthy server with other settings."""
    return dataclasses.replace(SERVER, settings={**SERVER.settings, **given})


def test_a_healthy_server_is_only_described(tasks: list[Any]):
    """There is one line about it, and that is in order."""
    (found,) = check_server(SERVER, tasks)

    assert found.level is Level.OK
    assert "18.4" in found.found


@pytest.mark.parametrize(
    ("server", "level", "found", "remedy"),
    [
        (dataclasses.replace(SERVER, number=130001, version="13.1"), Level.WRONG, "13.1 is too old", ""),
        (dataclasses.replace(SERVER, is_replica=True), Level.WRONG, "is a replica", "primary"),
        (settings(default_transaction_read_only="on"), Level.WRONG, "read_only is on", "ALTER DATABASE shop SET"),
        (dataclasses.replace(SERVER, oldest_transaction=7300.0), Level.WARNING, "open for 2 h", "pg_terminate_backend"),
        (settings(default_transaction_isolation="serializable"), Level.WARNING, "'serializable'", "'read committed'"),
        (settings(synchronous_commit="off"), Level.NOTE, "synchronous_commit is off", "synchronous_commit = on"),
        (settings(statement_timeout="5000"), Level.NOTE, "statement_timeout is 5 s, and holds for", "timeout="),
        (settings(idle_in_transaction_session_timeout="5000"), Level.NOTE, "without a timeout: slow", "timeout="),
        (settings(transaction_timeout="90000"), Level.WARNING, "90 s, and these tasks may take longer: slow", "= 0"),
        (settings(transaction_timeout="30000"), Level.WARNING, "longer: quick, slow", "timeout=30"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_server_is_found(server: Server, level: Level, found: str, remedy: str, tasks: list[Any]):
    """Each by itself, at its own level, and with what to type."""
    _described, *others = check_server(server, tasks)

    (finding,) = others
    assert finding.level is level
    assert found in finding.found
    assert finding.why
    assert remedy in "\n".join(finding.remedy)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("configuration file", 'ALTER DATABASE "my-shop" SET synchronous_commit = on;'),
        ("database", 'ALTER DATABASE "my-shop" SET synchronous_commit = on;'),
        ("user", 'ALTER ROLE "user" SET synchronous_commit = on;'),
        ("database user", 'ALTER ROLE "user" IN DATABASE "my-shop" SET synchronous_commit = on;'),
        ("client", "Database(…)    # without synchronous_commit in the URL, or in connect_args"),
    ],
)
def test_a_setting_is_changed_where_it_was_made(source: str, line: str):
    """A role's wins over its database's; names are written as the server reads them."""
    server = dataclasses.replace(
        settings(synchronous_commit="off"), database="my-shop", role="user", sources={"synchronous_commit": source}
    )

    _described, finding = check_server(server, [])

    assert finding.remedy == (line,)


def test_a_time_limit_of_a_tasks_own_takes_the_servers_place():
    """Where every task has one, the server's limits of statements and of idleness are no news."""
    db = Database("postgresql://localhost/shop")

    @db.task(timeout=60)
    def quick() -> None: ...

    limited = settings(
        statement_timeout="5000", idle_in_transaction_session_timeout="5000", transaction_timeout="60000"
    )

    assert [each.level for each in check_server(limited, [quick])] == [Level.OK]


@given(st.floats(-100, 100), st.floats(0, 10), st.floats(0, 1))
def test_a_slow_answer_is_no_skew(ahead: float, round_trip: float, part: float):
    """A clock that is right is never accused, whenever within the round trip it was read; one far off always is."""
    looks = [Clock(before=1000.0, there=1000.0 + part * round_trip + ahead, after=1000.0 + round_trip)]

    found = check_clock(looks)

    if abs(ahead) < 0.99:
        assert found.level is Level.OK
    if abs(ahead) > 1.01 + round_trip:
        assert found.level is Level.WARNING
        assert ("ahead of" if ahead > 0 else "behind") in found.found


def test_the_quickest_look_at_the_clock_counts():
    """One slow answer among quick ones neither accuses nor excuses."""
    slow, quick = Clock(before=0.0, there=9.0, after=9.0), Clock(before=20.0, there=25.0, after=20.1)

    assert "4.9 s ahead" in check_clock([slow, quick]).found or "5.0 s ahead" in check_clock([slow, quick]).found


def test_packages_that_are_too_old_are_found():
    """With the line that mends it; what is absent may be absent."""
    old, scopes = check_packages(
        {"sqlalchemy": ("2.0.39", "2.0.40"), "fastapi": ("0.121.0", "0.121"), "asyncpg": (None, "0.30")}
    )

    assert (old.level, old.remedy) == (Level.WRONG, ("pip install 'sqlalchemy>=2.0.40'",))
    assert scopes.level is Level.WARNING
    assert "0.121.1" in scopes.remedy[0]


@pytest.mark.parametrize("version", ["2.0.40", "2.0.40rc1", "2.1", "2.10.0b2", "3"])
def test_packages_that_will_do_are_in_order(version: str):
    """Numbers are compared as numbers."""
    (found,) = check_packages({"sqlalchemy": (version, "2.0.40")})

    assert found.level is Level.OK


def test_our_own_metadata_say_what_is_needed():
    """What is compared comes from the package itself, so that it cannot say anything else than pip."""
    found = installed()

    assert found.keys() >= {"sqlalchemy", "pydantic", "fastapi", "psycopg", "asyncpg", "aiosqlite"}
    assert all(version and oldest for version, oldest in found.values())


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/srv/data/app", "nfs4"), ("/srv/database", None), ("/srv", None), ("/mnt/a b", "cifs"), ("/", None)],
)
def test_network_file_systems_are_told_by_the_closest_mount(folder: str, kind: str | None):
    """The longest place that the folder lies in decides, whole names only."""
    mounts = (
        "/dev/sda1 / ext4 rw 0 0\nhost:/x /srv/data nfs4 rw 0 0\n//nas/y /mnt/a\\040b cifs rw 0 0\n"
        "tmpfs /srv/data/scratch tmpfs rw 0 0\nbroken line\n"
    )

    assert network_file_system(Path(folder), mounts) == kind
    assert network_file_system(Path("/srv/data/scratch/x"), mounts) is None


@pytest.mark.parametrize("url", ["sqlite:///shop.db", "sqlite:///file:shop.db?mode=ro&uri=true"])
def test_the_file_of_a_url_is_found(url: str):
    """Written as a path, or as SQLite's own URI."""
    assert file_of(flavours(url).given) == Path("shop.db")


def test_healthy_work_is_in_order():
    """A live worker and nothing that waits: nothing to say."""
    assert {each.level for each in check_work(CENSUS)} == {Level.OK}


@pytest.mark.parametrize(
    ("changes", "check", "found", "remedy"),
    [
        ({"tuples": Tuples(live=100_000, dead=40_000)}, "bloat", "40000 dead rows beside 100000", "VACUUM"),
        ({"kept": Kept(number=9, oldest=9 * 86400.0)}, "records", "for 9 days, though keep_finished is 7 days", "keep"),
        ({"failures": [Failures(task=f"t{n}", failed=n, error="E") for n in range(8)]}, "failures", "3 more", "list"),
    ],
)  # fmt: skip
def test_what_grows_is_noticed(changes: dict[str, Any], check: str, found: str, remedy: str):
    """Dead rows, records that nobody clears away, many names that fail."""
    findings = bad(check_work(dataclasses.replace(CENSUS, **changes)))

    assert {each.check for each in findings} == {check}
    assert found in findings[-1].found
    assert remedy in findings[-1].remedy[0]


def test_ordinary_dead_rows_are_no_news():
    """Autovacuum begins when a fiftieth of the rows is dead; only ten times as many are worth a word."""
    ordinary = dataclasses.replace(CENSUS, tuples=Tuples(live=100_000, dead=25_000))

    assert bad(check_work(ordinary)) == []


def test_for_ever_is_said_once():
    """Records that are never cleared away are a note, with the statement that does it."""
    (found,) = [each for each in check_work(dataclasses.replace(CENSUS, keep=None)) if each.level is not Level.OK]

    assert found.level is Level.NOTE
    assert found.remedy[0].startswith("DELETE")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (7200.0, "2 h"), (200_000.0, "2 days")]
)
def test_times_are_for_people(seconds: float, text: str):
    """In the largest unit of which there are two."""
    assert ago(seconds) == text


def test_a_password_in_the_drivers_words_is_left_out():
    """Some drivers repeat what they were given."""
    pools = Database("postgresql://joe:tops3cret@db.example/shop").sessions.pools

    found = unreachable(pools, OSError("cannot connect with\n  password=tops3cret  host=db.example"))

    assert "password=*** host=db.example" in found.found
    assert "tops3cret" not in repr(found)


@pytest.mark.parametrize(
    ("url", "error", "line"),
    [
        ("postgresql://joe@db:5433/shop", OSError("refused"), "pg_isready -h db -p 5433 -d shop"),
        ("postgresql://joe@db/my shop", OSError("refused"), "pg_isready -h db -d 'my shop'"),
        ("postgresql://joe@/shop?host=/run/pg&port=5433", OSError("refused"), "pg_isready -h /run/pg -p 5433 -d shop"),
        ("postgresql://joe@/shop?host=a&host=b", OSError("refused"), "pg_isready -h a,b -d shop"),
        ("postgresql:///shop", OSError("refused"), "pg_isready -d shop"),
        ("postgresql://joe@db/shop", OSError('FATAL: database "shop" does not exist'), "psql -h db -U joe -d shop"),
    ],
)
def test_what_to_type_goes_the_way_of_the_url(url: str, error: OSError, line: str):
    """With the host and port that it names, wherever it does; whether the server is there is no news if it refuses."""
    found = unreachable(Database(url).sessions.pools, error)

    assert found.remedy == (line,)


def test_names_are_written_as_the_shell_reads_them():
    """A task and a pool may be called anything."""
    worker = dataclasses.replace(CENSUS.workers[0], names=frozenset())
    queue = Queue(pool="my files", task="send mail", queued=1, due=1, oldest=300.0)
    census = dataclasses.replace(CENSUS, workers=[worker], queues=[queue], paused=["my files"])

    typed = [line for each in bad(check_work(census)) for line in each.remedy]

    assert "aftercommit pools resume 'my files' --db shop:db" in typed
    assert any("aftercommit tasks cancel --db shop:db --state queued --task 'send mail'  " in each for each in typed)


KEEPALIVES = {"tcp_keepalives_idle": "7200", "tcp_keepalives_interval": "75", "tcp_keepalives_count": "9"}


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({}, float("inf")),
        (KEEPALIVES, 7875),
        ({**KEEPALIVES, "tcp_keepalives_idle": "30", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3"}, 60),
        ({**KEEPALIVES, "tcp_keepalives_idle": "60", "tcp_user_timeout": "90000"}, 135),
        ({**KEEPALIVES, "tcp_keepalives_idle": "30", "tcp_user_timeout": "600000"}, 600),
        ({**KEEPALIVES, "idle_in_transaction_session_timeout": "45000"}, 45),
    ],
)
def test_how_long_a_vanished_client_keeps_its_locks(given: dict[str, str], seconds: float):
    """By whichever of the server's settings ends it first."""
    assert locked_for(settings(**given))[0] == seconds


@pytest.mark.parametrize(
    ("given", "reach", "found"),
    [
        (KEEPALIVES, Reach(unlisted=0, roles=[], is_remote=True), None),
        (KEEPALIVES, Reach(unlisted=3, roles=[], is_remote=False), None),
        (KEEPALIVES, Reach(unlisted=3, roles=[], is_remote=True), "up to 7875 s"),
        ({}, Reach(unlisted=3, roles=[], is_remote=True), "for ever"),
        ({**KEEPALIVES, "tcp_keepalives_idle": "30"}, Reach(unlisted=3, roles=["web"], is_remote=True), "up to 705 s"),
        ({"idle_in_transaction_session_timeout": "60000"}, Reach(unlisted=3, roles=["web"], is_remote=True), None),
    ],
)
def test_locks_that_stay_are_found_only_where_nobody_ends_them(given: dict[str, str], reach: Reach, found: str | None):
    """With the number of seconds, and what to type."""
    findings = list(check_vanishing(settings(**given), reach))

    assert [each.level for each in findings] == ([] if found is None else [Level.WARNING])
    for each in findings:
        assert found is not None
        assert found in each.found
        assert "ALTER DATABASE shop SET tcp_keepalives_idle = 30;" in each.remedy
