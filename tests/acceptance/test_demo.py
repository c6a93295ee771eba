"""The demo as a visitor meets it: a real browser, a real server, real files."""

import csv
import io
import os
import re
import signal
import socket
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.support.processes import Log, spawn
from tests.support.servers import ROOT, Server

DEMO = ROOT / "examples" / "orders"
SAMPLE = DEMO / "static" / "sample.csv"
COLUMNS = "order,ordered_on,customer,product,quantity,unit_price\n"
PATIENCE = 60_000  # milliseconds; two cores may be shared by many tests
expect.set_options(timeout=PATIENCE)


@dataclass
class Totals:
    """What a file holds, added up without any of the demo's code."""

    orders: int = 0
    refused: int = 0
    revenue: Decimal = Decimal(0)
    units: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, text: str) -> "Totals":
        """Add up *text*; its mistakes are those of the sample."""
        totals = cls()
        for row in csv.DictReader(io.StringIO(text), restkey="more"):
            if "more" in row or not row["quantity"].isdigit() or row["ordered_on"] == "2026-02-30":
                totals.refused += 1
                continue
            totals.orders += 1
            totals.units[row["product"]] += int(row["quantity"])
            totals.revenue += int(row["quantity"]) * Decimal(row["unit_price"])
        return totals

    @property
    def sentence(self) -> str:
        """How the list of files says it."""
        refused = f" · {self.refused:,} line{'s' if self.refused != 1 else ''} refused" if self.refused else ""
        return f"{self.orders:,} orders · €{self.revenue:,.2f}{refused}"


def many_orders(count: int) -> str:
    """Return a file with *count* orders, no two lines of it alike."""
    lines = (
        f"N-{n},2026-03-{n % 28 + 1:02},C-{n % 97},P-{n % 7},{n % 9 + 1},{n % 50}.{n % 100:02}\n" for n in range(count)
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


def rows_in(folder: Path) -> int:
    """Count the orders in the demo's database, looking on from outside."""
    with closing(sqlite3.connect(folder / "orders.db")) as connection:
        return int(connection.execute("SELECT count(*) FROM order_line").fetchone()[0])


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


def table(page: Page, caption: str) -> dict[str, list[str]]:
    """Read a table of the result page: the cells of each row by its first."""
    rows = page.locator("table", has=page.locator("caption", has_text=caption)).locator("tbody tr").all()
    cells = [row.locator("th, td").all_inner_texts() for row in rows]
    return {first: rest for first, *rest in cells}


def test_sample_is_completed_with_its_totals(demo: Server, page: Page):
    """The sample can be downloaded, uploaded and read: totals per product, and each refused line with its reason."""
    page.goto(demo.url)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download a sample").click()
    content = Path(download.value.path()).read_bytes()
    totals = Totals.of(content.decode())

    choose(page, ("orders.csv", content))

    expect_completed(page, "orders.csv", totals)
    page.get_by_role("link", name="orders.csv").click()
    units = {code: int(cells[1].replace(",", "")) for code, cells in table(page, "Products").items()}
    assert content == SAMPLE.read_bytes()
    assert (totals.orders, totals.refused) == (417, 3)
    assert units == totals.units
    assert sorted(table(page, "Lines refused")) == ["192", "339", "58"]
    expect(page.locator(".refused")).to_contain_text("2026-02-30")


def test_progress_of_a_large_file_is_seen_live(demo: Server, page: Page):
    """While a large file is processed, a bar grows on the page; nobody reloads it."""
    page.goto(demo.url)
    text = SAMPLE.read_text()
    large = text + text.split("\n", 1)[1] * 499

    with page.expect_navigation():
        page.get_by_role("button", name="210,000 lines").click()

    bar = page.get_by_role("progressbar")
    expect(bar).to_be_visible()
    page.wait_for_function("document.querySelector('progress')?.value > 0")
    seen = float(bar.get_attribute("value") or 0)
    page.wait_for_function("seen => (document.querySelector('progress')?.value ?? 1) > seen", arg=seen)
    expect_completed(page, "orders-x500.csv", Totals.of(large))


BAD = {
    "columns.csv": (b"id,name\n1,tea\n", "must name the columns order, ordered_on, .* It reads: id,name"),
    "semicolons.csv": (COLUMNS.replace(",", ";").encode() + b"1;2\n", "must name the columns"),
    "prose.csv": (b"Dear all,\nplease find the orders below.\n", "must name the columns"),
    "latin1.csv": (COLUMNS.encode() + "A-1,2026-01-02,C-1,TÉ-VERT,1,2.00\n".encode("latin-1"), "Line 2 is not text"),
    "utf16.csv": (COLUMNS.encode("utf-16"), "Line 1 is not text in UTF-8"),
    "workbook.csv": (b"PK\x03\x04\x14\x00\x06\x00" + bytes(range(256)) * 8, "Line 1 is not text in UTF-8"),
    "empty.csv": (b"", "no order in this file"),
    "header-only.csv": (COLUMNS.encode(), "no order in this file"),
    "one-endless-line.csv": (COLUMNS.encode() + b"x" * 100_000, "Line 2 is not text in UTF-8"),
    "rubbish.csv": (COLUMNS.encode() + b"what,is,this\n" * 5_000, "Most lines are not orders. Line 2: 3 cells"),
}


def test_bad_files_say_what_is_wrong_and_touch_nothing_else(demo: Server, page: Page):
    """Whatever a file is, it fails with a reason that a person understands, and the good one beside it is completed."""
    page.goto(demo.url)

    choose(page, ("good.csv", SAMPLE.read_bytes()), *((name, content) for name, (content, _) in BAD.items()))

    expect_completed(page, "good.csv", Totals.of(SAMPLE.read_text()))
    for name, (_, reason) in BAD.items():
        expect(card(page, name).locator(".status")).to_have_text("failed")
        expect(card(page, name).locator(".reason")).to_have_text(re.compile(reason))
    expect_completed(page, "good.csv", Totals.of(SAMPLE.read_text()))


def test_file_that_breaks_after_thousands_of_lines_leaves_nothing(demo: Server, page: Page, tmp_path: Path):
    """Orders that were committed before a file turned out to be broken are taken back with its failure."""
    page.goto(demo.url)

    choose(page, ("broken.csv", many_orders(5_000).encode() + b"\xff\xfe\n"))

    expect(card(page, "broken.csv").locator(".reason")).to_contain_text("Line 5002 is not text")
    page.get_by_role("link", name="broken.csv").click()
    expect(page.locator("table")).to_have_count(0)
    assert rows_in(tmp_path) == 0


def test_hundred_megabytes_of_noise(demo: Server, page: Page, tmp_path: Path):
    """A large upload goes through the disk, fails at once, and the server takes orders as before."""
    noise = tmp_path / "noise.csv"
    block = os.urandom(1 << 20)
    with noise.open("wb") as target:
        for _ in range(100):
            target.write(block)
    page.goto(demo.url)

    choose(page, ("noise.csv", noise))

    expect(card(page, "noise.csv").locator(".reason")).to_contain_text("is not text in UTF-8")
    choose(page, ("orders.csv", SAMPLE.read_bytes()))
    expect_completed(page, "orders.csv", Totals.of(SAMPLE.read_text()))


def test_two_files_at_once(demo: Server, page: Page):
    """Two files are processed side by side, each to its own totals."""
    one, two = many_orders(30_000), many_orders(40_000)
    page.goto(demo.url)

    choose(page, ("one.csv", one.encode()), ("two.csv", two.encode()))

    expect(page.get_by_role("progressbar")).to_have_count(2)
    expect_completed(page, "one.csv", Totals.of(one))
    expect_completed(page, "two.csv", Totals.of(two))


def test_killed_server_goes_on_where_it_was(demo: Server, page: Page, tmp_path: Path):
    """A server killed in the middle of a file is started again, and every order of the file is there exactly once."""
    large = many_orders(150_000)
    totals = Totals.of(large)
    page.goto(demo.url)
    choose(page, ("large.csv", large.encode()))
    page.wait_for_function("document.querySelector('progress')?.value > 0.1")

    demo.kill()
    committed = rows_in(tmp_path)
    demo.start()

    page.goto(demo.url)
    expect(card(page, "large.csv")).to_contain_text("went on after its process had died")
    expect_completed(page, "large.csv", totals)
    assert 0 < committed < totals.orders
    assert rows_in(tmp_path) == totals.orders


def test_pages_fit_a_phone(demo: Server, browser: Browser):
    """On a narrow screen nothing has to be moved sideways, not even with long names and messages."""
    httpx.post(f"{demo.url}/files", files=[("files", ("orders.csv", SAMPLE.read_bytes()))])
    httpx.post(f"{demo.url}/files", files=[("files", ("a" * 90 + ".csv", b"x" * 200))])
    context = browser.new_context(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(demo.url)
    expect_completed(page, "orders.csv", Totals.of(SAMPLE.read_text()))
    expect(page.locator(".failed")).to_be_visible()

    widths = [page.evaluate("document.documentElement.scrollWidth")]
    page.get_by_role("link", name="orders.csv", exact=True).click()
    expect(page.locator("table").first).to_be_visible()
    widths.append(page.evaluate("document.documentElement.scrollWidth"))

    context.close()
    assert widths == [320, 320]


def test_page_works_without_javascript(demo: Server, browser: Browser):
    """With scripts switched off, files are uploaded by the form and the page reloads itself while one is waited for."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(demo.url)

    text = many_orders(30_000)
    choose(page, ("orders.csv", text.encode()))

    expect_completed(page, "orders.csv", Totals.of(text))
    expect(page.get_by_role("button", name="210,000 lines")).to_be_hidden()
    context.close()


def test_demo_on_postgresql(postgres_url: str, page: Page, tmp_path: Path):
    """One variable puts the same demo on PostgreSQL: progress, totals and failures are the same."""
    text = many_orders(30_000)
    env = {"AFTERCOMMIT_DEMO_DIR": str(tmp_path), "AFTERCOMMIT_DEMO_URL": postgres_url}
    with Server(DEMO / "main.py", env=env) as server:
        page.goto(server.url)

        choose(page, ("orders.csv", text.encode()), ("nul.csv", b"a\0b\n"), ("sample.csv", SAMPLE.read_bytes()))

        expect(page.get_by_role("progressbar").first).to_be_visible()
        expect_completed(page, "orders.csv", Totals.of(text))
        expect_completed(page, "sample.csv", Totals.of(SAMPLE.read_text()))
        expect(card(page, "nul.csv").locator(".reason")).to_contain_text("is not text")
        page.get_by_role("link", name="sample.csv").click()
        expect(page.get_by_text("TEA-ASSAM-250")).to_be_visible()
    assert list(tmp_path.glob("*.db")) == []


def test_several_workers_start_at_once(page: Page, tmp_path: Path):
    """Two fresh processes make the tables together, and each upload is processed by one of them."""
    totals = Totals.of(SAMPLE.read_text())
    with Server(DEMO / "main.py", env={"AFTERCOMMIT_DEMO_DIR": str(tmp_path)}, workers=2) as server:
        for number in range(6):
            httpx.post(f"{server.url}/files", files=[("files", (f"{number}.csv", SAMPLE.read_bytes()))])

        page.goto(server.url)

        for number in range(6):
            expect_completed(page, f"{number}.csv", totals)
    assert rows_in(tmp_path) == 6 * totals.orders


def test_demo_started_by_hand_prints_its_address(tmp_path: Path):
    """`python examples/orders/main.py` says where to look, and takes another port where the wanted one is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        env = {**os.environ, "AFTERCOMMIT_DEMO_DIR": str(tmp_path), "PORT": str(port)}
        process = spawn([sys.executable, str(DEMO / "main.py")], env=env, cwd=tmp_path)
        assert process.stdout is not None
        log = Log(process.stdout)
        try:
            url = re.search(r"http://\S+", log.wait_for("open http://"))[0]  # type: ignore[index] # the line has one
            answer = httpx.get(url)
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            process.kill()
            process.wait()
            log.join()

    assert "Address already in use" in log.text
    assert url != f"http://127.0.0.1:{port}"
    assert answer.status_code == 200
    assert "Traceback" not in log.text


def test_demo_stays_small():
    """The code that people copy stays under 200 lines of Python, blank ones aside."""
    lines = [line for path in DEMO.glob("*.py") for line in path.read_text().splitlines() if line.strip()]

    assert len(lines) < 200
