"""The demo as a visitor meets it: a real browser, a real server, real files."""

import csv
import io
import os
import re
import signal
import socket
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from tests.support.processes import Log, spawn
from tests.support.servers import ROOT, Server

DEMO = ROOT / "examples" / "orders"
SAMPLE = DEMO / "static" / "sample.csv"
COLUMNS = "order,ordered_on,customer,product,quantity,unit_price\n"
PATIENCE = 120_000  # milliseconds; two cores may be shared by many tests
expect.set_options(timeout=PATIENCE)


@dataclass
class Totals:
    """What a file holds, added up without any of the demo's code."""

    orders: int = 0
    bad_lines: int = 0
    revenue: Decimal = Decimal(0)
    inventory: Counter[str] = field(default_factory=Counter)
    customers: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, text: str) -> "Totals":
        """Add up *text*; its mistakes are those of the sample."""
        totals = cls()
        for row in csv.DictReader(io.StringIO(text), restkey="more"):
            if "more" in row or not row["quantity"].isdigit() or row["ordered_on"] == "2026-02-30":
                totals.bad_lines += 1
                continue
            totals.orders += 1
            totals.inventory[row["product"]] += int(row["quantity"])
            totals.customers[row["customer"]] += 1
            totals.revenue += int(row["quantity"]) * Decimal(row["unit_price"])
        return totals

    @property
    def sentence(self) -> str:
        """How the list of files says it."""
        bad_lines = f" · {self.bad_lines:,} bad line{'s' if self.bad_lines != 1 else ''}" if self.bad_lines else ""
        return f"{self.orders:,} orders · €{self.revenue:,.2f}{bad_lines}"


def many_orders(count: int, name: str = "N") -> str:
    """Return a file with *count* lines, no two alike, one in a hundred bad, and a product that many want at once."""
    lines = (
        f"{name}-{n},2026-03-{n % 28 + 1:02},C-{n // 3 % 97},P-{n // 20 % 7},{'x' if n % 100 == 50 else n % 9 + 1},"
        f"{n % 50}.{n % 100:02}\n"
        for n in range(count)
    )
    return COLUMNS + "".join(lines)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """One headless Chromium for this file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of its own, on which no script may fail."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Server]:
    """The demo on SQLite, with a folder of the test's own."""
    with Server(DEMO / "main.py", env={"AFTERCOMMIT_DEMO_DIR": str(tmp_path)}) as server:
        yield server


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The demo's database, of either kind."""
    if request.param == "SQLite":
        return f"sqlite:///{tmp_path / 'orders.db'}"
    found: str = request.getfixturevalue("postgres_url")
    return found


@pytest.fixture
def demo_on(url: str, tmp_path: Path) -> Iterator[Server]:
    """The demo on the database at *url*."""
    env = {"AFTERCOMMIT_DEMO_DIR": str(tmp_path / "files"), "AFTERCOMMIT_DEMO_URL": url}
    with Server(DEMO / "main.py", env=env) as server:
        yield server


@contextmanager
def started_by_hand(folder: Path, port: int) -> Iterator[tuple[Log, str]]:
    """Run `python main.py` as `make demo` does; give what it prints and its address."""
    env = {**os.environ, "AFTERCOMMIT_DEMO_DIR": str(folder), "PORT": str(port)}
    process = spawn([sys.executable, str(DEMO / "main.py")], env=env, cwd=folder)
    assert process.stdout is not None
    log = Log(process.stdout)
    try:
        url = re.search(r"http://\S+", log.wait_for("open http://"))[0]  # type: ignore[index] # the line has one
        yield log, url
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.join()


def counted(url: str) -> Totals:
    """Read from the demo's database, from outside, what its handlers have made of the orders."""
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            orders, cents = connection.execute(text("SELECT count(*), coalesce(sum(cents), 0) FROM order_line")).one()
            bad_lines = connection.scalar(text("SELECT count(*) FROM bad_line"))
            products = connection.execute(text("SELECT code, 1000000 - inventory FROM product")).all()
            customers = connection.execute(text("SELECT code, orders FROM customer")).all()
    finally:
        engine.dispose()
    kept = Counter({code: int(count) for code, count in products}), Counter(dict(map(tuple, customers)))
    return Totals(orders, bad_lines or 0, Decimal(int(cents)) / 100, *kept)


@contextmanager
def standing_still(url: str, table: str, column: str) -> Iterator[None]:
    """Catch the demo in the middle: wait until *table* counts something, and keep everybody from writing meanwhile."""
    is_sqlite = "postgres" not in url
    # Not with SQLite's own patience: it sleeps between two looks, and the file would be done before it gets a turn.
    engine = create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"timeout": 0} if is_sqlite else {})
    lock = "BEGIN IMMEDIATE" if is_sqlite else f"BEGIN; LOCK TABLE {table} IN EXCLUSIVE MODE"
    with engine.connect() as connection:
        while not connection.scalar(text(f"SELECT coalesce(sum({column}), 0) FROM {table}")):
            pass
        while True:
            try:
                connection.exec_driver_sql(lock)
            except OperationalError:
                continue
            break
        yield
        connection.exec_driver_sql("ROLLBACK")
    engine.dispose()


def choose(page: Page, *files: tuple[str, bytes | Path]) -> None:
    """Upload *files* as a visitor does; large ones are given as a path."""
    paths = [content for _, content in files if isinstance(content, Path)]
    made = [{"name": name, "mimeType": "text/csv", "buffer": c} for name, c in files if isinstance(c, bytes)]
    page.get_by_label("CSV files").set_input_files(paths or made)
    with page.expect_navigation():
        page.get_by_role("button", name="Upload", exact=True).click()


def card(page: Page, name: str) -> Locator:
    """The newest entry of the file called *name*."""
    return page.locator("article").filter(has=page.get_by_role("link", name=name, exact=True)).first


def expect_completed(page: Page, name: str, totals: Totals) -> None:
    """Wait, without reloading the page, until the file is completed, and hold its numbers against *totals*."""
    expect(card(page, name).locator(".status")).to_have_text("completed")
    expect(card(page, name)).to_contain_text(totals.sentence)


def expect_settled(page: Page, orders: int) -> None:
    """Wait, without reloading the page, until both handlers have handled each order."""
    expect(page.locator("#totals")).to_contain_text(f"✓ Settled: {orders:,} orders")
    rows = table(page, "Totals")
    assert rows["files"] == rows["products"] == rows["customers"]


def table(page: Page, caption: str) -> dict[str, list[str]]:
    """Read a table of the page: the cells of each row by its first."""
    rows = page.locator("table", has=page.locator("caption", has_text=caption)).locator("tbody tr").all()
    cells = [row.locator("th, td").all_text_contents() for row in rows]
    return {first: rest for first, *rest in cells}


def numbers(page: Page, caption: str, column: int) -> dict[str, int]:
    """Read a column of a table by the first."""
    return {code: int(cells[column].replace(",", "")) for code, cells in table(page, caption).items()}


def test_sample_is_settled_with_its_totals(demo_on: Server, url: str, page: Page):
    """The sample is downloaded and uploaded: bad lines with reasons, inventory and statistics equal to the file's."""
    page.goto(demo_on.url)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download a sample").click()
    content = Path(download.value.path()).read_bytes()
    totals = Totals.of(content.decode())

    choose(page, ("orders.csv", content))

    expect_completed(page, "orders.csv", totals)
    expect_settled(page, totals.orders)
    page.get_by_role("link", name="orders.csv").click()
    expect(page.get_by_text("✓ 420 lines read = 417 orders + 3 bad lines")).to_be_visible()
    bad_lines = table(page, "Bad lines")
    page.goto(f"{demo_on.url}/products")
    units = numbers(page, "Inventory", 1)
    page.goto(f"{demo_on.url}/customers")
    orders = numbers(page, "Statistics", 0)
    assert content == SAMPLE.read_bytes()
    assert (totals.orders, totals.bad_lines) == (417, 3)
    assert sorted(bad_lines) == ["192", "339", "58"]
    assert "2026-02-30" in bad_lines["58"][0]
    assert "two" in bad_lines["192"][0]
    assert "7 cells instead of 6" in bad_lines["339"][0]
    assert (units, orders) == (totals.inventory, totals.customers)
    assert counted(url) == totals


def test_bad_lines_are_downloaded_with_their_reasons(demo: Server, page: Page):
    """More bad lines than the page shows are all in the download, as they stood in the file."""
    bad = "".join(f'B-{n},2026-01-02,"C ""{n}""",P-1,-{n},1.00\n' for n in range(1, 251))
    page.goto(demo.url)
    choose(page, ("bad.csv", (COLUMNS + "A-1,2026-01-02,C-1,P-1,1,1.00\n\n" + bad).encode()))
    expect(card(page, "bad.csv")).to_contain_text("1 order · €1.00 · 250 bad lines")
    page.get_by_role("link", name="bad.csv").click()

    with page.expect_download() as download:
        page.get_by_role("link", name="Download all as CSV").click()

    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    expect(page.locator(".bad tbody tr")).to_have_count(100)
    assert [int(row["line"]) for row in rows] == list(range(4, 254))
    assert [row["text"] + "\n" for row in rows] == bad.splitlines(keepends=True)
    assert all("greater than or equal to 1" in row["reason"] for row in rows)


def test_progress_of_a_large_file_is_seen_live(demo: Server, page: Page):
    """While a large file is processed, a bar grows on the page, with its pace; nobody reloads it."""
    page.goto(demo.url)

    with page.expect_navigation():
        page.get_by_role("button", name="8,400 lines").click()

    bar = page.get_by_role("progressbar")
    expect(bar).to_be_visible()
    page.wait_for_function("document.querySelector('progress')?.value > 0")
    seen = float(bar.get_attribute("value") or 0)
    page.wait_for_function("seen => (document.querySelector('progress')?.value ?? 0) > seen", arg=seen)
    expect(page.locator(".pace")).to_have_text(re.compile(r"[\d,]+\slines/s · \d+\s(s|min)\sleft"))
    expect(page.locator(".verdict")).to_contain_text("events still to be handled")
    assert bar.get_attribute("max") == "8400"


BAD = {
    "columns.csv": (b"id,name\n1,tea\n", "must name the columns order, ordered_on, .* It reads: id,name"),
    "semicolons.csv": (COLUMNS.replace(",", ";").encode() + b"1;2\n", "must name the columns"),
    "prose.csv": (b"Dear all,\nplease find the orders below.\n", "must name the columns"),
    "utf16.csv": (COLUMNS.encode("utf-16"), "Line 1 is not text in UTF-8"),
    "workbook.csv": (b"PK\x03\x04\x14\x00\x06\x00" + bytes(range(256)) * 8, "Line 1 is not text in UTF-8"),
    "endless.csv": (b"x" * 100_000, "Line 1 is longer than 10,000 bytes"),
    "empty.csv": (b"", "no order in this file"),
    "header-only.csv": (COLUMNS.encode() + b"\n,,,,,\n", "no order in this file"),
}


def test_bad_files_say_what_is_wrong_and_touch_nothing_else(demo: Server, page: Page):
    """Whatever a file is, it fails with a reason that a person understands, and the good one beside it is completed."""
    page.goto(demo.url)

    choose(page, ("good.csv", SAMPLE.read_bytes()), *((name, content) for name, (content, _) in BAD.items()))

    expect_completed(page, "good.csv", Totals.of(SAMPLE.read_text()))
    for name, (_, reason) in BAD.items():
        expect(card(page, name).locator(".status")).to_have_text("failed")
        expect(card(page, name).locator(".reason")).to_have_text(re.compile(reason))
    expect_settled(page, 417)


BAD_LINES = {
    b"A-1,2026-01-02,C-1,TEA,-3,2.00": "quantity “-3”: Input should be greater than or equal to 1",
    b"A-2,2026-01-02,C-1,TEA,1.5,2.00": "quantity “1.5”: Input should be a valid integer",
    b"A-3,2026-01-02,C-1,TEA,1,2.005": "unit_price “2.005”: Decimal input should have no more than 2 decimal places",
    b"A-4,2026-01-02,,TEA,1,2.00": "customer “”: String should have at least 1 character",
    b"A-5,yesterday,C-1,TEA,1,2.00": "ordered_on “yesterday”: Input should be a valid date",
    b"A-6,2026-01-02,C-1,T\xc9,1,2.00": "not text in UTF-8",
    b"A-7,2026-01-02,C-1,T\0EA,1,2.00": "not text in UTF-8",
    b"A-8," + b"x" * 100_000: "longer than 10,000 bytes",
    b"what,is,this": "3 cells instead of 6",
    b'A-9,2026-01-02,"C-1,TEA,1,2.00': "3 cells instead of 6",
    b"GOOD-1,2026-01-02,C-1,TEA,1,2.00": "an order of this number is there already",
}


def test_bad_line_costs_nothing_to_the_others(demo_on: Server, page: Page, url: str):
    """Each bad line of a file is marked with its reason, and the good ones around it are orders."""
    lines = [b for n, bad in enumerate(BAD_LINES, start=1) for b in (b"GOOD-%d,2026-01-02,C-1,TEA,1,2.00" % n, bad)]
    page.goto(demo_on.url)

    choose(page, ("mixed.csv", COLUMNS.encode() + b"\n".join(lines)))

    expect_settled(page, len(BAD_LINES))
    page.get_by_role("link", name="mixed.csv").click()
    found = table(page, "Bad lines")
    assert list(found) == [str(2 * n + 1) for n in range(1, len(BAD_LINES) + 1)]
    for cells, reason in zip(found.values(), BAD_LINES.values(), strict=True):
        assert cells[0].startswith(reason)
    assert counted(url).inventory == {"TEA": len(BAD_LINES)}


def test_order_counts_once_however_often_it_is_uploaded(demo_on: Server, page: Page, url: str):
    """The same file again, and twice at the same moment, adds no order: the lines say that they are there already."""
    content = many_orders(200).encode()
    totals = Totals.of(content.decode())
    page.goto(demo_on.url)

    choose(page, ("one.csv", content), ("two.csv", content))
    for each in ("one.csv", "two.csv"):
        expect(card(page, each).locator(".status")).to_have_text("completed")
    choose(page, ("again.csv", content))

    expect_completed(page, "again.csv", Totals(bad_lines=200))
    expect_settled(page, totals.orders)
    found = counted(url)
    assert (found.orders, found.bad_lines) == (totals.orders, 3 * 200 - totals.orders)
    assert (found.inventory, found.customers) == (totals.inventory, totals.customers)


def test_hundred_megabytes_of_noise(demo: Server, page: Page, tmp_path: Path):
    """A large upload goes through the disk, fails at once, and the server takes orders as before."""
    noise = tmp_path / "noise.csv"
    block = os.urandom(1 << 20)
    with noise.open("wb") as target:
        target.write(b"\xff")
        for _ in range(100):
            target.write(block)
    page.goto(demo.url)

    choose(page, ("noise.csv", noise))

    expect(card(page, "noise.csv").locator(".reason")).to_contain_text("is not text in UTF-8")
    choose(page, ("orders.csv", SAMPLE.read_bytes()))
    expect_completed(page, "orders.csv", Totals.of(SAMPLE.read_text()))


def test_larger_file_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The source of the batch reads line by line: of 100,000 lines, or of one as long, little is in memory."""
    monkeypatch.syspath_prepend(str(DEMO))
    from reading import Lines

    many, endless = tmp_path / "many.csv", tmp_path / "endless.csv"
    many.write_text(many_orders(100_000))
    endless.write_text(COLUMNS + "x" * many.stat().st_size)

    tracemalloc.start()
    counts = [len(Lines(1, many)), len(Lines(2, endless))]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert counts == [100_000, 1]
    assert peak < many.stat().st_size / 4


def test_two_files_at_once(demo: Server, page: Page):
    """Two files are processed side by side, each to its own totals."""
    one, two = many_orders(1_500, "ONE"), many_orders(2_000, "TWO")
    page.goto(demo.url)

    choose(page, ("one.csv", one.encode()), ("two.csv", two.encode()))

    expect(page.get_by_role("progressbar")).to_have_count(2)
    expect_completed(page, "one.csv", Totals.of(one))
    expect_completed(page, "two.csv", Totals.of(two))


def test_killed_server_ends_with_exact_totals(demo_on: Server, page: Page, url: str):
    """Killed in the middle of a file, and again while the handlers are behind: each order is counted exactly once."""
    large = many_orders(1_000)
    totals = Totals.of(large)
    page.goto(demo_on.url)
    choose(page, ("large.csv", large.encode()))

    with standing_still(url, "order_line", "1"):
        in_the_file = counted(url)
        demo_on.kill()
    demo_on.start()
    page.goto(demo_on.url)
    expect(card(page, "large.csv")).to_contain_text("Attempt 2: went on after its process had died")
    expect_completed(page, "large.csv", totals)
    with standing_still(url, "customer", "orders"):
        in_the_handlers = counted(url)
        demo_on.kill()
    demo_on.start()

    page.goto(demo_on.url)
    expect_settled(page, totals.orders)
    page.get_by_role("link", name="large.csv").click()
    # However often a visitor kills it: five attempts, the default, would be used up soon.
    expect(page.locator(".task")).to_have_text("Task process_file, succeeded, attempt 2 of 100")
    assert 0 < in_the_file.orders < totals.orders
    assert 0 < in_the_handlers.customers.total() < totals.orders
    assert counted(url) == totals


def test_visitor_kills_the_server(page: Page, tmp_path: Path):
    """`make demo` offers to kill the server: another takes its place, the page goes on by itself, totals are exact."""
    content = many_orders(700)
    totals = Totals.of(content)
    with started_by_hand(tmp_path, port=0) as (log, url):
        page.goto(url)
        choose(page, ("orders.csv", content.encode()))
        page.wait_for_function("document.querySelector('progress')?.value > 0")

        page.get_by_role("button", name="Kill the server now").click()

        expect(page.get_by_role("status")).to_be_visible()
        log.wait_for("The server was killed")
        expect(page.get_by_role("status")).to_be_hidden()
        expect_completed(page, "orders.csv", totals)
        expect_settled(page, totals.orders)
        killed = log.text.count("The server was killed")
    assert killed == 1
    assert counted(f"sqlite:///{tmp_path / 'orders.db'}") == totals


def test_demo_started_otherwise_does_not_offer_to_be_killed(demo: Server, page: Page):
    """Where nobody would start another server, there is no button that kills it, nor anything behind one."""
    page.goto(demo.url)

    answer = httpx.post(f"{demo.url}/kill")

    expect(page.locator("#totals")).to_be_visible()
    expect(page.locator("#kill")).to_have_count(0)
    assert answer.status_code == 404


def test_pages_fit_a_phone(demo: Server, browser: Browser):
    """On a narrow screen nothing has to be moved sideways, not even with long names, numbers and messages."""
    files = {
        "orders.csv": SAMPLE.read_bytes(),
        "large.csv": COLUMNS.encode() + b"L-1,2026-01-02,%s,%s,90000,900000.00\n" % (b"C" * 40, b"P" * 40),
        "a" * 90 + ".csv": b"x" * 200,
    }
    for each in files.items():
        httpx.post(f"{demo.url}/files", files=[("files", each)])
    context = browser.new_context(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(demo.url)
    expect_settled(page, 418)
    expect(page.locator(".failed")).to_be_visible()

    widths = [page.evaluate("document.documentElement.scrollWidth")]
    for path in ("/files/1", "/files/2", "/files/3", "/products", "/customers"):
        page.goto(demo.url + path)
        expect(page.locator("#live")).to_be_visible()
        widths.append(page.evaluate("document.documentElement.scrollWidth"))

    context.close()
    assert widths == [320] * 6


def test_page_works_without_javascript(demo: Server, browser: Browser):
    """With scripts switched off, files are uploaded by the form and the page reloads itself while one is waited for."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(demo.url)

    content = many_orders(500)
    choose(page, ("orders.csv", content.encode()))

    expect_completed(page, "orders.csv", Totals.of(content))
    expect_settled(page, Totals.of(content).orders)
    expect(page.get_by_role("button", name="8,400 lines")).to_be_hidden()
    context.close()


def test_several_workers_start_at_once(page: Page, tmp_path: Path):
    """Two fresh processes make the tables together, work side by side, and the totals are those of all files."""
    files = [many_orders(100, f"F{number}") for number in range(6)]
    with Server(DEMO / "main.py", env={"AFTERCOMMIT_DEMO_DIR": str(tmp_path)}, workers=2) as server:
        for number, content in enumerate(files):
            httpx.post(f"{server.url}/files", files=[("files", (f"{number}.csv", content.encode()))])

        page.goto(server.url)

        expect_settled(page, 6 * 99)
    found = counted(f"sqlite:///{tmp_path / 'orders.db'}")
    assert found.inventory == sum((Totals.of(content).inventory for content in files), Counter())


def test_demo_started_by_hand_prints_its_address(tmp_path: Path):
    """`python examples/orders/main.py` says where to look, and takes another port where the wanted one is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started_by_hand(tmp_path, port) as (log, url):
            answer = httpx.get(url)

    assert "Address already in use" in log.text
    assert url != f"http://127.0.0.1:{port}"
    assert answer.status_code == 200
    assert "Traceback" not in log.text


@pytest.mark.parametrize("number", ["99999999999999999999", "9223372036854775808", "0", "-1", "7"])
def test_what_is_not_there_is_not_found(demo_on: Server, number: str):
    """A file's number may be any: beyond what the database counts with it is as little there as elsewhere."""
    found = [httpx.get(f"{demo_on.url}/files/{number}{more}").status_code for more in ("", "/bad-lines.csv")]

    assert found == [404, 404]


ELSEWHERE: tuple[dict[str, str], ...] = (
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
)


def test_other_sites_neither_kill_nor_upload(tmp_path: Path):
    """A page of somebody else's cannot use a visitor's browser to write here; the demo's own can, and so can curl."""
    file = {"files": ("a.csv", COLUMNS)}
    with started_by_hand(tmp_path, port=0) as (log, url):
        refused = [
            httpx.post(f"{url}{path}", headers=headers, files=file).status_code
            for headers in ELSEWHERE
            for path in ("/kill", "/files")
        ]
        own = httpx.post(f"{url}/files", headers={"Origin": url, "Sec-Fetch-Site": "same-origin"}, files=file)
        by_hand = httpx.post(f"{url}/files", files={"files": ("a\0b.csv", COLUMNS)})
        is_alive = "killed" not in log.text
        killed = httpx.post(f"{url}/kill", headers={"Origin": url, "Sec-Fetch-Site": "same-origin"})
        log.wait_for("The server was killed")
        assert httpx.get(url, timeout=30).status_code == 200  # the next has started, and can be stopped in order

    assert set(refused) <= {400, 403}
    assert (own.status_code, by_hand.status_code, killed.status_code) == (303, 303, 204)
    assert is_alive


def test_demo_stays_small():
    """The code that people copy stays under 345 lines of Python, blank ones aside."""
    lines = [line for path in DEMO.glob("*.py") for line in path.read_text().splitlines() if line.strip()]

    assert len(lines) < 345
