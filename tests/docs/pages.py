"""The documentation as tests see it: pages, the code on them, and a place to run it in.

The convention, also told in CONTRIBUTING.md:

- Every fenced block of ```` ```python ```` runs, in the order of the page, in one namespace, in an empty directory.
- A block inside an HTML comment is set-up or an assertion that the reader need not see. It runs like the others.
- ```` ```python raises=SessionEnded ```` must raise that error. On a page of ``docs/errors``, with that page's code.
- ```` ```python file=main.py ```` is written to that file, for later blocks to import.
- ``await`` may stand at the top level, as in ``python -m asyncio``.
- ``DATABASE_URL`` names an SQLite file; on a page with ``<!-- database: postgresql -->`` a real PostgreSQL.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import importlib
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import sqlalchemy.exc
from sqlalchemy import Engine

from aftercommit import AfterCommitError, Database, errors, signals

__all__ = ["PAGES", "ROOT", "Block", "Page", "run"]

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r"(\w+)=(\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block.

    Attributes:
        language: The word behind the fence.
        options: What follows it, ``raises=SessionEnded``, by name.
        code: Its text.
        line: The line of the page on which the code begins, from 1.
    """

    language: str
    options: dict[str, str]
    code: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page.

    Attributes:
        path: Where it is.
        text: The whole of it.
    """

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        """Read it."""
        return cls(path=path, text=path.read_text(encoding="utf-8"))

    @property
    def blocks(self) -> list[Block]:
        """Every fenced block, hidden ones among them."""
        return [
            Block(
                language=found[1],
                options=dict(_OPTION.findall(found[2])),
                code=found[3],
                line=self.text.count("\n", 0, found.start()) + 2,
            )
            for found in _FENCE.finditer(self.text)
        ]

    @property
    def snippets(self) -> list[Block]:
        """The blocks that run."""
        return [block for block in self.blocks if block.language == "python"]

    @property
    def visible(self) -> str:
        """The text without comments and without code."""
        return _FENCE.sub("", re.sub(r"<!--.*?-->", "", self.text, flags=re.DOTALL))

    @property
    def wants_postgresql(self) -> bool:
        """Whether its code needs a real server."""
        return "<!-- database: postgresql -->" in self.text


def run(page: Page) -> None:
    """Run the code of *page*, in the directory at hand."""
    with _module() as module, asyncio.Runner() as runner:
        try:
            for block in page.snippets:
                _run_block(page, block, module, runner)
        finally:
            _tidy_up(runner)


def _run_block(page: Page, block: Block, module: ModuleType, runner: asyncio.Runner) -> None:
    if "file" in block.options:
        target = Path(block.options["file"])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.code, encoding="utf-8")
        return
    expected = block.options.get("raises")
    if expected is None:
        _execute(page, block, module, runner)
        return
    kind = _error_class(expected)
    try:
        _execute(page, block, module, runner)
    except kind as exc:
        code = exc.code if isinstance(exc, AfterCommitError) else None
        if page.path.parent.name == "errors" and code not in (None, page.path.stem):
            raise AssertionError(f"{page.path.name} raised {code}") from exc
        return
    raise AssertionError(f"{page.path.name}, line {block.line}: {expected} was not raised")


def _execute(page: Page, block: Block, module: ModuleType, runner: asyncio.Runner) -> None:
    # The blank lines in front make tracebacks, and the lines that the library tells, those of the page.
    source = "\n" * (block.line - 1) + block.code
    code = compile(source, str(page.path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:
        runner.run(eval(code, module.__dict__))
    else:
        exec(code, module.__dict__)


def _error_class(name: str) -> type[BaseException]:
    module, _, name = name.rpartition(".")
    for place in [importlib.import_module(module)] if module else (errors, builtins, sqlalchemy.exc):
        found = getattr(place, name, None)
        if isinstance(found, type) and issubclass(found, BaseException):
            return found
    raise AssertionError(f"raises={name}: there is no such error")


@contextmanager
def _module() -> Iterator[ModuleType]:
    """A module for the page; what it imports from its directory, and what it subscribes to, is forgotten afterwards."""
    here = str(Path.cwd())
    before = dict(sys.modules)
    subscribers = dict(signals._subscribers)
    module = sys.modules["page"] = ModuleType("page")
    sys.path.insert(0, here)
    try:
        yield module
    finally:
        sys.path.remove(here)
        signals._subscribers.clear()
        signals._subscribers.update(subscribers)
        for name, loaded in list(sys.modules.items()):
            if name not in before and (getattr(loaded, "__file__", None) or "").startswith(here):
                del sys.modules[name]
        del sys.modules["page"]


def _tidy_up(runner: asyncio.Runner) -> None:
    """Close what the page, or a file of its making, has opened: snippets are shorter without."""
    here = str(Path.cwd())
    local = [
        module
        for name, module in list(sys.modules.items())
        if name == "page" or (getattr(module, "__file__", None) or "").startswith(here)
    ]
    found: defaultdict[type, dict[int, object]] = defaultdict(dict)
    for value in [value for module in local for value in list(vars(module).values())]:
        for kind in (Database, Engine):
            if isinstance(value, kind):
                found[kind][id(value)] = value
    for db in found[Database].values():
        assert isinstance(db, Database)
        runner.run(db.async_dispose())
    for engine in found[Engine].values():
        assert isinstance(engine, Engine)
        engine.dispose()
