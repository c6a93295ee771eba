"""A shop with every kind of endpoint, written once with ``def`` and once with ``async def``.

The URL's driver decides which of the two ``make`` makes. ``Watch`` looks at each response when it starts.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import ForeignKey, NullPool, create_engine, func, inspect, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from starlette.background import BackgroundTask

from aftercommit import Database, PoolSettings, TaskRecord
from aftercommit.errors import SessionEnded
from aftercommit.fastapi import AfterCommitDep, AsyncSessionDep, SessionDep, install


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str] = mapped_column(default="new")
    lines: Mapped[list["Line"]] = relationship()


class Line(Base):
    __tablename__ = "lines"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))
    text: Mapped[str]


class Effect(Base):
    """What a task did, and in which process."""

    __tablename__ = "effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]
    pid: Mapped[int]


class LineOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    text: str


class OrderOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: int
    lines: list[LineOut]


@dataclass
class Shop:
    """An application, its database, and what was seen of it.

    Attributes:
        db: The database.
        app: The application.
        url: The URL of its database, by a plain driver.
        heard: What endpoints and Starlette's background tasks had to say.
        shipped: Called in the task, before its commit.
    """

    db: Database
    app: FastAPI
    url: str
    heard: SimpleQueue[str] = field(default_factory=SimpleQueue)
    shipped: Callable[[str], None] = lambda _sku: None

    def close(self) -> None:
        """Close what code outside a lifespan has opened."""
        if self.is_async:
            asyncio.run(self.db.async_dispose())
        else:
            self.db.dispose()

    def onlooker(self) -> Any:
        """A connection that has nothing to do with the application."""
        return create_engine(self.url, poolclass=NullPool).connect()

    def skus(self) -> list[str]:
        """The orders that are really there."""
        with self.onlooker() as connection:
            return list(connection.scalars(select(Order.sku).order_by(Order.sku)))

    def effects(self) -> list[str]:
        """For which orders a task has taken effect."""
        with self.onlooker() as connection:
            return list(connection.scalars(select(Effect.sku).order_by(Effect.sku)))

    def states(self) -> list[str]:
        """The states of all records; none, where even their table is missing."""
        with self.onlooker() as connection:
            if not inspect(connection).has_table(TaskRecord.__tablename__):
                return []
            return list(connection.scalars(select(TaskRecord.state)))

    def in_use(self) -> int:
        """How many connections of the request pool are in somebody's hands."""
        pool = self.db.engine().pool if not self.is_async else self.db.async_engine().pool
        return pool.checkedout()  # type: ignore[attr-defined] # a QueuePool

    @property
    def is_async(self) -> bool:
        """Which of the two shops this is."""
        return self.db.sessions.is_async_only


@dataclass
class Start:
    """How things stood when a response started."""

    path: str
    status: int
    in_use: int
    skus: list[str]


class Watch:
    """An ASGI application around a shop's, which looks around at each start of a response."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self.starts: list[Start] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve the shop, and look around when a response starts."""

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                shop = self._shop
                self.starts.append(Start(scope["path"], message["status"], shop.in_use(), shop.skus()))
            await send(message)

        await self._shop.app(scope, receive, watched if scope["type"] == "http" else send)


def make(url: str, *, pool: PoolSettings | None = None, **options: Any) -> Shop:
    """Make the shop of the flavour that the URL's driver asks for, and its tables."""
    target = make_url(url)
    plain = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}[target.get_backend_name()]
    plain_url = target.set(drivername=plain).render_as_string(hide_password=False)
    engine = create_engine(plain_url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    shop = Shop(Database(url, pool=pool), FastAPI(**options), plain_url)
    install(shop.app, shop.db, create_tables=True)
    (_async_endpoints if target.get_dialect().is_async else _endpoints)(shop)
    return shop


def _endpoints(shop: Shop) -> None:  # noqa: C901, PLR0915  # a list of endpoints
    db, app, heard = shop.db, shop.app, shop.heard

    @db.task
    def ship(session: Session, order: Order) -> None:
        order.state = "shipped"
        session.add(Effect(sku=order.sku, pid=os.getpid()))
        shop.shipped(order.sku)

    def add(session: Session, after_commit: Any, sku: str) -> Order:
        order = Order(sku=sku)
        session.add(order)
        after_commit(ship, order)
        return order

    @app.post("/orders")
    def order(sku: str, session: SessionDep, after_commit: AfterCommitDep) -> dict[str, str]:
        add(session, after_commit, sku)
        session.flush()
        return {"sku": sku}

    @app.post("/unflushed")
    def unflushed(sku: str, session: SessionDep, after_commit: AfterCommitDep) -> dict[str, str]:
        add(session, after_commit, sku)
        return {"sku": sku}

    @app.get("/orders/count")
    def count(session: SessionDep) -> int:
        return session.scalar(select(func.count()).select_from(Order)) or 0

    @app.post("/raise/{kind}")
    def fail(kind: str, sku: str, session: SessionDep, after_commit: AfterCommitDep) -> None:
        add(session, after_commit, sku)
        session.flush()
        raise HTTPException(409, "no") if kind == "http" else ValueError("no")

    @app.post("/returned")
    def returned(sku: str, session: SessionDep, after_commit: AfterCommitDep) -> JSONResponse:
        add(session, after_commit, sku)
        return JSONResponse({"told": "conflict"}, status_code=409)

    @app.post("/backgrounds")
    def backgrounds(
        sku: str, session: SessionDep, after_commit: AfterCommitDep, background: BackgroundTasks
    ) -> dict[str, str]:
        add(session, after_commit, sku)
        background.add_task(heard.put, f"background of {sku}")
        return {"sku": sku}

    @app.post("/own-background")
    def own_background(sku: str, session: SessionDep, after_commit: AfterCommitDep) -> PlainTextResponse:
        add(session, after_commit, sku)
        return PlainTextResponse(sku, background=BackgroundTask(heard.put, f"own background of {sku}"))

    @app.get("/stream")
    def stream(session: SessionDep) -> StreamingResponse:
        def lines() -> Iterator[str]:
            try:
                session.scalars(select(Order.sku)).all()
            except SessionEnded as ended:
                yield str(ended)
            with db.session() as own:
                yield ",".join(own.scalars(select(Order.sku)))

        return StreamingResponse(lines())

    @app.post("/lazy", response_model=OrderOut)
    def lazy(sku: str, session: SessionDep) -> Order:
        session.add(Order(sku=sku, lines=[Line(text="one"), Line(text="two")]))
        session.flush()
        session.expire_all()
        return session.scalars(select(Order)).one()

    @app.post("/unreadable", response_model=OrderOut)
    def unreadable(sku: str, session: SessionDep, after_commit: AfterCommitDep) -> dict[str, str]:
        add(session, after_commit, sku)
        session.flush()
        return {"sku": sku}

    @app.post("/late")
    def late(sku: str, session: SessionDep, after_commit: AfterCommitDep) -> StreamingResponse:
        def lines() -> Iterator[str]:
            try:
                after_commit(ship, found)
            except Exception as error:  # noqa: BLE001  # it is told to the client
                yield f"{type(error).__name__}: {error}"

        found = add(session, after_commit, sku)
        return StreamingResponse(lines())

    def swallow(session: SessionDep) -> Iterator[None]:
        try:
            yield
        except ValueError:
            heard.put("swallowed")

    @app.post("/swallowed")
    def swallowed(
        sku: str,
        _: Annotated[None, Depends(swallow, scope="function")],
        session: SessionDep,
        after_commit: AfterCommitDep,
    ) -> None:
        add(session, after_commit, sku)
        session.flush()
        raise ValueError("no")

    @app.post("/alone")
    def alone(sku: str, after_commit: AfterCommitDep) -> dict[str, str]:
        after_commit(note, sku)
        return {"sku": sku}

    @db.task
    def note(session: Session, sku: str) -> None:
        session.add(Effect(sku=sku, pid=os.getpid()))


def _async_endpoints(shop: Shop) -> None:  # noqa: C901, PLR0915  # a list of endpoints
    db, app, heard = shop.db, shop.app, shop.heard

    @db.task
    async def ship(session: AsyncSession, order: Order) -> None:
        order.state = "shipped"
        session.add(Effect(sku=order.sku, pid=os.getpid()))
        shop.shipped(order.sku)

    def add(session: AsyncSession, after_commit: Any, sku: str) -> Order:
        order = Order(sku=sku)
        session.add(order)
        after_commit(ship, order)
        return order

    @app.post("/orders")
    async def order(sku: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> dict[str, str]:
        add(session, after_commit, sku)
        await session.flush()
        return {"sku": sku}

    @app.post("/unflushed")
    async def unflushed(sku: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> dict[str, str]:
        add(session, after_commit, sku)
        return {"sku": sku}

    @app.get("/orders/count")
    async def count(session: AsyncSessionDep) -> int:
        return await session.scalar(select(func.count()).select_from(Order)) or 0

    @app.post("/raise/{kind}")
    async def fail(kind: str, sku: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> None:
        add(session, after_commit, sku)
        await session.flush()
        raise HTTPException(409, "no") if kind == "http" else ValueError("no")

    @app.post("/returned")
    async def returned(sku: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> JSONResponse:
        add(session, after_commit, sku)
        return JSONResponse({"told": "conflict"}, status_code=409)

    @app.post("/backgrounds")
    async def backgrounds(
        sku: str, session: AsyncSessionDep, after_commit: AfterCommitDep, background: BackgroundTasks
    ) -> dict[str, str]:
        add(session, after_commit, sku)
        background.add_task(heard.put, f"background of {sku}")
        return {"sku": sku}

    @app.post("/own-background")
    async def own_background(sku: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> PlainTextResponse:
        add(session, after_commit, sku)
        return PlainTextResponse(sku, background=BackgroundTask(heard.put, f"own background of {sku}"))

    @app.get("/stream")
    async def stream(session: AsyncSessionDep) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            try:
                await session.scalars(select(Order.sku))
            except SessionEnded as ended:
                yield str(ended)
            async with db.async_session() as own:
                yield ",".join(await own.scalars(select(Order.sku)))

        return StreamingResponse(lines())

    @app.post("/lazy", response_model=OrderOut)
    async def lazy(sku: str, session: AsyncSessionDep) -> Order:
        session.add(Order(sku=sku, lines=[Line(text="one"), Line(text="two")]))
        await session.flush()
        session.expire_all()
        order = (await session.scalars(select(Order))).one()
        await session.refresh(order, ["id", "lines"])
        return order

    @app.post("/unreadable", response_model=OrderOut)
    async def unreadable(sku: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> dict[str, str]:
        add(session, after_commit, sku)
        await session.flush()
        return {"sku": sku}

    @app.post("/late")
    async def late(sku: str, session: AsyncSessionDep, after_commit: AfterCommitDep) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            try:
                after_commit(ship, found)
            except Exception as error:  # noqa: BLE001  # it is told to the client
                yield f"{type(error).__name__}: {error}"

        found = add(session, after_commit, sku)
        return StreamingResponse(lines())

    async def swallow(session: AsyncSessionDep) -> AsyncIterator[None]:
        try:
            yield
        except ValueError:
            heard.put("swallowed")

    @app.post("/swallowed")
    async def swallowed(
        sku: str,
        _: Annotated[None, Depends(swallow, scope="function")],
        session: AsyncSessionDep,
        after_commit: AfterCommitDep,
    ) -> None:
        add(session, after_commit, sku)
        await session.flush()
        raise ValueError("no")

    @app.post("/alone")
    async def alone(sku: str, after_commit: AfterCommitDep) -> dict[str, str]:
        after_commit(note, sku)
        return {"sku": sku}

    @db.task
    async def note(session: AsyncSession, sku: str) -> None:
        session.add(Effect(sku=sku, pid=os.getpid()))


def _say_shipped(sku: str) -> None:
    # One write: two processes share the pipe.
    sys.stdout.write(f"shipped {sku}\n")


def app() -> FastAPI:
    """Make the shop that the environment asks for: for uvicorn's ``--factory``."""
    shop = make(os.environ["SHOP_URL"])
    shop.shipped = _say_shipped
    return shop.app
