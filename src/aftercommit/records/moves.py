"""How a record moves from state to state. Each function is one statement, and commits nothing.

```
(nothing) --written--> queued --claim--> running --finish--> succeeded
                         ^ |               | | '--fail-----> failed
                         | '--cancel--> cancelled <-cancel-'
                         '-- give_back, rescue --'
```

Whoever runs a task holds a *claim*: id, attempt and number of claims. Every move it makes holds only for that claim
while the record says ``running``; each returns whether it did.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from aftercommit.records import keys
from aftercommit.records.notifying import notify
from aftercommit.records.statement import Statement
from aftercommit.records.waiting import KINDS_LITE, KINDS_PG

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy import Connection

__all__ = [
    "Claim",
    "Claimed",
    "Failure",
    "Standing",
    "any_running",
    "cancel",
    "cancelled_among",
    "changes_so_far",
    "claim",
    "claim_one",
    "clear_progress",
    "discard",
    "fail",
    "finish",
    "give_back",
    "limit_time",
    "lock",
    "rehome",
    "retry",
    "save_checkpoint",
    "set_progress",
    "standing",
    "take_lock",
    "wrote_something",
]

_PG_NOW: Final = "clock_timestamp()"
_LITE_NOW: Final = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
_LITE_LATER: Final = "(strftime('%Y-%m-%d %H:%M:%f', 'now', :delay || ' seconds') || '000')"


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run a record's task.

    Attributes:
        id: The record.
        attempt: The attempt this is.
        claims: How often the record was claimed, this time included.
    """

    id: UUID
    attempt: int
    claims: int

    def parameters(self) -> dict[str, Any]:
        """For a statement."""
        return {"id": self.id, "attempt": self.attempt, "claims": self.claims}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A record that was claimed, with what is needed to run it.

    Attributes:
        claim: The claim.
        task: The task's name.
        arguments: JSON text.
        max_attempts: How often it may be tried.
        parent: The run that asked for it.
        context: JSON text, or None.
        checkpoint: JSON text, or None.
        refunds: How many claims before this one used no attempt up, did not end in order, and got nothing done.
        waited: Seconds since it was due, by the database's clock.
        asked_ago: Seconds since it was handed over, by the same clock.
    """

    claim: Claim
    task: str
    arguments: str
    max_attempts: int
    parent: UUID | None
    context: str | None
    checkpoint: str | None
    refunds: int
    waited: float
    asked_ago: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What became of a claim.

    Attributes:
        is_held: Whether the record still says that it runs under this claim.
        is_done: Whether it succeeded under this claim.
        has_failed: Whether it failed for good under this claim.
        checkpoint: What was saved last, as JSON text.
        is_cancelled: Whether it was cancelled under this claim.
        cancelled_by: By whom.
    """

    is_held: bool
    is_done: bool
    has_failed: bool
    checkpoint: str | None
    is_cancelled: bool = False
    cancelled_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is written of an error.

    Attributes:
        error: One line.
        traceback: The whole, without bound values; None where there is nothing to look for.
        expected: Whether the application knows this end.
    """

    error: str
    traceback: str | None
    expected: bool = False


_MINE: Final = "WHERE id = :id AND attempt = :attempt AND claims = :claims AND state = 'running'"
# Not by waiting for whoever has locked it: the thread that asks has more to do. An error (55P03), and not a row count
# of 0, which would say that the claim is lost.
_MINE_AND_FREE: Final = f"WHERE id = (SELECT id FROM aftercommit_task {_MINE} FOR UPDATE NOWAIT)"

_FINISH = Statement(
    f"UPDATE aftercommit_task SET state = 'succeeded', finished_at = {_PG_NOW}, result = CAST(:result AS json), "
    f"error = NULL, traceback = NULL {_MINE}",
    f"UPDATE aftercommit_task SET state = 'succeeded', finished_at = {_LITE_NOW}, result = :result, "
    f"error = NULL, traceback = NULL {_MINE}",
)
_LOCK = Statement(
    f"SELECT id FROM aftercommit_task {_MINE} FOR SHARE",
    f"SELECT id FROM aftercommit_task {_MINE}",
)
_STANDING = Statement(
    "SELECT state, attempt, claims, CAST(checkpoint AS text), cancelled_by FROM aftercommit_task WHERE id = :id "
    "FOR UPDATE NOWAIT",
    "SELECT state, attempt, claims, CAST(checkpoint AS text), cancelled_by FROM aftercommit_task WHERE id = :id",
)
_CHECKPOINT = Statement(
    f"UPDATE aftercommit_task SET checkpoint = CAST(:value AS json), refunds = attempt {_MINE}",
    f"UPDATE aftercommit_task SET checkpoint = :value, refunds = attempt {_MINE}",
)
_WROTE = Statement("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")


def finish(connection: Connection, claim: Claim, result: str | None) -> bool:
    """Note, in the task's own transaction, that it is done."""
    return _FINISH.execute(connection, {**claim.parameters(), "result": _kept(connection, result)}).rowcount == 1


def lock(connection: Connection, claim: Claim) -> bool:
    """Hold the record until the transaction ends, for a commit in the middle of a task.

    By a lock and not by a plain read: at REPEATABLE READ the snapshot would still show a claim that was lost.
    Shared, so that the lanes of one run do not exclude each other.
    """
    return _LOCK.execute(connection, claim.parameters()).first() is not None


def standing(connection: Connection, claim: Claim) -> Standing:
    """Say what became of a claim, in a transaction of its own.

    Under a lock: after a connection was lost during COMMIT, the server process that may still be committing holds it,
    and until that one has ended nobody can say. Not by waiting: it may take as long as a network is down, and the
    connection that asks is the one that keeps this worker alive for others. Ask again while it is refused.

    Raises:
        sqlalchemy.exc.DBAPIError: With 55P03 while somebody else is changing the record.
    """
    row = _STANDING.execute(connection, {"id": claim.id}).first()
    if row is None or row[2] != claim.claims:
        return Standing(is_held=False, is_done=False, has_failed=False, checkpoint=None)
    # A failure caps the attempt at what there may be.
    is_same = row[1] == claim.attempt
    return Standing(
        is_held=is_same and row[0] == "running",
        is_done=is_same and row[0] == "succeeded",
        has_failed=row[0] == "failed",
        checkpoint=row[3],
        is_cancelled=row[0] == "cancelled",
        cancelled_by=row[4],
    )


def save_checkpoint(connection: Connection, claim: Claim, value: str) -> bool:
    """Save *value*, JSON text, in the task's own transaction."""
    return _CHECKPOINT.execute(connection, {**claim.parameters(), "value": _kept(connection, value)}).rowcount == 1


def _kept(connection: Connection, text: str | None) -> str | bytes | None:
    """JSON text as it comes back equal.

    SQLite makes a number of what looks like one in a column of type JSON, with 64 bits, and 15 digits as text again.
    What is bytes it leaves alone.
    """
    if text is None or connection.dialect.name != "sqlite" or text[:1] not in "-0123456789":
        return text
    number = json.loads(text)
    is_kept = isinstance(number, int) and -(2**63) <= number < 2**63
    return text if is_kept else text.encode()


def wrote_something(connection: Connection, before: int) -> bool:
    """Whether this transaction wrote anything, raw SQL included.

    Args:
        connection: In its transaction.
        before: What ``changes_so_far`` said when it began; only SQLite needs it.
    """
    if connection.dialect.name == "sqlite":
        return changes_so_far(connection) > before
    return bool(_WROTE.execute(connection, {}).scalar())


def changes_so_far(connection: Connection) -> int:
    """How many rows this connection changed in its life, on SQLite; elsewhere 0, unasked."""
    if connection.dialect.name != "sqlite":
        return 0
    # The driver counts them itself; asked by a statement, it would cost aiosqlite four trips to its thread.
    return int(connection.connection.driver_connection.total_changes)  # type: ignore[union-attr]


_LIMIT_TIME = Statement(
    "SELECT set_config('statement_timeout', :milliseconds, true), "
    "set_config('idle_in_transaction_session_timeout', :milliseconds, true)"
)


def limit_time(connection: Connection, seconds: float) -> None:
    """Have the server end this transaction's statements, and its idleness, after *seconds*; SQLite has no server.

    Of the transaction, not of the session: a transaction pooler lets no other kind through.
    """
    if connection.dialect.name == "postgresql":
        _LIMIT_TIME.execute(connection, {"milliseconds": str(max(1, round(seconds * 1000)))})


# --- the end of an attempt that failed --------------------------------------------------------------------------

# As text, and only behind what is a list: somebody may have written there what is none.
_ENTRY_PG: Final = (
    "errors = CASE WHEN CAST(:entry AS text) IS NULL THEN errors "
    "WHEN json_typeof(errors) = 'array' AND json_array_length(errors) > 0 THEN "
    "CAST(left(rtrim(CAST(errors AS text), E' \\n\\r\\t'), -1) || ', ' || CAST(:entry AS text) || ']' AS json) "
    "ELSE CAST('[' || CAST(:entry AS text) || ']' AS json) END"
)
_ENTRY_LITE: Final = (
    "errors = CASE WHEN :entry IS NULL THEN errors "
    "WHEN CASE WHEN json_valid(errors) THEN json_type(errors) END = 'array' "
    "THEN json_insert(errors, '$[#]', json(:entry)) ELSE json_array(json(:entry)) END"
)
_FAIL = Statement(
    f"UPDATE aftercommit_task SET state = 'failed', finished_at = {_PG_NOW}, error = :error, traceback = :traceback, "
    "expected = CAST(:expected AS boolean), "
    f"attempt = LEAST(attempt, max_attempts), {_ENTRY_PG} {_MINE_AND_FREE}",
    f"UPDATE aftercommit_task SET state = 'failed', finished_at = {_LITE_NOW}, error = :error, traceback = :traceback, "
    "expected = :expected, "
    f"attempt = MIN(attempt, max_attempts), {_ENTRY_LITE} {_MINE}",
)
# What has not even been tried keeps its place among the others.
_PG_BACK: Final = (
    "CASE WHEN CAST(:refund AS integer) = 1 AND CAST(:delay AS double precision) = 0 THEN run_at "
    f"ELSE {_PG_NOW} + :delay * interval '1 second' END"
)
_LITE_BACK: Final = f"CASE WHEN :refund = 1 AND :delay = 0 THEN run_at ELSE {_LITE_LATER} END"
# Counted at the claim; taken back where that ends in order, or has got on.
_REFUNDS: Final = (
    "refunds = CASE CAST(:how AS integer) WHEN 1 THEN refunds - 1 WHEN 2 THEN attempt - :refund ELSE refunds END"
)
# Without the key at first: see ``keys``.
_GIVE_BACK = Statement(
    f"UPDATE aftercommit_task SET state = 'queued', run_at = {_PG_BACK}, worker = NULL, queued_key = NULL, "
    f"attempt = CASE WHEN attempt > 0 THEN attempt - :refund ELSE 0 END, {_REFUNDS}, error = COALESCE(:error, error), "
    f"traceback = COALESCE(:traceback, traceback), {_ENTRY_PG} {_MINE_AND_FREE} RETURNING key",
    f"UPDATE aftercommit_task SET state = 'queued', run_at = {_LITE_BACK}, worker = NULL, queued_key = NULL, "
    f"attempt = CASE WHEN attempt > 0 THEN attempt - :refund ELSE 0 END, {_REFUNDS}, error = COALESCE(:error, error), "
    f"traceback = COALESCE(:traceback, traceback), {_ENTRY_LITE} {_MINE} RETURNING key",
)


def fail(connection: Connection, claim: Claim, failure: Failure, *, at: str) -> bool:
    """Note that the task failed for good.

    Raises:
        sqlalchemy.exc.DBAPIError: With 55P03 while somebody else has locked the record.
    """
    parameters = {**claim.parameters(), **_written(failure), "entry": _entry(claim, failure, at)}
    parameters["expected"] = failure.expected
    return _FAIL.execute(connection, parameters).rowcount == 1


def give_back(
    connection: Connection,
    claim: Claim,
    failure: Failure | None,
    *,
    at: str,
    delay: float,
    refund: bool,
    got_on: bool = False,
    in_order: bool = False,
) -> bool:
    """Queue the task again.

    Args:
        connection: In a transaction.
        claim: The claim that is given up.
        failure: What went wrong; None for an orderly stop.
        at: The time of the failure, for the record.
        delay: Seconds until it is due again.
        refund: Whether the attempt does not count.
        got_on: Whether it saved something that the next claim goes on from.
        in_order: Whether the claim has not come to nothing, though there is something to note.

    Raises:
        sqlalchemy.exc.DBAPIError: With 55P03 while somebody else has locked the record.
    """
    entry = None if failure is None or refund else _entry(claim, failure, at)
    parameters = {
        **claim.parameters(),
        **(_written(failure) if failure is not None else {"error": None, "traceback": None}),
        "entry": entry,
        "delay": delay,
        "refund": int(refund),
        "how": 1 if failure is None or in_order else 2 if got_on else 0,
    }
    row = _GIVE_BACK.execute(connection, parameters).first()
    if row is not None and row[0] is not None:
        keys.take_up(connection, [claim.id])
    return row is not None


_DISCARD = Statement(
    f"UPDATE aftercommit_task SET state = 'cancelled', finished_at = {_PG_NOW}, error = :error, traceback = NULL "
    f"{_MINE_AND_FREE}",
    f"UPDATE aftercommit_task SET state = 'cancelled', finished_at = {_LITE_NOW}, error = :error, traceback = NULL "
    f"{_MINE}",
)


def discard(connection: Connection, claim: Claim, reason: str) -> bool:
    """Note that the task itself has said that there is nothing to do.

    Raises:
        sqlalchemy.exc.DBAPIError: With 55P03 while somebody else has locked the record.
    """
    return _DISCARD.execute(connection, {**claim.parameters(), "error": _writable(reason)}).rowcount == 1


def _written(failure: Failure) -> dict[str, Any]:
    traceback = None if failure.traceback is None else _writable(failure.traceback)
    return {"error": _writable(failure.error), "traceback": traceback}


def _writable(text: str) -> str:
    """What both databases can hold: PostgreSQL's text knows no NUL, and no encoding knows half a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\0")


def _entry(claim: Claim, failure: Failure, at: str) -> str:
    return json.dumps({"attempt": claim.attempt, "at": at, **_written(failure)})


# --- claiming ---------------------------------------------------------------------------------------------------

_RETURNED: Final = (
    "RETURNING id, task, CAST(arguments AS text), attempt, claims, max_attempts, parent, CAST(context AS text), "
    "CAST(checkpoint AS text), refunds, priority, "
)
# Whatever number somebody has written there: the token goes on, and what was tried too often fails by itself.
# Counted in `refunds` at each claim, so that a task that rewrites its own record is counted, too.
_TAKEN_PG: Final = (
    "state = 'running', worker = :worker, attempt = GREATEST(0, LEAST(attempt, 2147483646)) + 1, "
    "refunds = GREATEST(0, LEAST(refunds, 1000000)) + 1, "
    f"claims = CASE WHEN claims < 2147483647 THEN claims ELSE 0 END + 1, queued_key = NULL, started_at = {_PG_NOW}"
)
_TAKEN_LITE: Final = (
    "state = 'running', worker = :worker, attempt = MAX(0, MIN(CAST(attempt AS INTEGER), 2147483646)) + 1, "
    "refunds = MAX(0, MIN(CAST(refunds AS INTEGER), 1000000)) + 1, "
    "claims = CASE WHEN CAST(claims AS INTEGER) BETWEEN -2147483648 AND 2147483646 THEN CAST(claims AS INTEGER) "
    f"ELSE 0 END + 1, queued_key = NULL, started_at = {_LITE_NOW}"
)
# Since it was due, and since it was handed over.
_WAITED_PG: Final = (
    "CASE WHEN isfinite(run_at) THEN EXTRACT(EPOCH FROM now() - run_at) END, "
    "CASE WHEN isfinite(enqueued_at) THEN EXTRACT(EPOCH FROM now() - enqueued_at) END"
)
_WAITED_LITE: Final = (
    "(julianday('now') - julianday(run_at)) * 86400.0, (julianday('now') - julianday(enqueued_at)) * 86400.0"
)
_NOT_PAUSED: Final = "NOT EXISTS (SELECT 1 FROM aftercommit_pool p WHERE p.name = :pool)"
_CLAIM = Statement(
    "WITH due AS (SELECT id AS due_id FROM aftercommit_task WHERE state = 'queued' AND pool = :pool "
    "AND run_at <= now() AND task = ANY(ARRAY(SELECT json_array_elements_text(CAST(:names AS json)))) "
    f"AND {_NOT_PAUSED} "
    "ORDER BY priority DESC, run_at, id LIMIT :count FOR UPDATE SKIP LOCKED) "
    f"UPDATE aftercommit_task SET {_TAKEN_PG} FROM due WHERE id = due_id {_RETURNED} {_WAITED_PG}",
    # The name is not for an index: by the one of kinds, all that is delayed would be looked at (SQLite 3.53).
    f"UPDATE aftercommit_task SET {_TAKEN_LITE} WHERE id IN (SELECT id FROM aftercommit_task "
    f"WHERE state = 'queued' AND pool = :pool AND run_at <= {_LITE_NOW} "
    f"AND +task IN (SELECT value FROM json_each(:names)) AND {_NOT_PAUSED} "
    f"ORDER BY priority DESC, run_at, id LIMIT :count) {_RETURNED} {_WAITED_LITE}",
)
_ANY_DUE = Statement(
    f"SELECT EXISTS (SELECT 1 FROM aftercommit_task WHERE state = 'queued' AND pool = :pool AND run_at <= {_LITE_NOW} "
    f"AND +task IN (SELECT value FROM json_each(:names)) AND {_NOT_PAUSED})"
)
# The same where tasks stand in the way which cannot be taken: the first few of every kind, and of these the best. Not
# always, because on PostgreSQL it locks, for its own length, more than it takes.
_OF_A_KIND: Final = (
    "FROM aftercommit_task t WHERE t.state = 'queued' AND t.pool = k.pool AND t.task = k.task "
    "AND t.priority = k.priority AND t.run_at <= {now} ORDER BY t.run_at, t.id LIMIT :count"
)
_KNOWN_KINDS_LITE: Final = (
    f"FROM kinds k {{join}} WHERE k.pool = :pool AND k.task IN (SELECT value FROM json_each(:names)) AND {_NOT_PAUSED}"
)
_CLAIM_CROWDED = Statement(
    f"WITH {KINDS_PG}, due AS (SELECT d.id AS due_id FROM kinds k CROSS JOIN LATERAL (SELECT t.id, t.run_at "
    f"{_OF_A_KIND.format(now='now()')} FOR UPDATE SKIP LOCKED) d WHERE k.pool = :pool "
    f"AND k.task = ANY(ARRAY(SELECT json_array_elements_text(CAST(:names AS json)))) AND {_NOT_PAUSED} "
    "ORDER BY k.priority DESC, d.run_at, d.id LIMIT :count) "
    f"UPDATE aftercommit_task SET {_TAKEN_PG} FROM due WHERE id = due_id {_RETURNED} {_WAITED_PG}",
    f"UPDATE aftercommit_task SET {_TAKEN_LITE} WHERE id IN (WITH {KINDS_LITE} SELECT c.id "
    + _KNOWN_KINDS_LITE.format(
        # Crossed: in this order, whatever the planner believes.
        join=f"CROSS JOIN aftercommit_task c ON c.id IN (SELECT t.id {_OF_A_KIND.format(now=_LITE_NOW)})"
    )
    + f" ORDER BY c.priority DESC, c.run_at, c.id LIMIT :count) {_RETURNED} {_WAITED_LITE}",
)
_ANY_DUE_CROWDED = Statement(
    f"WITH {KINDS_LITE} SELECT EXISTS (SELECT 1 "
    + _KNOWN_KINDS_LITE.format(join="")
    + f" AND EXISTS (SELECT 1 {_OF_A_KIND.format(now=_LITE_NOW)}))",
)


def claim(
    connection: Connection, *, pool: str, names: Sequence[str], worker: UUID, count: int, crowded: bool = False
) -> list[Claimed]:
    """Take up to *count* due tasks of *pool*, of those *names* only, highest priority first, then oldest first.

    Args:
        connection: In a transaction, or in autocommit.
        pool: The pool.
        names: The tasks that the worker knows.
        worker: Who takes them.
        count: How many at most.
        crowded: Whether many tasks may stand in the way that cannot be taken (``Waiting.is_crowded``). Then fewer than
            *count* do not say that there are no more: others may have been looking at them in the same moment.
    """
    parameters = {"pool": pool, "names": json.dumps(list(names)), "worker": worker, "count": count}
    if connection.dialect.name == "sqlite":
        any_due = _ANY_DUE_CROWDED if crowded else _ANY_DUE
        if not any_due.execute(connection, parameters).scalar():
            # A claim that finds nothing would wait for the write lock all the same.
            return []
    rows = (_CLAIM_CROWDED if crowded else _CLAIM).execute(connection, parameters).all()
    taken: list[tuple[tuple[int, float, str], Claimed]] = []
    for row in rows:
        try:
            each = _claimed(row)
            taken.append(((-int(row[10]), -each.waited, str(each.claim.id)), each))
        except (ValueError, TypeError) as exc:
            # Somebody has written there what no column of ours can hold; only SQLite lets him.
            _UNREADABLE.execute(connection, {"raw": row[0], "error": f"the record cannot be read: {exc}"[:1000]})
    # An UPDATE returns its rows in no order in particular; ids rise with time.
    return [each for _place, each in sorted(taken, key=lambda pair: pair[0])]


_UNREADABLE = Statement(
    "UPDATE aftercommit_task SET state = 'failed', finished_at = clock_timestamp(), error = :error WHERE id = :raw",
    f"UPDATE aftercommit_task SET state = 'failed', finished_at = {_LITE_NOW}, error = :error WHERE id = :raw",
)


def _claimed(row: Any) -> Claimed:
    return Claimed(
        claim=Claim(_uuid(row[0]), row[3], row[4]),
        task=row[1],
        arguments=row[2],
        max_attempts=int(row[5]),
        parent=None if row[6] is None else _uuid(row[6]),
        context=row[7],
        checkpoint=row[8],
        refunds=int(row[9]) - int(row[3]),
        waited=_seconds(row[11]),
        asked_ago=_seconds(row[12]),
    )


def _seconds(value: Any) -> float:
    # Nobody can say it of a moment that there never was, such as the year 0 or infinity.
    seconds = float(value or 0.0)
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


_CLAIM_ONE = Statement(
    "UPDATE aftercommit_task SET state = 'running', worker = :worker, attempt = 1, claims = 1, queued_key = NULL, "
    f"started_at = {_PG_NOW} WHERE id = :id AND state = 'queued'",
    "UPDATE aftercommit_task SET state = 'running', worker = :worker, attempt = 1, claims = 1, queued_key = NULL, "
    f"started_at = {_LITE_NOW} WHERE id = :id AND state = 'queued'",
)


def claim_one(connection: Connection, record: UUID, *, worker: UUID) -> bool:
    """Take one queued task for its first attempt, due or not: a test does not wait."""
    return _CLAIM_ONE.execute(connection, {"id": record, "worker": worker}).rowcount == 1


_REHOME = Statement(
    # Those that an asker has locked, who counts on their being queued, come the next time.
    "UPDATE aftercommit_task SET pool = :new WHERE id IN (SELECT id FROM aftercommit_task WHERE state = 'queued' "
    "AND pool = :old AND task = ANY(ARRAY(SELECT json_array_elements_text(CAST(:names AS json)))) "
    "FOR UPDATE SKIP LOCKED)",
    "UPDATE aftercommit_task SET pool = :new WHERE state = 'queued' AND pool = :old "
    "AND task IN (SELECT value FROM json_each(:names))",
)


def rehome(connection: Connection, *, old: str, new: str, names: Sequence[str]) -> int:
    """Move queued tasks of these names out of a pool that is no more; return how many."""
    return _REHOME.execute(connection, {"old": old, "new": new, "names": json.dumps(list(names))}).rowcount


_ANY_RUNNING = Statement(
    "SELECT EXISTS (SELECT 1 FROM aftercommit_task WHERE state = 'running' "
    "AND task = ANY(ARRAY(SELECT json_array_elements_text(CAST(:names AS json)))))",
    "SELECT EXISTS (SELECT 1 FROM aftercommit_task WHERE state = 'running' "
    "AND task IN (SELECT value FROM json_each(:names)))",
)


def any_running(connection: Connection, *, names: Sequence[str]) -> bool:
    """Whether a task of these names runs, here or anywhere."""
    return bool(_ANY_RUNNING.execute(connection, {"names": json.dumps(list(names))}).scalar())


# --- by hand ----------------------------------------------------------------------------------------------------

_CANCEL = Statement(
    f"UPDATE aftercommit_task SET state = 'cancelled', finished_at = {_PG_NOW}, queued_key = NULL, "
    "cancelled_by = :by WHERE id = :id AND state IN ('queued', 'running') RETURNING worker",
    f"UPDATE aftercommit_task SET state = 'cancelled', finished_at = {_LITE_NOW}, queued_key = NULL, "
    "cancelled_by = :by WHERE id = :id AND state IN ('queued', 'running') RETURNING worker",
)
_RETRY = Statement(
    f"UPDATE aftercommit_task SET state = 'queued', run_at = {_PG_NOW}, finished_at = NULL, worker = NULL, "
    "attempt = 0, refunds = 0, queued_key = NULL, expected = false, cancelled_by = NULL "
    "WHERE id = :id AND state IN ('failed', 'cancelled') RETURNING pool, key",
    f"UPDATE aftercommit_task SET state = 'queued', run_at = {_LITE_NOW}, finished_at = NULL, worker = NULL, "
    "attempt = 0, refunds = 0, queued_key = NULL, expected = false, cancelled_by = NULL "
    "WHERE id = :id AND state IN ('failed', 'cancelled') RETURNING pool, key",
)


def cancel(connection: Connection, record: UUID, *, by: str | None = None) -> bool:
    """Cancel a task that is queued or running; a running one can then commit nothing more, and its worker hears of it.

    Args:
        connection: In a transaction.
        record: The record.
        by: Who asks, for the record.
    """
    row = _CANCEL.execute(connection, {"id": record, "by": by}).first()
    if row is not None and row[0] is not None:
        notify(connection, (), cancelled=(record,))
    return row is not None


_CANCELLED = Statement(
    "SELECT id, claims, cancelled_by FROM aftercommit_task WHERE state = 'cancelled' "
    "AND id IN (SELECT CAST(json_array_elements_text(CAST(:ids AS json)) AS uuid))",
    "SELECT id, claims, cancelled_by FROM aftercommit_task WHERE state = 'cancelled' "
    "AND id IN (SELECT value FROM json_each(:ids))",
)


def cancelled_among(connection: Connection, records: Collection[UUID]) -> dict[tuple[UUID, int], str | None]:
    """Return who has cancelled which of *records*, by id and number of claims."""
    rows = _CANCELLED.execute(connection, {"ids": json.dumps([each.hex for each in records])})
    return {(_uuid(row[0]), row[1]): row[2] for row in rows}


def retry(connection: Connection, record: UUID) -> bool:
    """Queue a task that failed or was cancelled once more, with all its attempts."""
    row = _RETRY.execute(connection, {"id": record}).first()
    if row is None:
        return False
    if row[1] is not None:
        keys.take_up(connection, [record])
    notify(connection, (row[0],))
    return True


# --- progress ---------------------------------------------------------------------------------------------------

_TAKE_LOCK = Statement("DELETE FROM aftercommit_progress WHERE false")
_SET_PROGRESS = Statement(
    "INSERT INTO aftercommit_progress (task_id, done, total) VALUES (:id, :done, :total) "
    "ON CONFLICT (task_id) DO UPDATE SET done = excluded.done, total = excluded.total"
)
_CLEAR_PROGRESS = Statement(
    "DELETE FROM aftercommit_progress WHERE task_id IN (SELECT CAST(json_array_elements_text(CAST(:ids AS json)) AS "
    "uuid))",
    "DELETE FROM aftercommit_progress WHERE task_id IN (SELECT value FROM json_each(:ids))",
)


def take_lock(connection: Connection) -> None:
    """Wait for SQLite's write lock, before anything is looked at; elsewhere there is none."""
    if connection.dialect.name == "sqlite":
        _TAKE_LOCK.execute(connection, {})


def set_progress(connection: Connection, record: UUID, done: int, total: int | None) -> None:
    """Say how far a run is."""
    _SET_PROGRESS.execute(connection, {"id": record, "done": done, "total": total})


def clear_progress(connection: Connection, records: Collection[UUID]) -> None:
    """Forget the progress of records that are pruned."""
    _CLEAR_PROGRESS.execute(connection, {"ids": json.dumps([each.hex for each in records])})


def _uuid(value: Any) -> UUID:
    return value if isinstance(value, UUID) else UUID(str(value))
