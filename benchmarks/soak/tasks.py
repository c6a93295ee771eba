"""What the application's tasks do: all of it read, change, write, and nothing that a careful author would add."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlmodel import Session as SQLModelSession

from aftercommit import Retry, current_run
from benchmarks.soak.application import PATIENT, Declined, Flaky, Shop
from benchmarks.soak.plans import GRAINS, PIECES, STEPS
from benchmarks.soak.tables import Effect, Item, KeyRow, Loose, Named, Status, counter_of, effect

# An administrator's pg_cancel_backend never passes by itself, unless it is named: then no key may be left unhandled.
STUBBORN = Retry(attempts=1_000_000, base=0.4, cap=0.4, on=(DBAPIError, Flaky))
FLAKY = Retry(attempts=1_000_000, base=0.05, cap=0.3, on=Flaky)
JoinMode = Literal["conditional_savepoint", "rollback_only", "create_savepoint"]
JOIN_MODES: tuple[JoinMode, ...] = ("conditional_savepoint", "rollback_only", "create_savepoint")


@dataclass(frozen=True)
class Paid:
    """An event with two handlers."""

    label: str


def declare(shop: Shop) -> None:  # noqa: C901, PLR0915  # a list of small functions
    """Declare all tasks."""

    @shop.task()
    def count(session: Session, label: str) -> None:
        effect(session, label, "count", counter=counter_of(label))

    @shop.task()
    def slow(session: Session, label: str) -> None:
        for number in range(PIECES):
            effect(session, label, f"slow{number}")
            shop.doze(0.05)

    @shop.task()
    def steps(session: Session, label: str) -> None:
        _steps(session, label, lambda: shop.doze(0.02))

    @shop.task()
    def steps_beside_others(session: Session, label: str) -> None:
        _steps(session, label, lambda: _look(session, "conditional_savepoint"))

    @shop.task()
    def joined(session: Session, label: str) -> None:
        effect(session, label, "before")
        for mode in JOIN_MODES:
            with Session(bind=session.connection(), join_transaction_mode=mode) as other:
                effect(other, label, "beside")
                other.commit()
        effect(session, label, "after", counter=counter_of(label))

    @shop.task()
    def reads_beside(session: Session, label: str) -> None:
        effect(session, label, "read", counter=counter_of(label))
        _look(session, JOIN_MODES[len(label) % 3])
        with SQLModelSession(bind=session.connection()) as other:
            other.scalar(sa.select(sa.func.count()).select_from(Named))

    @shop.task(retry=FLAKY)
    def flaky(session: Session, label: str) -> None:
        effect(session, label, "flaky", counter=counter_of(label))
        if _run().attempt <= 2:
            raise Flaky(label)

    @shop.task()
    def doomed(session: Session, label: str) -> None:
        effect(session, label, "doomed", counter=counter_of(label))
        raise Declined(label)

    @shop.task(retry=Retry(attempts=2, base=0.05, cap=0.1, on=Flaky))
    def weary(session: Session, label: str) -> None:
        effect(session, label, "weary")
        raise Flaky(label)

    def leaves(session: Session, error: BaseException, label: str) -> None:  # its signature
        effect(session, label, "on_failure", counter="failures")
        raise SystemExit(3)

    @shop.task(on_failure=leaves)
    def exits(session: Session, label: str) -> None:
        effect(session, label, "exits")
        raise Declined(label)

    @shop.task()
    def child(session: Session, label: str) -> None:
        effect(session, label, "child")
        shop.hand_over(session, "count", label)

    @shop.task()
    def never(session: Session, label: str) -> None:
        effect(session, label, "never")

    @shop.task()
    def parent(session: Session, label: str) -> None:
        shop.hand_over(session, "child", label)
        with session.begin_nested() as savepoint:
            session.add(Effect(record="", label=label, name="never", attempt=0))
            shop.hand_over(session, "never", label)
            session.flush()
            savepoint.rollback()
        shop.hand_over(session, "child", label)
        effect(session, label, "parent", counter=counter_of(label))

    @shop.task(repeatable=True)
    def twice(session: Session, label: str) -> None:
        session.merge(Status(label=label, value="half"))
        session.commit()
        shop.doze(0.05)
        session.get_one(Status, label).value = "whole"
        effect(session, label, "twice", counter=counter_of(label))

    @shop.task()
    def named(session: Session, label: str) -> None:
        name = label.rpartition("-")[0]
        found = session.scalar(sa.select(Named).where(Named.name == name))
        if found is None:
            try:
                with session.begin_nested():
                    found = Named(name=name)
                    session.add(found)
            except IntegrityError:
                found = session.scalars(sa.select(Named).where(Named.name == name)).one()
        found.n += 1
        effect(session, label, "named")

    @shop.task(timeout=0.4)
    def overrun(session: Session, label: str) -> None:
        while True:
            _grind(session, label, "overrun")
            if shop.is_async:
                # A loop that never turns could cancel nothing.
                shop.doze(0.0)

    @shop.task()
    def grind(session: Session, label: str) -> None:
        for number in range(GRAINS):
            _grind(session, label, "grain")
            if shop.is_async and number % 50 == 0:
                shop.doze(0.0)

    @shop.task()
    def hang(session: Session, label: str) -> None:
        shop.doze(2.5)
        effect(session, label, "hang", counter=counter_of(label))

    @shop.task(retry=STUBBORN)
    def sweep(session: Session, label: str) -> None:
        """*label* is the key. Some fail at first, so that they go back ``queued`` while others ask for the same key."""
        if _run().attempt == 1 and sum(label.encode()) % 3 == 0:
            shop.doze(0.1)
            raise Flaky(label)
        for row in session.scalars(sa.select(KeyRow).where(KeyRow.key == label, KeyRow.handled == 0)).all():
            _handle(session, row)

    @shop.task(retry=STUBBORN)
    def sweep_in_steps(session: Session, label: str) -> None:
        """What was read at first is what a later run goes on with."""
        run = _run()
        found = run.restored
        if found is None:
            unhandled = sa.select(KeyRow.label).where(KeyRow.key == label, KeyRow.handled == 0)
            found = list(session.scalars(unhandled))
            run.checkpoint(found)
            session.commit()
        shop.doze(0.2)
        if run.attempt == 1 and sum(label.encode()) % 3 == 0:
            raise Flaky(label)
        for each in found:
            row = session.get_one(KeyRow, each)
            if row.handled == 0:
                _handle(session, row)

    @shop.handler(Paid)
    def tally(session: Session, event: Paid) -> None:
        effect(session, event.label, "tally", counter="events")

    @shop.handler(Paid)
    def mail(session: Session, event: Paid) -> None:
        effect(session, event.label, "mail", counter=counter_of(event.label))

    _declare_batch(shop)
    _declare_second(shop)
    _declare_scoped(shop)


def _declare_pair(shop: Shop, name: str, plain: Callable[..., Any], native: Callable[..., Any]) -> None:
    """Declare one of those that await something of ours themselves."""
    given: Any = shop.db.task(name=name, retry=PATIENT, on_failure=shop.on_failure)
    shop.tasks[name] = given(native if shop.is_async else plain)


def _declare_batch(shop: Shop) -> None:
    def handle(session: Session, item: Item) -> None:
        if item.number % 5 == 4:
            raise Declined(item.label)
        item.done += 1
        effect(session, item.label, "item", counter=counter_of(item.label))

    def mark(session: Session, item: Item, error: BaseException) -> None:
        item.failed += 1
        effect(session, item.label, "bad")

    async def native(session: AsyncSession, label: str) -> None:
        items = sa.select(Item).where(Item.label == label)
        await shop.db.async_run_batch(items, handle, size=3, workers=2, on_error=mark)

    def plain(session: Session, label: str) -> None:
        shop.db.run_batch(sa.select(Item).where(Item.label == label), handle, size=3, workers=2, on_error=mark)

    _declare_pair(shop, "batch", plain, native)


def _declare_second(shop: Shop) -> None:
    async def native(session: AsyncSession, label: str) -> None:
        async with shop.db.async_session() as other:
            other.add(Loose(label=label))
        await session.run_sync(effect, label, "second")

    def plain(session: Session, label: str) -> None:
        with shop.db.session() as other:
            other.add(Loose(label=label))
        effect(session, label, "second")

    _declare_pair(shop, "second", plain, native)


def _declare_scoped(shop: Shop) -> None:
    nothing = sa.select(Named).limit(1)

    async def native(session: AsyncSession, label: str) -> None:
        for number in (1, 2):
            async with AsyncSession(bind=await session.connection()) as other:
                await other.execute(nothing)
            await session.run_sync(_step, label, number)
            await session.commit()

    def plain(session: Session, label: str) -> None:
        for number in (1, 2):
            other = scoped_session(sessionmaker(bind=session.connection()))
            other.execute(nothing)
            other.remove()
            _step(session, label, number)
            session.commit()

    _declare_pair(shop, "scoped", plain, native)


def _run() -> Any:
    run = current_run()
    assert run is not None
    return run


def _look(session: Session, mode: JoinMode) -> None:
    """A helper with a session of its own on the task's connection: it only reads."""
    with Session(bind=session.connection(), join_transaction_mode=mode) as other:
        other.scalar(sa.select(sa.func.count()).select_from(Named))


def _steps(session: Session, label: str, between: Callable[[], None]) -> None:
    run = _run()
    for number in range(run.restored or 0, STEPS):
        effect(session, label, f"step{number}", counter=counter_of(label))
        between()
        run.checkpoint(number + 1)
        session.commit()


def _step(session: Session, label: str, number: int) -> None:
    """One of several steps, unless an earlier run has done it."""
    run = _run()
    if (run.restored or 0) < number:
        effect(session, label, f"part{number}")
        run.checkpoint(number)


def _grind(session: Session, label: str, name: str) -> None:
    """One small statement of very many, so that whoever stops the run meets it at every point."""
    values = {"record": _run().id.hex, "label": label, "name": name, "attempt": _run().attempt}
    session.execute(sa.insert(Effect).values(values))


def _handle(session: Session, row: KeyRow) -> None:
    row.handled += 1
    effect(session, row.label, "handled")
