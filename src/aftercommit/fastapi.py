"""FastAPI: a session per request that commits before the response starts, and tasks that follow the commit.

```python
app = FastAPI()
install(app, db)

@app.post("/files", status_code=202)
def upload(session: SessionDep, after_commit: AfterCommitDep) -> dict[str, str]: ...
```

Everything here leans on the commit, never on the order in which FastAPI leaves its dependencies.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, ParamSpec
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
import fastapi
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.requests import HTTPConnection
from starlette.routing import Mount

from aftercommit.errors import ConfigurationError, HandOverError
from aftercommit.pools.pools import REQUEST
from aftercommit.sessions import AsyncScope, Owner, Scope, shielded

if TYPE_CHECKING:
    from fastapi.dependencies.models import Dependant

    from aftercommit.database import Database
    from aftercommit.runner import TaskHandle
    from aftercommit.tasks import Task

__all__ = [
    "AfterCommit",
    "AfterCommitDep",
    "AsyncSessionDep",
    "SessionDep",
    "after_commit_of",
    "async_session_of",
    "get_after_commit",
    "get_async_session",
    "get_session",
    "install",
    "session_of",
]

logger = logging.getLogger(__name__)

P = ParamSpec("P")

_OLDEST: Final = (0, 121)
_KEY: Final = "aftercommit.sessions"
_INSTALLED: Final = "aftercommit_databases"
"""The attribute of a router under which its databases stand: routers cannot be keys of a dictionary."""
_ours: set[Callable[..., Any]] = set()
"""Our session dependencies, which only make sense with ``scope="function"``."""


# --- the application --------------------------------------------------------------------------------------------


def install(
    app: FastAPI,
    db: Database,
    *,
    runs: Sequence[str] | None = None,
    grace: float = 15.0,
    create_tables: bool | None = None,
) -> None:
    """Give *app* the database: tables and runner at start-up, an orderly stop, and the dependencies of this module.

    Wraps the application's own lifespan: the tables stand before it starts, tasks run while it is open.

    Args:
        app: The application.
        db: Its database. Call again for a second one, and use ``session_of(db2)`` there.
        runs: The pools whose tasks run in this process; None for all, ``()`` for none.
            ``AFTERCOMMIT_RUNS=none`` does the same from outside.
        grace: Seconds that running tasks get when the application stops.
        create_tables: Whether to make our tables at start-up; None for SQLite only.

    Raises:
        ConfigurationError: For a FastAPI that is too old, or if *db* is installed already.
    """
    version = tuple(int(part) for part in fastapi.__version__.split(".")[:2])
    if version < _OLDEST:
        raise ConfigurationError(
            f"FastAPI {fastapi.__version__} is too old: before 0.121 a dependency cannot commit before the response "
            "starts. pip install 'fastapi>=0.121'."
        )
    if not isinstance(app, FastAPI):
        raise ConfigurationError(
            f"install(app, db) needs the FastAPI application, and got {type(app).__name__}. Routers share the "
            "application's database: install it there."
        )
    databases: list[Database] = getattr(app.router, _INSTALLED, [])
    if db in databases:
        raise ConfigurationError("This Database is installed in this application already. Once is enough.")
    setattr(app.router, _INSTALLED, [*databases, db])
    running = db.running(runs=runs, grace=grace, create_tables=create_tables)
    db.expects_runner = bool(running.pools)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(target: Any) -> AsyncIterator[Any]:
        _check_routes(app)
        try:
            # The tables first, because the application's own start-up may hand over tasks; the runner last, because
            # tasks may need what that start-up opens.
            await db.prepare_tables(create=create_tables)
            async with inner(target) as state, running:
                yield state
        finally:
            await db.async_dispose()

    app.router.lifespan_context = lifespan


def _check_routes(app: FastAPI) -> None:
    """Find, before the first request, what cannot work: our sessions in the wrong scope, or in a WebSocket."""
    for path, route in _routes(app.routes):
        for dependant in _all_dependants(route.dependant):
            if dependant.call not in _ours:
                continue
            if isinstance(route, APIWebSocketRoute):
                raise ConfigurationError(f"WebSocket {path}: {_NOT_IN_WEBSOCKETS}")
            if dependant.scope != "function":
                raise ConfigurationError(
                    f'{path} depends on aftercommit\'s session without scope="function": it would commit after the '
                    "response has been sent, so a failing commit would reach the client as a success. Write SessionDep "
                    'or AsyncSessionDep, or Depends(get_session, scope="function").'
                )


def _routes(routes: Sequence[Any], prefix: str = "") -> list[tuple[str, APIRoute | APIWebSocketRoute]]:
    found: list[tuple[str, APIRoute | APIWebSocketRoute]] = []
    for route in routes:
        if isinstance(route, (APIRoute, APIWebSocketRoute)):
            found.append((prefix + route.path, route))
        elif isinstance(route, Mount):
            found += _routes(route.routes or [], prefix + route.path)
    return found


def _all_dependants(dependant: Dependant) -> list[Dependant]:
    return [dependant, *(each for below in dependant.dependencies for each in _all_dependants(below))]


def _database_of(connection: HTTPConnection) -> Database:
    """The database that was installed: in this sub-application, or in the application it is mounted in."""
    app = connection.scope.get("app")
    for router in (getattr(app, "router", None), connection.scope.get("router")):
        databases = getattr(router, _INSTALLED, None)
        if databases:
            return databases[0]  # type: ignore[no-any-return]
    raise ConfigurationError(
        "No Database is installed in this application. Write install(app, db) after app = FastAPI(); a mounted "
        "sub-application uses the one of the application it is mounted in."
    )


# --- sessions ---------------------------------------------------------------------------------------------------

_NOT_IN_WEBSOCKETS: Final = (
    "a session that lives as long as the socket would hold its connection, and its tasks, for hours. "
    "Open one per message: `async with db.async_session() as session:` (or `with db.session() as session:`)."
)


class _Request:
    """What one request has of one database: at most one session, of one flavour."""

    __slots__ = ("scope",)

    def __init__(self) -> None:
        self.scope: Scope | AsyncScope | None = None


def _request_of(connection: HTTPConnection, db: Database) -> _Request:
    requests: dict[int, _Request] = connection.scope.setdefault(_KEY, {})
    return requests.setdefault(id(db), _Request())


def _owner(connection: HTTPConnection) -> Owner:
    if connection.scope["type"] == "websocket":
        raise ConfigurationError(f"WebSocket {connection.scope['path']}: {_NOT_IN_WEBSOCKETS}")
    return Owner(f"{connection.scope['method']} {connection.scope['path']}", kind="request")


def _enter(connection: HTTPConnection, db: Database, scope: Scope | AsyncScope) -> _Request:
    request = _request_of(connection, db)
    if request.scope is not None:
        if type(request.scope) is type(scope):
            raise ConfigurationError(
                f"{scope.owner}: this request has a session of this database already, in another scope. Two sessions "
                "are "
                "two transactions, which commit apart. Use SessionDep (or AsyncSessionDep) everywhere, also in "
                'sub-dependencies; a generator dependency over it needs Depends(…, scope="function").'
            )
        raise ConfigurationError(
            f"{scope.owner}: this request asks for a Session and an AsyncSession of the same database. They are two "
            "transactions, which commit apart. Use one of them in the endpoint and in all its dependencies."
        )
    request.scope = scope
    return request


async def _finish_sync(scope: Scope, *, commit: bool) -> None:
    """End a sync session without blocking the loop, whatever is cancelled meanwhile."""
    if not scope.session.in_transaction():
        scope.end()
        return

    def finish() -> None:
        scope.__exit__(*((None, None, None) if commit else (RuntimeError, RuntimeError(), None)))

    # Not one of the 40 threads that serve endpoints: if all of them wait for a connection, the commit that would
    # give one back must not wait for them.
    await shielded(anyio.to_thread.run_sync(finish, limiter=anyio.CapacityLimiter(1)))


async def _serve_session(connection: HTTPConnection, db: Database) -> AsyncIterator[Session]:
    scope = db.sessions.scope(REQUEST, _owner(connection))
    request = _enter(connection, db, scope)
    try:
        yield scope.session
    except BaseException:
        await _finish_sync(scope, commit=False)
        raise
    else:
        await _finish_sync(scope, commit=True)
    finally:
        request.scope = None


async def _serve_async_session(connection: HTTPConnection, db: Database) -> AsyncIterator[AsyncSession]:
    scope = db.sessions.async_scope(REQUEST, _owner(connection))
    request = _enter(connection, db, scope)
    try:
        async with scope as session:
            yield session
    finally:
        request.scope = None


async def get_session(connection: HTTPConnection) -> AsyncIterator[Session]:
    """The request's session: committed when the endpoint has returned, before the response starts.

    The key for ``app.dependency_overrides``; in endpoints write ``SessionDep``.
    """
    async for session in _serve_session(connection, _database_of(connection)):
        yield session


async def get_async_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """The request's async session: committed when the endpoint has returned, before the response starts.

    The key for ``app.dependency_overrides``; in endpoints write ``AsyncSessionDep``.
    """
    async for session in _serve_async_session(connection, _database_of(connection)):
        yield session


def session_of(db: Database) -> Any:
    """Depend on the session of *db*, for an application with several: ``Annotated[Session, session_of(db2)]``."""

    async def get_session_of(connection: HTTPConnection) -> AsyncIterator[Session]:
        async for session in _serve_session(connection, db):
            yield session

    return Depends(_known(db, "session", get_session_of), scope="function")


def async_session_of(db: Database) -> Any:
    """The async session of *db*, for an application with several: ``Annotated[AsyncSession, "
    "async_session_of(db2)]``."""

    async def get_async_session_of(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
        async for session in _serve_async_session(connection, db):
            yield session

    return Depends(_known(db, "async_session", get_async_session_of), scope="function")


_by_database: WeakKeyDictionary[Database, dict[str, Callable[..., Any]]] = WeakKeyDictionary()


def _known(db: Database, kind: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """One callable per database, so that two parameters of one endpoint share one session."""
    found = _by_database.setdefault(db, {}).setdefault(kind, made)
    if kind != "after_commit":
        _ours.add(found)
    return found


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
        return self._session() if callable(self._session) and not _is_session(self._session) else self._session

    def __call__(self, task: Task[P, Any], *args: P.args, **kwargs: P.kwargs) -> TaskHandle:
        """Have *task* run once the session's transaction has committed; see ``Database.after_commit``."""
        return self.db.after_commit(self.session, task, *args, **kwargs)


def _is_session(value: object) -> bool:
    # A scoped_session is callable, too.
    return hasattr(value, "commit")


async def _serve_after_commit(connection: HTTPConnection, db: Database) -> AsyncIterator[AfterCommit]:
    request = _request_of(connection, db)
    own: list[Scope | AsyncScope] = []

    def session() -> Session | AsyncSession:
        if request.scope is None:
            if own:
                return own[0].session
            _refuse_overridden(connection)
            # The endpoint has no session of ours, so the tasks get a transaction of their own.
            make = db.sessions.async_scope if db.sessions.is_async_only else db.sessions.scope
            own.append(make(REQUEST, _owner(connection)))
            return own[0].session
        return request.scope.session

    try:
        yield AfterCommit(db, session)
    except BaseException:
        for scope in own:
            await _leave(scope, commit=False)
        raise
    else:
        for scope in own:
            await _leave(scope, commit=True)


async def _leave(scope: Scope | AsyncScope, *, commit: bool) -> None:
    if isinstance(scope, AsyncScope):
        await scope.__aexit__(*((None, None, None) if commit else (RuntimeError, RuntimeError(), None)))
    else:
        await _finish_sync(scope, commit=commit)


def _refuse_overridden(connection: HTTPConnection) -> None:
    route = connection.scope.get("route")
    if not isinstance(route, APIRoute):
        return
    calls = [dependant.call for dependant in _all_dependants(route.dependant)]
    for dependency in (get_session, get_async_session):
        if dependency in calls:
            raise HandOverError(
                f"{dependency.__name__} is overridden, so AfterCommitDep does not know the session of this request, "
                "and the task would be written into another transaction. Override it, too: "
                "app.dependency_overrides[get_after_commit] = lambda: AfterCommit(db, session); in tests, "
                "aftercommit.testing.replace(db, …) replaces everything at once."
            )


async def get_after_commit(connection: HTTPConnection) -> AsyncIterator[AfterCommit]:
    """Hands over to the commit of the request's session, whichever flavour the endpoint uses.

    The key for ``app.dependency_overrides``; in endpoints write ``AfterCommitDep``.
    """
    async for after_commit in _serve_after_commit(connection, _database_of(connection)):
        yield after_commit


def after_commit_of(db: Database, get_session: Callable[..., Any] | None = None, *, scope: str | None = None) -> Any:
    """Hand over to *db*: ``Annotated[AfterCommit, after_commit_of(db, get_db)]``.

    Args:
        db: The database whose tasks these are.
        get_session: The application's own dependency that yields the session, whatever made it; None for ours.
        scope: The scope in which the endpoints depend on it (``"function"`` or ``"request"``), if they name one: a
            dependency used in two scopes makes two sessions.
    """
    if get_session is None:

        async def get_after_commit_of(connection: HTTPConnection) -> AsyncIterator[AfterCommit]:
            async for after_commit in _serve_after_commit(connection, db):
                yield after_commit

        return Depends(_known(db, "after_commit", get_after_commit_of), scope="function")

    dependency = Depends(get_session) if scope is None else Depends(get_session, scope=scope)  # type: ignore[arg-type]

    def get_bound(session=dependency) -> AfterCommit:  # type: ignore[no-untyped-def]  # noqa: ANN001  # any session
        return AfterCommit(db, session)

    return Depends(get_bound)


_ours.update((get_session, get_async_session))

SessionDep = Annotated[Session, Depends(get_session, scope="function")]
"""The request's session."""

AsyncSessionDep = Annotated[AsyncSession, Depends(get_async_session, scope="function")]
"""The request's async session."""

AfterCommitDep = Annotated[AfterCommit, Depends(get_after_commit, scope="function")]
"""Hands tasks over to the commit of the request's session."""
