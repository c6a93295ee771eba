"""Run the rules over many files: in parallel, and only where something changed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aftercommit_check import candidates
from aftercommit_check.analyse import check_file
from aftercommit_check.cache import Cache, Entry
from aftercommit_check.index.modules import EVERY_CLASS, Project, digest, is_test_path
from aftercommit_check.sources.files import UnreadableSourceError, find_sources, project_root, read_bytes
from aftercommit_check.sources.pins import find_pin, forget_pins

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aftercommit_check.findings import Finding

RECURSION_LIMIT = 6000
SMALL = 150_000
"""Below this many bytes of interesting source, starting processes costs more than it saves."""


@dataclass(slots=True)
class Report:
    """What a run found.

    Attributes:
        findings: All findings, of every confidence, sorted by place.
        skipped: Files that could not be read, with the reason.
        files: How many files were looked at.
        checked: How many files were really analysed this time.

    """

    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    files: int = 0
    checked: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run.

    Attributes:
        exclude: Globs of what to leave out.
        jobs: Processes; 0 for one per core.
        cache: Where results are kept; None for nowhere.
        base: The folder that shown paths are relative to.
        tests: Whether to look into test suites too; their findings are all of low confidence.

    """

    exclude: tuple[str, ...] = ()
    tests: bool = False
    jobs: int = 0
    cache: str | None = None
    base: str = "."


@dataclass(frozen=True, slots=True)
class _World:
    """What every worker needs to know."""

    root: str
    files: list[str]
    base: str
    anchor: str
    wrappers: dict[str, str]


def run(paths: Sequence[str], settings: Settings) -> Report:
    """Check the Python files below *paths*."""
    forget_pins()
    base = os.path.abspath(settings.base)
    files = [os.path.abspath(path) for path in find_sources(paths, settings.exclude)]
    report = Report(files=len(files))
    if not files:
        return report
    root = _common_root(paths)
    anchor = _anchor(paths, root)
    cache = Cache.load(settings.cache)
    digests, wrappers, interesting = _survey(files, cache, report)
    if not settings.tests:
        interesting = [path for path in interesting if not is_test_path(os.path.relpath(path, anchor))]
    world = digest("\0".join([root, base, anchor, *files, *sorted(wrappers)]).encode(errors="replace"))
    todo = _outdated(cache, world, interesting, digests, root)
    for path in interesting:
        if path not in todo:
            report.findings += cache.results[path].findings
    results = _check_all(todo, _World(root, files, base, anchor, wrappers), settings.jobs)
    for path, entry in results:
        report.findings += entry.findings
        if entry.skipped:
            report.skipped[path] = entry.skipped
        else:
            cache.results[path] = entry
    report.checked = len(todo)
    cache.world = world
    cache.keep(files)
    cache.save(settings.cache)
    report.findings.sort(key=lambda finding: finding.sort_key)
    report.skipped = {os.path.relpath(path, base): why for path, why in sorted(report.skipped.items())}
    return report


def _common_root(paths: Sequence[str]) -> str:
    roots = [project_root(path) for path in paths if os.path.exists(path)]
    try:
        return os.path.commonpath(roots) if roots else os.path.abspath(".")
    except ValueError:  # different drives
        return roots[0]


def _anchor(paths: Sequence[str], root: str) -> str:
    """Return the tree that is checked: the folders above it say nothing about the files in it."""
    folders = [os.path.abspath(path) for path in paths if os.path.isdir(path)]
    if len(folders) != len(paths):
        return root
    # `aftercommit-check tests` is about tests, wherever one stands.
    named = {"tests", "test", "scripts", "tools"}
    return os.path.commonpath([root if os.path.basename(folder) in named else folder for folder in folders])


def _survey(files: list[str], cache: Cache, report: Report) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Read every file once: its hash, the wrappers it defines, and whether it is worth a closer look."""
    digests: dict[str, str] = {}
    names: set[str] = set()
    decorators: set[str] = set()
    maybe: list[str] = []
    for path in files:
        try:
            data = read_bytes(path)
        except UnreadableSourceError as error:
            report.skipped[path] = str(error)
            continue
        digests[path] = digest(data)
        known = cache.survey.get(digests[path])
        if known is None:
            known = [int(candidates.is_interesting(data)), *candidates.wrapper_names(data)]
            cache.survey[digests[path]] = known
        for name in known[1:]:
            (decorators if str(name).startswith("@") else names).add(str(name).lstrip("@"))
        if known[0]:
            maybe.append(path)
    if decorators or names:
        found = set(maybe)
        pattern = candidates.names_pattern(sorted(names))
        marks = [name.encode() for name in sorted(decorators)]
        if marks:
            for path in digests:
                names.update(candidates.decorated_names(read_bytes(path), marks))
            pattern = candidates.names_pattern(sorted(names))
        maybe += [path for path in digests if path not in found and candidates.calls_any(read_bytes(path), pattern)]
    cache.surveyed = set(digests.values())
    return digests, dict.fromkeys(sorted(names), ""), sorted(maybe)


def _outdated(cache: Cache, world: str, files: list[str], digests: dict[str, str], root: str) -> list[str]:
    """Return the files whose cached result no longer holds."""
    if cache.world != world:
        cache.results.clear()
        return files
    known = dict(digests)
    changed = any(
        path in cache.results and cache.results[path].consulted.get(path) != digests.get(path) for path in files
    ) or set(digests.values()) != set(cache.survey_before)
    todo = []
    for path in files:
        entry = cache.results.get(path)
        if entry is None or not _holds(entry, known, changed) or entry.pin != repr(find_pin(path, root)):
            todo.append(path)
    return todo


def _holds(entry: Entry, known: dict[str, str], changed: bool) -> bool:
    for path, content in entry.consulted.items():
        if path == EVERY_CLASS:
            if changed:
                return False
            continue
        if path not in known:
            try:
                known[path] = digest(read_bytes(path))
            except UnreadableSourceError:
                known[path] = ""
        if known[path] != content:
            return False
    return True


# -- workers -------------------------------------------------------------------------------------------------------

_project: Project | None = None
_wrappers: dict[str, str] = {}


def _start(world: _World) -> None:
    global _project, _wrappers  # noqa: PLW0603 - a worker process has one project
    sys.setrecursionlimit(max(sys.getrecursionlimit(), RECURSION_LIMIT))
    gc.disable()  # millions of syntax nodes make every collection slow; Project.trim collects when it forgets
    _project = Project(world.root, world.files, world.base, world.anchor)
    _wrappers = world.wrappers


def _check_chunk(paths: list[str]) -> list[tuple[str, Entry]]:
    assert _project is not None
    found = []
    for path in paths:
        found.append((path, check_one(_project, path, _wrappers)))
        _project.trim()
    return found


def check_one(project: Project, path: str, wrappers: dict[str, str]) -> Entry:
    """Check one file, whatever is in it."""
    project.consulted = {}
    try:
        findings = check_file(project, path, wrappers)
    except (RecursionError, MemoryError) as error:
        return Entry((), {}, "", f"too deeply nested to analyse ({type(error).__name__})")
    except Exception as error:
        if os.environ.get("AFTERCOMMIT_CHECK_DEBUG"):
            raise
        return Entry((), {}, "", f"internal error, please report it: {type(error).__name__}: {error}")
    if path in project.unreadable:
        return Entry((), {}, "", project.unreadable[path])
    return Entry(tuple(findings), dict(project.consulted), repr(find_pin(path, project.root)), "")


def _check_all(paths: list[str], world: _World, jobs: int) -> Iterator[tuple[str, Entry]]:
    if not paths:
        return
    jobs = min(jobs or os.cpu_count() or 1, 8)
    sizes = [os.path.getsize(path) for path in paths]
    if jobs == 1 or sum(sizes) < SMALL:
        collecting = gc.isenabled()
        _start(world)
        try:
            yield from _check_chunk(paths)
        finally:
            if collecting:
                gc.enable()
        return
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(world,)) as pool:
        for chunk in pool.map(_check_chunk, _chunks(paths, sizes, jobs)):
            yield from chunk


def _chunks(paths: list[str], sizes: list[int], jobs: int) -> list[list[str]]:
    """Cut *paths* into neighbouring pieces of about the same size: neighbours import the same modules."""
    target = max(sum(sizes) // (jobs * 6), 1)
    chunks: list[list[str]] = [[]]
    filled = 0
    for path, size in zip(paths, sizes, strict=True):
        if filled >= target and chunks[-1]:
            chunks.append([])
            filled = 0
        chunks[-1].append(path)
        filled += size
    return chunks
