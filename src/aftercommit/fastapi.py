"""FastAPI: a session per request that commits before the response starts, and tasks that follow the commit.

```python
app = FastAPI()
install(app, db)

@app.post("/files", status_code=202)
def upload(session: SessionDep, after_commit: AfterCommitDep) -> dict[str, str]: ...
```

Everything here leans on the commit, never on the order in which FastAPI leaves its dependencies.

One module, although a long one: users import one name, ``aftercommit.fastapi``, and nothing else may import fastapi.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, ParamSpec, cast
from weakref import WeakKeyDictionary, WeakSet

import anyio
import anyio.to_thread
import fastapi
from fastapi import Depends, FastAPI
from fastapi.routing import APIWebSocketRoute
from sqlalchemy import MetaData
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from aftercommit.errors import ConfigurationError, HandOverError, PoolExhausted
from aftercommit.events import EventHandle
from aftercommit.fastapi_status import TaskStatus, status_router
from aftercommit.plain import one_line
from aftercommit.pools.pools import REQUEST
from aftercommit.sessions import AsyncScope, Owner, Scope, line_of, serving, shielded
from aftercommit.tasks.transient import Fault, fault_of, is_disconnect, met_in_commit
from aftercommit.wording import without_values

if TYPE_CHECKING:
    from fastapi.dependencies.models import Dependant

    from aftercommit.database import Database
    from aftercommit.pools.urls import Flavour
    from aftercommit.runner import TaskHandle
    from aftercommit.tasks import Task

__all__ = [
    "AfterCommit",
    "AfterCommitDep",
    "AsyncSessionDep",
    "SessionDep",
    "TaskStatus",
    "after_commit_of",
    "async_session_of",
    "get_after_commit",
    "get_async_session",
    "get_session",
    "install",
    "session_of",
    "status_router",
]

logger = logging.getLogger(__name__)

P = ParamSpec("P")

_OLDEST: Final = (0, 121)
_LOSES_SCOPES: Final = "0.121.0"
"""Forgets the scope of what stands in ``dependencies=[…]``; 0.121.1 does not."""
_VERSION: Final = re.compile(r"(\d+)\.(\d+)")
_KEY: Final = "aftercommit.sessions"
_PLACE: Final = "aftercommit.place"
_INSTALLED: Final = "aftercommit_databases"
"""The attribute of an application's router under which its databases stand."""
_BY_DATABASE: Final = "_fastapi_dependencies"
_CHECKED: Final = "aftercommit_checked"
_applications: WeakSet[FastAPI] = WeakSet()
_sessions: WeakSet[Callable[..., Any]] = WeakSet()
"""Our session dependencies: ``scope="function"`` only, and never in a WebSocket."""
_hand_overs: WeakSet[Callable[..., Any]] = WeakSet()
"""Our hand-over dependencies that stand on them."""
_bound: WeakSet[Callable[..., Any]] = WeakSet()
"""Our hand-over dependencies that stand on one of the application's own."""


# --- the application --------------------------------------------------------------------------------------------


def install(
    app: FastAPI,
    db: Database,
    *,
    runs: Sequence[str] | None = None,
    grace: float = 15.0,
    create_tables: bool | MetaData | None = None,
    processes: int | None = None,
    strict: bool = False,
) -> None:
    """Give *app* the database: tables and runner at start-up, an orderly stop, and the dependencies of this module.

    Wraps the application's own lifespan: the tables stand before it starts, tasks run while it is open.

    Args:
        app: The application.
        db: Its database. Call again for a second one, and use ``session_of(db2)`` there.
        runs: The pools whose tasks run in this process; None for all, ``()`` for none.
            ``AFTERCOMMIT_RUNS=none`` does the same from outside.
        grace: Seconds that running tasks get when the application stops.
        create_tables: Whether to make our tables at start-up; None for SQLite only; ``Base.metadata``: the
            application's own tables as well.
        processes: How many processes, on all machines, share the server's connections; None to count this one and the
            live workers.
        strict: Whether to refuse to start, with ``PoolBudgetError`` instead of a warning, where they may open more
            connections than the server allows.

    Raises:
        ConfigurationError: For a FastAPI that is too old, an application that has started, or if *db* is installed
            already.
    """
    _check_version()
    if not isinstance(app, FastAPI):
        raise ConfigurationError(
            f"install(app, db) needs the FastAPI application, and got {type(app).__name__}. Routers share the "
            "application's database: install it there."
        )
    if app.middleware_stack is not None:
        raise ConfigurationError(
            "install(app, db) came after the application has started, so its start-up and its stop would be missed. "
            "Call it where the application is put together."
        )
    databases: list[Database] = getattr(app.router, _INSTALLED, [])
    if db in databases:
        raise ConfigurationError("This Database is installed in this application already. Once is enough.")
    setattr(app.router, _INSTALLED, [*databases, db])
    _applications.add(app)
    _answer_errors(app)
    running = db.running(runs=runs, grace=grace, create_tables=create_tables, processes=processes, strict=strict)
    db.expects_runner = bool(running.pools)
    db.flavours_of_requests = partial(_flavours_of, app, db)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(target: Any) -> AsyncIterator[Any]:
        for where, route in _routes(app.routes):
            if fastapi.__version__ == _LOSES_SCOPES:
                _restore_scopes(route)
            _check(where, route.dependant)
        _warn_of_blocking(app, db)
        for mount in _mounts(app.routes):
            # What its endpoints raise ends in the mounted application, which answers 500 to what it does not know.
            if isinstance(mounted := getattr(mount, "app", None), FastAPI):
                _answer_errors(mounted)
        try:
            # The tables first, because the application's own start-up may hand over tasks; the runner last, because
            # tasks may need what that start-up opens.
            await db.prepare_tables(create=create_tables)
            async with inner(target) as state, running:
                yield state
        finally:
            await db.async_dispose()

    app.router.lifespan_context = lifespan


def _answer_errors(app: FastAPI) -> None:
    app.exception_handlers.setdefault(PoolExhausted, _answer_exhausted)
    app.exception_handlers.setdefault(DBAPIError, _answer_unreachable)


async def _answer_exhausted(request: Request, error: Exception) -> Response:
    """Answer 503, or what the application answers to SQLAlchemy's errors: it knows better."""
    theirs = _handler_of_theirs(request, error)
    if theirs is not None:
        return await _ask(theirs, request, error)
    return _answer_503(request, error, "Too busy. Try again.")


async def _answer_unreachable(request: Request, error: Exception) -> Response:
    """Answer 503 if the database cannot be reached for now; all other errors of databases stay as they are.

    Not where the connection was lost during COMMIT. Nobody knows what became of that one, and whoever asks again,
    as a 503 invites to, might have it done twice.
    """
    theirs = _handler_of_theirs(request, error)
    if theirs is not None:
        return await _ask(theirs, request, error)
    if fault_of(error) not in (Fault.CONNECTION, Fault.STALE) or (is_disconnect(error) and met_in_commit(error)):
        raise error
    return _answer_503(request, error, "The database cannot be reached. Try again.")


def _handler_of_theirs(request: Request, error: Exception) -> Callable[..., Any] | None:
    """The handler that the application has for a broader class of errors.

    Not for ``Exception``: that one answers to what nobody has handled, and Starlette, which calls it, then lets the
    error through, to be seen by servers and tests.
    """
    for kind in type(error).__mro__[1:-3]:
        handler = request.app.exception_handlers.get(kind)
        if handler is not None and handler is not _answer_unreachable:
            return cast("Callable[..., Any]", handler)
    return None


async def _ask(handler: Callable[..., Any], request: Request, error: Exception) -> Response:
    answer = handler(request, error)
    return cast("Response", await answer if inspect.isawaitable(answer) else answer)


def _answer_503(request: Request, error: Exception, detail: str) -> Response:
    if request.scope["type"] != "http":
        # Starlette comes here with WebSockets, too. One that was accepted knows no status: it ends as without us.
        raise error
    # Our own texts have several lines; those of others are laid out by what leaves the values out.
    told = str(without_values(error))
    logger.error("%s %s: %s", one_line(request.method), one_line(request.url.path), told)
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "1"})


def _check_version() -> None:
    if _is_too_old():
        raise ConfigurationError(
            f"FastAPI {fastapi.__version__} is too old: before 0.121 a dependency cannot commit before the response "
            "starts. pip install 'fastapi>=0.121'."
        )


def _is_too_old() -> bool:
    found = _VERSION.match(fastapi.__version__)
    return found is not None and (int(found[1]), int(found[2])) < _OLDEST


def _function_scoped(dependency: Callable[..., Any]) -> Any:
    # An older FastAPI does not know scopes. This module must import all the same: install tells what is wrong.
    return Depends(dependency) if _is_too_old() else Depends(dependency, scope="function")


def _database_of(connection: HTTPConnection) -> Database:
    """The database that was installed: in this sub-application, or in an application it is mounted in."""
    app = connection.scope.get("app")
    for router in (getattr(app, "router", None), connection.scope.get("router")):
        databases = getattr(router, _INSTALLED, None)
        if databases:
            return databases[0]  # type: ignore[no-any-return]
    for outer in _applications:
        # Neither the innermost nor the outermost: an application in between.
        if any(getattr(mount, "app", None) is app for mount in _mounts(outer.routes)):
            return getattr(outer.router, _INSTALLED)[0]  # type: ignore[no-any-return]
    raise ConfigurationError(
        "No Database is installed in this application. Write install(app, db) after app = FastAPI(); a mounted "
        "sub-application uses the one of the application it is mounted in."
    )


# --- what cannot work, found before the first request -----------------------------------------------------------


def _contexts(routes: Sequence[Any]) -> Iterator[Any]:
    """Every route, those of included routers with what they are included with."""
    try:
        from fastapi.routing import iter_route_contexts
    except ImportError:  # an older FastAPI, which copies them into the application
        yield from routes
    else:
        yield from iter_route_contexts(routes)


def _mounts(routes: Sequence[Any]) -> Iterator[Any]:
    for route in _contexts(routes):
        below = getattr(route, "routes", None)
        if below:
            yield route
            yield from _mounts(below)


def _routes(routes: Sequence[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every route that has dependencies, with what to call it in a message."""
    for route in _contexts(routes):
        path = prefix + (getattr(route, "path", None) or "")
        if getattr(route, "dependant", None) is not None:
            is_socket = isinstance(getattr(route, "original_route", route), APIWebSocketRoute)
            yield (f"WebSocket {path}" if is_socket else path), route
        yield from _routes(getattr(route, "routes", None) or [], path)


def _restore_scopes(route: Any) -> None:
    """Give what stands in ``dependencies=[Depends(…, scope=…)]`` the scope that FastAPI 0.121.0 loses."""
    # They come first among the route's dependants, in this order.
    for given, dependant in zip(route.dependencies, route.dependant.dependencies, strict=False):
        if given.scope is not None and dependant.call is given.dependency:
            dependant.scope = given.scope
            for cached in ("computed_scope", "cache_key"):
                dependant.__dict__.pop(cached, None)


def _check(where: str, dependant: Dependant) -> None:
    every = _all_dependants(dependant)
    for each in every:
        if each.call is None:
            continue
        if where.startswith("WebSocket ") and (each.call in _sessions or each.call in _hand_overs):
            raise ConfigurationError(f"{where}: {_NOT_IN_WEBSOCKETS}")
        if each.call in _sessions and each.scope != "function":
            raise ConfigurationError(
                f"{where} depends on aftercommit's session without scope='function': it would commit after the "
                "response has been sent, so a failing commit would reach the client as a success. Write SessionDep or "
                f"AsyncSessionDep, or Depends(get_session, scope='function').{_loss()}"
            )
        if each.call in _bound:
            _check_bound(where, each.dependencies[0], every)


def _loss() -> str:
    # Restored at start-up only: what is added later, or without a start-up, has been entered by the time we see it.
    if fastapi.__version__ != _LOSES_SCOPES:
        return ""
    return " If that stands in dependencies=[…] already, FastAPI 0.121.0 lost it: pip install 'fastapi>=0.121.1'."


def _check_bound(where: str, session: Dependant, every: list[Dependant]) -> None:
    """Whether ``after_commit_of(db, get_db)`` gets the session that the endpoint gets."""
    for each in every:
        scopes = {each.scope or "request", session.scope or "request"}
        if each.call is session.call and (len(scopes) > 1 or not each.use_cache):
            name = getattr(session.call, "__name__", repr(session.call))
            remedy = (
                f"Depends({name}), without use_cache=False"
                if not each.use_cache
                else f"after_commit_of(db, {name}, scope={each.scope or 'request'!r})"
            )
            raise ConfigurationError(
                f"{where} would get two sessions of {name}: one for the endpoint, another for after_commit_of, because "
                "FastAPI makes one for each scope. The tasks would wait for a commit of the wrong one. "
                f"Write {remedy}."
            )


def _warn_of_blocking(app: FastAPI, db: Database) -> None:
    """Tell of each ``async def`` that was given a Session of *db*: its statements would stop all other requests."""
    sessions = _sync_sessions(app, db)
    found: dict[str, None] = {}
    for where, route in _routes(app.routes):
        for each in _all_dependants(route.dependant):
            is_async = inspect.iscoroutinefunction(each.call) or inspect.isasyncgenfunction(each.call)
            if is_async and any(below.call in sessions for below in each.dependencies):
                methods = ", ".join(sorted(getattr(route, "methods", None) or ()))
                found[f"`async def {getattr(each.call, '__name__', each.call)}` of {methods} {where}"] = None
    if found:
        logger.warning(
            "%s: an `async def` that is given a Session. Each of its statements blocks the event loop, and every other "
            "request of this process with it. Write `def`, or take AsyncSessionDep", one_line("; ".join(found)),
        )  # fmt: skip


def _all_dependants(dependant: Dependant) -> list[Dependant]:
    return [dependant, *(each for below in dependant.dependencies for each in _all_dependants(below))]


def _flavours_of(app: FastAPI, db: Database) -> set[Flavour]:
    """The flavours of the sessions of *db* that the endpoints of *app* ask for."""
    made: dict[str, Callable[..., Any]] = vars(db).get(_BY_DATABASE, {})
    known: dict[Flavour, set[Any]] = {"sync": _sync_sessions(app, db), "async": {made.get("get_async_session_of")}}
    if getattr(app.router, _INSTALLED)[0] is db:
        known["async"].add(get_async_session)
    used = {each.call for _, route in _routes(app.routes) for each in _all_dependants(route.dependant)} - {None}
    return {flavour for flavour, sessions in known.items() if used & sessions}


def _sync_sessions(app: FastAPI, db: Database) -> set[Any]:
    """The dependencies that give a Session of *db*."""
    made: dict[str, Callable[..., Any]] = vars(db).get(_BY_DATABASE, {})
    own = {get_session} if getattr(app.router, _INSTALLED)[0] is db else set()
    return own | ({made["get_session_of"]} if "get_session_of" in made else set())


def _route_of(connection: HTTPConnection) -> Any:
    """The route of this request, with the dependencies of the routers that it is included by."""
    included = connection.scope.get("fastapi") or {}
    return included.get("effective_route_context") or connection.scope.get("route")


def _check_once(connection: HTTPConnection) -> None:
    """Check a route that start-up has not seen: no lifespan has run, or it was added later."""
    route = _route_of(connection)
    if route is not None and not hasattr(route, _CHECKED):
        if getattr(route, "dependant", None) is not None:
            _check(connection.scope["path"], route.dependant)
        setattr(route, _CHECKED, True)


# --- sessions ---------------------------------------------------------------------------------------------------

_NOT_IN_WEBSOCKETS: Final = (
    "a session that lives as long as the socket would hold its connection, and its tasks, for hours. "
    "Open one per message: `async with db.async_session() as session:` (or `with db.session() as session:`), and hand "
    "over with db.after_commit(session, …)."
)


class _Request:
    """What one request has of one database: at most one session, of one flavour."""

    __slots__ = ("had_session", "scope")

    def __init__(self) -> None:
        self.scope: Scope | AsyncScope | None = None
        self.had_session = False


def _request_of(connection: HTTPConnection, db: Database) -> _Request:
    requests: dict[int, _Request] = connection.scope.setdefault(_KEY, {})
    return requests.setdefault(id(db), _Request())


_places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


@asynccontextmanager
async def _place(connection: HTTPConnection) -> AsyncIterator[None]:
    """Wait until a thread is sure to be there for every step of a ``def`` endpoint.

    FastAPI goes to its threads once for the endpoint and once more to validate what it returned. If all 40 threads
    wait for a connection, those who have one cannot get on, and nobody gives one back. So no more requests get a
    sync session than there are threads: that costs nothing, because no more of them could run.
    """
    if _PLACE in connection.scope or inspect.iscoroutinefunction(connection.scope.get("endpoint")):
        yield
        return
    loop = asyncio.get_running_loop()
    places = _places.get(loop)
    if places is None:
        threads = anyio.to_thread.current_default_thread_limiter().total_tokens
        places = _places[loop] = asyncio.Semaphore(1_000_000 if threads == math.inf else int(threads))
    async with places:
        # One for the whole request, however many databases it uses.
        connection.scope[_PLACE] = True
        try:
            yield
        finally:
            del connection.scope[_PLACE]


def _owner(connection: HTTPConnection) -> Owner:
    if connection.scope["type"] == "websocket":
        raise ConfigurationError(f"WebSocket {connection.scope['path']}: {_NOT_IN_WEBSOCKETS}")
    scope = connection.scope
    return Owner(one_line(f"{scope['method']} {scope['path']}"), line_of(scope.get("endpoint")), kind="request")


def _enter(connection: HTTPConnection, db: Database, scope: Scope | AsyncScope) -> _Request:
    _check_once(connection)
    request = _request_of(connection, db)
    if request.scope is not None:
        if type(request.scope) is type(scope):
            raise ConfigurationError(
                f"{scope.owner}: this request has a session of this database already, made by another dependency, in "
                "another scope, or with use_cache=False. Two sessions are two transactions, which commit apart. Use "
                "SessionDep (or AsyncSessionDep) everywhere, also in sub-dependencies; a generator dependency over it "
                "needs Depends(…, scope='function')."
            )
        raise ConfigurationError(
            f"{scope.owner}: this request asks for a Session and an AsyncSession of the same database. They are two "
            "transactions, which commit apart. Use one of them in the endpoint and in all its dependencies."
        )
    request.scope = scope
    request.had_session = True
    return request


async def _finish(scope: Scope | AsyncScope, *, commit: bool) -> None:
    """End a session without blocking the loop, whatever is cancelled meanwhile."""
    # A cancelled scope of anyio's cancels again at every turn of the loop, so it must not see us.
    with anyio.CancelScope(shield=True):
        if isinstance(scope, AsyncScope):
            await (scope.__aexit__(None, None, None) if commit else scope.end())
        elif not scope.session.in_transaction():
            scope.end()
        else:
            # Not one of the 40 threads that serve endpoints: if all of them wait for a connection, the commit that
            # would give one back must not wait for them.
            work = anyio.to_thread.run_sync(_finish_in_thread, scope, commit, limiter=anyio.CapacityLimiter(1))
            await shielded(work)


def _finish_in_thread(scope: Scope, commit: bool) -> None:  # noqa: FBT001  # threads are called by position
    try:
        if commit:
            scope.commit()
    finally:
        scope.end()


@asynccontextmanager
async def _serve(connection: HTTPConnection, db: Database, scope: Scope | AsyncScope) -> AsyncIterator[Any]:
    try:
        request = _enter(connection, db, scope)
    except BaseException:
        # It was opened for nobody: dropped as it is, it would be told of as a leak.
        await _finish(scope, commit=False)
        raise
    handled = sys.exception()
    serving.set(scope.owner.name)
    try:
        yield scope.session
    except BaseException:
        await _finish(scope, commit=False)
        raise
    else:
        # A dependency in between may have swallowed the endpoint's exception. FastAPI then has no response and
        # answers 500, and what the client is told has failed must not be committed.
        await _finish(scope, commit=sys.exception() is handled)
    finally:
        serving.set(None)
        request.scope = None


def _sync_scope(connection: HTTPConnection, db: Database) -> Scope:
    return db.sessions.scope(REQUEST, _owner(connection))


def _async_scope(connection: HTTPConnection, db: Database) -> AsyncScope:
    return db.sessions.async_scope(REQUEST, _owner(connection))


@asynccontextmanager
async def _serve_sync(connection: HTTPConnection, db: Database) -> AsyncIterator[Session]:
    scope = _sync_scope(connection, db)
    async with _place(connection), _serve(connection, db, scope) as session:
        yield session


def _serve_async(connection: HTTPConnection, db: Database) -> AbstractAsyncContextManager[AsyncSession]:
    return _serve(connection, db, _async_scope(connection, db))


async def get_session(connection: HTTPConnection) -> AsyncIterator[Session]:
    """The request's session: committed when the endpoint has returned, before the response starts.

    The key for ``app.dependency_overrides``; in endpoints write ``SessionDep``.
    """
    async with _serve_sync(connection, _database_of(connection)) as session:
        yield session


async def get_async_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """The request's async session: committed when the endpoint has returned, before the response starts.

    The key for ``app.dependency_overrides``; in endpoints write ``AsyncSessionDep``.
    """
    async with _serve_async(connection, _database_of(connection)) as session:
        yield session


def session_of(db: Database) -> Any:
    """Depend on the session of one of several databases.

    Written as ``Annotated[Session, session_of(db2)]``.
    """

    async def get_session_of(connection: HTTPConnection) -> AsyncIterator[Session]:
        async with _serve_sync(connection, db) as session:
            yield session

    return _known(db, get_session_of, _sessions)


def async_session_of(db: Database) -> Any:
    """Depend on the async session of one of several databases.

    Written as ``Annotated[AsyncSession, async_session_of(db2)]``.
    """

    async def get_async_session_of(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
        async with _serve_async(connection, db) as session:
            yield session

    return _known(db, get_async_session_of, _sessions)


def _known(db: Database, made: Callable[..., Any], kind: WeakSet[Callable[..., Any]]) -> Any:
    """One callable per database, so that two parameters of one endpoint share one session."""
    _check_version()
    # Kept by the database, so that they go when it goes.
    known: dict[str, Callable[..., Any]] = vars(db).setdefault(_BY_DATABASE, {})
    dependency = known.setdefault(made.__name__, made)
    kind.add(dependency)
    return _function_scoped(dependency)


# --- handing over -----------------------------------------------------------------------------------------------


class AfterCommit:
    """Hands tasks over to the commit of one session: ``after_commit(task, *args)``.

    Attributes:
        db: The database whose tasks these are.
    """

    __slots__ = ("_session", "db")

    def __init__(self, db: Database, session: Any) -> None:
        self.db = db
        self._session = session

    @property
    def session(self) -> Any:
        """The session whose commit the tasks wait for."""
        return self._session

    def __call__(self, task: Task[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> TaskHandle:
        """Have *task* run once the session's transaction has committed; see ``Database.after_commit``."""
        return self.db.after_commit(self.session, task, *args, **kwargs)

    def publish(self, event: object, key: str | None = None) -> EventHandle:
        """Have every handler of *event* run once the session's transaction has committed; see ``Database.publish``."""
        return self.db.publish(self.session, event, key=key)


class _AfterRequest(AfterCommit):
    """Hands over to whichever session the request has at that moment."""

    __slots__ = ("_connection", "_request", "is_over", "own")

    def __init__(self, db: Database, connection: HTTPConnection) -> None:
        super().__init__(db, None)
        self._connection = connection
        self._request = _request_of(connection, db)
        self.own: Scope | AsyncScope | None = None
        self.is_over = False

    @property
    def session(self) -> Any:
        """The request's session; one for the tasks alone where the endpoint has none."""
        if self.is_over:
            raise HandOverError(
                f"{_owner(self._connection).name} has ended, and with it the transaction that a task could wait for. "
                "This is a streaming response, a background task of Starlette's, or a variable that outlived the "
                "request. "
                "Open a session here: with db.session() as session: db.after_commit(session, task, …)."
            )
        if self._request.scope is not None:
            return self._request.scope.session
        if self.own is None:
            if not self._request.had_session:
                _refuse_unknown_session(self._connection)
            make = _async_scope if self.db.sessions.is_async_only else _sync_scope
            self.own = make(self._connection, self.db)
        return self.own.session


@asynccontextmanager
async def _serve_after_commit(connection: HTTPConnection, db: Database) -> AsyncIterator[AfterCommit]:
    after_commit = _AfterRequest(db, connection)
    handled = sys.exception()
    commit = False
    try:
        yield after_commit
        commit = sys.exception() is handled
    finally:
        after_commit.is_over = True
        if after_commit.own is not None:
            await _finish(after_commit.own, commit=commit)


def _refuse_unknown_session(connection: HTTPConnection) -> None:
    """Refuse to hand over into another transaction than that of the session which the endpoint has, or will have."""
    dependant = getattr(_route_of(connection), "dependant", None)
    if dependant is None:
        return
    overridden = getattr(connection.scope.get("app"), "dependency_overrides", {})
    for each in _all_dependants(dependant):
        call = each.call
        if call is None or call not in (get_session, get_async_session):
            continue
        if call in overridden:
            raise HandOverError(
                f"{call.__name__} is overridden, so AfterCommitDep does not know the session of this request, and "
                "the task would be written into another transaction. Override it, too: "
                "app.dependency_overrides[get_after_commit] = lambda: AfterCommit(db, session); in tests, "
                "aftercommit.testing.replace(db, …) replaces everything at once."
            )
        raise HandOverError(
            "A dependency hands over a task before this request has opened its session, so the task would be written "
            "into another transaction. Let that dependency take the session, too (SessionDep or AsyncSessionDep), "
            "before it hands over."
        )


async def get_after_commit(connection: HTTPConnection) -> AsyncIterator[AfterCommit]:
    """Hands over to the commit of the request's session, whichever flavour the endpoint uses.

    The key for ``app.dependency_overrides``; in endpoints write ``AfterCommitDep``.
    """
    async with _serve_after_commit(connection, _database_of(connection)) as after_commit:
        yield after_commit


def after_commit_of(db: Database, get_session: Callable[..., Any] | None = None, *, scope: str | None = None) -> Any:
    """Depend on the hand-over to the tasks of one database, bound to the session of a dependency.

    Written as ``Annotated[AfterCommit, after_commit_of(db, get_db)]``.

    Args:
        db: The database whose tasks these are.
        get_session: The application's own dependency that yields the session, whatever made it; None for ours.
        scope: The scope in which the endpoints depend on it (``"function"`` or ``"request"``), if they name one: a
            dependency used in two scopes makes two sessions.
    """
    if get_session is None:

        async def get_after_commit_of(connection: HTTPConnection) -> AsyncIterator[AfterCommit]:
            async with _serve_after_commit(connection, db) as after_commit:
                yield after_commit

        return _known(db, get_after_commit_of, _hand_overs)

    dependency = Depends(get_session) if scope is None else Depends(get_session, scope=scope)  # type: ignore[arg-type]

    # async, although it awaits nothing: FastAPI would take one of its threads for it.
    async def get_bound(connection: HTTPConnection, session=dependency) -> AfterCommit:  # type: ignore[no-untyped-def]  # noqa: ANN001  # any session
        _check_once(connection)
        return AfterCommit(db, session)

    _bound.add(get_bound)
    return Depends(get_bound)


_sessions.update((get_session, get_async_session))
_hand_overs.add(get_after_commit)

SessionDep = Annotated[Session, _function_scoped(get_session)]
"""The request's session."""

AsyncSessionDep = Annotated[AsyncSession, _function_scoped(get_async_session)]
"""The request's async session."""

AfterCommitDep = Annotated[AfterCommit, _function_scoped(get_after_commit)]
"""Hands tasks over to the commit of the request's session."""
