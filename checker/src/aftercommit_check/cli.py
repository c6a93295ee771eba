"""The command line. Exit codes as ruff's: 0 nothing found, 1 something found, 2 it could not run."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from aftercommit_check import __version__, fix
from aftercommit_check.cache import FOLDER
from aftercommit_check.codes import RULES
from aftercommit_check.findings import Confidence
from aftercommit_check.output.human import Human
from aftercommit_check.output.machine import to_github, to_json, to_sarif
from aftercommit_check.runner import Settings, run
from aftercommit_check.sources.config import Config, ConfigError, check_codes, load_config, parse_confidence
from aftercommit_check.sources.files import project_root
from aftercommit_check.suppress import Sources, is_silenced, read_baseline, without_known, write_baseline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aftercommit_check.findings import Finding
    from aftercommit_check.runner import Report


@dataclass(frozen=True, slots=True)
class Streams:
    """Where the command writes."""

    out: TextIO
    err: TextIO


def entry() -> None:
    """Run the command and exit."""
    try:
        code = main(sys.argv[1:], Streams(sys.stdout, sys.stderr))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def main(arguments: Sequence[str], streams: Streams) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.explain:
            return _explain(options.explain.upper(), streams.out)
        return _check(options, streams)
    except ConfigError as error:
        streams.err.write(f"aftercommit-check: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aftercommit-check",
        description="Find misuse of SQLAlchemy sessions around background work in FastAPI code, without running it.",
    )
    parser.add_argument("paths", nargs="*", default=["."], metavar="PATH", help="files and folders (default: here)")
    parser.add_argument("--format", choices=("human", "json", "sarif", "github"), default="human")
    parser.add_argument(
        "--select", metavar="CODES", help="rules to report, separated by commas; a prefix stands for many"
    )
    parser.add_argument("--ignore", metavar="CODES", help="rules not to report")
    parser.add_argument("--exclude", action="append", metavar="GLOB", help="files and folders to leave out")
    parser.add_argument(
        "--confidence", metavar="LEVEL", help="lowest confidence to report: high, medium (default) or low"
    )
    parser.add_argument("--explain", metavar="CODE", help="explain a rule and exit")
    parser.add_argument("--fix", action="store_true", help="make the corrections that are certain")
    parser.add_argument("--diff", action="store_true", help="show the corrections that are certain, change nothing")
    parser.add_argument("--config", metavar="FILE", help="the pyproject.toml to use")
    parser.add_argument("--baseline", metavar="FILE", help="known findings, not to be reported")
    parser.add_argument("--write-baseline", metavar="FILE", help="write all findings down as known, and exit with 0")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--cache-dir", metavar="FOLDER", help=f"where results are kept (default: {FOLDER})")
    parser.add_argument("--no-cache", action="store_true", help="check everything anew, keep nothing")
    parser.add_argument("--exit-zero", action="store_true", help="exit with 0 even if something was found")
    parser.add_argument("--quiet", "-q", action="store_true", help="no summary and no notes about skipped files")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--version", action="version", version=f"aftercommit-check {__version__}")
    return parser


def _config(options: argparse.Namespace) -> Config:
    config = load_config(options.config, options.paths[0])
    if options.select:
        config = config.but(select=check_codes(_codes(options.select)))
    if options.ignore:
        config = config.but(ignore=check_codes(_codes(options.ignore)))
    if options.exclude:
        config = config.but(exclude=(*config.exclude, *options.exclude))
    if options.confidence:
        config = config.but(confidence=parse_confidence(options.confidence))
    if options.baseline:
        config = config.but(baseline=options.baseline)
    return config


def _codes(text: str) -> list[str]:
    return [code.strip().upper() for code in text.split(",") if code.strip()]


def _check(options: argparse.Namespace, streams: Streams) -> int:
    missing = [path for path in options.paths if not os.path.exists(path)]
    if missing:
        raise ConfigError(f"no such file or folder: {missing[0]}")
    config = _config(options)
    cache = None if options.no_cache else (options.cache_dir or os.path.join(project_root(options.paths[0]), FOLDER))
    tests = config.confidence is Confidence.LOW
    report = run(options.paths, Settings(exclude=config.exclude, jobs=options.jobs, cache=cache, base=".", tests=tests))
    sources = Sources(".")
    shown = [
        finding
        for finding in report.findings
        if config.reports(finding.code, finding.confidence) and not is_silenced(finding, sources)
    ]
    if options.write_baseline:
        count = write_baseline(options.write_baseline, shown, sources)
        streams.err.write(f"{count} findings written to {options.write_baseline}\n")
        return 0
    if config.baseline and os.path.exists(config.baseline):
        shown = without_known(shown, read_baseline(config.baseline), sources)
    elif options.baseline:
        raise ConfigError(f"no such baseline: {options.baseline}")
    if options.diff or options.fix:
        return _fix(options, shown, streams)
    _write(options, shown, report, sources, streams)
    return 1 if shown and not options.exit_zero else 0


def _fix(options: argparse.Namespace, shown: list[Finding], streams: Streams) -> int:
    changes = fix.plan(shown, ".")
    if options.diff:
        streams.out.write(fix.diff(changes))
        return 1 if changes and not options.exit_zero else 0
    fix.write(changes, ".")
    fixed = sum(1 for finding in shown if finding.edits and finding.path in changes)
    left = len(shown) - fixed
    if not options.quiet:
        streams.err.write(f"{_count(fixed, 'finding')} corrected in {_count(len(changes), 'file')}, {left} left\n")
    return 1 if left and not options.exit_zero else 0


def _write(
    options: argparse.Namespace, shown: list[Finding], report: Report, sources: Sources, streams: Streams
) -> None:
    if options.format == "json":
        streams.out.write(to_json(shown) + "\n")
    elif options.format == "sarif":
        streams.out.write(to_sarif(shown) + "\n")
    elif options.format == "github":
        streams.out.write(to_github(shown) + ("\n" if shown else ""))
    else:
        color = options.color == "always" or (
            options.color == "auto" and streams.out.isatty() and not os.environ.get("NO_COLOR")
        )
        human = Human(sources, color=color)
        for finding in shown:
            streams.out.write(human.finding(finding) + "\n\n")
    if options.quiet:
        return
    for path, why in report.skipped.items():
        streams.err.write(f"skipped {path}: {why}\n")
    if options.format == "human":
        fixable = sum(1 for finding in shown if finding.edits)
        tail = f" ({fixable} can be corrected with --fix)" if fixable else ""
        summary = f"Found {_count(len(shown), 'problem')}{tail}" if shown else "No problems found"
        streams.out.write(f"{summary} in {_count(report.files, 'file')}.\n")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _explain(code: str, out: TextIO) -> int:
    rule = RULES.get(code)
    if rule is None:
        raise ConfigError(f"unknown rule {code!r}; known are {', '.join(RULES)}")
    out.write(f"{rule.code} ({rule.category}): {rule.title}\n\n{textwrap.fill(rule.why, 88)}\n\n")
    out.write(f"Found:\n{textwrap.indent(rule.bad, '    ')}\n\nRight:\n{textwrap.indent(rule.good, '    ')}\n")
    return 0
