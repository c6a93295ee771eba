"""What follows a task across the hand-over: the trace of whoever asked for it, and nothing else of his context."""

from contextvars import ContextVar

from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from aftercommit import Database, TaskRecord
from tests.support.databases import DatabaseUnderTest

REQUEST = SpanContext(0xABCDEF, 0x123, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
user: ContextVar[str | None] = ContextVar("user", default=None)


def test_the_trace_of_the_asker_goes_on_in_the_task(database: DatabaseUnderTest) -> None:
    """A task belongs to the trace that asked for it, and sees no other of the asker's context variables."""
    url = database.url.replace("+asyncpg", "+psycopg").replace("+aiosqlite", "")
    db = Database(url)
    seen: list[tuple[int, int, str | None]] = []

    if database.is_async:

        @db.task
        async def work() -> None:
            found = trace.get_current_span().get_span_context()
            seen.append((found.trace_id, found.span_id, user.get()))

    else:

        @db.task
        def work() -> None:
            found = trace.get_current_span().get_span_context()
            seen.append((found.trace_id, found.span_id, user.get()))

    token = context.attach(trace.set_span_in_context(NonRecordingSpan(REQUEST)))
    mine = user.set("somebody")
    try:
        with db.running(create_tables=True):
            with db.session() as session:
                handle = db.after_commit(session, work)
            db.drain()
    finally:
        user.reset(mine)
        context.detach(token)

    with db.session() as session:
        carried = session.get_one(TaskRecord, handle.id).context
    db.dispose()
    assert seen == [(REQUEST.trace_id, REQUEST.span_id, None)]
    assert carried is not None
    assert carried["trace"]["traceparent"] == f"00-{REQUEST.trace_id:032x}-{REQUEST.span_id:016x}-01"
