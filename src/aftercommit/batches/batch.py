"""A whole batch: what is left of it, the lanes that work on it, and the report."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from aftercommit.batches.chunks import Handling, Settled, repeated, run_chunk
from aftercommit.batches.flavour import AsyncFlavour, Flavour, SyncFlavour
from aftercommit.batches.lanes import Lane, bare
from aftercommit.batches.progress import Teller, teller
from aftercommit.batches.report import MAX_FAILURES_KEPT, BatchFailure, BatchReport
from aftercommit.batches.sources import Chunk, Source, source_of
from aftercommit.batches.stretches import Stretch, gaps, merged
from aftercommit.errors import BatchError, BatchStopped, ConfigurationError
from aftercommit.records import moves, positions
from aftercommit.sessions import Owner, is_async_callable, user_line
from aftercommit.tasks import CurrentRun, current_run

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from aftercommit.batches.options import Options
    from aftercommit.runner import Outbox
    from aftercommit.runner.lanes import Lane as Place
    from aftercommit.runner.run import Run
    from aftercommit.sessions import Opened, SessionFactory
    from aftercommit.tasks.retry import Again

__all__ = ["Batch", "Home", "async_run_batch", "run_batch"]

DEFAULT: Final = "default"
_PROGRESS_SECONDS: Final = 0.5


class Home(Protocol):
    """What a batch needs of its ``Database``."""

    sessions: SessionFactory
    outbox: Outbox


def run_batch(home: Home, source: Any, handler: Callable[..., Any], options: Options) -> BatchReport:
    """Run a batch here, on plain sessions."""
    for function, name in ((handler, "handler"), (options.on_error, "on_error")):
        if function is not None and is_async_callable(function):
            raise ConfigurationError(f"{name} is async: await db.async_run_batch(…), or write it with `def`.")
    run = _run_at_hand()
    if run is not None and run.task.is_async:
        raise ConfigurationError("An async task awaits db.async_run_batch(…): this one would block its event loop.")
    return Batch(home, source, handler, options, SyncFlavour(), is_async=False).run()


async def async_run_batch(home: Home, source: Any, handler: Callable[..., Any], options: Options) -> BatchReport:
    """Run a batch here, on async sessions."""
    from sqlalchemy.util import greenlet_spawn

    batch = Batch(home, source, handler, options, AsyncFlavour(), is_async=True)
    report: BatchReport = await greenlet_spawn(batch.run)
    return report


def _run_at_hand() -> Run | None:
    current = current_run()
    run: Run | None = None if current is None else current.behind
    return run


class Batch:
    """One call of ``run_batch``."""

    def __init__(
        self,
        home: Home,
        source: Any,
        handler: Callable[..., Any],
        options: Options,
        flavour: Flavour,
        *,
        is_async: bool,
    ) -> None:
        self._home = home
        self._options = options
        self._handler = handler
        self._flavour = flavour
        self._make_source = source_of(source, options.entity, size=options.size, is_async=is_async)
        self._current: CurrentRun | None = current_run()
        self._run: Run | None = _run_at_hand()
        self._pool = self._choose_pool()
        self._level = None if self._run is None else self._run.task.settings.isolation_level
        name = getattr(handler, "__qualname__", type(handler).__qualname__)
        self._owner = self._name_owner(f"batch of {name}")
        self._name = self._number(name)
        self._books = threading.Lock()
        self._done: list[Stretch] = []
        self._lanes: list[Lane] = []
        self._free: list[Lane] = []
        self._failures: list[BatchFailure] = []
        self._failed_here = 0
        self._settled_here = 0
        self._total: int | None = None
        self._error: BaseException | None = None
        self._is_exhausted = False
        self._teller: Teller | None = None
        self._main: Lane | None = None
        self._next_progress = 0.0
        self._source: Source | None = None

    # --- before -----------------------------------------------------------------------------------------------

    def _choose_pool(self) -> str:
        run, pool = self._run, self._options.pool
        if run is None:
            settings = self._home.sessions.pools[pool].settings
            most = settings.pool_size + settings.max_overflow
            if self._options.workers > most:
                raise ConfigurationError(
                    f"workers={self._options.workers}: the pool {pool!r} has {most} connections, so that chunks would "
                    f"wait for one another. Give it more (PoolSettings(pool_size=…)), or take fewer workers."
                )
            return pool
        if pool not in (DEFAULT, run.pool):
            raise ConfigurationError(
                f"pool={pool!r}: inside task {run.name!r} the chunks run in the task's own place, in the pool "
                f"{run.pool!r}. Leave it out, or declare the task with @db.task(pool={pool!r})."
            )
        return run.pool

    def _name_owner(self, doing: str) -> Owner:
        """Who has the sessions of the chunks."""
        run, line = self._run, user_line()
        if run is None:
            return Owner(doing, line)
        allowed = run.task.settings.timeout
        return Owner(run.name, line, kind="task", allowed=allowed, task_id=run.id, attempt=run.attempt, doing=doing)

    def _number(self, name: str) -> str:
        """What this batch is called in its task: the handler's name, and which of its batches it is."""
        if self._current is None:
            return name
        number = self._current.batches.get(name, 0) + 1
        self._current.batches[name] = number
        return f"{name[-240:]}#{number}"

    # --- the whole --------------------------------------------------------------------------------------------

    def run(self) -> BatchReport:
        """Run it to its end.

        Raises:
            BatchStopped: If more than ``max_failures`` failed.
        """
        started = time.monotonic()
        conflict_before = None if self._current is None else (self._current.saw_unique, self._current.saw_conflict)
        try:
            self._check()
            if self._prepare():
                self._is_exhausted = True
            left = gaps(self._done)
            self._source = self._make_source(left)
            self._read_stored_keys()
            with self._telling() as self._teller:
                self._tell()
                self._main = self._free.pop(0)
                self._work(self._main)
            if not self._is_finished_before:
                self._finish()
        finally:
            if self._current is not None and conflict_before is not None:
                # They were the chunks', which have dealt with them: the task is not to be repeated for them.
                self._current.saw_unique, self._current.saw_conflict = conflict_before
        return self._report(time.monotonic() - started)

    def _read_stored_keys(self) -> None:
        codec = self._source.codec if self._source is not None else None
        if codec is None:
            return
        for failure in self._stored_failures:
            if isinstance(failure[0], list):
                key = codec.read(failure[0])
                failure[0] = key[0] if len(key) == 1 else key

    def _prepare(self) -> bool:
        """Find out what earlier attempts have done; return whether that was all."""
        run = self._run
        self._is_finished_before = False
        self._stored_failures: list[list[Any]] = []
        workers = self._options.workers
        stored: list[positions.Position] = []
        if run is not None and run.claim is not None:
            stored = self._fenced(self._open_positions)
            self._is_finished_before = any(each.is_finished for each in stored)
        self._lanes = [Lane(each.lane, each) for each in stored] or [Lane(number) for number in range(workers)]
        self._free = self._lanes[:workers]
        self._done = merged(Stretch(*each) for row in stored for each in row.done)
        self._stored_failures = [list(each) for row in stored for each in row.failures]
        return self._is_finished_before

    def _open_positions(self, connection: Connection) -> list[positions.Position]:
        run = self._run
        assert run is not None  # noqa: S101  # asked by the caller
        positions.prepare(connection, run.id, self._name, lanes=self._options.workers)
        return positions.read(connection, run.id, self._name)

    def _finish(self) -> None:
        run = self._run
        if run is not None and run.claim is not None:
            record = run.id

            def note(connection: Connection) -> None:
                positions.finish(connection, record, self._name)
                if self._teller is not None and self._teller.is_on_record:
                    done = self._settled
                    moves.set_progress(connection, record, done, done)

            self._fenced(note)

    def _fenced(self, work: Callable[[Connection], Any]) -> Any:
        """Do *work*, which may be repeated, in a short transaction that holds only while the task is ours."""
        return repeated(lambda: self._fence(work), self._flavour)

    def _fence(self, work: Callable[[Connection], Any]) -> Any:
        run = self._run
        assert run is not None  # noqa: S101  # asked by the callers
        opened = self._open(reads=False)
        try:
            connection = opened.plain.connection()
            if run.claim is not None and not moves.lock(connection, run.claim):
                raise run.lost()
            found = work(connection)
            opened.commit()
        finally:
            opened.end()
        return found

    def _report(self, seconds: float) -> BatchReport:
        earlier = [BatchFailure(key=key, error=RuntimeError(line)) for key, line in self._stored_failures]
        succeeded = sum(lane.succeeded for lane in self._lanes)
        failed = sum(lane.failed for lane in self._lanes)
        return BatchReport(
            total=succeeded + failed,
            succeeded=succeeded,
            failed=failed,
            failures=tuple([*earlier, *self._failures][:MAX_FAILURES_KEPT]),
            seconds=seconds,
            rate=self._settled_here / seconds if seconds > 0 else 0.0,
        )

    # --- lanes ------------------------------------------------------------------------------------------------

    def _work(self, lane: Lane) -> None:
        """Work in the caller's place, with further lanes beside it; raise what ended the batch."""
        started = time.monotonic()
        try:
            self._widen()
            self._serve(lane)
        except BaseException as exc:  # noqa: BLE001  # raised below, once the other lanes have ended
            self._give_up(exc)
        try:
            self._flavour.join()
        except BaseException as exc:  # noqa: BLE001  # raised below
            self._give_up(exc)
        error = self._error
        if isinstance(error, BatchStopped):
            error.report = self._report(time.monotonic() - started)
        if error is not None:
            raise error

    def _widen(self) -> None:
        """Start further lanes, as many as there are places for."""
        while True:
            with self._books:
                if not self._free or self._is_exhausted or self._error is not None:
                    return
            release = self._take_place()
            if release is None:
                return
            with self._books:
                lane = self._free.pop(0)
            self._flavour.spawn(partial(self._serve_beside, lane, release))

    def _take_place(self) -> Callable[[], None] | None:
        """Take a place of the pool for a further lane, if one is free; return what gives it back."""
        if self._run is None:
            return _nothing
        place = self._place
        return place.take_back if place is not None and place.lend() else None

    @property
    def _place(self) -> Place | None:
        """Where the task's pool has its places in this process; None where a test runs the task."""
        runner = self._home.outbox.runner
        return None if runner is None or self._run is None else runner.lanes.get(self._run.pool)

    def _serve_beside(self, lane: Lane, release: Callable[[], None]) -> None:
        try:
            self._serve(lane, is_lent=self._run is not None)
        except BaseException as exc:  # noqa: BLE001  # the caller's lane raises it
            self._give_up(exc)
        finally:
            with self._books:
                self._free.append(lane)
            release()

    def _give_up(self, error: BaseException) -> None:
        if not isinstance(error, _Ended):
            with self._books:
                graver = isinstance(self._error, Exception) and not isinstance(error, Exception)
                if self._error is None or graver:
                    self._error = error
        # A lane that merely saw that another has ended the batch cancels nobody: what is cancelled has an error of its
        # own, which would be taken for the batch's.
        self._flavour.hurry(abort=not isinstance(error, Exception | _Ended))

    def _serve(self, lane: Lane, *, is_lent: bool = False) -> None:
        """Take one chunk after the other, until none is left, or a task waits for the place that was lent."""
        assert self._source is not None  # noqa: S101  # made before any lane
        handling = Handling(
            source=self._source,
            flavour=self._flavour,
            handler=self._handler,
            on_error=self._options.on_error,
            per_chunk=self._options.per_chunk,
            open=lambda: self._open(reads=False),
            read=self._read,
            begun=self._begun,
            committing=lambda connection, settled: self._committing(lane, connection, settled),
            was_committed=lambda: self._was_committed(lane),
            check=self._check,
            fence=self._check_claim,
            repeating=self._note_repeat,
        )
        while (chunk := self._next()) is not None:
            run_chunk(chunk, handling, lambda settled: self._settle(lane, settled))
            if not is_lent:
                self._widen()
            elif self._place is None or self._place.is_wanted_back:
                return

    def _next(self) -> Chunk | None:
        with self._flavour.locked():
            if self._error is not None or self._is_exhausted:
                return None
            self._check()
            assert self._source is not None  # noqa: S101  # made before any lane
            try:
                chunk = self._source.next(self._read, self._flavour.following)
            except BaseException:
                self._is_exhausted = True
                raise
            self._is_exhausted = chunk is None
            return chunk

    # --- what a chunk asks ------------------------------------------------------------------------------------

    def _open(self, *, reads: bool) -> Opened:
        return self._flavour.open(self._home.sessions, self._pool, self._owner, self._level, reads=reads)

    def _read(self, work: Callable[[Session], Any]) -> Any:
        return repeated(lambda: self._look(work), self._flavour)

    def _look(self, work: Callable[[Session], Any]) -> Any:
        opened = self._open(reads=True)
        try:
            return work(opened.plain)
        finally:
            opened.end()

    def _check(self) -> None:
        """Raise what ends the batch before its next transaction."""
        run = self._run
        if self._error is not None:
            raise _Ended
        if run is None:
            return
        if run.abandoned is not None:
            raise run.abandoned
        if run.is_overdue:
            raise run.overdue()
        if run.stopping:
            raise BatchError(f"Task {run.name!r} is being stopped; its batch goes on from here when it runs again.")
        if run.session is not None and run.session.in_transaction():
            raise BatchError(
                f"Task {run.name!r} is in a transaction of its own session, and a batch runs in the task's place: its "
                "chunks would need a second connection, and on SQLite wait for a lock that the task itself holds. "
                "Read what you need from your rows, call session.commit(), then run the batch; while it runs, use the "
                "session that the handler is given."
            )

    def _check_claim(self) -> None:
        self._check()
        if self._run is not None and self._run.claim is not None:
            self._fenced(lambda _connection: None)

    def _note_repeat(self, step: Again) -> None:
        if self._run is not None and not step.counts:
            self._run.task.figures.repeats(counts=False)

    def _begun(self, connection: Connection) -> None:
        run = self._run
        if run is not None and run.deadline is not None:
            moves.limit_time(connection, max(0.0, run.deadline - time.monotonic()) + 0.25)

    def _committing(self, lane: Lane, connection: Connection, settled: Settled) -> None:
        """Save, in the chunk's own transaction, that it is done."""
        run = self._run
        if run is None:
            return
        if run.abandoned is not None:
            raise run.abandoned
        if run.claim is None:
            return
        if not moves.lock(connection, run.claim):
            raise run.lost()
        with self._books:
            done = merged([*self._done, settled.stretch])
        failures = lane.with_failures(settled, self._source)
        if not positions.advance(
            connection,
            run.id,
            self._name,
            lane=lane.number,
            done=[each.stored() for each in done],
            succeeded=lane.succeeded + settled.succeeded,
            failed=lane.failed + len(settled.failures),
            failures=failures,
            commits=lane.commits + 1,
        ):
            raise run.lost()
        self._save_progress(lane, connection, run.id, len(settled.failures) + settled.succeeded)

    def _save_progress(self, lane: Lane, connection: Connection, record: UUID, more: int) -> None:
        """Say on the record how far the batch is: now and then, and one lane only, so that it meets nobody."""
        now = time.monotonic()
        if self._teller is None or not self._teller.is_on_record or lane is not self._main or now < self._next_progress:
            return
        self._next_progress = now + _PROGRESS_SECONDS
        done = self._settled + more
        moves.set_progress(connection, record, done, None if self._total is None else max(self._total, done))

    def _was_committed(self, lane: Lane) -> bool | None:
        run = self._run
        if run is None or run.claim is None:
            return None
        record, before = run.id, lane.commits

        def look(connection: Connection) -> bool:
            return positions.commits_of(connection, record, self._name, lane=lane.number) > before

        return bool(self._fenced(look))

    def _settle(self, lane: Lane, settled: Settled) -> None:
        """Count what was committed."""
        failures = settled.failures
        if self._run is not None:
            self._run.got_on = True
        lane.settle(settled, self._source)
        with self._books:
            self._done = merged([*self._done, settled.stretch])
            self._settled_here += settled.succeeded + len(failures)
            self._failed_here += len(failures)
            for key, error in failures[: MAX_FAILURES_KEPT - len(self._failures)]:
                self._failures.append(BatchFailure(key=key, error=bare(error)))
            most, failed = self._options.max_failures, self._failed_here
        self._tell()
        if most is not None and failed > most:
            raise BatchStopped(
                f"{failed} records failed, and max_failures={most}: the batch of {self._name} was stopped. What is "
                f"committed stays; the first failure was {self._failures[0].key!r}: "
                f"{type(self._failures[0].error).__name__}.",
                report=None,
            )

    # --- telling ----------------------------------------------------------------------------------------------

    def _telling(self) -> Teller:
        assert self._source is not None  # noqa: S101  # made before
        made = teller(self._options.progress, self._current, self._name)
        if made.wants_total and not self._is_exhausted:
            left = self._source.count(self._read)
            self._total = None if left is None else left + self._settled
        return made

    @property
    def _settled(self) -> int:
        return sum(lane.succeeded + lane.failed for lane in self._lanes)

    def _tell(self) -> None:
        if self._teller is not None:
            done = self._settled
            self._teller.tell(done, None if self._total is None else max(self._total, done))


class _Ended(BaseException):
    """Another lane has ended the batch."""


def _nothing() -> None:
    pass
