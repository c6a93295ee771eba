"""Syntax newer than the Python that runs the checker, rewritten line by line into what it can parse.

Only used when parsing fails. Lines keep their numbers, so findings still point at the right place.
"""

from __future__ import annotations

import re

TYPE_STATEMENT = re.compile(r"^([ \t]*)type[ \t]+(\w+)[ \t]*(?:\[[^\]\n]*\])?[ \t]*=(?!=)", re.MULTILINE)
GENERIC = re.compile(r"^([ \t]*)(class|def|async[ \t]+def)([ \t]+)(\w+)\[", re.MULTILINE)
BARE_EXCEPT = re.compile(r"^([ \t]*except[ \t*]+)([\w.]+(?:[ \t]*,[ \t]*[\w.]+)+)[ \t]*:", re.MULTILINE)


def rewritten(text: str) -> str:
    """Return *text* without type parameters (3.12), type statements (3.12) and unparenthesised excepts (3.14)."""
    text = TYPE_STATEMENT.sub(r"\1\2 =", text)
    text = BARE_EXCEPT.sub(r"\1(\2):", text)
    position = 0
    while (match := GENERIC.search(text, position)) is not None:
        end = _closing(text, match.end() - 1)
        if end is None:
            break
        inside = text[match.end() : end]
        names = [part.split(":")[0].split("=")[0].strip(" \t\n*") for part in _parts(inside)]
        head = text[: match.end() - 1]
        rest = text[end + 1 :]
        lines = "\n" * inside.count("\n")
        if match.group(2) == "class":
            generic = f"Generic[{', '.join(name for name in names if name)}]"
            opened = rest.startswith("(")
            rest = f"({generic}, {lines}{rest[1:]}" if opened else f"({generic}{lines}){rest}"
        elif rest.startswith("("):
            rest = f"({lines}{rest[1:]}"
        text = head + rest
        position = match.end()
    return text


def _closing(text: str, start: int) -> int | None:
    """Return where the bracket that opens at *start* closes."""
    depth = 0
    for index in range(start, min(len(text), start + 2000)):
        if text[index] in "[({":
            depth += 1
        elif text[index] in "])}":
            depth -= 1
            if depth == 0:
                return index
    return None


def _parts(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
