"""``@db.around``: what an application puts around every run."""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.orm import Session

from aftercommit.errors import TaskDefinitionError
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Workshop


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database)
    yield shop
    shop.close()


def surround(
    shop: Workshop, before: Callable[[Any, Session], None], after: Callable[[Any, Session], None] = lambda *_: None
) -> None:
    """Declare a function around every run of the flavour under test."""

    def plain(run: Any, session: Session) -> Iterator[None]:
        before(run, session)
        yield
        after(run, session)

    async def native(run: Any, session: Any) -> AsyncIterator[None]:
        await session.run_sync(lambda sync: before(run, sync))
        yield
        await session.run_sync(lambda sync: after(run, sync))

    shop.db.around(native if shop.is_async else plain)


def writing(label: str) -> Callable[[Any, Session], None]:
    """Write an effect in the run's transaction."""

    def write(run: Any, session: Session) -> None:
        session.add(Effect(label=f"{label} {run.name}"))
        session.flush()

    return write


def refuse(*_: object) -> None:
    """Fail."""
    raise ValueError("no tenant")


def test_they_nest_in_the_transaction(shop: Workshop) -> None:
    """What stands around a run writes in its transaction, in the order of declaration, with the run at hand."""
    order: list[str] = []
    for name in ("outer", "inner"):
        surround(
            shop,
            lambda run, session, name=name: (order.append(f"+{name}"), writing(name)(run, session))[0],  # type: ignore[misc]
            lambda *_, name=name: order.append(f"-{name}"),  # type: ignore[misc]
        )

    @shop.task()
    def work(session: Session, label: str) -> None:
        order.append(label)

    with shop.running():
        id = shop.ask(work, "work")
        shop.drain()

    assert order == ["+outer", "+inner", "work", "-inner", "-outer"]
    assert shop.effects() == ["inner work", "outer work"]
    assert shop.record(id).state == "succeeded"


@pytest.mark.parametrize("where", ["before", "after"])
def test_its_error_fails_the_run(shop: Workshop, where: str) -> None:
    """What raises around a run fails it, and nothing of the run is committed."""
    surround(shop, *((refuse,) if where == "before" else (lambda *_: None, refuse)))

    @shop.task()
    def work(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    with shop.running():
        id = shop.ask(work, "work")
        shop.drain()

    record = shop.record(id)
    assert (record.state, shop.effects()) == ("failed", [])
    assert "no tenant" in str(record.error)


def test_one_that_swallows_the_error_makes_no_success(shop: Workshop) -> None:
    """A run that raised has failed, whatever stands around it makes of the error."""

    @shop.db.around
    def plain(run: Any, session: Session) -> Iterator[None]:
        try:
            yield
        except ValueError:
            return

    @shop.db.around
    async def native(run: Any, session: Any) -> AsyncIterator[None]:
        try:
            yield
        except ValueError:
            return

    @shop.task()
    def work(session: Session, label: str) -> None:
        session.add(Effect(label=label))
        raise ValueError("not today")

    with shop.running():
        id = shop.ask(work, "work")
        shop.drain()

    record = shop.record(id)
    assert (record.state, shop.effects()) == ("failed", [])
    assert "not today" in str(record.error)


def test_on_failure_is_inside(shop: Workshop) -> None:
    """on_failure has what the run had."""
    surround(shop, writing("tenant"))

    def compensate(session: Any, error: Exception, label: str) -> None:
        session.add(Effect(label=f"compensated {label}"))

    @shop.task(on_failure=compensate)
    def work(session: Session, label: str) -> None:
        raise ValueError(label)

    with shop.running():
        shop.ask(work, "work")
        shop.drain()

    assert shop.effects() == ["compensated work", "tenant work"]


def test_a_run_of_the_other_kind_is_refused(shop: Workshop) -> None:
    """A task that nothing can surround does not run without its tenant."""

    async def native(run: Any, session: Any) -> AsyncIterator[None]:
        yield

    def plain(run: Any, session: Any) -> Iterator[None]:
        yield

    shop.db.around(plain if shop.is_async else native)

    @shop.task()
    def work(session: Session, label: str) -> None:
        session.add(Effect(label=label))

    with shop.running():
        id = shop.ask(work, "work")
        shop.drain()

    record = shop.record(id)
    assert (record.state, shop.effects()) == ("failed", [])
    assert "twin" in str(record.error)


def test_what_can_be_none_is_refused_at_its_declaration(shop: Workshop) -> None:
    """A function that does not yield, or takes something else, is refused where it stands."""

    def returns(run: Any, session: Any) -> None:
        """Nothing."""

    def narrow(run: Any) -> Iterator[None]:
        yield

    for function in (returns, narrow):
        with pytest.raises(TaskDefinitionError, match="around"):
            shop.db.around(function)
