"""Rows that are another row to the task's session than to the one that hands them over."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from aftercommit import Database
from aftercommit.errors import HandOverError
from tests.support.workshop import Base, Counter

MAP = {None: "main", "tenant": "main"}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database with a counter in it."""
    url = f"sqlite:///{tmp_path / 'app.db'}"
    engine = sa.create_engine(url)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Counter(id=1))
    engine.dispose()
    return url


def test_a_row_of_a_translated_schema_is_refused(url: str) -> None:
    """The task would load the row of the same key from the schema that its own session sees; plain data may cross."""
    db = Database(url)
    db.create_tables()

    @db.task
    def with_row(session: Session, counter: Counter) -> None: ...

    @db.task
    def with_key(session: Session, id: int) -> None: ...

    with Session(db.engine().execution_options(schema_translate_map=MAP)) as session:
        counter = session.get_one(Counter, 1)
        with pytest.raises(HandOverError, match="schema_translate_map"):
            db.after_commit(session, with_row, counter)
        db.after_commit(session, with_key, 1)
    db.dispose()


def test_a_row_with_an_identity_token_is_refused(url: str) -> None:
    """A shard is a part of the row's identity that a reference does not carry."""
    db = Database(url)
    db.create_tables()

    @db.task
    def with_row(session: Session, counter: Counter) -> None: ...

    with Session(db.engine()) as session:
        counter = session.get_one(Counter, 1, identity_token="north")
        db.after_commit(session, with_row, counter)
        with pytest.raises(HandOverError, match="north"):
            session.commit()
    db.dispose()
