"""What the library says while it works: frozen payloads, and one place to subscribe.

Subscribers are plain functions. They are called where the thing happens: on the event loop, on a task's thread, or
on the bookkeeping thread; they must be quick and must not block. One that raises is logged and harms nobody.

```python
from aftercommit import signals

@signals.subscribe(signals.TaskFailed)
def page_someone(signal: signals.TaskFailed) -> None: ...
```
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aftercommit.errors import ConfigurationError
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from uuid import UUID

__all__ = [
    "ClaimLost",
    "ConnectionAwaited",
    "ConnectionHeld",
    "ConnectionReturned",
    "ConnectionUsed",
    "DatabaseDown",
    "DatabaseUp",
    "LoopBlocked",
    "PoolPaused",
    "PoolRanDry",
    "PoolResumed",
    "RunSignal",
    "ScheduleChanged",
    "ScheduleEnded",
    "ScheduleFired",
    "ScheduleMissed",
    "ScheduleSkipped",
    "SessionLeaked",
    "Signal",
    "TaskDiscarded",
    "TaskFailed",
    "TaskGivenBack",
    "TaskPostponed",
    "TaskRetried",
    "TaskStarted",
    "TaskSucceeded",
    "TasksCancelled",
    "TasksHandedOver",
    "TasksLost",
    "TasksRequeued",
    "TasksRescued",
    "WorkerStarted",
    "WorkerStopped",
    "emit",
    "subscribe",
    "unsubscribe",
    "wanted",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """Base of all payloads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksHandedOver(Signal):
    """Tasks of one transaction were committed; those whose key was queued already are not among them.

    Attributes:
        tasks: Their names.
        ids: Their ids, in the same order.
        pools: The pools they run in, in the same order.
    """

    tasks: tuple[str, ...]
    ids: tuple[UUID, ...]
    pools: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksLost(Signal):
    """Tasks were waiting in a session that closed without a commit; they will never run.

    Attributes:
        tasks: Their names.
        lines: Where each was handed over, as ``"file:line in function"``.
    """

    tasks: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSignal(Signal):
    """A step in the life of one run.

    Attributes:
        task: The task's name.
        id: The id of its record.
        pool: The pool it runs in.
        attempt: 1 for the first.
    """

    task: str
    id: UUID
    pool: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStarted(RunSignal):
    """A run began.

    Attributes:
        waited: Seconds since it was due, by this machine's clock; 0.0 where unknown.
    """

    waited: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSucceeded(RunSignal):
    """A run's own commit is done.

    Attributes:
        seconds: From start to commit.
        repeats: How often the run was repeated after conflicts.
    """

    seconds: float
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRetried(RunSignal):
    """A run failed in a way that may pass, and will be made again.

    Attributes:
        error: The exception.
        delay: Seconds until it is tried again; 0.0 for at once.
        in_place: Whether this worker repeats it itself, without giving the record back.
    """

    error: BaseException
    delay: float
    in_place: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailed(RunSignal):
    """A run failed for good; the record says so.

    Attributes:
        error: The exception.
        seconds: From start to failure.
        expected: Whether ``@db.task(expected=…)`` names it: an outcome that the application knows, and no alarm.
    """

    error: BaseException
    seconds: float
    expected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDiscarded(RunSignal):
    """A run raised ``Discard``: rolled back, and the record says ``cancelled``.

    Attributes:
        reason: As the task has said it.
        seconds: From start to end.
    """

    reason: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPostponed(RunSignal):
    """A run raised ``RetryLater``: rolled back, and queued again; its attempt does not count.

    Attributes:
        delay: Seconds until it is due again.
        reason: As the task has said it.
    """

    delay: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskGivenBack(RunSignal):
    """A run was interrupted by an orderly stop and its record is queued again.

    Attributes:
        reason: Why, in words.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimLost(RunSignal):
    """A run found its record in other hands: rescued, or cancelled. It was rolled back.

    Attributes:
        seconds: From its start here until it was noticed.
        is_cancelled: Whether it was cancelled by hand.
        by: Who has cancelled it, if that was said.
    """

    seconds: float
    is_cancelled: bool = False
    by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksCancelled(Signal):
    """Tasks were cancelled from this process; a run of one, wherever it is, ends with ``ClaimLost``.

    Attributes:
        ids: Their ids.
        by: Who has cancelled them, if that was said.
    """

    ids: tuple[UUID, ...]
    by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksRequeued(Signal):
    """Tasks were queued once more from this process, and not by a run of theirs.

    Attributes:
        ids: Their ids.
        reason: Why, in words.
    """

    ids: tuple[UUID, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksRescued(Signal):
    """Tasks of silent workers were given to others.

    Attributes:
        requeued: Ids that are queued again.
        failed: Ids that died as often as they may be tried, and failed.
    """

    requeued: tuple[UUID, ...]
    failed: tuple[UUID, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStarted(Signal):
    """A runner started in this process.

    Attributes:
        worker: Its id.
        pools: The pools it runs.
    """

    worker: UUID
    pools: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStopped(Signal):
    """A runner stopped in order.

    Attributes:
        worker: Its id.
        given_back: How many runs were interrupted and queued again.
    """

    worker: UUID
    given_back: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseDown(Signal):
    """The bookkeeping of this process cannot work on the database; told once, until it can again.

    Attributes:
        error: The exception.
    """

    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseUp(Signal):
    """The database answers again.

    Attributes:
        seconds: For how long it did not.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPaused(Signal):
    """This process has noticed that a pool is paused: it starts no more tasks of it.

    Attributes:
        pool: Its name.
    """

    pool: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolResumed(Signal):
    """This process has noticed that a pool was resumed.

    Attributes:
        pool: Its name.
    """

    pool: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRanDry(Signal):
    """Somebody waited for a connection in vain, and was given ``PoolExhausted``.

    Attributes:
        pool: The pool.
        seconds: For how long he waited; 0.0 where to wait would have been in vain.
        held: How many connections are in use.
        waiting: How many others are waiting.
    """

    pool: str
    seconds: float
    held: int
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionHeld(Signal):
    """A connection has been held for longer than its pool allows, or SQLite's write lock; each is told once.

    Attributes:
        pool: The pool it belongs to.
        owner: Who has it: a request line with its endpoint, a task with attempt, id and function, or a line of the
            user's own code; frames of libraries are left out.
        seconds: For how long so far.
        idle: Seconds for which its transaction has been open with nothing running in it; None while a statement runs.
        locked: Whether it holds SQLite's write lock.
        statement: The statement that was run last, without its values; None before the first.
    """

    pool: str
    owner: str
    seconds: float
    idle: float | None
    locked: bool
    statement: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionReturned(Signal):
    """A connection that had been reported as held for too long came back.

    Attributes:
        pool: The pool it belongs to.
        owner: Who had it.
        seconds: For how long in all.
    """

    pool: str
    owner: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionAwaited(Signal):
    """Somebody had to wait for a connection, and has one now, or has given up; told only where somebody listens.

    Attributes:
        pool: The pool it belongs to.
        seconds: For how long he waited.
    """

    pool: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionUsed(Signal):
    """A request or a task gave its connection back; told only where somebody listens.

    Attributes:
        pool: The pool it belongs to.
        kind: Who had it: ``"request"`` or ``"task"``.
        seconds: For how long.
    """

    pool: str
    kind: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLeaked(Signal):
    """A session was dropped without being ended, and its connection was given back, rolled back.

    Told when the garbage collector finds the session, on whichever thread that is, between any two lines of code.

    Attributes:
        pool: The pool it was opened on.
        owner: Who had it: a request line, a task with its attempt, or ``code``.
        line: Where it was opened, as ``"file:line in function"``; None where that is not known.
        seconds: How long ago that was.
    """

    pool: str
    owner: str
    line: str | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopBlocked(Signal):
    """The event loop has not turned for a while: something computes, or waits, without ``await``.

    Attributes:
        seconds: How long so far.
        tasks: Names of the async tasks running on it.
        line: Where it stands, as ``"file:line in function"``: the innermost line of the application's own code; None
            where none was found.
    """

    seconds: float
    tasks: tuple[str, ...]
    line: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleFired(Signal):
    """A tick of a schedule was written as a task, by this process.

    Attributes:
        schedule: The schedule's name.
        task: The task's name.
        origin: ``code`` if the code declares the schedule, ``data`` if it was made with ``db.create_schedule``.
        id: The id of the task's record.
        at: The tick.
        missed: How many ticks before it, that nobody could fire in time, it stands for; counted to 1000.
        lag: Seconds between the tick and its firing, by the database's clock.
    """

    schedule: str
    task: str
    origin: str
    id: UUID
    at: datetime
    missed: int
    lag: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSkipped(Signal):
    """A tick was left out, because the task of the one before has not ended (``overlap="skip"``).

    Attributes:
        schedule: The schedule's name.
        task: The task's name.
        origin: ``code`` if the code declares the schedule, ``data`` if it was made with ``db.create_schedule``.
        at: The tick.
        running: The record that has not ended.
    """

    schedule: str
    task: str
    origin: str
    at: datetime
    running: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleMissed(Signal):
    """Ticks were dropped: nobody could fire them in time, and the schedule says not to fire them later.

    Attributes:
        schedule: The schedule's name.
        task: The task's name.
        origin: ``code`` if the code declares the schedule, ``data`` if it was made with ``db.create_schedule``.
        count: How many, counted to 1000.
        first: The oldest.
        last: The newest.
        reason: Why, such as ``"older than catch_up_within=3600 s"``.
    """

    schedule: str
    task: str
    origin: str
    count: int
    first: datetime
    last: datetime
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleChanged(Signal):
    """A schedule was made, changed, paused, resumed, triggered or deleted by this process.

    Attributes:
        schedule: The schedule's name.
        what: What happened to it, in words.
        by: Who did it, where that was said.
    """

    schedule: str
    what: str
    by: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleEnded(Signal):
    """No tick of a schedule will come any more.

    Attributes:
        schedule: The schedule's name.
        reason: Why.
    """

    schedule: str
    reason: str


S = TypeVar("S", bound=Signal)

# Taken again by its own thread: a session that is collected while it is held is told of at that very moment.
_lock = threading.RLock()
_subscribers: defaultdict[type[Signal], tuple[Callable[[Any], None], ...]] = defaultdict(tuple)
_called: dict[type[Signal], tuple[Callable[[Any], None], ...]] = {}
"""Who is called with signals of a class, those of its base classes included; made when it is first asked for."""


_OF_THE_PROCESS: Final = (SystemExit, KeyboardInterrupt)
"""On the main thread these mean the process: a handler of its signals may raise them in the middle of a subscriber. On
another they would end nothing but that thread, without a word, and what it watches or runs with it."""


def subscribe(*kinds: type[S]) -> Callable[[Callable[[S], None]], Callable[[S], None]]:
    """Return a decorator that has a function called with every signal of *kinds* (subclasses included).

    Raises:
        ConfigurationError: For what is no class of signals, or none at all; by the decorator, for an ``async def``.
    """
    given: tuple[Any, ...] = kinds
    if not given or not all(isinstance(kind, type) and issubclass(kind, Signal) for kind in given):
        raise ConfigurationError(
            f"signals.subscribe({', '.join(map(repr, kinds))}): there is no signal that the function would be called "
            "with. Name one class or more: @signals.subscribe(signals.TaskFailed)."
        )

    def register(function: Callable[[S], None]) -> Callable[[S], None]:
        # An object's own `__call__`, where it has one: functions have it, too, but one that is not `async`.
        if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
            raise ConfigurationError(
                f"signals.subscribe: {function!r} would have to be awaited, and nobody does. A subscriber is a plain "
                "function that hands over what takes long: asyncio.run_coroutine_threadsafe(…, loop), or a queue."
            )
        with _lock:
            for kind in kinds:
                _subscribers[kind] = (*_subscribers[kind], function)
            _called.clear()
        return function

    return register


def unsubscribe(function: Callable[[Any], None]) -> None:
    """Forget *function* for every kind of signal; harmless where it is not subscribed."""
    with _lock:
        for kind, functions in list(_subscribers.items()):
            _subscribers[kind] = tuple(each for each in functions if each != function)
        _called.clear()


def wanted(kind: type[Signal]) -> bool:
    """Whether anybody listens to signals of *kind*: what is told very often is not even put together for nobody."""
    functions = _called.get(kind)
    return bool(_functions(kind) if functions is None else functions)


def emit(signal: Signal) -> None:
    """Call every subscriber of the signal's class and of its base classes; what one raises is logged.

    Only what ends the process passes: ``SystemExit`` and ``KeyboardInterrupt`` on the main thread.
    """
    kind = type(signal)
    functions = _called.get(kind)
    for function in _functions(kind) if functions is None else functions:
        try:
            function(signal)
        except BaseException as exc:
            if isinstance(exc, _OF_THE_PROCESS) and threading.current_thread() is threading.main_thread():
                raise
            # The work that is being reported must not fail because somebody's counter did. Nor is it cancelled: a
            # subscriber awaits nothing, so that what it raises is its own.
            logger.error(  # noqa: TRY400  # without values
                "A subscriber of %s raised: %r", kind.__name__, function, exc_info=without_values(exc)
            )


def _functions(kind: type[Signal]) -> tuple[Callable[[Any], None], ...]:
    with _lock:
        found = tuple(each for base in kind.__mro__[:-1] for each in _subscribers.get(base, ()))
        _called[kind] = found
    return found
