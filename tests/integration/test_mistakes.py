"""Mistakes that Python or the database answers with a bare line: ours says what to write."""

import asyncio
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from aftercommit import Database
from aftercommit.errors import HandOverError
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Effect, Workshop


@dataclass
class Happened:
    """An event that nobody handles."""


@pytest.fixture
def shop(database: DatabaseUnderTest) -> Iterator[Workshop]:
    """A workshop on each driver in turn."""
    shop = Workshop(database)
    yield shop
    shop.close()


@pytest.mark.drivers("pysqlite")
def test_a_hand_over_is_not_awaited(shop: Workshop):
    """Awaiting what ``after_commit`` or ``publish`` gave back says that there is nothing to wait for."""

    @shop.task()
    def work(session: Session, label: str) -> None: ...

    async def wait(handle: object) -> None:
        await handle  # type: ignore[misc]

    with shop.running(), shop.db.session() as session:
        for handle in (shop.db.after_commit(session, work), shop.db.publish(session, Happened())):
            with pytest.raises(HandOverError, match="Leave out the `await`"):
                asyncio.run(wait(handle))
        session.rollback()


@pytest.mark.drivers("pysqlite")
def test_a_task_that_is_called_without_a_session_says_how_it_is_handed_over(shop: Workshop):
    """A row, plain data or nothing in the place of the session; what may stand for one in a test is let through."""
    seen: list[object] = []

    @shop.db.task
    def confirm(session: Session, order: Effect) -> None:
        seen.append(session)
        if order is None:
            raise TypeError("its own")

    order, fake = Effect(label="x"), SimpleNamespace(add=seen.append)

    for call in (
        lambda: confirm(order), lambda: confirm(7), confirm, lambda: confirm(order=order),  # type: ignore[call-arg,arg-type]
        lambda: confirm(order, order), lambda: confirm(SimpleNamespace()),  # type: ignore[call-arg]
    ):  # fmt: skip
        with pytest.raises(HandOverError, match=r"after_commit\(confirm") as caught:
            call()
        assert isinstance(caught.value, TypeError)
    confirm(fake, order)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="its own"):
        confirm(fake, None)  # type: ignore[call-arg]
    assert seen == [fake, fake]


def test_a_table_of_the_applications_own_that_is_missing_is_told_of(shop: Workshop):
    """The error of the database has a note that says who makes which tables, once."""

    def use(session: Session) -> None:
        session.execute(sa.text("SELECT * FROM nowhere"))

    with shop.running():
        with pytest.raises(DBAPIError) as caught:
            shop.commit(use)

        assert "create_tables=Base.metadata" in "".join(traceback.format_exception(caught.value))
        assert len(getattr(caught.value, "__notes__", [])) == 1


def test_a_column_or_a_table_of_ours_has_no_such_note(postgres_url: str):
    """It is about missing tables, and about the application's."""
    db = Database(postgres_url)
    for statement in ("SELECT nothing FROM pg_class", "SELECT * FROM aftercommit_task"):
        with pytest.raises(DBAPIError) as caught, db.session() as session:
            session.execute(sa.text(statement))
        assert not getattr(caught.value, "__notes__", [])
    db.dispose()
