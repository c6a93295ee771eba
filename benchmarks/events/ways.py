"""Four ways to add one to a row."""

from dataclasses import dataclass

from sqlalchemy import update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.events.table import Account, OrderCreated


@dataclass(slots=True)
class Job:
    """What a side is to do.

    Attributes:
        url: The database.
        events: The events.
        width: Handlers at once.
        calls: How often handlers were called: more often than there are events, where conflicts repeat them.
    """

    url: str
    events: list[OrderCreated]
    width: int
    calls: int = 0


async def naive(session: AsyncSession, event: OrderCreated) -> None:
    """Read, add, write back."""
    account = await session.get_one(Account, event.account)
    account.n += 1


async def for_update(session: AsyncSession, event: OrderCreated) -> None:
    """The same, with the row locked from the read on."""
    account = await session.get_one(Account, event.account, with_for_update=True)
    account.n += 1


async def in_the_database(session: AsyncSession, event: OrderCreated) -> None:
    """Let the database add."""
    await session.execute(
        update(Account).where(Account.id == event.account).values(n=Account.n + 1),
        execution_options={"synchronize_session": False},
    )


async def upsert(session: AsyncSession, event: OrderCreated) -> None:
    """Let it add, or make the row."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    await session.execute(
        insert(Account)
        .values(id=event.account, n=1)
        .on_conflict_do_update(index_elements=["id"], set_={"n": Account.n + 1})
    )
