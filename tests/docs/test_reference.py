"""The documentation and the code name the same things: errors, options, columns, fields, commands, links."""

import dataclasses
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry

import aftercommit
import aftercommit.fastapi
import aftercommit.monitoring.logging
import aftercommit.monitoring.opentelemetry
import aftercommit.testing
from aftercommit import (
    ClusterStats,
    ClusterTask,
    Cron,
    CurrentRun,
    Database,
    Every,
    Holder,
    PoolSettings,
    PoolStats,
    Retry,
    ScheduleRecord,
    Stats,
    Task,
    TaskHandle,
    TaskRecord,
    TaskStats,
    Tick,
    Timing,
    errors,
    signals,
)
from aftercommit.cli.commands import app
from aftercommit.monitoring import prometheus
from tests.docs.pages import PAGES, ROOT, Page

DOCS = ROOT / "docs"
ERRORS = DOCS / "errors"
# Rules that only the static checker knows; the others are errors at run time.
CHECKER_ONLY = {"AC104", "AC106", "AC107", "AC108", "AC112", "AC113"}
# One class, several rules: the code says which thing it was.
OF_UNSAFE_ARGUMENT = {"AC101", "AC102", "AC105", "AC109"}
# Nobody raises these: they are there to be caught.
BASES = {errors.AfterCommitError, errors.RunError}
# Of CurrentRun, for the library's own use.
INTERNAL = {
    *("batches", "behind", "forget", "saw_cancelled", "saw_conflict", "saw_unique", "stopped_by"),
    *("take_checkpoint", "take_progress"),
}
# What db.stats() is made of.
STATS = (Stats, PoolStats, Holder, TaskStats, Timing, ClusterStats, ClusterTask)
# What a block may be written in. Python's own is "python", so that it runs.
LANGUAGES = {"javascript", "python", "shell", "console", "text", "sql", "toml", "yaml"}

READ = [Page.read(path) for path in PAGES]
PUBLIC = [page for page in READ if page.path.name != "CONTRIBUTING.md"]


def error_classes() -> Iterator[type[errors.AfterCommitError]]:
    """Every class of the tree, but those that nobody raises."""
    for value in vars(errors).values():
        if inspect.isclass(value) and issubclass(value, errors.AfterCommitError) and value not in BASES:
            yield value


def reference(name: str) -> str:
    """The text of a page of the reference."""
    return (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")


def in_code(text: str) -> set[str]:
    """Every word that stands in backticks, in tables and in text."""
    return {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", code)}


def parameters(function: Callable[..., object]) -> set[str]:
    """The names of a function's parameters."""
    return set(inspect.signature(function).parameters) - {"self", "function"}


def members(kind: type) -> set[str]:
    """The public names of a class that its instances have."""
    return {name for name in (*dir(kind), *getattr(kind, "__slots__", ())) if not name.startswith("_")}


# --- errors -----------------------------------------------------------------------------------------------------


def test_every_error_has_a_page_and_every_page_an_error() -> None:
    """A code in a message leads to a page, and no page is about a code that nobody raises."""
    raised = {kind.code for kind in error_classes()} | OF_UNSAFE_ARGUMENT

    pages = {path.stem for path in ERRORS.glob("*.md")}

    assert pages == raised | CHECKER_ONLY
    assert not raised & CHECKER_ONLY


def test_no_two_errors_share_a_code() -> None:
    """A code is one rule."""
    codes = [kind.code for kind in error_classes()]

    assert len(codes) == len(set(codes))


def test_every_error_is_public() -> None:
    """What may be raised can be imported, and stands in ``__all__``."""
    assert {kind.__name__ for kind in error_classes()} <= set(errors.__all__)


@pytest.mark.parametrize("path", sorted(ERRORS.glob("*.md")), ids=lambda path: path.stem)
def test_error_page_says_what_why_and_what_to_do(path: Path) -> None:
    """Each page names its code, the error that carries it, what happened, why it matters, and the right code."""
    text = Page.read(path).visible.strip()
    names = {kind.__name__ for kind in error_classes() if kind.code == path.stem}
    if path.stem in OF_UNSAFE_ARGUMENT:
        names = {"UnsafeArgument"}

    assert text.startswith(f"# {path.stem}: ")
    assert names <= in_code(text) or path.stem in CHECKER_ONLY
    assert "## What happened" in text
    assert "## Why it matters" in text
    assert "## Right" in text or "## What to do" in text
    assert Page.read(path).snippets


def test_index_of_errors_is_complete() -> None:
    """The reference lists every page, with the class that carries its code."""
    rows = dict(
        re.findall(r"^\| \[(AC\d+)\]\(\.\./errors/AC\d+\.md\) \| `?(\w+)`? \|", reference("errors"), re.MULTILINE)
    )

    expected = {kind.code: kind.__name__ for kind in error_classes()}
    expected |= dict.fromkeys(OF_UNSAFE_ARGUMENT, "UnsafeArgument") | dict.fromkeys(CHECKER_ONLY, "checker")

    assert rows == expected


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("database", parameters(Database.__init__)),
        ("database", {field.name for field in dataclasses.fields(PoolSettings)}),
        ("database", parameters(Database.running) | parameters(Database.drain)),
        *(("database", {field.name for field in dataclasses.fields(kind)}) for kind in STATS),
        ("tasks", parameters(Database.task)),
        ("tasks", parameters(Task.with_options)),
        ("tasks", {field.name for field in dataclasses.fields(Retry)}),
        ("tasks", members(TaskHandle)),
        ("tasks", members(CurrentRun) - INTERNAL),
        ("record", {attribute.key for attribute in TaskRecord.__mapper__.column_attrs}),
        ("schedules", {attribute.key for attribute in ScheduleRecord.__mapper__.column_attrs}),
        ("schedules", parameters(Cron.__init__) | parameters(Every.__init__)),
        ("schedules", {field.name for field in dataclasses.fields(Tick)}),
        ("schedules", {name for name in members(Database) if "schedule" in name and name != "schedules"}),
        ("fastapi", set(aftercommit.fastapi.__all__) | parameters(aftercommit.fastapi.install)),
        ("testing", set(aftercommit.testing.__all__) | parameters(aftercommit.testing.replace)),
        ("testing", members(aftercommit.testing.PendingTask) - {"as_run"}),
        ("signals", set(signals.__all__)),
        ("monitoring", set(aftercommit.monitoring.logging.__all__)),
        ("monitoring", {"create", "process"} | parameters(aftercommit.monitoring.opentelemetry.instrument)),
        ("monitoring", set(prometheus.__all__)),
        ("monitoring", parameters(prometheus.metrics_router)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reference_is_complete(page: str, names: set[str]) -> None:
    """Whatever a user may write or read has its place in the reference."""
    assert names - in_code(reference(page)) == set()


@pytest.mark.parametrize("kind", [Database, PoolSettings])
def test_defaults_are_those_of_the_code(kind: type) -> None:
    """A figure that the reference gives as a default is the one that an application gets."""
    signature = inspect.signature(kind).parameters
    rows = re.findall(r"^\| `(\w+)` \| `?([\w.]+)`? \|", reference("database"), re.MULTILINE)
    listed = {name: default for name, default in rows if name in signature and re.fullmatch(r"-?\d+(\.\d+)?", default)}

    assert len(listed) >= 3
    assert listed == {name: str(signature[name].default) for name in listed}


def test_signals_are_listed_with_all_their_fields() -> None:
    """A subscriber finds every field of a payload, and none that is not there."""
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*) \|$", reference("signals"), re.MULTILINE))
    own = {
        name: {field.name for field in dataclasses.fields(kind)}
        - ({"task", "id", "pool", "attempt"} if issubclass(kind, signals.RunSignal) else set())
        for name in signals.__all__
        if inspect.isclass(kind := getattr(signals, name)) and kind not in (signals.Signal, signals.RunSignal)
    }

    assert {name: set(re.findall(r"`(\w+)`:", fields)) for name, fields in rows.items()} == own


def test_metrics_of_prometheus_are_listed_with_their_labels() -> None:
    """Every family that a scrape shows stands in the reference with its labels, and none that does not."""
    registry = CollectorRegistry()
    db = Database("sqlite:///unused.db")
    prometheus.instrument(db, registry=registry)
    exporter = prometheus._exporters[registry]
    # As a counter is called in a scrape.
    shown = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in (*exporter.collect(), *prometheus._of_clusters([]))
    }
    prometheus.uninstrument(registry=registry)

    rows = re.findall(r"^\| ((?:`aftercommit_\w+`(?:, )?)+) \|([^|]*)\|", reference("monitoring"), re.MULTILINE)
    listed = {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)}

    assert listed == shown
    assert {label for _, labels in rows for label in re.findall(r"`(\w+)`", labels)} == {
        *("database", "outcome", "pool", "schedule", "state", "task"),
    }


def test_metrics_of_opentelemetry_are_listed_with_their_units() -> None:
    """Every instrument that is made stands in the reference with its unit, and none that is not."""
    reader = InMemoryMetricReader()
    made: dict[str, str] = {}

    class Noting(MeterProvider):
        def get_meter(self, *args: Any, **kwargs: Any) -> Any:
            meter = super().get_meter(*args, **kwargs)
            for kind in (
                "counter",
                "histogram",
                "observable_counter",
                "observable_gauge",
                "observable_up_down_counter",
            ):
                setattr(meter, f"create_{kind}", noting(getattr(meter, f"create_{kind}")))
            return meter

    def noting(create: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            instrument = create(*args, **kwargs)
            made[instrument.name] = instrument.unit
            return instrument

        return note

    aftercommit.monitoring.opentelemetry.instrument(meter_provider=Noting([reader]))
    aftercommit.monitoring.opentelemetry.uninstrument()

    section = reference("monitoring").partition("| metric | unit | |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \| `([^`]+)` \|", section, re.MULTILINE)
    assert {name: unit for names, unit in rows for name in re.findall(r"`([\w.]+)`", names)} == made


def test_public_names_are_documented() -> None:
    """What ``aftercommit`` exports stands in the reference."""
    everything = "\n".join(page.text for page in PUBLIC)

    assert set(aftercommit.__all__) - in_code(everything) == set()


# --- links and blocks -------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a page: those of its headings, as GitHub makes them, and those that it names itself."""
    headings = re.findall(r"^#+ (.+)$", Page.read(path).visible, re.MULTILINE)
    named = re.findall(r'<a id="([\w-]+)"></a>', Page.read(path).visible)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(named)


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Page) -> None:
    """Every link inside of the repository leads to a file, and to a heading that is on it."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.visible):
        file, _, anchor = target.partition("#")
        path = (page.path.parent / file).resolve() if file else page.path

        assert path.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(path), f"{target}: there is no such heading"


def test_every_page_can_be_found() -> None:
    """A reader who starts at the index reaches every page but those of errors, which have an index of their own."""
    index = DOCS / "README.md"
    linked = {
        (index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+\.md)\)", Page.read(index).visible)
    }

    assert {page.path for page in PUBLIC if DOCS in page.path.parents} - {index} - set(ERRORS.glob("*.md")) <= linked


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.path.relative_to(ROOT)))
def test_no_code_escapes(page: Page) -> None:
    """Python stands in blocks that run: none is indented, and none is called otherwise."""
    assert {block.language for block in page.blocks} <= LANGUAGES
    assert not re.search(r"^[ \t>]+```\w", page.text, re.MULTILINE)


# --- commands ---------------------------------------------------------------------------------------------------


def commands(name: str) -> Iterator[tuple[str, list[str]]]:
    """Every call of the program *name* in a shell block, with the page's name."""
    for page in READ:
        for block in page.blocks:
            for line in block.code.splitlines() if block.language == "shell" else ():
                words = shlex.split(line, comments=True)
                words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
                if words and words[0] == name:
                    yield page.path.name, words[1:]


def test_commands_are_what_they_are_called() -> None:
    """Every ``aftercommit …`` in a shell block names a command and options that there are."""
    seen = 0
    for page, words in commands("aftercommit"):
        command: Any = typer.main.get_command(app)
        for word in words:
            options = {option for parameter in command.params for option in parameter.opts}
            below = getattr(command, "commands", None)
            if below is not None:
                assert word in below, f"{page}: aftercommit {' '.join(words)}"
                command = below[word]
            elif word.startswith("-"):
                assert word in options, f"{page}: aftercommit {' '.join(words)}"
        seen += 1

    assert seen > 0


def test_targets_of_make_are_there() -> None:
    """Every ``make …`` in a shell block names a target of the Makefile."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

    named = {word for _page, words in commands("make") for word in words if "=" not in word}

    assert named
    assert named <= targets


def test_the_tests_that_prove_the_guarantees_are_there():
    """Every test that the guarantees page names exists, and is a test."""
    text = (DOCS / "explanation" / "guarantees.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)

    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or (name and f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8"))
    ]

    assert len(named) > 40
    assert not missing
