"""What belongs to the application is left as it is: what others keep, compare, replace and see raised."""

import traceback
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database
from tests.support.databases import DatabaseUnderTest
from tests.support.workshop import Workshop

ONE = sa.text("SELECT 1")


def test_the_info_of_sessions_and_connections_is_the_application_s(database: DatabaseUnderTest) -> None:
    """In requests and in tasks, nothing of ours stands there."""
    shop = Workshop(database)
    found: list[Any] = []

    def look(session: Session) -> None:
        connection = session.connection()
        connection.execute(ONE)
        pooled = connection.connection
        found.extend((dict(session.info), dict(connection.info), dict(pooled.info), dict(pooled.record_info or {})))

    def plain(session: Session) -> None:
        look(session)

    async def native(session: AsyncSession) -> None:
        await session.run_sync(look)

    task: Any = shop.db.task(name="look")(native if shop.is_async else plain)  # type: ignore[arg-type]
    with shop.running():
        shop.commit(lambda session: (look(session), shop.db.after_commit(session, task)))
        shop.drain()
        shop.commit(look)
    shop.close()

    assert found == [{}] * 12


@pytest.mark.drivers("pysqlite")
def test_an_error_of_connecting_is_raised_in_the_middle_of_no_other(database: DatabaseUnderTest) -> None:
    """What SQLAlchemy's own pool raises, and nothing before it."""
    url = f"sqlite:///{database.path}/nowhere/x.db"
    chains = []
    for engine in (sa.create_engine(url), Database(url).engine()):
        with pytest.raises(sa.exc.OperationalError) as caught:
            engine.connect()
        error: BaseException | None = caught.value
        chain = []
        while error is not None:
            chain.append(type(error))
            error = error.__cause__ or error.__context__
        chains.append(chain)
        assert "queue" not in "".join(traceback.format_exception(caught.value))

    assert chains[0] == chains[1]


def test_a_session_on_a_mocked_connection_closes() -> None:
    """As if the library was not imported."""
    begun = mock.Mock(_is_future=False, in_transaction=mock.Mock(return_value=False))
    connection = mock.Mock(_is_future=False, execution_options=mock.Mock(return_value=begun))
    session = Session(bind=mock.Mock(connect=mock.Mock(return_value=connection)))

    session.connection(execution_options={"isolation_level": "FOO"})
    session.close()

    assert begun.close.called or connection.close.called
