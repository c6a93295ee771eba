"""The rules, one code each: the same codes as aftercommit's errors at run time where both exist."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        code: ``AC101`` and so on.
        category: ``C1`` to ``C8``, or ``own``.
        title: What it finds, in a few words.
        why: Why it is a problem, for ``--explain``.
        bad: An example that is found.
        good: The same, right.

    """

    code: str
    category: str
    title: str
    why: str
    bad: str
    good: str


_RULES = (
    Rule(
        "AC101", "C1", "session handed to a background task",
        "A session belongs to the request that opened it. On FastAPI 0.118 and later the request's dependency exits after "
        "its background tasks: the request's connection stays checked out all the while, and its commit comes after the "
        'task. On 0.106 to 0.117 (and with scope="function") the session is closed before the task starts; SQLAlchemy '
        "revives a closed session without a word: reads work, the write is lost, the connection stays idle in transaction.",
        "background_tasks.add_task(send_receipt, db, order.id)",
        "def send_receipt(order_id: int) -> None:\n    with SessionLocal() as db:\n        ...\n\n"
        "db.commit()\nbackground_tasks.add_task(send_receipt, order.id)",
    ),
    Rule(
        "AC102", "C2", "mapped instance handed to a task",
        "A row belongs to the session that loaded it. In the task it is attached to a session that is closed or in use "
        "elsewhere: reading an expired attribute or a relationship raises DetachedInstanceError or MissingGreenlet, or "
        "revives the request's session; what the task changes is never written.",
        "background_tasks.add_task(welcome, user)",
        "background_tasks.add_task(welcome, user.id)  # and load it in the task's own session",
    ),
    Rule(
        "AC103", "C3", "session shared with concurrent work",
        "A session holds one connection and one transaction and is not safe for concurrent use. An asyncio task, a thread "
        "or a gathered coroutine that uses it interleaves its statements with the others': results swapped, "
        "IllegalStateChangeError, a commit in the middle of somebody else's work. SQLAlchemy notices only while the session "
        "fetches its first connection.",
        "await asyncio.gather(*[refresh_price(db, item) for item in items])",
        "async def one(item_id):\n    async with SessionLocal() as db:\n        await refresh_price(db, item_id)\n\n"
        "await asyncio.gather(*[one(item.id) for item in items])",
    ),
    Rule(
        "AC104", "C4", "session not closed on every path",
        "A session that is not closed keeps its connection, often idle in transaction, until the garbage collector comes "
        "by; under load the pool runs dry. next(get_db()) is the same in disguise: the generator is thrown away, its "
        "finally runs at once, the session is silently reopened, and nobody closes it again.",
        "db = SessionLocal()\nrow = db.get(Order, order_id)\ndb.close()  # not when get() raises",
        "with SessionLocal() as db:\n    row = db.get(Order, order_id)",
    ),
    Rule(
        "AC105", "C5", "connection or cursor handed to a task",
        "A connection goes back to its pool when the request ends and is given to the next one: two requests then write on "
        "the same wire. Before that, it is pinned for as long as the task runs.",
        "background_tasks.add_task(make_tiles, conn, project_id)",
        "async def make_tiles(project_id):\n    async with pool.connection() as conn:\n        ...",
    ),
    Rule(
        "AC106", "C6", "error swallowed without a rollback",
        "After a failed flush or commit a session refuses to work until it is rolled back (PendingRollbackError); after a "
        "failed statement PostgreSQL refuses the whole transaction. A handler that goes on with the same session writes "
        "nothing of what it means to write. A rollback undoes everything that is not committed yet, the work before the "
        "try too: where each round of a loop commits, roll back; where one commit stands behind the loop, give each round "
        "a savepoint (begin_nested), so that an error undoes that round alone. --fix inserts the rollback only where the "
        "function itself shows that nothing else is uncommitted.",
        'except Exception as error:\n    job.status = "failed"\n    db.commit()',
        'except Exception as error:\n    db.rollback()  # what was done before the try is committed already\n'
        '    job.status = "failed"\n    db.commit()\n\n'
        "for row in rows:  # one commit behind the loop: a savepoint for each round\n    try:\n"
        "        with db.begin_nested():\n            db.add(row)\n    except IntegrityError:\n"
        "        skipped.append(row)\ndb.commit()",
    ),
    Rule(
        "AC107", "C7", "work started before the commit",
        "The task looks for rows that its asker has not committed yet, and finds nothing. With a dependency that commits "
        "after yield, FastAPI 0.118 and later runs background tasks before that commit; asyncio tasks, threads and "
        "queues may start at once on any version.",
        "db.add(order)\ndb.flush()\nbackground_tasks.add_task(send_receipt, order.id)  # get_db commits after this",
        "db.add(order)\ndb.commit()\nbackground_tasks.add_task(send_receipt, order.id)",
    ),
    Rule(
        "AC108", "C8", "transaction held open during slow work",
        "While a transaction waits for the network its connection is missing in the pool, its row locks stop others, and "
        "the server may end it (idle_in_transaction_session_timeout). Read, commit, do the slow work, then write.",
        "user = db.get(User, user_id)\nrequests.post(url, json=...)\nuser.notified = True\ndb.commit()",
        "user = db.get(User, user_id)\ndb.commit()\nrequests.post(url, json=...)\nuser.notified = True\ndb.commit()",
    ),
    Rule(
        "AC109", "own", "argument cannot cross to an aftercommit task",
        "Arguments of a task are turned into JSON by their annotations. Sessions, connections, requests, open files and "
        "functions cannot be; mapped instances cross by identity, but only into a parameter annotated with their class. "
        "aftercommit refuses the rest at hand-over with UnsafeArgument.",
        "after_commit(process_file, upload_file)",
        "after_commit(process_file, record)  # def process_file(session: Session, record: FileRecord)",
    ),
    Rule(
        "AC110", "own", "hand-over after the last commit of its session",
        "A task starts when the session it was handed over in commits. After the last commit of that session nothing "
        "starts it any more: aftercommit reports TasksNotCommitted when the session closes.",
        "session.commit()\ndb.after_commit(session, send_receipt, order.id)",
        "db.after_commit(session, send_receipt, order.id)\nsession.commit()",
    ),
    Rule(
        "AC111", "own", "first parameter of a task not annotated as its kind of session",
        "aftercommit injects the session into a first parameter annotated Session (def) or AsyncSession (async def). "
        "Without the annotation the parameter is an ordinary argument; with the wrong flavour the task is refused.",
        "@db.task\nasync def send(session: Session, order_id: int): ...",
        "@db.task\nasync def send(session: AsyncSession, order_id: int): ...",
    ),
    Rule(
        "AC112", "own", "session kept in a global or a context variable",
        "A session in a global is shared by every request and thread. One held strongly in a context variable outlives its "
        "request: the event loop keeps the context, and with it the connection.",
        "session = SessionLocal()  # at module level",
        "def get_db():\n    with SessionLocal() as session:\n        yield session",
    ),
    Rule(
        "AC113", "own", "exception swallowed by a function-scope dependency",
        "A scope=\"function\" dependency that catches the endpoint's exception and does not raise it again hides it from the "
        "session's dependency: the session commits half the work, and FastAPI answers 500.",
        'try:\n    yield\nexcept Exception:\n    logger.exception("failed")',
        'try:\n    yield\nexcept Exception:\n    logger.exception("failed")\n    raise',
    ),
)  # fmt: skip

RULES: dict[str, Rule] = {rule.code: rule for rule in _RULES}
"""All rules by code."""
