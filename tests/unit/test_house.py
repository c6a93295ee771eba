"""The plan of the house (design, section 4) holds: imports point down, and what is optional stays optional."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aftercommit

PACKAGE = Path(aftercommit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. Rooms of one floor may know each other in one direction; "aftercommit" is __init__.py.
FLOORS = (
    ("errors", "plain", "wording", "signals"),
    ("watch",),
    ("pools",),
    ("commits",),
    ("sessions",),
    ("records", "tasks"),
    ("runner",),
    ("batches", "events", "schedules", "stats"),
    ("database",),
    ("fastapi", "fastapi_status", "backends", "monitoring", "testing", "cli"),
    ("aftercommit", "__main__"),  # the doors: what most users import, and the command
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# fastapi.py, and pages meant to be mounted.
MAY_IMPORT_FASTAPI = {"fastapi.py", "fastapi_status.py", "monitoring/prometheus.py"}

OPTIONAL = {
    *("aiosqlite", "anyio", "asyncpg", "fastapi", "opentelemetry", "prometheus_client", "psycopg"),
    *("rich", "starlette", "structlog", "typer"),
}


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Give the full name of everything that *source*, the text of *module*, imports anywhere in it.

    Imports inside functions and under ``TYPE_CHECKING`` count, and so does ``import_module("…")``.
    ``from a import b`` gives ``a.b``: ``b`` may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level):
                base = module.split(".")[: -level + is_package or None] if level else []
                yield from (".".join([*base, *([name] if name else []), alias.name]) for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def room_of(name: str) -> str | None:
    """Return the room that the module *name* stands in; None outside the house."""
    package, _, rest = name.partition(".")
    if package != "aftercommit":
        return None
    room = rest.partition(".")[0]
    is_room = (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists()
    return room if room and is_room else "aftercommit"


def name_of(path: Path) -> str:
    """Return the full name of the module in *path*."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["aftercommit", *parts]).removesuffix(".__init__")


def rooms_used(path: Path) -> set[str]:
    """Return the other rooms that the module in *path* imports from."""
    name = name_of(path)
    names = imported(path.read_text(encoding="utf-8"), name, is_package=path.name == "__init__.py")
    return {room for other in names if (room := room_of(other))} - {room_of(name)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path):
    """A room knows the rooms below it and none above; types are no exception."""
    room = room_of(name_of(path))
    assert room in FLOOR, f"{room} is a new room: give it a floor in FLOORS, and in the design."

    above = {other for other in rooms_used(path) if FLOOR[other] > FLOOR[room]}

    assert not above, f"{name_of(path)} imports {above} from above; the design draws the house the other way round."


def test_rooms_of_one_floor_do_not_import_each_other_in_a_circle():
    """Between two rooms of one floor, imports run in one direction."""
    pairs = {(room_of(name_of(path)), other) for path in MODULES for other in rooms_used(path)}

    circles = {(room, other) for room, other in pairs if (other, room) in pairs}

    assert not circles


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_fastapi_room_imports_fastapi(path: Path):
    """Whoever runs tasks without a web application needs no web framework."""
    if path.relative_to(PACKAGE).as_posix() in MAY_IMPORT_FASTAPI:
        return

    names = {name.partition(".")[0] for name in imported(path.read_text(encoding="utf-8"), name_of(path))}

    assert names.isdisjoint({"fastapi", "starlette"})


def test_importing_aftercommit_imports_nothing_optional():
    """A fresh interpreter that imports aftercommit has loaded no dependency but SQLAlchemy and Pydantic."""
    program = "import sys, json; import aftercommit; print(json.dumps(sorted(sys.modules)))"

    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert OPTIONAL.isdisjoint(name.partition(".")[0] for name in json.loads(output))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import aftercommit.pools.engine as e", {"aftercommit.pools.engine"}),
        ("from aftercommit import pools", {"aftercommit.pools"}),
        ("from . import claim", {"aftercommit.runner.claim"}),
        ("from ..records import due", {"aftercommit.records.due"}),
        ("def f():\n    import fastapi", {"fastapi"}),
        ("if TYPE_CHECKING:\n    import fastapi", {"fastapi"}),
        ("importlib.import_module('rich.table')", {"rich.table"}),
    ],
)
def test_no_import_hides(source: str, expected: set[str]):
    """Relative, local, typing-only and dynamic imports are all seen."""
    assert set(imported(source, "aftercommit.runner.loop")) == expected


def test_relative_imports_of_a_package_start_at_itself():
    """In an ``__init__.py`` one dot means the package, not the one around it."""
    found = set(imported("from .loop import run", "aftercommit.runner", is_package=True))

    assert found == {"aftercommit.runner.loop.run"}
