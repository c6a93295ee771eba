"""What requests ask for, and which records each of them must leave."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from sqlalchemy.orm import Session

from benchmarks.soak.application import Shop
from benchmarks.soak.plans import ITEMS
from benchmarks.soak.tables import Asked, Item, KeyRow
from benchmarks.soak.tasks import Paid

BLOCK = 8
"""Requests in a row of one asker that share a key, a name, or an event's key with the other askers of its process."""

MEETING = 2
"""Of those, how many of each asker share a task's key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, made of the seed alone.

    Attributes:
        label: Its name, ``block-number``, where the block is shared with other askers.
        kind: What it asks for.
        gives_up: Whether it raises at its end, so that it is rolled back.
        pause: Seconds before it.
        rng: For what else it decides.
    """

    label: str
    kind: str
    gives_up: bool
    pause: float
    rng: Random

    @property
    def block(self) -> str:
        """What it shares with others of its time."""
        return self.label.rpartition("-")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a request asks for.

    Attributes:
        ask: Called with the shop, the request's session and the request.
        records: By task, how many records carry its label, those that a task asked for left out.
        weight: How often it is chosen.
        pause: Seconds at most between two of them.
        may_be_cancelled: Whether its records may end ``cancelled``.
        is_shared: Whether its event's key is shared with others, so that its records carry the block as their label.
    """

    ask: Callable[[Shop, Session, Request], object]
    records: dict[str, int] = field(default_factory=dict)
    weight: float = 1.0
    pause: float = 0.03
    may_be_cancelled: bool = False
    is_shared: bool = False


def _one(task: str, **options: float) -> Callable[[Shop, Session, Request], object]:
    def ask(shop: Shop, session: Session, request: Request) -> object:
        return shop.hand_over(session, task, request.label, **options)

    return ask


def _many(shop: Shop, session: Session, request: Request) -> None:
    for _ in range(5):
        shop.hand_over(session, "count", request.label)


def _batch(shop: Shop, session: Session, request: Request) -> None:
    session.add_all(Item(label=request.label, number=number) for number in range(ITEMS))
    shop.hand_over(session, "batch", request.label)


def _keyed(task: str) -> Callable[[Shop, Session, Request], object]:
    def ask(shop: Shop, session: Session, request: Request) -> None:
        # A few at a time: what a lost wake-up leaves behind, a later request of the same key would pick up.
        number = int(request.label.rpartition(".")[2])
        meeting = MEETING if task == "sweep" else 1
        key = f"{request.block}/{task}/{number // meeting}"
        session.add(KeyRow(label=request.label, key=key))
        shop.hand_over(session, task, key, key=key, delay=request.rng.choice([0.0, 0.03, 0.1]))

    return ask


def _savepoints(shop: Shop, session: Session, request: Request) -> None:
    with suppress(_Enough), session.begin_nested():
        shop.hand_over(session, "never", request.label)
        session.add(KeyRow(label=f"{request.label}/never", key="never"))
        session.flush()
        raise _Enough
    with session.begin_nested():
        shop.hand_over(session, "count", request.label)


def _joined(shop: Shop, session: Session, request: Request) -> None:
    with Session(bind=session.connection(), join_transaction_mode="create_savepoint") as other:
        shop.hand_over(other, "count", request.label)
        other.commit()


def _event(shop: Shop, session: Session, request: Request) -> None:
    shop.db.publish(session, Paid(request.label))


def _keyed_event(shop: Shop, session: Session, request: Request) -> None:
    shop.db.publish(session, Paid(request.block), key=request.block)


class _Enough(Exception):  # an exit, not an error
    pass


KINDS: dict[str, Kind] = {
    "count": Kind(ask=_one("count"), records={"count": 1}, weight=3.0),
    "many": Kind(ask=_many, records={"count": 5}),
    "later": Kind(ask=_one("count", delay=0.7), records={"count": 1}),
    "slow": Kind(ask=_one("slow"), records={"slow": 1}, weight=2.0),
    "steps": Kind(ask=_one("steps"), records={"steps": 1}),
    "steps_beside_others": Kind(ask=_one("steps_beside_others"), records={"steps_beside_others": 1}),
    "joined": Kind(ask=_one("joined"), records={"joined": 1}),
    "reads_beside": Kind(ask=_one("reads_beside"), records={"reads_beside": 1}),
    "scoped": Kind(ask=_one("scoped"), records={"scoped": 1}),
    "flaky": Kind(ask=_one("flaky"), records={"flaky": 1}),
    "doomed": Kind(ask=_one("doomed"), records={"doomed": 1}, weight=2.0),
    "weary": Kind(ask=_one("weary"), records={"weary": 1}),
    "exits": Kind(ask=_one("exits"), records={"exits": 1}, weight=0.3),
    "parent": Kind(ask=_one("parent"), records={"parent": 1}),
    "batch": Kind(ask=_batch, records={"batch": 1}),
    "twice": Kind(ask=_one("twice"), records={"twice": 1}),
    "named": Kind(ask=_one("named"), records={"named": 1}),
    "second": Kind(ask=_one("second"), records={"second": 1}),
    "overrun": Kind(ask=_one("overrun"), records={"overrun": 1}),
    "grind": Kind(ask=_one("grind"), records={"grind": 1}, weight=0.4),
    "hang": Kind(ask=_one("hang"), records={"hang": 1}, weight=0.2),
    "cancel": Kind(ask=_one("count", delay=0.1), records={"count": 1}, may_be_cancelled=True),
    "savepoints": Kind(ask=_savepoints, records={"count": 1}),
    "joined_request": Kind(ask=_joined, records={"count": 1}),
    "event": Kind(ask=_event, records={"tally": 1, "mail": 1}),
    "keyed_event": Kind(ask=_keyed_event, records={"tally": 1, "mail": 1}, is_shared=True),
    "key": Kind(ask=_keyed("sweep"), weight=4.0),
    # Apart, so that some come when the run has read its rows, and has been queued again.
    "key_in_steps": Kind(ask=_keyed("sweep_in_steps"), weight=2.0, pause=0.6),
}


def body_of(shop: Shop, request: Request) -> Callable[[Session], object]:
    """What a request does within its transaction."""
    kind = KINDS[request.kind]

    def body(session: Session) -> object:
        shared = request.block if kind.is_shared else None
        session.add(Asked(label=request.label, kind=request.kind, shared=shared))
        handle = kind.ask(shop, session, request)
        session.flush()
        return handle

    return body


def requests_of(seed: str, worker: str, asker: int, only: list[str] | None) -> "Requests":
    """Everything that one asker of one process will ask for, without end."""
    return Requests(seed, worker, asker, only or list(KINDS))


class Requests:
    """An iterator of requests: a block of several askers is often about one kind, so that they meet."""

    def __init__(self, seed: str, worker: str, asker: int, kinds: list[str]) -> None:
        self._name = f"{seed}/{worker}"
        self._worker, self._asker, self._kinds = worker, asker, kinds
        self._number = 0

    def __iter__(self) -> "Requests":
        return self

    def __next__(self) -> Request:
        """The next one."""
        number, self._number = self._number, self._number + 1
        block = f"{self._worker}.{number // BLOCK}"
        theme = Random(f"{self._name}/{block}")
        rng = Random(f"{self._name}/{self._asker}/{number}")
        kind = self._choose(theme) if theme.random() < 0.4 else self._choose(rng)
        label = f"{block}-{self._asker}.{number}"
        pause = rng.uniform(0.0, KINDS[kind].pause)
        return Request(label=label, kind=kind, gives_up=rng.random() < 0.12, pause=pause, rng=rng)

    def _choose(self, rng: Random) -> str:
        return rng.choices(self._kinds, [KINDS[each].weight for each in self._kinds])[0]
