"""How an application is put together: routers, overrides, scopes, lifespans, mounts, several databases."""

import asyncio
import gc
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import fastapi
import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.exceptions import DependencyScopeError
from sqlalchemy import NullPool, create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from websockets.sync.client import connect

from aftercommit import Database, TaskRecord, signals
from aftercommit.errors import ConfigurationError
from aftercommit.fastapi import (
    AfterCommit,
    AfterCommitDep,
    AsyncSessionDep,
    SessionDep,
    after_commit_of,
    async_session_of,
    get_after_commit,
    get_async_session,
    get_session,
    install,
    session_of,
)
from tests.acceptance.apps.orders import Base, Effect, Order
from tests.support.databases import DatabaseUnderTest
from tests.support.servers import serve
from tests.support.workshop import Heard


def new_database(url: str) -> Database:
    """Make a database with the shop's tables, and a task ``note(text)`` on it."""
    db = Database(url)
    Base.metadata.create_all(db.engine())
    db.dispose()

    @db.task
    def note(session: Session, text: str) -> None:
        session.add(Effect(sku=text, pid=0))

    return db


def note_of(db: Database) -> Any:
    """The task of ``new_database``."""
    return db.tasks["note"]


def notes(db: Database) -> list[str]:
    """What the task noted."""
    with db.session() as session:
        return list(session.scalars(select(Effect.sku).order_by(Effect.id)))


@pytest.fixture
def db(sqlite_url: str) -> Iterator[Database]:
    """A database in an SQLite file."""
    # Without a driver in it, the URL serves both flavours.
    db = new_database(sqlite_url.replace("+pysqlite", ""))
    yield db
    db.dispose()


@pytest.fixture
def db2(tmp_path: Any) -> Iterator[Database]:
    """Another one."""
    db = new_database(f"sqlite:///{tmp_path / 'second.db'}")
    yield db
    db.dispose()


def start(app: FastAPI) -> None:
    """Start the application and stop it again; raise what its start-up raised."""
    import asyncio

    async def run() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(run())


# --- sub-dependencies and routers -------------------------------------------------------------------------------


class Service:
    """A dependency that is a class, deep below the endpoint."""

    def __init__(self, session: SessionDep, after_commit: AfterCommitDep) -> None:
        self.session = session
        self.after_commit = after_commit

    def ask(self, text: str) -> None:
        """Ask for the task."""
        self.after_commit(note_of(self.after_commit.db), text)


def test_dependencies_of_every_kind_share_one_session(db: Database):
    """Classes, functions, generators with scope="function" and the endpoint are in one transaction."""
    app = FastAPI()
    install(app, db)
    left: list[bool] = []

    def plain(session: SessionDep) -> Session:
        return session

    def generator(session: SessionDep) -> Iterator[Session]:
        yield session
        left.append(session.in_transaction())

    @app.post("/")
    def endpoint(
        service: Annotated[Service, Depends()],
        one: Annotated[Session, Depends(plain)],
        two: Annotated[Session, Depends(generator, scope="function")],
        three: SessionDep,
    ) -> bool:
        service.ask("a")
        return service.session is one is two is three

    with serve(app) as url:
        answer = httpx.post(url).json()
        db.drain()

    assert answer is True
    assert left == [True]
    assert notes(db) == ["a"]


def test_routers_and_their_dependencies_share_the_session(db: Database):
    """A router that is included twice over, with dependencies of its own, works in the request's transaction."""
    seen: list[int] = []

    def check(session: SessionDep, after_commit: AfterCommitDep) -> None:
        seen.append(id(session))
        after_commit(note_of(db), "router")

    inner = APIRouter()

    @inner.post("/orders")
    def endpoint(session: SessionDep, after_commit: AfterCommitDep) -> str:
        seen.append(id(session))
        after_commit(note_of(db), "endpoint")
        return "ok"

    outer = APIRouter(prefix="/v1", dependencies=[Depends(check)])
    outer.include_router(inner, prefix="/shop")
    app = FastAPI(dependencies=[Depends(get_session, scope="function")])
    app.include_router(outer, prefix="/api")
    install(app, db)

    with serve(app) as url:
        answer = httpx.post(f"{url}/api/v1/shop/orders")
        db.drain()

    assert answer.json() == "ok"
    assert len(set(seen)) == 1
    assert sorted(notes(db)) == ["endpoint", "router"]


def test_a_session_among_the_dependencies_of_a_route_commits_before_the_response(db: Database):
    """Where the session stands in dependencies=[…] only, the scope that is written there holds."""
    app = FastAPI()
    install(app, db)
    seen: list[int] = []

    def look() -> None:
        with db.session() as session:
            seen.append(len(session.scalars(select(TaskRecord.id)).all()))

    @app.post("/", dependencies=[Depends(get_session, scope="function")])
    def endpoint(after_commit: AfterCommitDep, background: BackgroundTasks) -> None:
        # It runs after the response, and before the dependencies of the longer scope are left.
        background.add_task(look)
        after_commit(note_of(db), "a")

    with serve(app) as url:
        response = httpx.post(url)
        db.drain()

    assert response.status_code == 200
    assert seen == [1]


def test_a_lost_scope_is_told_from_a_mistake(db: Database, caplog: pytest.LogCaptureFixture):
    """FastAPI 0.121.0 loses the scope in dependencies=[…]: where no start-up restored it, the message says so."""
    app = FastAPI(dependencies=[Depends(get_session, scope="function")])
    install(app, db)

    @app.get("/")
    def endpoint() -> None: ...

    with serve(app, lifespan="off") as url:
        response = httpx.get(url)

    if fastapi.__version__ == "0.121.0":
        assert response.status_code == 500
        assert "FastAPI 0.121.0 lost it: pip install 'fastapi>=0.121.1'" in caplog.text
    else:
        assert response.status_code == 200


def test_handing_over_before_the_session_is_open_is_refused(db: Database, caplog: pytest.LogCaptureFixture):
    """A dependency that hands over before the endpoint's session exists is told to take the session, too."""
    app = FastAPI()
    install(app, db)

    def early(after_commit: AfterCommitDep) -> None:
        after_commit(note_of(db), "early")

    @app.post("/", dependencies=[Depends(early)])
    def endpoint(session: SessionDep) -> None: ...

    with serve(app) as url:
        response = httpx.post(url)

    assert response.status_code == 500
    assert "Let that dependency take the session, too" in caplog.text
    assert notes(db) == []


# --- what FastAPI does not allow --------------------------------------------------------------------------------


def _on_endpoint(app: FastAPI) -> None:
    @app.get("/wrong")
    def wrong(session: Annotated[Session, Depends(get_session)]) -> None: ...


def _on_sub_dependency(app: FastAPI) -> None:
    def below(session: Annotated[AsyncSession, Depends(get_async_session)]) -> None: ...

    @app.get("/wrong")
    def wrong(_: Annotated[None, Depends(below)]) -> None: ...


def _on_router(app: FastAPI) -> None:
    router = APIRouter(dependencies=[Depends(get_session)])

    @router.get("/wrong")
    def wrong() -> None: ...

    app.include_router(router)


def _on_inclusion(app: FastAPI) -> None:
    router = APIRouter()

    @router.get("/wrong")
    def wrong() -> None: ...

    app.include_router(router, dependencies=[Depends(get_session)])


def _in_mount(app: FastAPI) -> None:
    below = FastAPI()
    _on_router(below)
    app.mount("/below", below)


def _on_application(app: FastAPI) -> None:
    app.router.dependencies.append(Depends(get_session))

    @app.get("/wrong")
    def wrong() -> None: ...


@pytest.mark.parametrize(
    "mistake", [_on_endpoint, _on_sub_dependency, _on_router, _on_inclusion, _in_mount, _on_application]
)
def test_our_session_in_the_default_scope_is_refused_at_start_up(db: Database, mistake: Callable[[FastAPI], None]):
    """Wherever it hides, a session that would commit after the response stops the start, with the line to write."""
    app = FastAPI()
    install(app, db)
    mistake(app)

    with pytest.raises(ConfigurationError, match=r"/wrong depends on .* Depends\(get_session, scope='function'\)"):
        start(app)


def test_our_session_in_the_default_scope_is_refused_without_a_start_up(db: Database, caplog: pytest.LogCaptureFixture):
    """Where no lifespan runs, the first request finds the same mistake."""
    app = FastAPI()
    install(app, db)
    _on_inclusion(app)

    with serve(app, lifespan="off") as url:
        response = httpx.get(f"{url}/wrong")

    assert response.status_code == 500
    assert "scope='function'" in caplog.text


def test_fastapi_refuses_a_default_scope_generator_over_ours(db: Database):
    """FastAPI itself does not allow a generator of the longer scope over a session of the shorter."""
    app = FastAPI()

    def generator(session: SessionDep) -> Iterator[Session]:
        yield session

    with pytest.raises(DependencyScopeError):

        @app.get("/")
        def endpoint(session: Annotated[Session, Depends(generator)]) -> None: ...


def test_both_flavours_in_one_request_are_refused(db: Database, caplog: pytest.LogCaptureFixture):
    """A Session and an AsyncSession in one request would be two transactions."""
    app = FastAPI()
    install(app, db)

    @app.get("/")
    async def endpoint(one: SessionDep, two: AsyncSessionDep) -> None: ...

    with serve(app) as url:
        response = httpx.get(url)

    assert response.status_code == 500
    assert "this request asks for a Session and an AsyncSession of the same database" in caplog.text


@pytest.mark.parametrize("order", ["sync first", "async first"])
def test_a_request_that_was_refused_a_second_session_leaks_none(db: Database, order: str):
    """What was opened for the second one is ended, and not told of as a leak."""
    app = FastAPI()
    install(app, db)

    if order == "sync first":

        @app.get("/")
        def endpoint(first: SessionDep, second: AsyncSessionDep) -> None: ...
    else:

        @app.get("/")
        async def async_endpoint(first: AsyncSessionDep, second: SessionDep) -> None: ...

    async def ask() -> int:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return (await client.get("/")).status_code

    with Heard(signals.SessionLeaked) as heard:
        status = asyncio.run(ask())
        gc.collect()

    assert status == 500
    assert heard.of(signals.SessionLeaked) == []


def test_an_async_endpoint_with_a_sync_session_is_told_of_at_start_up(db: Database, caplog: pytest.LogCaptureFixture):
    """One warning names the routes and the functions whose statements would block the loop, and no others."""
    other = Database("sqlite:///nowhere.db")
    app = FastAPI()
    install(app, db)
    router = APIRouter(prefix="/shop")

    async def user(session: SessionDep) -> int:
        return 1

    @router.post("/orders")
    async def blocking(session: SessionDep) -> None: ...

    @app.get("/mine")
    def below(number: Annotated[int, Depends(user)]) -> None: ...

    @app.get("/def")
    def plain(session: SessionDep) -> None: ...

    @app.get("/async")
    async def native(session: AsyncSessionDep, after_commit: AfterCommitDep) -> None: ...

    @app.get("/other")
    async def elsewhere(session: Annotated[Session, session_of(other)]) -> None: ...

    app.include_router(router)

    with serve(app):
        pass

    (said,) = [each.getMessage() for each in caplog.records if "blocks the event loop" in each.getMessage()]
    assert "`async def blocking` of POST /shop/orders" in said
    assert "`async def user` of GET /mine" in said
    assert not any(name in said for name in ("plain", "native", "elsewhere"))


def test_two_sessions_of_one_flavour_are_refused(db: Database, caplog: pytest.LogCaptureFixture):
    """use_cache=False would make a second transaction in the same request."""
    app = FastAPI()
    install(app, db)

    @app.get("/")
    def endpoint(
        one: SessionDep, two: Annotated[Session, Depends(get_session, scope="function", use_cache=False)]
    ) -> None: ...

    with serve(app) as url:
        response = httpx.get(url)

    assert response.status_code == 500
    assert "Two sessions are two transactions" in caplog.text


@pytest.mark.parametrize(
    "dependency", [get_session, get_async_session, get_after_commit], ids=lambda dependency: dependency.__name__
)
def test_a_websocket_with_our_dependencies_is_refused_at_start_up(db: Database, dependency: Any):
    """A known WebSocket route with a session for its whole life stops the start, and says what to write."""
    app = FastAPI()
    router = APIRouter()
    install(app, db)

    @router.websocket("/socket")
    async def socket(websocket: WebSocket, _: Annotated[Any, Depends(dependency, scope="function")]) -> None: ...

    app.include_router(router, prefix="/api")

    with pytest.raises(ConfigurationError, match=r"WebSocket /api/socket: .*async with db\.async_session\(\)"):
        start(app)


def test_a_session_per_message_works_in_a_websocket(db: Database):
    """Each message has a transaction of its own, and its task starts while the socket stays open."""
    app = FastAPI()
    install(app, db)

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            async with db.async_session() as session:
                db.after_commit(session, note_of(db), text)
            await websocket.send_text(f"got {text}")

    with serve(app) as url, connect(url.replace("http", "ws") + "/socket") as client:
        answers = []
        for text in ("a", "b"):
            client.send(text)
            answers.append(client.recv())
            db.drain()
        noted = notes(db)

    assert answers == ["got a", "got b"]
    assert noted == ["a", "b"]


@pytest.mark.parametrize("version", ["0.105.0", "0.120.4", "0.120.9rc1"])
def test_an_old_fastapi_is_refused(db: Database, monkeypatch: pytest.MonkeyPatch, version: str):
    """Before 0.121 no dependency could commit before the response."""
    monkeypatch.setattr(fastapi, "__version__", version)

    with pytest.raises(ConfigurationError, match=rf"FastAPI {re.escape(version)} is too old.*fastapi>=0\.121"):
        install(FastAPI(), db)


@pytest.mark.parametrize("version", ["0.121.0", "0.121rc1", "0.165.0", "1.0", "unknown"])
def test_a_newer_fastapi_is_not_refused(db: Database, monkeypatch: pytest.MonkeyPatch, version: str):
    """From 0.121 on it works; a version that nobody can read is given the benefit of the doubt."""
    monkeypatch.setattr(fastapi, "__version__", version)

    install(FastAPI(), db)


def test_installing_twice_is_refused(db: Database):
    """The same database twice would be two runners."""
    app = FastAPI()
    install(app, db)

    with pytest.raises(ConfigurationError, match="Once is enough"):
        install(app, db)


def test_installing_a_router_is_refused(db: Database):
    """A router is not an application."""
    with pytest.raises(ConfigurationError, match="needs the FastAPI application, and got APIRouter"):
        install(APIRouter(), db)  # type: ignore[arg-type]


def test_installing_after_the_start_is_refused(db: Database):
    """An application that runs has missed the start-up that install adds."""
    app = FastAPI()

    with serve(app), pytest.raises(ConfigurationError, match="after the application has started"):
        install(app, db)


def test_a_forgotten_install_is_told(caplog: pytest.LogCaptureFixture):
    """SessionDep in an application without a database says which line is missing."""
    app = FastAPI()

    @app.get("/")
    def endpoint(session: SessionDep) -> None: ...

    with serve(app) as url:
        response = httpx.get(url)

    assert response.status_code == 500
    assert "Write install(app, db)" in caplog.text


# --- overrides --------------------------------------------------------------------------------------------------


def test_overrides_replace_session_and_hand_over(db: Database, db2: Database):
    """get_session and get_after_commit are the keys: what is put there is used, and nothing reaches the first."""
    app = FastAPI()
    install(app, db)
    db2.create_tables()
    new_session = sessionmaker(db2.engine())

    def other_session() -> Iterator[Session]:
        with new_session() as session, session.begin():
            yield session

    def other_hand_over(session: Annotated[Session, Depends(get_session, scope="function")]) -> AfterCommit:
        return AfterCommit(db2, session)

    app.dependency_overrides = {get_session: other_session, get_after_commit: other_hand_over}

    @app.post("/")
    def endpoint(session: SessionDep, after_commit: AfterCommitDep) -> None:
        session.add(Order(sku="a"))
        after_commit(note_of(db2), "a")

    with serve(app) as url:
        httpx.post(url).raise_for_status()
        db2.drain()

    assert notes(db2) == ["a"]
    assert notes(db) == []


def test_an_async_override_is_used(db: Database, db2: Database):
    """get_async_session can be overridden in the same way."""
    app = FastAPI()
    install(app, db)

    async def other_session() -> AsyncIterator[AsyncSession]:
        async with db2.async_session() as session:
            yield session

    app.dependency_overrides[get_async_session] = other_session

    @app.post("/")
    async def endpoint(session: AsyncSessionDep) -> None:
        session.add(Effect(sku="a", pid=0))

    with serve(app) as url:
        httpx.post(url).raise_for_status()

    assert notes(db2) == ["a"]
    assert notes(db) == []


def test_a_session_overridden_alone_is_told(db: Database, caplog: pytest.LogCaptureFixture):
    """With only the session overridden a task would go into another transaction, so the hand-over is refused."""
    app = FastAPI()
    install(app, db)
    app.dependency_overrides[get_session] = lambda: Session(db.engine())

    @app.post("/")
    def endpoint(session: SessionDep, after_commit: AfterCommitDep) -> None:
        after_commit(note_of(db), "a")

    with serve(app) as url:
        response = httpx.post(url)

    assert response.status_code == 500
    assert "get_session is overridden" in caplog.text
    assert "app.dependency_overrides[get_after_commit]" in caplog.text


# --- several databases ------------------------------------------------------------------------------------------


def test_two_databases_in_one_application(db: Database, db2: Database):
    """Each database has its session, its tasks and its runner; the first installed is the one of SessionDep."""
    app = FastAPI()
    install(app, db)
    install(app, db2)

    @app.post("/sync")
    def sync(
        session: SessionDep,
        other: Annotated[Session, session_of(db2)],
        again: Annotated[Session, session_of(db2)],
        after_commit: AfterCommitDep,
        after_other: Annotated[AfterCommit, after_commit_of(db2)],
    ) -> bool:
        session.add(Order(sku="sync"))
        other.add(Order(sku="sync"))
        after_commit(note_of(db), "first")
        after_other(note_of(db2), "second")
        return other is again is not session

    @app.post("/async")
    async def asynchronous(
        session: AsyncSessionDep,
        other: Annotated[AsyncSession, async_session_of(db2)],
        after_other: Annotated[AfterCommit, after_commit_of(db2)],
    ) -> None:
        session.add(Order(sku="async"))
        other.add(Order(sku="async"))
        after_other(note_of(db2), "third")

    with serve(app) as url:
        assert httpx.post(f"{url}/sync").json() is True
        httpx.post(f"{url}/async").raise_for_status()
        db.drain()
        db2.drain()

    assert notes(db) == ["first"]
    assert notes(db2) == ["second", "third"]
    for each in (db, db2):
        with each.session() as session:
            assert session.scalars(select(Order.sku).order_by(Order.id)).all() == ["sync", "async"]


def test_a_task_of_another_database_is_refused(db: Database, db2: Database, caplog: pytest.LogCaptureFixture):
    """A task handed to the wrong database's hand-over would be written where nobody looks."""
    app = FastAPI()
    install(app, db)

    @app.post("/")
    def endpoint(after_commit: AfterCommitDep) -> None:
        after_commit(note_of(db2), "a")

    with serve(app) as url:
        response = httpx.post(url)

    assert response.status_code == 500
    assert "belongs to another Database" in caplog.text


# --- lifespans and mounts ---------------------------------------------------------------------------------------


def _asking(app: FastAPI, db: Database, path: str = "/") -> None:
    @app.post(path)
    def endpoint(session: SessionDep, after_commit: AfterCommitDep) -> None:
        after_commit(note_of(db), "asked")


def test_an_own_lifespan_keeps_its_state_and_its_order(db: Database):
    """The tables stand before the application's start-up, whose state reaches requests; it stops after the runner."""
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, str]]:
        async with db.async_session() as session:
            db.after_commit(session, note_of(db), "from start-up")
        seen.append("up")
        yield {"word": "state"}
        seen.append(f"down, runner {'alive' if db.runner else 'gone'}")

    app = FastAPI(lifespan=lifespan)
    install(app, db)

    @app.get("/")
    def endpoint(request: Request) -> str:
        return str(request.state.word)

    with serve(app) as url:
        word = httpx.get(url).json()
        db.drain()

    assert word == "state"
    assert seen == ["up", "down, runner gone"]
    assert notes(db) == ["from start-up"]


@pytest.mark.filterwarnings("ignore:\\s*on_event is deprecated:DeprecationWarning")
def test_deprecated_event_handlers_are_called(db: Database):
    """Handlers of on_event still run, whether they were added before or after install."""
    seen: list[str] = []
    app = FastAPI()

    @app.on_event("startup")
    def before() -> None:
        seen.append("before")

    install(app, db)

    @app.on_event("startup")
    async def after() -> None:
        seen.append("after")

    @app.on_event("shutdown")
    def stop() -> None:
        seen.append("stop")

    _asking(app, db)

    with serve(app) as url:
        httpx.post(url).raise_for_status()
        db.drain()

    assert seen == ["before", "after", "stop"]
    assert notes(db) == ["asked"]


def test_an_included_routers_lifespan_runs_too(db: Database):
    """A router with a lifespan of its own, included after install, does not push ours aside."""
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        seen.append("up")
        yield
        seen.append("down")

    app = FastAPI()
    install(app, db)
    app.include_router(APIRouter(lifespan=lifespan))
    _asking(app, db)

    with serve(app) as url:
        httpx.post(url).raise_for_status()
        db.drain()

    assert seen == ["up", "down"]
    assert notes(db) == ["asked"]


def test_the_application_starts_again(db: Database):
    """An application that was stopped can be started again, as a test does."""
    app = FastAPI()
    install(app, db)
    _asking(app, db)

    for _ in range(2):
        with serve(app) as url:
            httpx.post(url).raise_for_status()
            db.drain()

    assert notes(db) == ["asked", "asked"]
    assert db.runner is None


def test_a_mounted_application_uses_the_outer_ones_database(db: Database):
    """Endpoints of a sub-application, also of one two mounts deep, use the database that is installed outside."""
    outer, middle, inner = FastAPI(), FastAPI(), FastAPI()
    install(outer, db)
    _asking(middle, db)
    _asking(inner, db)
    middle.mount("/inner", inner)
    outer.mount("/middle", middle)

    with serve(outer) as url:
        httpx.post(f"{url}/middle/").raise_for_status()
        httpx.post(f"{url}/middle/inner/").raise_for_status()
        db.drain()

    assert notes(db) == ["asked", "asked"]


def test_an_application_in_between_is_found(db: Database, db2: Database):
    """Endpoints two mounts deep find the database of the mount between, and not that of a stranger."""
    outer, middle, inner, stranger = FastAPI(), FastAPI(), FastAPI(), FastAPI()
    db.create_tables()
    install(stranger, db2)
    install(middle, db)
    _asking(inner, db)
    middle.mount("/inner", inner)
    outer.mount("/middle", middle)

    with serve(outer) as url:
        httpx.post(f"{url}/middle/inner/").raise_for_status()
    db.drain()

    assert notes(db) == ["asked"]


def test_a_mount_whose_lifespan_never_runs_queues_and_warns_once(db: Database, caplog: pytest.LogCaptureFixture):
    """Installed on the sub-application only, tasks are written as queued, with one warning, and run elsewhere."""
    outer, inner = FastAPI(), FastAPI()
    install(inner, db)
    db.create_tables()
    _asking(inner, db)
    outer.mount("/inner", inner)

    with serve(outer) as url:
        for _ in range(2):
            httpx.post(f"{url}/inner/").raise_for_status()
    asked_before, warned = notes(db), [record for record in caplog.records if record.levelno == logging.WARNING]
    db.drain()

    assert asked_before == []
    assert len(warned) == 1
    assert "no runner is alive in this process" in warned[0].getMessage()
    assert notes(db) == ["asked", "asked"]


def test_a_process_that_runs_nothing_hands_over_only(db: Database):
    """install(runs=()) starts no runner and warns of none: another process runs the tasks."""
    app = FastAPI()
    install(app, db, runs=())
    _asking(app, db)

    with serve(app) as url:
        httpx.post(url).raise_for_status()
        alive = db.runner
        asked_before = notes(db)
    db.drain()

    assert alive is None
    assert asked_before == []
    assert notes(db) == ["asked"]


# --- adoption ---------------------------------------------------------------------------------------------------


@pytest.fixture
def adopted(database: DatabaseUnderTest) -> Iterator[Database]:
    """A database for an application that has sessions of its own."""
    db = new_database(database.sync_url)
    yield db
    db.dispose()


def _get_db_of(db: Database, *, commits: bool) -> Callable[[], Iterator[Session]]:
    new_session = sessionmaker(create_engine(db.engine().url, poolclass=NullPool))

    def get_db() -> Iterator[Session]:
        with new_session() as session:
            yield session
            if commits:
                session.commit()

    return get_db


@pytest.mark.drivers("psycopg", "pysqlite")
@pytest.mark.parametrize("commits", [False, True], ids=["endpoint commits", "dependency commits"])
@pytest.mark.parametrize("is_async", [False, True], ids=["def", "async def"])
def test_adoption_beside_an_own_get_db(adopted: Database, commits: bool, is_async: bool):
    """A task follows the commit of the application's own session, whoever makes it, in the default scope."""
    db = adopted
    app = FastAPI()
    install(app, db, create_tables=True)
    get_db = _get_db_of(db, commits=commits)

    def work(session: Session, after_commit: AfterCommit) -> None:
        session.add(Order(sku="a"))
        after_commit(note_of(db), "a")
        if not commits:
            session.commit()

    if is_async:

        @app.post("/")
        async def endpoint(
            session: Annotated[Session, Depends(get_db)],
            after_commit: Annotated[AfterCommit, after_commit_of(db, get_db)],
        ) -> None:
            work(session, after_commit)
    else:

        @app.post("/")
        def endpoint(
            session: Annotated[Session, Depends(get_db)],
            after_commit: Annotated[AfterCommit, after_commit_of(db, get_db)],
        ) -> None:
            work(session, after_commit)

    with serve(app) as url:
        httpx.post(url).raise_for_status()
        db.drain()

    assert notes(db) == ["a"]


def test_handing_over_after_the_last_commit_is_an_error(db: Database, caplog: pytest.LogCaptureFixture):
    """Who commits first and hands over then is told to hand over before the commit, with the line."""
    app = FastAPI()
    install(app, db)
    get_db = _get_db_of(db, commits=False)

    @app.post("/")
    def endpoint(
        session: Annotated[Session, Depends(get_db)], after_commit: Annotated[AfterCommit, after_commit_of(db, get_db)]
    ) -> None:
        session.commit()
        after_commit(note_of(db), "a")

    with serve(app) as url:
        httpx.post(url).raise_for_status()
        db.drain()

    assert notes(db) == []
    [error] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "Hand over before you commit" in error.getMessage()
    assert "test_fastapi_wiring.py" in error.getMessage()
    assert "in endpoint" in error.getMessage()


def test_an_instance_of_another_session_is_refused(db: Database, caplog: pytest.LogCaptureFixture):
    """An instance loaded in another session than the bound one is in another transaction."""
    app = FastAPI()
    install(app, db)
    get_db = _get_db_of(db, commits=True)

    @db.task
    def ship(session: Session, order: Order) -> None: ...

    @app.post("/")
    def endpoint(session: SessionDep, after_commit: Annotated[AfterCommit, after_commit_of(db, get_db)]) -> None:
        order = Order(sku="a")
        session.add(order)
        after_commit(ship, order)

    with serve(app) as url:
        response = httpx.post(url)

    assert response.status_code == 500
    assert "UnsafeArgument" in caplog.text
    assert "another session" in caplog.text


@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_one_own_dependency_in_two_scopes_is_refused(db: Database, lifespan: str, caplog: pytest.LogCaptureFixture):
    """get_db in scope "function" and after_commit_of without it would be two sessions; the error has the line."""
    app = FastAPI()
    install(app, db)
    get_db = _get_db_of(db, commits=True)

    @app.post("/")
    def endpoint(
        session: Annotated[Session, Depends(get_db, scope="function")],
        after_commit: Annotated[AfterCommit, after_commit_of(db, get_db)],
    ) -> None:
        raise AssertionError("never called")

    expected = "after_commit_of(db, get_db, scope='function')"
    if lifespan == "on":
        with pytest.raises(ConfigurationError, match=re.escape(expected)):
            start(app)
    else:
        with serve(app, lifespan="off") as url:
            assert httpx.post(url).status_code == 500
        assert expected in caplog.text


def test_an_own_dependency_in_the_function_scope_works(db: Database):
    """With the scope named in both places there is one session, and its commit starts the task."""
    app = FastAPI()
    install(app, db)
    get_db = _get_db_of(db, commits=True)

    @app.post("/")
    def endpoint(
        session: Annotated[Session, Depends(get_db, scope="function")],
        after_commit: Annotated[AfterCommit, after_commit_of(db, get_db, scope="function")],
    ) -> bool:
        after_commit(note_of(db), "a")
        return after_commit.session is session

    with serve(app) as url:
        same = httpx.post(url).json()
        db.drain()

    assert same is True
    assert notes(db) == ["a"]


def test_an_overridden_get_db_is_followed(db: Database):
    """after_commit_of is bound to what the dependency yields, also where a test overrides it."""
    app = FastAPI()
    install(app, db)
    get_db = _get_db_of(db, commits=False)
    app.dependency_overrides[get_db] = _get_db_of(db, commits=True)

    @app.post("/")
    def endpoint(
        session: Annotated[Session, Depends(get_db)], after_commit: Annotated[AfterCommit, after_commit_of(db, get_db)]
    ) -> None:
        after_commit(note_of(db), "a")

    with serve(app) as url:
        httpx.post(url).raise_for_status()
        db.drain()

    assert notes(db) == ["a"]
