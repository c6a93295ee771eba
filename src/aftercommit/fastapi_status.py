"""How a task stands, for the browser that waits for it: one answer, or a stream of server-sent events."""

import asyncio
import contextlib
import json
import math
import signal
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Header, HTTPException
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response, StreamingResponse

from aftercommit.errors import ConfigurationError
from aftercommit.runner.following import Followed

if TYPE_CHECKING:
    from aftercommit.database import Database
    from aftercommit.records.states import TaskState

__all__ = ["TaskStatus", "status_router"]

_HEARTBEAT_SECONDS: Final = 15.0
_LOOK_SECONDS: Final = 0.5
_LONGEST_WAIT: Final = 60
_ENDED: Final = "ended"
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class TaskStatus(BaseModel):
    """How a task stands: never its arguments, its result or its traceback.

    Attributes:
        id: The task's id.
        state: ``queued``, ``running``, ``succeeded``, ``failed`` or ``cancelled``.
        progress_done: How far it is, as ``current_run().progress(done, total)`` has told.
        progress_total: Of how many.
        enqueued_at: When it was asked for.
        run_at: When it is due.
        started_at: When the attempt at hand began.
        finished_at: When it ended.
        error: The last error in one line, for those who may see it.
    """

    id: UUID
    state: str
    progress_done: int | None = None
    progress_total: int | None = None
    enqueued_at: datetime
    run_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error: str | None = None


def _nobody() -> bool:
    return False


def status_router(
    db: "Database", *, allow: Callable[..., Any], show_error: Callable[..., Any] | None = None
) -> APIRouter:
    """Return a router that tells how a task stands: ``GET /{id}`` and ``GET /{id}/events``.

    ``GET /{id}`` answers 202 with ``Retry-After`` while the task is open and 200 when it has ended. ``…/events`` is a
    stream of server-sent events, ``state``, ``progress`` and ``end``. One query a second serves all streams of a
    process; a stream ends with its task, when the client goes, and when the server stops.

    Args:
        db: The database.
        allow: A dependency that says whose task this is: it takes ``id: UUID`` and whatever else, and returns whether
            the caller may see the task. What it does not admit is answered 404, like what is not there. Asked once for
            each request, a stream included.
        show_error: A dependency that returns whether the caller sees ``error`` as well; by default nobody does.

    Raises:
        ConfigurationError: If *allow* cannot be a dependency.
    """
    given: object = allow
    if not callable(given):
        raise ConfigurationError(
            f"status_router(allow={allow!r}): give a dependency that says whose task this is, such as "
            "def allow(id: UUID, user: UserDep, session: SessionDep) -> bool."
        )
    router = APIRouter()

    @router.get("/{id}", response_model=TaskStatus, responses={202: {"model": TaskStatus}, 404: {}})
    async def status(
        id: UUID,
        admitted: Any = Depends(allow),  # noqa: FAST002  # a closure's names cannot stand in an annotation
        sees_error: Any = Depends(show_error or _nobody),  # noqa: FAST002  # as above
    ) -> Response:
        """How the task stands."""
        state = await _state(db, id, admitted=admitted)
        body = json.loads(_shown(state, with_error=bool(sees_error)))
        if state.has_ended:
            return JSONResponse(body, headers={"Cache-Control": "no-store"})
        headers = {"Cache-Control": "no-store", "Retry-After": str(_retry_after(state))}
        return JSONResponse(body, status_code=202, headers=headers)

    @router.get("/{id}/events", response_class=StreamingResponse, responses={204: {}, 404: {}})
    async def events(
        id: UUID,
        admitted: Any = Depends(allow),  # noqa: FAST002  # as above
        sees_error: Any = Depends(show_error or _nobody),  # noqa: FAST002  # as above
        last_event_id: str | None = Header(None),  # noqa: FAST002  # as above
    ) -> Response:
        """What becomes of the task, as it happens."""
        state = await _state(db, id, admitted=admitted)
        if last_event_id == _ENDED and state.has_ended:
            # A browser comes again behind the end of a stream, unless it is told that there is nothing more.
            return Response(status_code=204)
        stream = _stream(db, state, with_error=bool(sees_error))
        return StreamingResponse(stream, media_type="text/event-stream", headers=_HEADERS)

    return router


async def _state(db: "Database", id: UUID, *, admitted: object) -> "TaskState":
    from aftercommit.records.states import states_of  # mapping the tables takes time that an import must not

    found = (await db.async_call_anyhow(lambda c: states_of(c, [id]))).get(id) if admitted else None
    if found is None:
        raise HTTPException(404)
    return found


def _shown(state: "TaskState", *, with_error: bool) -> str:
    status = TaskStatus(
        id=state.id,
        state=state.state,
        progress_done=state.progress_done,
        progress_total=state.progress_total,
        enqueued_at=state.enqueued_at,
        run_at=state.run_at,
        started_at=state.started_at,
        finished_at=state.finished_at,
        error=state.error if with_error else None,
    )
    return status.model_dump_json()


def _retry_after(state: "TaskState") -> int:
    wait = (state.run_at - datetime.now(UTC)).total_seconds() if state.state == "queued" else 0.0
    return max(1, min(math.ceil(wait), _LONGEST_WAIT))


async def _stream(db: "Database", state: "TaskState", *, with_error: bool) -> AsyncIterator[str]:
    """Give events from *state* on."""
    news = _News(state)
    followed = Followed(state.id, news.told, news.stopped, is_urgent=False)
    yield "retry: 1000\n" + _event("end" if state.has_ended else "state", state, with_error=with_error)
    if state.has_ended:
        return
    db.following.add(followed)
    try:
        quiet = 0.0
        while not (news.is_over or _is_stopping()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.changed.wait(), _LOOK_SECONDS)
            news.changed.clear()
            seen, state = state, news.state
            if state == seen:
                quiet += _LOOK_SECONDS
                if quiet >= _HEARTBEAT_SECONDS:
                    quiet = 0.0
                    yield ":\n\n"
                continue
            quiet = 0.0
            if state.has_ended:
                yield _event("end", state, with_error=with_error)
                return
            is_progress = (state.state, state.attempt) == (seen.state, seen.attempt)
            yield _event("progress" if is_progress else "state", state, with_error=with_error)
    finally:
        db.following.remove(followed)


class _News:
    """What the thread that looks tells a stream."""

    def __init__(self, state: "TaskState") -> None:
        self.state = state
        self.is_over = False
        self.changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def told(self, state: "TaskState | None") -> None:
        if state is None:
            self.is_over = True
            self._wake()
        elif state != self.state:
            self.state = state
            self._wake()

    def stopped(self) -> None:
        self.is_over = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that is closed streams nothing
            self._loop.call_soon_threadsafe(self.changed.set)


def _event(kind: str, state: "TaskState", *, with_error: bool) -> str:
    mark = f"id: {_ENDED}\n" if kind == "end" else ""
    return f"event: {kind}\n{mark}data: {_shown(state, with_error=with_error)}\n\n"


def _is_stopping() -> bool:
    """Whether uvicorn has been told to stop: it waits for open streams, and tells the application only after them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        server = getattr(signal.getsignal(number), "__self__", None)
        if getattr(server, "should_exit", False) is True:
            return True
    return False
