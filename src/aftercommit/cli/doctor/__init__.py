"""``aftercommit doctor``: what is wrong with the whole set-up, and what to type."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from aftercommit.cli.doctor.examination import examine
from aftercommit.cli.doctor.findings import Finding, Level
from aftercommit.cli.target import DatabaseOption, fail, import_module, load
from aftercommit.errors import AfterCommitError
from aftercommit.plain import json_text, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["doctor"]

_MARKS: Final = {Level.OK: "✓", Level.NOTE: "·", Level.WARNING: "!", Level.WRONG: "✗"}
_COLOURS: Final = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.WRONG: "red"}
_READABLE: Final = 100
"""Characters in a line beyond which nobody likes to read."""


def doctor(  # noqa: PLR0917  # options of a command
    target: Annotated[str | None, typer.Argument(help="The Database, as module:name.")] = None,
    db: DatabaseOption = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Modules that declare tasks, if the first one does not import them."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="How many processes there are, on all machines; the live workers by default."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings, too.")] = False,  # noqa: FBT002  # a flag
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: one JSON document on standard output.")] = False,  # noqa: FBT002
) -> None:
    """Examine the whole set-up: say what is wrong, and what to type. Changes nothing; exits with 1 if it is wrong."""
    where = target or db
    try:
        database = load(where)
        for module in imports or ():
            import_module(module)
        findings = examine(database, str(where), processes=processes)
    except AfterCommitError as exc:
        raise fail(str(exc)) from exc
    if as_json:
        typer.echo(json_text(_document(str(where), findings)))
    else:
        _print(findings)
    bad = {Level.WRONG, Level.WARNING} if strict else {Level.WRONG}
    if any(finding.level in bad for finding in findings):
        raise typer.Exit(1)


def _document(where: str, findings: Sequence[Finding]) -> dict[str, object]:
    return {
        "database": where,
        **{level.value: _number(findings, level) for level in Level},
        "findings": [{**dataclasses.asdict(finding), "level": finding.level.value} for finding in findings],
    }


def _number(findings: Sequence[Finding], level: Level) -> int:
    return sum(finding.level is level for finding in findings)


def _flat(text: str) -> str:
    return one_line(" ".join(text.split()))


def _print(findings: Sequence[Finding]) -> None:
    console = Console(highlight=False)
    width = min(console.width, _READABLE)
    for finding in findings:
        colour = _COLOURS[finding.level]
        head = textwrap.fill(
            f"{_MARKS[finding.level]} {finding.check}: {_flat(finding.found)}",
            width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        text = Text(head)
        text.stylize(colour if finding.level is Level.OK else f"bold {colour}", 0, 2 + len(finding.check))
        console.print(text, soft_wrap=True)
        if finding.why:
            indent = "    "
            console.print(
                Text(
                    textwrap.fill(_flat(finding.why), width, initial_indent=indent, subsequent_indent=indent),
                    style="dim",
                ),
                soft_wrap=True,
            )
        for line in finding.remedy:
            # Never wrapped: it is there to be copied.
            console.print(Text.assemble(("    → ", colour), one_line(line)), soft_wrap=True)
    wrong, warnings = _number(findings, Level.WRONG), _number(findings, Level.WARNING)
    if wrong or warnings:
        parts = ([f"{wrong} wrong"] if wrong else []) + (
            [f"{warnings} warning{'' if warnings == 1 else 's'}"] if warnings else []
        )
        console.print(Text(f"\n{', '.join(parts)}.", style="bold red" if wrong else "bold yellow"))
    else:
        console.print(Text("\nNothing is wrong.", style="bold green"))
