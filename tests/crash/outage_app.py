"""An application as people write it, on any driver: a request writes a row and asks for a task, which has one effect.

Served by uvicorn in a process of its own, by a test that takes its database away.
"""

import logging
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import Engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aftercommit import Database
from aftercommit.fastapi import AfterCommitDep, AsyncSessionDep, SessionDep, install
from tests.support.workshop import Base, Counter, Effect

logging.basicConfig(level=logging.INFO)
url = make_url(os.environ["DATABASE_URL"])
is_async = url.get_driver_name() in {"asyncpg", "aiosqlite"}
# Long enough on the server that some run, some wait here and some are queued when it is taken away.
SLOWLY = "SELECT pg_sleep(0.02)" if url.get_backend_name() == "postgresql" else "SELECT 1"

ILL = os.environ.get("ILL")
"""A file: what stands in it is run before every statement on SQLite, which has no administrator to do it."""

if ILL is not None:

    @event.listens_for(Engine, "before_cursor_execute")
    def fall_ill(_connection: object, cursor: Any, *_: object) -> None:
        """Be what the file says, or well again."""
        cursor.execute(Path(ILL).read_text(encoding="utf-8"))
        # To its end: a statement that is still open would keep a snapshot.
        cursor.fetchall()


db = Database(url, heartbeat=0.2, silent_after=float(os.environ.get("SILENT_AFTER", "10")))
app = FastAPI()
install(app, db, grace=5.0, create_tables=Base.metadata)

if is_async:

    @db.task
    async def pay(session: AsyncSession, number: int) -> None:
        """Pay once."""
        session.add(Effect(label=str(number)))
        await session.flush()
        await session.execute(text(SLOWLY))

    @app.post("/{number}", status_code=201)
    async def ask(number: int, session: AsyncSessionDep, after_commit: AfterCommitDep) -> None:
        """Leave all that touches the database to the commit, as many endpoints do."""
        session.add(Counter(id=number))
        after_commit(pay, number)

    @app.get("/")
    async def look(session: AsyncSessionDep) -> int:
        """Read."""
        return (await session.execute(text("SELECT count(*) FROM counter"))).scalar_one()

else:

    @db.task(name="pay")
    def pay_sync(session: Session, number: int) -> None:
        """Pay once."""
        session.add(Effect(label=str(number)))
        session.flush()
        session.execute(text(SLOWLY))

    @app.post("/{number}", status_code=201)
    def ask_sync(number: int, session: SessionDep, after_commit: AfterCommitDep) -> None:
        """Leave all that touches the database to the commit, as many endpoints do."""
        session.add(Counter(id=number))
        after_commit(pay_sync, number)

    @app.get("/")
    def look_sync(session: SessionDep) -> int:
        """Read."""
        return session.execute(text("SELECT count(*) FROM counter")).scalar_one()
