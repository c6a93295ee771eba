"""Tables of the soak's application, each with an invariant that the books hold it to."""

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aftercommit import current_run


class Base(DeclarativeBase):
    """Tables of the application."""


class Asked(Base):
    """One row for each request, in the transaction that handed its tasks over.

    Attributes:
        label: Of the request; its tasks carry it as an argument.
        kind: What it asked for.
        shared: The event's key that it shares with other requests, or None.
    """

    __tablename__ = "asked"
    label: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    shared: Mapped[str | None]


class Effect(Base):
    """One line for each thing that a run did. Nothing here is unique: what is done twice stands here twice.

    Attributes:
        record: The run's id, as hex.
        label: Of the request.
        name: What was done.
        counter: The counter that was counted up along with it.
        attempt: Of the run, for whoever reads a finding.
    """

    __tablename__ = "effect"
    id: Mapped[int] = mapped_column(primary_key=True)
    record: Mapped[str] = mapped_column(index=True)
    label: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    counter: Mapped[str | None]
    attempt: Mapped[int]


class Counter(Base):
    """Counted up by reading and writing: it must end at the number of effects that name it."""

    __tablename__ = "counter"
    name: Mapped[str] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(default=0)


class KeyRow(Base):
    """What a keyed task looks for: each must have been handled once."""

    __tablename__ = "key_row"
    label: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(index=True)
    handled: Mapped[int] = mapped_column(default=0)


class Item(Base):
    """A record of a batch; every fifth is bad, so that its handler raises."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(index=True)
    number: Mapped[int]
    done: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)


class Named(Base):
    """Got or created by its unique name, and counted up: it must end at the number of effects that name it."""

    __tablename__ = "named"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    n: Mapped[int] = mapped_column(default=0)


class Status(Base):
    """Set by a repeatable task, once or more often, always to the same."""

    __tablename__ = "status"
    label: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Loose(Base):
    """Written by a task in a second session: at least once, and nothing more is promised."""

    __tablename__ = "loose"
    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(index=True)


def effect(session: Session, label: str, name: str, *, counter: str | None = None) -> None:
    """Note that something was done; count by reading and writing, as people do."""
    run = current_run()
    assert run is not None
    session.add(Effect(record=run.id.hex, label=label, name=name, counter=counter, attempt=run.attempt))
    if counter is not None:
        row = session.get_one(Counter, counter)
        row.n += 1
    # So that an error of the statement has the application's own lines in its traceback.
    session.flush()


def counter_of(label: str) -> str:
    """One of three counters, so that they are wanted by many at once."""
    return f"counter{sum(label.encode()) % 3}"


COUNTERS = ("counter0", "counter1", "counter2", "failures", "events")
