"""Fixtures for all tests: real databases, real servers, a real browser."""

import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests.support import chromium as browser
from tests.support import history, pgbouncer
from tests.support.databases import DRIVERS, DatabaseUnderTest
from tests.support.postgres import PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One real PostgreSQL for all tests, started by the first that needs it."""
    # A server in a time zone that nobody expects: times must be right all the same.
    with PostgresServer({"timezone": "Asia/Kathmandu"}) as server:
        yield server


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DatabaseUnderTest]:
    """An empty database of the test's own, on each driver in turn (or those of ``@pytest.mark.drivers``)."""
    driver: str = request.param
    if driver in {"pysqlite", "aiosqlite"}:
        path = tmp_path / "test.db"
        yield DatabaseUnderTest(url=f"sqlite+{driver}:///{path}", driver=driver, path=path)
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    with server.database() as name:
        yield DatabaseUnderTest(
            url=server.url(name, driver=driver), driver=driver, server_url=server.url("postgres", driver="psycopg")
        )


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """The URL (psycopg) of an empty PostgreSQL database of the test's own."""
    with postgres.database() as name:
        yield postgres.url(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL (pysqlite) of an SQLite file of the test's own, not yet there."""
    return f"sqlite+pysqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run `async def` tests on asyncio: SQLAlchemy knows no other."""
    return "asyncio"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium that can be started; where there is none, the test is left out, loudly."""
    path = browser.find()
    if path is None:
        pytest.skip(browser.MISSING)
    return path


def pytest_configure() -> None:
    """Let SIGTERM (a time limit of CI) end the tests as Ctrl+C does: fixtures stop what they started."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("SIGTERM")

    signal.signal(signal.SIGTERM, interrupt)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that uses ``database`` once for each driver."""
    if "database" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("drivers")
        metafunc.parametrize("database", marker.args if marker else DRIVERS, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI nothing may be left out: there, a skipped test is a failed one."""
    report = yield
    # What a test has logged may be no text that can be written, and goes to another process where tests run in several.
    report.sections = [(name, said.encode("utf-8", "backslashreplace").decode()) for name, said in report.sections]
    if report.skipped and not hasattr(report, "wasxfail") and browser.is_ci():
        report.outcome = "failed"
        report.longrepr = f"left out, and CI=true allows that to no test: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly that the browser tests, or those through a real PgBouncer, were left out."""
    skipped = terminalreporter.stats.get("skipped", [])
    if any(browser.MISSING in str(report.longrepr) for report in skipped):
        terminalreporter.write_sep("!", "browser tests left out", red=True, bold=True)
        terminalreporter.write_line(browser.MISSING, red=True)
    if any(history.MISSING in str(report.longrepr) for report in skipped):
        terminalreporter.write_sep("!", "tests with the code of an earlier release left out", red=True, bold=True)
        terminalreporter.write_line(history.MISSING, red=True)
    ran = (report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, []))
    if pgbouncer.find() is None and any("contract/test_pooler.py" in report.nodeid for report in ran):
        terminalreporter.write_sep("!", "tests through PgBouncer left out", red=True, bold=True)
        terminalreporter.write_line(pgbouncer.MISSING, red=True)
