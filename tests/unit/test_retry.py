"""What follows a failed run: bounds, attempts and an end, for whatever comes."""

import asyncio
import dataclasses
import pickle
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import exc

from aftercommit.errors import (
    CommitWithoutCheckpoint,
    ConfigurationError,
    LostClaim,
    PayloadError,
    PoolExhausted,
    RowGone,
    TaskTimeout,
)
from aftercommit.records.statement import Statement
from aftercommit.tasks.retry import (
    CANCELLED_LIMIT,
    CONFLICT_LIMIT,
    UNIQUE_LIMIT,
    Again,
    GiveUp,
    Repeats,
    Retry,
    Tries,
    backoff,
    decide,
)
from aftercommit.tasks.transient import Fault, describe, fault_of, is_disconnect


def psycopg_error(sqlstate: str | None, name: str = "OperationalError") -> Exception:
    """An error that looks like psycopg's: drivers are known by names, so none is needed here."""
    base = type("OperationalError", (Exception,), {"__module__": "psycopg"})
    kind = base if name == "OperationalError" else type(name, (base,), {"__module__": "psycopg.errors"})
    error: Exception = kind("text with a bound value: jane@example.org")
    error.sqlstate = sqlstate  # type: ignore[attr-defined]
    return error


def sqlite_error(name: str) -> Exception:
    """An error that looks like sqlite3's."""
    error: Exception = type("OperationalError", (Exception,), {"__module__": "sqlite3"})("text")
    error.sqlite_errorname = name  # type: ignore[attr-defined]
    return error


def wrapped(orig: Exception, *, invalidated: bool = False) -> exc.DBAPIError:
    """SQLAlchemy's wrapping."""
    error = exc.OperationalError("SELECT 1", {}, orig, connection_invalidated=invalidated)
    error.__cause__ = orig
    return error


def cancelled_in_ours(error: Exception) -> Exception:
    """*error*, as it comes out of a statement of the library's own."""
    dialect = SimpleNamespace(name="postgresql", paramstyle="pyformat")
    connection: Any = SimpleNamespace(dialect=dialect, exec_driver_sql=Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        Statement("SELECT 1").execute(connection, {})
    return raised.value


CANCELLED = wrapped(psycopg_error("57014", "QueryCanceled"))
OURS_CANCELLED = cancelled_in_ours(wrapped(psycopg_error("57014", "QueryCanceled")))
CONFLICT = wrapped(psycopg_error("40001", "SerializationFailure"))
UNIQUE = wrapped(psycopg_error("23505", "UniqueViolation"))
STALE = wrapped(psycopg_error("25006", "ReadOnlySqlTransaction"))
OUTDATED = wrapped(psycopg_error("0A000", "FeatureNotSupported"))
READ_ONLY_FILE = wrapped(sqlite_error("SQLITE_READONLY"))
IDLE = wrapped(psycopg_error("25P03", "IdleInTransactionSessionTimeout"), invalidated=True)
REFUSED = wrapped(psycopg_error(None))
MISSING = wrapped(psycopg_error("42P01", "UndefinedTable"))
ABORTED = wrapped(psycopg_error("25P02", "InFailedSqlTransaction"))
BUG = KeyError("jane@example.org")
NAMED = ConnectionError("the mail server is down")

ERRORS = [CONFLICT, UNIQUE, STALE, IDLE, REFUSED, MISSING, ABORTED, BUG, NAMED, exc.TimeoutError(), OURS_CANCELLED]

seconds = st.floats(min_value=0, max_value=1e9)
policies = st.builds(
    lambda attempts, waits, on: Retry(attempts=attempts, base=min(waits), cap=max(waits), on=on),
    st.integers(min_value=1, max_value=20),
    st.tuples(seconds, seconds),
    st.sampled_from([(), ConnectionError, (ConnectionError, exc.DBAPIError), Exception]),
)
repeated = st.builds(
    Repeats,
    conflicts=st.integers(min_value=0, max_value=10_000),
    conflict_seconds=st.floats(min_value=0, max_value=100),
    uniques=st.integers(min_value=0, max_value=10),
    stales=st.integers(min_value=0, max_value=3),
    cancels=st.integers(min_value=0, max_value=10),
)
seeds = st.integers(min_value=0).map(Random)


def after(error: BaseException, policy: Retry | None = None, attempt: int = 1, **options) -> Again | GiveUp:
    """``decide`` with plain values for what a test is not about."""
    options = {"repeats": Repeats(), "saw_unique": False, "rng": Random(1), **options}
    return decide(error, policy=policy or Retry(), attempt=attempt, **options)


# --- the policy -------------------------------------------------------------------------------------------------


def test_a_policy_has_the_promised_defaults():
    """Five attempts, from half a second to a minute."""
    assert Retry() == Retry(5, 0.5, 60.0, ()) == Retry(attempts=5, base=0.5, cap=60, on=[])


def test_a_single_class_is_as_good_as_several():
    """``on=ValueError`` needs no comma."""
    assert Retry(on=ValueError).on == Retry(on=[ValueError]).on == (ValueError,)


def test_a_policy_is_a_value():
    """It can be compared, hashed, pickled and replaced, and not changed."""
    policy = Retry(3, on=ValueError)

    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(policy) == hash(Retry(3, on=(ValueError,)))
    assert dataclasses.replace(policy, cap=90.0) == Retry(3, cap=90.0, on=ValueError)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.attempts = 4


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": -1},
        {"attempts": 2.0},
        {"attempts": True},
        {"base": -0.1},
        {"base": 61},
        {"base": "1"},
        {"cap": 0.1},
        {"cap": float("inf")},
        {"base": float("nan")},
        {"on": BaseException},
        {"on": asyncio.CancelledError},
        {"on": (ValueError, KeyboardInterrupt)},
        {"on": (ValueError("instance"),)},
        {"on": "ValueError"},
        {"on": None},
    ],
    ids=repr,
)
def test_what_cannot_be_a_policy_is_refused(options):
    """Bad settings raise where they are written, and name the value."""
    with pytest.raises(ConfigurationError, match="Retry"):
        Retry(**options)


@given(policies, st.integers(min_value=1, max_value=10**30), seeds)
def test_a_wait_is_never_longer_than_its_step_and_the_cap(policy, attempt, rng):
    """Full jitter: from nothing to the step, however late the attempt."""
    wait = backoff(policy, attempt, rng)

    assert 0 <= wait <= policy.cap
    if attempt < 60:
        assert wait <= policy.base * 2 ** (attempt - 1)


def test_waits_use_the_whole_range():
    """Half of a step is waited on average; a wait that only shrank a little would keep rivals in step."""
    rng = Random(7)

    waits = [backoff(Retry(), 3, rng) for _ in range(2000)]

    assert min(waits) < 0.1
    assert max(waits) > 1.9
    assert 0.95 < sum(waits) / len(waits) < 1.05


def test_the_first_attempt_is_1():
    """Nothing is waited for before it."""
    with pytest.raises(ValueError, match="the first is 1"):
        backoff(Retry(), 0, Random())


# --- decisions: what always holds -------------------------------------------------------------------------------


@given(
    st.sampled_from(ERRORS),
    policies,
    st.integers(1, 40),
    st.fixed_dictionaries(
        {"repeats": repeated, "saw_unique": st.booleans(), "saw_conflict": st.booleans(), "rng": seeds}
    ),
)
def test_no_attempt_is_given_out_beyond_the_policy(error, policy, attempt, seen):
    """Whatever happened: at the last attempt nothing follows that would need another."""
    decision = decide(error, policy=policy, attempt=attempt, **seen)

    if isinstance(decision, GiveUp):
        assert "\n" not in decision.reason
        assert "jane" not in decision.reason
    else:
        assert policy.attempts > 1
        assert decision.delay >= 0
        assert decision.drop_connection or not is_disconnect(error)
        if decision.counts:
            assert attempt < policy.attempts
            assert not decision.in_place
            assert decision.delay <= policy.cap


@given(policies.filter(lambda policy: policy.attempts > 1), st.integers(1, 40), repeated, st.booleans(), seeds)
def test_a_conflict_never_counts_and_never_ends_a_task(policy, attempt, repeats, unique, rng):
    """In place at first, for at most a second each; later from the queue, after long enough for others to get on."""
    decision = decide(CONFLICT, policy=policy, attempt=attempt, repeats=repeats, saw_unique=unique, rng=rng)

    assert isinstance(decision, Again)
    assert not decision.counts
    assert not decision.drop_connection
    assert decision.in_place is (repeats.conflict_seconds < CONFLICT_LIMIT)
    assert 0 <= decision.delay <= 1 if decision.in_place else 1 <= decision.delay <= 5


@given(st.data(), policies, seeds)
def test_every_sequence_of_errors_ends_once_conflicts_do(data, policy, rng):
    """Nothing else can keep a task going for ever: at most seven repeats in place for each attempt."""
    errors = [error for error in ERRORS if error is not CONFLICT]
    attempt, repeats = 1, Repeats()
    limit = policy.attempts * (1 + UNIQUE_LIMIT + CANCELLED_LIMIT + 1)

    for _ in range(limit):
        decision = decide(
            data.draw(st.sampled_from(errors)),
            policy=policy,
            attempt=attempt,
            repeats=repeats,
            saw_unique=data.draw(st.booleans()),
            # What was caught on the way counts as a conflict as long as there is time.
            saw_conflict=repeats.conflict_seconds < CONFLICT_LIMIT and data.draw(st.booleans()),
            rng=rng,
        )
        if isinstance(decision, GiveUp):
            break
        if decision.counts:
            attempt, repeats = attempt + 1, Repeats()
        else:
            # As a runner would count, with a clock on which every run takes four seconds.
            repeats = Repeats(
                conflicts=repeats.conflicts + 1,
                conflict_seconds=repeats.conflict_seconds + 4,
                uniques=repeats.uniques + 1,
                stales=repeats.stales + 1,
                cancels=repeats.cancels + 1,
            )

    else:
        pytest.fail(f"still going after {limit} runs")
    assert attempt <= policy.attempts


# --- decisions: one by one --------------------------------------------------------------------------------------


def test_conflicts_wait_longer_and_longer():
    """From 5 ms, doubling, to a second."""

    def longest(conflicts: int) -> float:
        rng = Random(3)
        repeats = Repeats(conflicts=conflicts)
        return max(after(CONFLICT, repeats=repeats, rng=rng).delay for _ in range(500))

    assert 0.004 < longest(0) <= 0.005
    assert 0.075 < longest(4) <= 0.08
    assert 0.95 < longest(20) <= 1.0


@pytest.mark.parametrize("error", ERRORS, ids=describe)
def test_once_means_once(error):
    """``Retry(attempts=1)`` repeats nothing, not even a conflict, and says why."""
    decision = after(error, Retry(attempts=1, on=Exception), saw_unique=True, saw_conflict=True)

    assert isinstance(decision, GiveUp)
    assert "attempts=1" in decision.reason


@pytest.mark.parametrize("error", [REFUSED, exc.TimeoutError(), PoolExhausted("full", pool="files")], ids=describe)
def test_a_lost_connection_is_an_attempt_from_the_queue(error):
    """It blocks no place while the database is away."""
    decision = after(error, Retry(3, base=2, cap=2), attempt=2)

    assert isinstance(decision, Again)
    assert (decision.in_place, decision.counts) == (False, True)
    assert after(error, Retry(3), attempt=3) == GiveUp(reason=f"{describe(error)}; that was attempt 3 of 3")


def test_a_stale_connection_is_dropped_and_the_run_repeated_once():
    """If a fresh connection says the same, it is not the connection."""
    first = after(STALE, attempt=5)
    second = after(OUTDATED, repeats=Repeats(stales=1))

    assert first == Again(delay=0.0, in_place=True, counts=False, drop_connection=True)
    assert second == GiveUp(reason="FeatureNotSupported (0A000): a fresh connection did not help")


def test_a_database_that_stays_read_only_uses_up_attempts():
    """A primary no longer, or an SQLite file opened read-only: the next one is found in time, or it is a failure."""
    later = [after(error, repeats=Repeats(stales=1), attempt=1) for error in (STALE, READ_ONLY_FILE)]
    last = after(STALE, repeats=Repeats(stales=1), attempt=5)

    assert [(step.in_place, step.counts, step.drop_connection) for step in later] == [(False, True, True)] * 2
    assert last == GiveUp(reason="ReadOnlySqlTransaction (25006); that was attempt 5 of 5")


def test_an_idle_kill_counts():
    """A task that waits on the network in a transaction would be repeated, and pay, for ever."""
    decision = after(IDLE)

    assert isinstance(decision, Again)
    assert (decision.in_place, decision.counts, decision.drop_connection) == (False, True, True)
    assert isinstance(after(IDLE, attempt=5), GiveUp)


@pytest.mark.parametrize(
    ("error", "saw_unique"),
    [(UNIQUE, False), (UNIQUE, True), (BUG, True), (ABORTED, True)],
    ids=["raised", "raised and seen", "caught", "aborted"],
)
def test_a_unique_violation_deserves_a_few_tries_even_a_caught_one(error, saw_unique):
    """The usual get-or-create catches it, finds nothing, and fails with an error of its own."""
    decisions = [after(error, repeats=Repeats(uniques=n), saw_unique=saw_unique, attempt=5) for n in range(4)]

    for decision in decisions[:3]:
        assert isinstance(decision, Again)
        assert (decision.in_place, decision.counts) == (True, False)
        assert decision.delay <= 0.1
    assert isinstance(decisions[3], GiveUp)


@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "wrapped"])
def test_what_cancels_a_statement_of_ours_is_told_from_what_cancels_the_task_s(wrap):
    """By the way that the error came, also below an error of the application."""

    def seen(error: Exception) -> BaseException:
        if not wrap:
            return error
        mine = RuntimeError("mine")
        mine.__cause__ = error
        return mine

    assert fault_of(seen(OURS_CANCELLED)) is Fault.CANCELLED
    assert fault_of(seen(CANCELLED)) is (Fault.APPLICATION if wrap else Fault.PERMANENT)
    assert not is_disconnect(OURS_CANCELLED)


@pytest.mark.parametrize(
    ("error", "saw_cancelled"),
    [(OURS_CANCELLED, False), (BUG, True), (ABORTED, True)],
    ids=["raised", "caught", "aborted"],
)
def test_what_cancels_a_statement_of_ours_is_repeated_and_then_an_attempt(error, saw_cancelled):
    """Three times in place; then it is an attempt, and what the function made of it stands."""
    decisions = [
        after(error, repeats=Repeats(cancels=n), saw_cancelled=saw_cancelled) for n in range(CANCELLED_LIMIT + 1)
    ]

    assert all(isinstance(each, Again) and each.in_place and not each.counts for each in decisions[:-1])
    if error is OURS_CANCELLED:
        assert isinstance(decisions[-1], Again)
        assert decisions[-1].counts
        assert isinstance(after(error, repeats=Repeats(cancels=CANCELLED_LIMIT), attempt=5), GiveUp)
    else:
        assert isinstance(decisions[-1], GiveUp)


@pytest.mark.parametrize("error", [CONFLICT, UNIQUE, OURS_CANCELLED], ids=describe)
def test_once_means_once_only_for_what_was_called(error):
    """``Retry(attempts=1)``: what was not called yet may be called."""
    once = Retry(attempts=1)

    assert isinstance(after(error, once), GiveUp)
    assert isinstance(after(error, once, was_called=False), Again)
    assert isinstance(after(REFUSED, once, was_called=False), GiveUp)


@given(st.lists(st.sampled_from([CONFLICT, UNIQUE, STALE, OURS_CANCELLED]), max_size=8), seeds)
def test_each_repeat_is_counted_as_what_it_is_for(errors, rng):
    """And the time of conflicts begins with the first."""
    tries, counted = Tries(), []

    for second, error in enumerate(errors):
        step = after(error, repeats=tries.seen_at(second / 100), rng=rng)
        if isinstance(step, Again) and not step.counts:
            tries.count(step, second / 100)
            counted.append(step.because)

    repeats = tries.repeats
    assert [repeats.conflicts, repeats.uniques, repeats.stales, repeats.cancels] == [
        counted.count(fault) for fault in (Fault.CONFLICT, Fault.UNIQUE, Fault.STALE, Fault.CANCELLED)
    ]
    assert (tries.conflict_since is None) is (CONFLICT not in errors)


@pytest.mark.parametrize("error", [BUG, ABORTED], ids=describe)
def test_a_caught_conflict_is_repeated_in_place_within_the_time_limit(error):
    """Then the error that came of it stands."""
    early = after(error, saw_conflict=True, attempt=5)
    late = after(error, saw_conflict=True, repeats=Repeats(conflict_seconds=CONFLICT_LIMIT))

    assert isinstance(early, Again)
    assert (early.in_place, early.counts) == (True, False)
    assert isinstance(late, GiveUp)


@pytest.mark.parametrize("error", [MISSING, ABORTED, BUG, NAMED], ids=describe)
def test_what_nobody_named_is_not_repeated(error):
    """Errors that cannot pass, and errors of the application."""
    assert isinstance(after(error), GiveUp)


@pytest.mark.parametrize(
    ("error", "on"),
    [
        (NAMED, ConnectionError),
        (NAMED, (ValueError, OSError)),
        (MISSING, exc.DBAPIError),
        (UNIQUE, exc.DBAPIError),
        (ExceptionGroup("two", [ConnectionError(), BrokenPipeError()]), ConnectionError),
        (TaskTimeout("slow", task="t"), TimeoutError),
    ],
)
def test_what_on_names_is_an_attempt(error, on):
    """From the queue, as long as there are attempts; after the repeats that nobody had to ask for."""
    repeats = Repeats(uniques=UNIQUE_LIMIT)

    decision = after(error, Retry(2, on=on), repeats=repeats)

    assert isinstance(decision, Again)
    assert (decision.in_place, decision.counts) == (False, True)
    assert isinstance(after(error, Retry(2, on=on), attempt=2, repeats=repeats), GiveUp)


def test_a_group_is_named_only_as_a_whole():
    """A bug beside a lost connection stays a bug."""
    group = ExceptionGroup("two", [ConnectionError(), KeyError()])

    assert isinstance(after(group, Retry(on=ConnectionError)), GiveUp)


@pytest.mark.parametrize(
    "error",
    [
        RowGone("gone", task="t", row="Order(7,)"),
        PayloadError("changed", task="t"),
        LostClaim("lost", task="t"),
        CommitWithoutCheckpoint("wrote", task="t"),
    ],
    ids=describe,
)
def test_what_ends_a_run_of_ours_for_good_is_never_repeated(error):
    """Not by a broad ``on``, and not because a conflict led to it: a lost claim belongs to another worker."""
    error.__cause__ = CONFLICT

    assert isinstance(after(error, Retry(on=Exception), saw_unique=True, saw_conflict=True), GiveUp)


# --- what an error means, without a database --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        *((code, Fault.CONFLICT) for code in ("40001", "40P01", "55P03")),
        *((code, Fault.CONNECTION) for code in ("57P01", "57P02", "57P03", "08006", "08P01", "53300")),
        *((code, Fault.STALE) for code in ("25006", "26000", "0A000")),
        *((code, Fault.IDLE) for code in ("25P03", "25P04", "57P05")),
        *((code, Fault.UNIQUE) for code in ("23505", "23P01")),
        *((code, Fault.PERMANENT) for code in ("57014", "22012", "23503", "42P01", "25P02", "28P01", "XX000")),
    ],
)
def test_every_sqlstate_has_one_meaning_bare_or_wrapped(code, fault):
    """The table, by heart."""
    error = psycopg_error(code, "Whatever")

    assert fault_of(error) is fault_of(wrapped(error)) is fault


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((f"SQLITE_{name}", Fault.CONFLICT) for name in ("BUSY", "BUSY_SNAPSHOT", "BUSY_RECOVERY", "BUSY_TIMEOUT")),
        *((f"SQLITE_{name}", Fault.CONFLICT) for name in ("LOCKED", "LOCKED_SHAREDCACHE", "PROTOCOL")),
        *((f"SQLITE_{name}", Fault.CONNECTION) for name in ("FULL", "IOERR_WRITE", "CANTOPEN")),
        *((f"SQLITE_{name}", Fault.STALE) for name in ("READONLY", "READONLY_DBMOVED")),
        *((f"SQLITE_CONSTRAINT_{name}", Fault.UNIQUE) for name in ("UNIQUE", "PRIMARYKEY", "ROWID")),
        *((f"SQLITE_CONSTRAINT_{name}", Fault.PERMANENT) for name in ("FOREIGNKEY", "CHECK", "NOTNULL")),
        *((f"SQLITE_{name}", Fault.PERMANENT) for name in ("ERROR", "CORRUPT", "MISMATCH")),
    ],
)
def test_every_name_of_sqlite_has_one_meaning(name, fault):
    """Extended codes follow their family, except where they say more."""
    assert fault_of(sqlite_error(name)) is fault_of(wrapped(sqlite_error(name))) is fault


@pytest.mark.parametrize("code", ["53100", "53200"])
def test_a_server_that_lacks_something_keeps_its_connections(code):
    """Class 53 says nothing against the connection, unless SQLAlchemy found it closed."""
    assert not is_disconnect(wrapped(psycopg_error(code)))
    assert is_disconnect(wrapped(psycopg_error(code), invalidated=True))


@pytest.mark.parametrize(
    ("code", "fault"), [("XX000", Fault.CONNECTION), ("57014", Fault.PERMANENT), ("22012", Fault.PERMANENT)]
)
def test_an_invalidated_connection_decides_where_the_code_does_not(code, fault):
    """A crashed backend passes; what the table calls permanent does not, whatever became of the connection."""
    error = wrapped(psycopg_error(code, "Whatever"), invalidated=True)

    assert fault_of(error) is fault
    assert is_disconnect(error)


def chained(error: BaseException, *, cause: BaseException | None = None, context: BaseException | None = None):
    """Give *error* a past."""
    error.__context__ = context
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [CONFLICT, UNIQUE, STALE, IDLE, REFUSED], ids=describe)
def test_an_error_raised_from_one_that_passes_is_that_one(error):
    """``raise Mine() from error`` says what the cause was, however many links away."""
    mine = chained(RuntimeError("mine"), cause=chained(ValueError("deeper"), cause=error))

    assert fault_of(mine) is fault_of(error)
    assert is_disconnect(mine) is is_disconnect(error)
    assert describe(mine) == f"RuntimeError from {describe(error)}"


def test_an_error_raised_from_one_that_cannot_pass_stays_the_applications():
    """It is the application that decides about it, by ``on``."""
    assert fault_of(chained(RuntimeError(), cause=MISSING)) is Fault.APPLICATION


@pytest.mark.parametrize("error", [CONFLICT, UNIQUE, STALE, IDLE, REFUSED], ids=describe)
def test_what_was_merely_being_handled_proves_nothing(error):
    """A function called again in an ``except`` block carries the error of last time as its context."""
    assert fault_of(chained(RuntimeError(), context=error)) is Fault.APPLICATION


@pytest.mark.parametrize("code", ["7s2a", "25P02"])
def test_below_an_aborted_transaction_the_handled_error_is_looked_at(code):
    """Being aborted means nothing by itself: what aborted it does."""
    aftermath: Exception
    if code == "7s2a":
        aftermath = exc.PendingRollbackError("rolled back", code=code)
    else:
        aftermath = wrapped(psycopg_error(code, "InFailedSqlTransaction"))

    alone = fault_of(aftermath)
    aftermath.__context__ = CONFLICT

    assert alone is Fault.PERMANENT
    assert fault_of(aftermath) is Fault.CONFLICT
    assert fault_of(chained(RuntimeError(), cause=aftermath)) is Fault.CONFLICT


def test_a_group_is_what_all_its_members_agree_upon():
    """Two conflicts are a conflict; a conflict and a bug are a bug."""
    inner = ExceptionGroup("inner", [CONFLICT])

    assert fault_of(ExceptionGroup("two", [CONFLICT, inner])) is Fault.CONFLICT
    assert fault_of(ExceptionGroup("two", [CONFLICT, BUG])) is Fault.APPLICATION
    assert fault_of(BaseExceptionGroup("two", [CONFLICT, asyncio.CancelledError()])) is Fault.APPLICATION


def test_what_the_server_said_last_weighs_more_than_the_closed_connection():
    """The driver says 08003, from the error with which the server closed it."""
    closed, reason = psycopg_error("08003", "ConnectionDoesNotExist"), psycopg_error("25P04", "TransactionTimeout")
    closed.__cause__ = reason

    assert fault_of(closed) is fault_of(wrapped(closed)) is Fault.IDLE
    assert describe(wrapped(closed)) == "TransactionTimeout (25P04)"


def test_a_circle_of_causes_ends():
    """Python allows it, and somebody's framework makes one."""
    first, second = RuntimeError(), RuntimeError()
    first.__cause__, second.__cause__ = second, first

    assert fault_of(first) is Fault.APPLICATION


def test_an_error_in_preparing_a_statement_is_seen_through():
    """StatementError wraps what a type's own code raised; a database error only if that was one."""
    error = exc.StatementError("wrapped", "SELECT 1", {}, ValueError("not a colour"))
    of_a_default = exc.StatementError("wrapped", "SELECT 1", {}, CONFLICT)

    assert fault_of(error) is Fault.APPLICATION
    assert fault_of(of_a_default) is Fault.CONFLICT


def test_a_pickled_error_means_the_same():
    """It crossed from a process, and lost its causes on the way."""
    error = exc.OperationalError("SELECT 1", {}, CONFLICT.orig)

    assert fault_of(error) is Fault.CONFLICT


@pytest.mark.parametrize(
    "error", [ValueError(), OSError(), TimeoutError(), asyncio.CancelledError(), exc.ArgumentError()]
)
def test_what_is_no_database_error_is_the_applications(error):
    """SQLAlchemy's complaints about a program are among them."""
    assert fault_of(error) is Fault.APPLICATION
    assert not is_disconnect(error)
