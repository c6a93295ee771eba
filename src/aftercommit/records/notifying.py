"""NOTIFY, where there is one: other processes hear of work without asking for it.

Never in a transaction of the application's: a transaction that notifies takes a lock of the whole database at its
commit, which halves what the server can commit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from aftercommit.records.statement import Statement

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection

__all__ = ["CHANNEL", "News", "notify", "read"]

CHANNEL: Final = "aftercommit"

_NOTIFY = Statement(f"SELECT pg_notify('{CHANNEL}', :news)")


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What one notification says.

    Attributes:
        pools: Pools that have something queued.
        look: Whether pools were paused or resumed.
        echo: What a listener sent to find out whether it is heard.
        cancelled: Tasks that were cancelled while a worker had them.
    """

    pools: frozenset[str]
    look: bool
    echo: str
    cancelled: frozenset[UUID] = frozenset()


def notify(
    connection: Connection,
    pools: Collection[str],
    *,
    look: bool = False,
    echo: str = "",
    cancelled: Collection[UUID] = (),
) -> None:
    """Tell every listener, at the commit; nothing on databases that cannot."""
    if connection.dialect.name == "postgresql":
        news = {"pools": sorted(pools), "look": look, "echo": echo}
        if cancelled:
            news["cancelled"] = [str(each) for each in cancelled]
        _NOTIFY.execute(connection, {"news": json.dumps(news)})


def read(payload: str) -> News:
    """Understand a notification; what a later release says and this one does not know is left out."""
    try:
        news: Any = json.loads(payload)
        return News(
            pools=frozenset(str(name) for name in news.get("pools", ())),
            look=bool(news.get("look")),
            echo=str(news.get("echo", "")),
            cancelled=frozenset(UUID(str(each)) for each in news.get("cancelled", ())),
        )
    except (ValueError, AttributeError, TypeError):
        # Anybody may send anything on this channel; looking does no harm.
        return News(pools=frozenset(), look=True, echo="")
