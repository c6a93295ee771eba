"""One chunk: plain first; if that fails, record by record; transient errors repeat it.

The ladder, each step in a transaction of its own that takes the place of the one before:

1. *plain*: every record, one flush, one commit. What nearly every chunk needs.
2. *in savepoints*, after a record failed, so that a bad one costs nothing to the others: it is alone in its savepoint;
   those before and behind it share one, and are cut apart in their turn if that fails.
3. *alone*, after a COMMIT failed for good (a deferred constraint): nobody can say at a COMMIT which record it was, so
   each becomes a chunk of its own. One whose commit fails by itself is failed then.
"""

from __future__ import annotations

import random
import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import inspect
from sqlalchemy.orm import InstanceState, Session

from aftercommit.batches.stretches import Stretch
from aftercommit.commits import fence_commits
from aftercommit.errors import BatchError, BatchStopped, LostClaim, TaskTimeout
from aftercommit.records import elsewhere
from aftercommit.tasks.retry import UNIQUE_LIMIT, Again, Repeats, Retry, Tries, decide
from aftercommit.tasks.transient import Fault, fault_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection

    from aftercommit.batches.flavour import Flavour
    from aftercommit.batches.sources import Chunk, Loaded, Source
    from aftercommit.sessions import Opened

__all__ = ["Handling", "Seen", "Settled", "note_fault", "repeated", "run_chunk"]

_POLICY: Final = Retry()
_rng = random.Random()  # noqa: S311  # jitter, not secrets
_TRANSIENT: Final = frozenset({Fault.CONFLICT, Fault.CONNECTION, Fault.STALE, Fault.IDLE, Fault.CANCELLED})
_ABORTING: Final = (BatchError, BatchStopped, LostClaim, TaskTimeout)


class _Mode(Enum):
    PLAIN = "plain"
    SAVEPOINTS = "savepoints"


@dataclass(eq=False, slots=True)
class Seen:
    """What the database answered during a chunk, even if the handler caught it."""

    unique: bool = False
    conflict: bool = False

    def forget(self) -> None:
        """Begin anew."""
        self.unique = self.conflict = False


_seen: ContextVar[Seen | None] = ContextVar("aftercommit_batch", default=None)


def note_fault(context: Any) -> None:
    """Remember what the database answered; a listener of the engines' ``handle_error``."""
    seen = _seen.get()
    if seen is not None:
        fault = fault_of(context.sqlalchemy_exception or context.original_exception)
        seen.unique = seen.unique or fault is Fault.UNIQUE
        seen.conflict = seen.conflict or fault is Fault.CONFLICT


@dataclass(frozen=True, slots=True)
class Settled:
    """What one committed transaction has settled.

    Attributes:
        stretch: Where.
        succeeded: How many records are done.
        failures: Those that failed, with their keys.
    """

    stretch: Stretch
    succeeded: int
    failures: tuple[tuple[Any, BaseException], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """How the records of a batch are handled.

    Attributes:
        source: Loads them.
        flavour: Calls what follows.
        handler: The user's.
        on_error: The user's, or None.
        per_chunk: Whether the handler takes a list.
        open: Opens the session of a chunk.
        read: Runs a function in a short session.
        begun: Called with the connection once a chunk's transaction has begun.
        committing: Called with the connection and what is settled before its COMMIT, in its transaction.
        was_committed: Whether a COMMIT whose answer was lost happened all the same; None if nobody can say.
        check: Raises what ends the whole batch: a lost claim, a time limit, a stop.
        fence: Raises what ``check`` does, after a look into the database: before a handler is called again.
        repeating: Told of what comes next when a chunk is to be run again.
    """

    source: Source
    flavour: Flavour
    handler: Callable[..., Any]
    on_error: Callable[..., Any] | None
    per_chunk: bool
    open: Callable[[], Opened]
    read: Callable[[Callable[[Session], Any]], Any]
    begun: Callable[[Connection], None]
    committing: Callable[[Connection, Settled], None]
    was_committed: Callable[[], bool | None]
    check: Callable[[], None]
    fence: Callable[[], None]
    repeating: Callable[[Again], None]


@dataclass(slots=True)
class _Tries:
    """What one chunk has been repeated for."""

    attempt: int = 1
    tries: Tries = field(default_factory=lambda: Tries(Repeats(uniques=UNIQUE_LIMIT)))

    def judge(self, error: BaseException, seen: Seen) -> Again | None:
        """Whether the chunk is to be run again; None where *error* does not pass by itself."""
        step = decide(
            error,
            policy=_POLICY,
            attempt=self.attempt,
            repeats=self.tries.seen_at(time.monotonic()),
            saw_unique=False,
            saw_conflict=seen.conflict,
            rng=_rng,
        )
        return step if isinstance(step, Again) else None

    def count(self, step: Again) -> None:
        """Count the repeat that follows."""
        if step.counts:
            self.attempt += 1
        self.tries.count(step, time.monotonic())


def repeated(work: Callable[[], Any], flavour: Flavour) -> Any:
    """Do *work*, which may be done twice, again for as long as its errors pass by themselves."""
    tries, seen = _Tries(), Seen()
    while True:
        try:
            return work()
        except Exception as exc:
            step = None if isinstance(exc, _ABORTING) else tries.judge(exc, seen)
            if step is None:
                raise
            tries.count(step)
            flavour.wait(step.delay)


class _AtCommit(Exception):
    """The COMMIT itself failed, for good."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Suspects(Exception):
    """Unique violations that another transaction may have caused: look again with a fresh snapshot."""

    def __init__(self, places: set[int]) -> None:
        self.places = places


def run_chunk(chunk: Chunk, handling: Handling, settle: Callable[[Settled], None]) -> None:
    """Run *chunk* until it is settled and committed, in one transaction or several.

    Args:
        chunk: The chunk.
        handling: How it is handled.
        settle: Called after each commit with what it settled.

    Raises:
        BaseException: What is no record's fault, or does not stop: a lost database, a cancellation, a misuse.
    """
    seen = Seen()
    token = _seen.set(seen)
    try:
        try:
            settle(_Chunk(chunk, handling, seen).run())
        except _AtCommit:
            for each in _singles(chunk, handling):
                settle(_alone(each, handling, seen))
    finally:
        _seen.reset(token)


def _alone(chunk: Chunk, handling: Handling, seen: Seen) -> Settled:
    """Run one record as a chunk of its own; mark it, and nothing else, if its commit fails."""
    try:
        return _Chunk(chunk, handling, seen).run(_Mode.SAVEPOINTS)
    except _AtCommit as exc:
        verdict = exc.error
    try:
        return _Chunk(chunk, handling, seen, verdict=verdict).run(_Mode.SAVEPOINTS)
    except _AtCommit as exc:
        raise exc.error from verdict


def _singles(chunk: Chunk, handling: Handling) -> list[Chunk]:
    """Cut *chunk* into chunks of one record; together they are the same stretch."""
    # Keys while the session is there: behind its end, a row that was expired could not say its own.
    keys = handling.read(lambda session: _keys_of(handling.source, session, chunk))
    whole, singles, after, place = chunk.stretch, [], chunk.stretch.after, chunk.stretch.start
    for number, key in enumerate(keys):
        is_last = number == len(keys) - 1
        # Rows may have come since places were given: the last place is left to the last row.
        stop = whole.stop if is_last or whole.stop is None else min(place + 1, whole.stop - 1)
        last = whole.last if is_last else _place_key(key, handling.source)
        values = None if chunk.values is None else (chunk.values[number],)
        singles.append(type(chunk)(Stretch(place, stop, after, last), values))
        place, after = place if stop is None else stop, last
    return singles


def _keys_of(source: Source, session: Session, chunk: Chunk) -> list[Any]:
    return [source.key_of(value) for value in source.load(session, chunk).values]


def _place_key(key: Any, source: Source) -> Any:
    """The key of a row as a stretch has it; None for values."""
    if source.codec is None:
        return None
    return source.codec.write(key if isinstance(key, tuple) else (key,))


def _split(start: int, stop: int, culprit: int | None) -> list[tuple[int, int]]:
    """Cut a part that failed: around the record at which it did, in halves where that is not known. Pure."""
    if culprit is None:
        middle = (start + stop) // 2
        return [(start, middle), (middle, stop)]
    parts = [(start, culprit), (culprit, culprit + 1), (culprit + 1, stop)]
    return [part for part in parts if part[0] < part[1]]


class _Chunk:
    """One chunk on its way through the ladder.

    Args:
        chunk: The chunk.
        handling: How it is handled.
        seen: What the database answered.
        verdict: What its one record has failed with already: it is only marked.
    """

    def __init__(self, chunk: Chunk, handling: Handling, seen: Seen, verdict: BaseException | None = None) -> None:
        self._chunk = chunk
        self._handling = handling
        self._seen = seen
        self._verdict = verdict
        self._tries = _Tries()
        self._suspects: set[int] = set()
        self._passes = 0
        self._culprit: int | None = None
        self._settled: Settled | None = None
        """What its COMMIT settles, once that is being sent; None before."""

    def run(self, mode: _Mode = _Mode.PLAIN) -> Settled:
        """Run it until it is committed."""
        while True:
            try:
                return self._try(mode)
            except _Suspects as exc:
                self._suspects |= exc.places
                self._passes += 1
            except _ABORTING:
                raise
            except Exception as exc:  # noqa: BLE001  # what does not pass by itself is raised by _next_mode
                if self._settled is not None and self._happened(exc):
                    return self._settled
                if not self._repeats(exc):
                    mode = self._next_mode(mode, exc)

    def _repeats(self, error: Exception) -> bool:
        """Wait, if *error* passes by itself."""
        step = self._tries.judge(error, self._seen)
        if step is None:
            return False
        self._tries.count(step)
        self._handling.repeating(step)
        self._handling.flavour.wait(step.delay)
        # A claim that was lost shows as a conflict, too, and then the handler must not run again.
        self._handling.fence()
        return True

    def _next_mode(self, mode: _Mode, error: Exception) -> _Mode:
        """The next step of the ladder, or *error* itself."""
        if fault_of(error) in _TRANSIENT:
            raise error
        if self._settled is not None:
            raise _AtCommit(error) from error
        if mode is _Mode.PLAIN:
            return _Mode.SAVEPOINTS
        raise error

    def _happened(self, error: BaseException) -> bool:
        """Whether a COMMIT whose answer was lost was done."""
        if fault_of(error) not in (Fault.CONNECTION, Fault.IDLE):
            return False
        answer = self._handling.was_committed()
        if answer is None:
            error.add_note(
                "The connection was lost during a COMMIT of this batch, so that nobody can say whether the chunk at "
                "hand was committed. Inside a durable task its position would say so."
            )
            raise error
        return answer

    def _try(self, mode: _Mode) -> Settled:
        handling = self._handling
        handling.check()
        self._seen.forget()
        self._settled = None
        opened = handling.open()
        try:
            session = opened.plain
            fence_commits(session, self)
            session.connection()
            root = session.get_transaction()
            # The commit is the last that is done with these rows: to expire them, one by one, would be for nothing.
            session.expire_on_commit = False
            loaded = handling.source.load(session, self._chunk)
            failures = self._plain(opened, loaded) if mode is _Mode.PLAIN else self._in_savepoints(opened, loaded)
            _still_in(session.get_transaction() is root)
            settled = Settled(self._chunk.stretch, len(loaded.values) - len(failures), tuple(failures))
            self._settled = settled
            opened.commit()
            # What nobody holds need not be told that its session has ended.
            loaded.values.clear()
        except BaseException as exc:
            if fault_of(exc) is Fault.STALE:
                # The server answers, so the pool would hand the connection out again.
                opened.plain.invalidate()
            raise
        finally:
            opened.end()
        return settled

    # --- its commits, see commits.fences -----------------------------------------------------------------------

    def begun(self, connection: Connection) -> None:
        """Its transaction has begun."""
        self._handling.begun(connection)

    def begun_elsewhere(self, connection: Connection) -> None:
        """Its session works on a second connection, too."""
        elsewhere.note(connection)

    def rolled_back(self, connection: Connection) -> None:
        """Nothing of it is left."""

    def committing_anywhere(self, connection: Connection, others: Sequence[Connection]) -> None:
        """A COMMIT comes on one of several connections: of these, only its own may have written."""
        elsewhere.refuse_writes(connection, others, task=getattr(self._handling.handler, "__name__", "run_batch"))

    def committing(self, connection: Connection) -> None:
        """A COMMIT comes on its connection, whoever sends it."""
        if self._settled is None:
            raise _ended_by_handler()
        self._handling.committing(connection, self._settled)

    # --- plain ------------------------------------------------------------------------------------------------

    def _plain(self, opened: Opened, loaded: Loaded) -> list[tuple[Any, BaseException]]:
        if loaded.missing:
            raise next(iter(loaded.missing.values()))
        if self._handling.per_chunk:
            if loaded.values:
                self._handling.flavour.call(self._handling.handler, opened, list(loaded.values))
        else:
            self._each(opened, loaded.values, 0, len(loaded.values))
        opened.plain.flush()
        return []

    def _each(self, opened: Opened, values: list[Any], start: int, stop: int) -> None:
        """Handle records one after the other, and remember at which one that ended."""
        call, handler = self._handling.flavour.call, self._handling.handler
        self._culprit = None
        for number in range(start, stop):
            self._culprit = number
            call(handler, opened, values[number])
        # From here on it is the flush, and nobody knows whose.
        self._culprit = None

    # --- record by record -------------------------------------------------------------------------------------

    def _in_savepoints(self, opened: Opened, loaded: Loaded) -> list[tuple[Any, BaseException]]:
        failures: list[tuple[Any, BaseException]] = []
        suspects: set[int] = set()
        # Most records of a chunk are good even where one is not: these go together, as long as they do.
        parts = deque(self._parts(loaded))
        while parts:
            start, stop = parts.popleft()
            # Only what belongs to these: what the database answered before was judged then.
            self._seen.forget()
            if stop - start > 1:
                failed = self._guarded(opened, partial(self._each, opened, loaded.values, start, stop))
                parts.extendleft(reversed(_split(start, stop, self._culprit) if failed is not None else []))
                continue
            value, missing = loaded.values[start], loaded.missing.get(start)
            key = self._handling.source.key_of(value)
            error = self._verdict or missing or self._one(opened, value)
            if error is None:
                continue
            if self._may_be_a_race(opened.plain, error) and start not in self._suspects:
                suspects.add(start)
                continue
            self._mark(opened, value, error)
            failures.append((key, error))
        if suspects:
            raise _Suspects(suspects)
        return failures

    def _parts(self, loaded: Loaded) -> list[tuple[int, int]]:
        """How to begin: with what is known to be bad alone, and everything alone for a handler of whole chunks."""
        count = len(loaded.values)
        if self._handling.per_chunk or self._verdict is not None:
            return [(number, number + 1) for number in range(count)]
        bad = {*loaded.missing, *self._suspects}
        if self._culprit is not None and self._culprit < count:
            bad.add(self._culprit)
        parts, start = [], 0
        for number in sorted(bad):
            parts += [(start, number), (number, number + 1)]
            start = number + 1
        return [part for part in (*parts, (start, count)) if part[0] < part[1]]

    def _may_be_a_race(self, session: Session, error: BaseException) -> bool:
        # On SQLite nobody else writes meanwhile.
        if session.get_bind().dialect.name == "sqlite" or self._passes >= UNIQUE_LIMIT:
            return False
        return fault_of(error) is Fault.UNIQUE or self._seen.unique

    def _one(self, opened: Opened, value: Any) -> BaseException | None:
        """Handle one record in a savepoint; return what it failed with."""
        handling = self._handling
        given = [value] if handling.per_chunk else value
        return self._guarded(opened, lambda: handling.flavour.call(handling.handler, opened, given))

    def _mark(self, opened: Opened, value: Any, error: BaseException) -> None:
        """Have ``on_error`` mark a record, in a savepoint of its own."""
        on_error = self._handling.on_error
        if on_error is None:
            return
        _refresh(opened.plain, value)
        failed = self._guarded(opened, lambda: self._handling.flavour.call(on_error, opened, value, error))
        if failed is not None:
            failed.add_note(
                f"on_error itself failed, marking a record that had failed with {type(error).__name__}: the batch "
                "stops, because what cannot be marked would be lost in silence."
            )
            stop = BatchError(f"on_error failed with {type(failed).__name__}; the chunk was rolled back.")
            raise stop from failed

    def _guarded(self, opened: Opened, work: Callable[[], Any]) -> BaseException | None:
        """Do *work* in a savepoint; return the error that is its own, raise what concerns the whole chunk."""
        session = opened.plain
        savepoint = session.begin_nested()
        try:
            work()
            _still_in(session.get_nested_transaction() is savepoint)
            savepoint.commit()
        except _ABORTING:
            raise
        except Exception as exc:
            if self._tries.judge(exc, self._seen) is not None or fault_of(exc) in _TRANSIENT:
                raise
            if savepoint.is_active or session.get_nested_transaction() is savepoint:
                savepoint.rollback()
            return exc
        return None


def _still_in(is_there: bool) -> None:  # noqa: FBT001  # reads as what it says
    if not is_there:
        raise _ended_by_handler()


def _ended_by_handler() -> BatchError:
    return BatchError(
        "The handler committed, rolled back or closed the session of its chunk. A chunk is one transaction, with the "
        "note of how far the batch is in it, and it is committed for you: leave that out. To undo one record, raise; "
        "for a part of one, with session.begin_nested()."
    )


def _refresh(session: Session, value: Any) -> None:
    """Load a row anew after its savepoint was rolled back: in async code it could not do so itself."""
    state = inspect(value, raiseerr=False)
    # Values may be anything, also what SQLAlchemy can inspect without its being a row.
    if isinstance(state, InstanceState) and state.session is session and state.persistent:
        session.refresh(value)
