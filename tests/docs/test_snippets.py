"""Every Python snippet of the documentation runs."""

from pathlib import Path

import pytest

from aftercommit.tasks import context
from tests.docs import pages

# Starlette's test client would rather have httpx2; which of the two is installed does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:Using `httpx` with")


def name_of(path: Path) -> str:
    """Return the path as pytest shows it."""
    return str(path.relative_to(pages.ROOT))


@pytest.mark.parametrize("path", [path for path in pages.PAGES if pages.Page.read(path).snippets], ids=name_of)
def test_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A reader who types the code of a page in, from top to bottom, gets no error but those that the page announces."""
    page = pages.Page.read(path)
    url = request.getfixturevalue("postgres_url") if page.wants_postgresql else f"sqlite:///{tmp_path / 'app.db'}"
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.delenv("AFTERCOMMIT_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    # What a page has follow its tasks is known to the whole process.
    monkeypatch.setattr(context, "_variables", {})

    pages.run(page)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("<!--\n```python\nx = 1\n```\n-->\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python raises=ValueError\nx = 1\n```\n", AssertionError),
        ("```python raises=ValueError\n1 / 0\n```\n", ZeroDivisionError),
        ("```python file=other.py\nx = 1\n```\n\n```python\nimport other\nassert other.x > 1\n```\n", AssertionError),
        ("```python\nimport asyncio\n\nawait asyncio.sleep(0)\nassert False\n```\n", AssertionError),
    ],
)
def test_broken_page_is_noticed(
    text: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page whose code does not do what it says fails."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises(error):
        pages.run(pages.Page(path=tmp_path / "page.md", text=text))


def test_errors_point_at_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback names the page and the line on it."""
    monkeypatch.chdir(tmp_path)
    page = pages.Page(path=tmp_path / "page.md", text="# Title\n\n```python\nx = 1\n1 / 0\n```\n")

    with pytest.raises(ZeroDivisionError) as caught:
        pages.run(page)

    innermost = caught.traceback[-1]
    assert (Path(innermost.path).name, innermost.lineno + 1) == ("page.md", 5)
