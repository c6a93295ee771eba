"""At which line of the application's own code an event loop stands."""

from __future__ import annotations

import asyncio.base_events
import asyncio.events
import asyncio.runners
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aftercommit.watch.call_sites import is_users

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["line_on_loop"]

# Whoever is behind these has started the loop, and does nothing but wait for it.
_LOOP: Final = frozenset(each.__file__ for each in (asyncio.base_events, asyncio.events, asyncio.runners))
_INSTALLED: Final = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_STANDARD: Final = str(Path(os.__file__).parent) + os.sep


def line_on_loop(thread: int) -> str | None:
    """Return the innermost line of the application's own code in what runs on an event loop at this moment.

    Libraries are left out: what blocks is mostly theirs, and what can be mended is the line that calls it. Of an
    application that is installed like a library, it is the innermost line of all that is.

    Args:
        thread: The identity of the thread that the loop is on.

    Returns:
        ``file:line in function``; None where nothing of that kind runs on it.
    """
    frame: FrameType | None = sys._current_frames().get(thread)  # noqa: SLF001  # documented, though named so
    innermost: str | None = None
    while frame is not None and frame.f_code.co_filename not in _LOOP:
        code = frame.f_code
        is_installed = any(each in code.co_filename for each in _INSTALLED)
        if is_users(code.co_filename) and (is_installed or not code.co_filename.startswith(_STANDARD)):
            line = f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
            if not is_installed:
                return line
            innermost = innermost or line
        frame = frame.f_back
    return innermost
