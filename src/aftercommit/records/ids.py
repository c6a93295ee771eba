"""Ids that sort by time: UUID version 7, always rising within a process."""

from __future__ import annotations

import os
import threading
import time
from typing import Final
from uuid import UUID

__all__ = ["uuid7"]

_COUNTER_BITS: Final = 42
_lock = threading.Lock()
_last_ms = 0
_counter = 0


def uuid7() -> UUID:
    """Return a new UUIDv7; within a process each is greater than the one before.

    Source: RFC 9562, section 5.7, with the monotonic counter of section 6.2, method 1.
    """
    global _last_ms, _counter  # noqa: PLW0603  # the counter is the point
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last_ms:
            _last_ms = now
            # The top bit is left free, so that the counter has room to count up within a millisecond.
            _counter = int.from_bytes(os.urandom(6), "big") >> 7
        else:
            _counter += 1
            if _counter >> _COUNTER_BITS:
                _last_ms += 1
                _counter = 0
        ms, counter = _last_ms, _counter
    tail = int.from_bytes(os.urandom(4), "big")
    high, low = counter >> 30, counter & (1 << 30) - 1
    return UUID(int=ms << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low << 32 | tail)
