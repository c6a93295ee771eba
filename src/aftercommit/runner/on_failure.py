"""The call of a task's ``on_failure``: a run of its own, repeated by the same rules, which always comes to an end.

It runs in the pool and at the isolation of its task, in the transaction that records the failure. Its ends:

- committed: the failure is recorded, with what it wrote;
- an error that passes by itself, of its own statements or of ours, and a few times a statement that was cancelled:
  the whole transaction is repeated;
- any other end, ``sys.exit()`` and a cancellation of its own among them: it is over. What it wrote is rolled back, the
  failure is recorded without it, and its own error is noted beside.

Where it could not even be called because the database does not do what we ask, nothing is recorded: that is left for
later, so that no failure is recorded without its compensation.
"""

from __future__ import annotations

import enum
import inspect
import logging
import random
import time
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import SQLAlchemyError

from aftercommit.commits import fence_commits
from aftercommit.errors import LostClaim
from aftercommit.records import moves
from aftercommit.runner.surroundings import surrounded_end
from aftercommit.tasks.context import logged
from aftercommit.tasks.current import as_current
from aftercommit.tasks.retry import Again, GiveUp, Retry, Tries, decide
from aftercommit.tasks.transient import Fault, fault_of, is_cancelled
from aftercommit.wording import told, without_values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection

    from aftercommit.runner.executor import Executor
    from aftercommit.runner.run import Run
    from aftercommit.sessions import Opened

__all__ = ["OnFailure", "Recorded", "note_leaving"]

logger = logging.getLogger(__name__)

_rng = random.Random()  # noqa: S311  # jitter, not secrets
_POLICY: Final = Retry()
"""Its own: what a task says of its retries is about its function, which may do things outside of the database."""


class Recorded(enum.Enum):
    """What became of the failure's record."""

    DONE = "done"
    """Recorded, with what ``on_failure`` wrote."""

    NOT_YET = "not yet"
    """``on_failure`` has ended in an error of its own, and nothing was written."""

    NOT_OURS = "not ours"
    """The claim was lost: there is nothing to write."""


class OnFailure:
    """The calls of one run's ``on_failure``.

    Args:
        run: The run that has failed.
        error: What it failed with.
        executor: Opens the session.
        write: Records the failure; returns whether the claim was still held.
        look: Says what became of the claim.
    """

    def __init__(
        self,
        run: Run,
        error: BaseException,
        executor: Executor,
        *,
        write: Callable[[Connection], bool],
        look: Callable[[], moves.Standing],
    ) -> None:
        self._run = run
        self._failure = error
        self._executor = executor
        self._write = write
        self._look = look
        self._tries = Tries()
        self._attempt = 1
        self._was_called = False
        self.error: BaseException | None = None
        """What ended the last call, or kept it from being made."""

    def attempt(self) -> Recorded | Again | GiveUp:
        """Call it once, in a session of its own.

        Returns:
            What became of it; ``Again`` where it is to be called again; ``GiveUp`` where it could not be called, and
            that is for later.

        Raises:
            BaseException: A cancellation from outside: the event loop is closing.
        """
        self._was_called = False
        try:
            return self._attempt_once()
        except BaseException as exc:
            self.error = exc
            if self._executor.is_cancelled(self._run, exc):
                raise
            if isinstance(exc, LostClaim) and isinstance(self._run.abandoned, LostClaim):
                # Stopped from outside, at one of its statements.
                return Recorded.NOT_OURS
            return self._judge(exc)

    def look_again(self) -> Recorded | None:
        """Before the next call: whether a COMMIT happened after all, or the claim was lost; None to go on."""
        found = self._look()
        if found.has_failed:
            assert self.error is not None  # noqa: S101  # there was a call
            if fault_of(self.error) not in (Fault.CONNECTION, Fault.IDLE):
                # Not by our COMMIT: it made one itself, and what came after it cannot be repeated.
                self._note(self.error)
            return Recorded.DONE
        return None if found.is_held else Recorded.NOT_OURS

    def _attempt_once(self) -> Recorded:
        run = self._run
        # Nothing that the database answered before is about this call.
        run.renew_current()
        opened = self._executor.open_session(run)
        try:
            with logged(run.current), as_current(run.current):
                return self._call(opened)
        except BaseException as exc:
            if fault_of(exc) is Fault.STALE:
                # The server answers, so the pool would hand the connection out again.
                opened.plain.invalidate()
            raise
        finally:
            try:
                opened.end()
            except Exception as exc:  # noqa: BLE001  # told of in the next line
                note_leaving(run.owner, exc)

    def _call(self, opened: Opened) -> Recorded:
        run, session = self._run, opened.plain
        on_failure = run.task.settings.on_failure
        assert on_failure is not None  # noqa: S101  # asked by the caller
        if run.claim is not None:
            mark = _Mark(run, self._write)
            fence_commits(session, mark)
            # First, so that it is not called for a claim that was lost.
            if not mark.set(session.connection()):
                return Recorded.NOT_OURS
        with surrounded_end(run, opened):
            args, kwargs = run.task.arguments.load(session, run.arguments, run_id=run.id)
            self._was_called = True
            returned = opened.call(on_failure, self._failure, *args, **kwargs)
            if inspect.iscoroutine(returned):
                returned.close()
                raise TypeError(
                    "on_failure returned a coroutine, which was not awaited: it is a `def` around an `async def`. "
                    "Declare it with `async def`."
                )
        if run.claim is not None:
            # Behind a rollback there may be no transaction, and the failure must be recorded all the same.
            session.connection()
        opened.commit()
        return Recorded.DONE

    def _judge(self, error: BaseException) -> Recorded | Again | GiveUp:
        seen, now = self._run.current, time.monotonic()
        step = decide(
            error,
            policy=_POLICY,
            attempt=self._attempt,
            repeats=self._tries.seen_at(now),
            saw_unique=seen.saw_unique,
            saw_conflict=seen.saw_conflict,
            # Its own, too: once may be an administrator's doing, and the compensation would be lost with it.
            saw_cancelled=seen.saw_cancelled or is_cancelled(error),
            rng=_rng,
        )
        if isinstance(step, Again):
            self._tries.count(step, now)
            self._attempt += step.counts
            return step
        if not self._was_called and fault_of(error) not in (Fault.APPLICATION, Fault.PERMANENT):
            return step
        self._note(error)
        return Recorded.NOT_YET

    def _note(self, error: BaseException) -> None:
        """Say beside the failure, and in the log, how ``on_failure`` ended."""
        run = self._run
        text = told(error)
        if self._was_called:
            self._failure.add_note(f"on_failure raised, too, and what it wrote was rolled back: {text}")
            logger.error("on_failure of task %r (%s) raised", run.name, run.id, exc_info=without_values(error))
        else:
            self._failure.add_note(f"on_failure could not be called: {text}")
            logger.error(
                "on_failure of task %r (%s) could not be called", run.name, run.id, exc_info=without_values(error)
            )


class _Mark:
    """Has every commit in the call hold the record of the failure, also behind a ``session.rollback()``.

    Without it what the function writes then would be committed, and the record would say that the task runs.
    """

    __slots__ = ("_is_set", "_run", "_write")

    def __init__(self, run: Run, write: Callable[[Connection], bool]) -> None:
        self._run = run
        self._write = write
        self._is_set = False

    def set(self, connection: Connection) -> bool:
        """Record the failure in this transaction; whether the claim was still held."""
        self._is_set = self._write(connection)
        return self._is_set

    def begun(self, connection: Connection) -> None:  # noqa: ARG002  # a fence's, as all of these
        """A transaction begins, and nothing is recorded in it."""
        self._is_set = False

    def begun_elsewhere(self, connection: Connection) -> None:
        """Not ours to say."""

    def committing(self, connection: Connection) -> None:
        """Record it now, if this transaction does not, and no earlier one did."""
        if self._is_set or self.set(connection):
            return
        claim = self._run.claim
        assert claim is not None  # noqa: S101  # else there is no mark
        if not moves.standing(connection, claim).has_failed:
            raise self._run.lost()

    def committing_anywhere(self, connection: Connection, others: Sequence[Connection]) -> None:
        """Not ours to say."""

    def rolled_back(self, connection: Connection) -> None:  # noqa: ARG002
        """With it the record."""
        self._is_set = False


def note_leaving(owner: object, error: Exception) -> None:
    """Log that a session could not be closed; what the run came to is known by then."""
    # A connection that cannot even be closed is gone anyway.
    known = isinstance(error, (SQLAlchemyError, OSError))
    logger.log(
        logging.DEBUG if known else logging.ERROR,
        "Closing the session of %s failed",
        owner,
        exc_info=without_values(error),
    )
