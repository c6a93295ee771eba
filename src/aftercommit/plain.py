r"""Text of others as it may stand in a line of a log or on a terminal.

A task's name, a key, an exception's message: whoever wrote them may have written control characters into them, which
move a terminal's cursor, set its title, turn the direction of writing around, or begin a line of a log that nobody
has logged. They are shown by their numbers instead, as Python writes them: ``\x1b``.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

__all__ = ["indented", "json_text", "one_line", "several_lines"]

_INVISIBLE: Final = re.compile(
    "[\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f"  # C0 but the tab, C1
    "\\xad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"  # direction, nothing
    "\\ud800-\\udfff\\U000e0000-\\U000e007f]"  # half a character; tags
)


def one_line(text: str, longest: int | None = None) -> str:
    """Return *text* as one line without control characters.

    Args:
        text: Whatever somebody has written.
        longest: How many characters of it are shown at most; all by default.
    """
    told = _INVISIBLE.sub(_escaped, text)
    return told if longest is None or len(told) <= longest else f"{told[: longest - 1]}…"


def several_lines(text: str) -> str:
    """Return *text* without control characters but those that end its lines."""
    return "\n".join(map(one_line, text.replace("\r\n", "\n").split("\n")))


def indented(text: str) -> str:
    """Return *text* so that only its first line begins where lines begin: no other one can be taken for somebody's."""
    return several_lines(text).replace("\n", "\n    ")


def json_text(value: Any) -> str:
    """Return *value* as JSON for people and scripts: readable, and without control characters but its own lines."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Those below 0x20 were escaped already, so that a line that ends here is one of the document's.
    return "\n".join(_INVISIBLE.sub(_escaped_in_json, line) for line in text.split("\n"))


def _escaped_in_json(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1] if found[0] != "\x7f" else "\\u007f"


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return "\\0" if character == "\0" else character.encode("unicode_escape").decode("ascii")
