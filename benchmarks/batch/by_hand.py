"""What people write: slices of ids, a session for each, and ``try`` around each record."""

from collections.abc import Iterator

from sqlalchemy import Engine, create_engine, select, update
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.batch.table import SIZE, Order, refuse, settle, tune


def _slices(engine: Engine) -> Iterator[list[int]]:
    with Session(engine) as session:
        ids = list(session.scalars(select(Order.id).where(Order.state == "new").order_by(Order.id)))
    for start in range(0, len(ids), SIZE):
        yield ids[start : start + SIZE]


def loop(url: str) -> None:
    """A session and a commit per slice. What the *database* refuses of a record loses its whole slice."""
    engine = tune(create_engine(url))
    new_session = sessionmaker(engine)
    for ids in _slices(engine):
        session = new_session()
        try:
            for order in session.query(Order).filter(Order.id.in_(ids)).all():
                try:
                    settle(session, order)
                except Exception as error:  # noqa: BLE001  # as people write it
                    refuse(session, order, error)
            session.commit()
        finally:
            session.close()
    engine.dispose()


def loop_with_savepoints(url: str) -> None:
    """The same with a savepoint around each record, so that what the database refuses of one costs only that one."""
    engine = tune(create_engine(url))
    new_session = sessionmaker(engine)
    for ids in _slices(engine):
        session = new_session()
        try:
            for order in session.query(Order).filter(Order.id.in_(ids)).all():
                try:
                    with session.begin_nested():
                        settle(session, order)
                except Exception as error:  # noqa: BLE001  # as people write it
                    refuse(session, order, error)
            session.commit()
        finally:
            session.close()
    engine.dispose()


def loop_with_commits(url: str) -> None:
    """The same with a commit after each record: the other way to lose nothing to a bad one."""
    engine = tune(create_engine(url))
    new_session = sessionmaker(engine)
    for ids in _slices(engine):
        session = new_session()
        try:
            for id_ in ids:
                order = session.get_one(Order, id_)
                try:
                    settle(session, order)
                    session.commit()
                except Exception as error:  # noqa: BLE001  # as people write it
                    session.rollback()
                    refuse(session, order, error)
                    session.commit()
        finally:
            session.close()
    engine.dispose()


def one_update(url: str) -> None:
    """One UPDATE over all of it: the least that the database can be asked to do, in one long transaction."""
    engine = tune(create_engine(url))
    with engine.begin() as connection:
        connection.execute(
            update(Order).where(Order.state == "new").values(state="settled", done=Order.done + 1),
        )
    engine.dispose()
