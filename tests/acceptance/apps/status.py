"""An application whose tasks are watched: who has asked for one may see it, and the admin sees errors, too."""

import os
import time
from uuid import UUID

from fastapi import FastAPI, Header

from aftercommit import Database, current_run
from aftercommit.fastapi import AfterCommitDep, AsyncSessionDep, install, status_router

db = Database(os.environ["STATUS_URL"])
owners: dict[UUID, str] = {}


def allow(id: UUID, user: str = Header("nobody")) -> bool:
    """Whose task this is."""
    return user in {"admin", owners.get(id)}


def show_error(user: str = Header("nobody")) -> bool:
    """Who sees errors."""
    return user == "admin"


app = FastAPI()
install(app, db, create_tables=True, grace=1.0)
app.include_router(status_router(db, allow=allow, show_error=show_error), prefix="/tasks")


@db.task
def count(to: int, seconds: float) -> str:
    """Take some time, and say how far it is."""
    run = current_run()
    assert run is not None
    for done in range(to):
        run.progress(done, to)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.01)
            run.check()
    if to == 0:
        raise ValueError("secret detail")
    return "result"


@app.post("/tasks")
async def ask(to: int, seconds: float, session: AsyncSessionDep, after_commit: AfterCommitDep) -> dict[str, str]:
    """Hand it over."""
    run = after_commit(count, to, seconds)
    owners[run.id] = "ann"
    return {"id": str(run.id)}


@app.post("/tasks/{id}/cancel")
async def cancel(id: UUID) -> None:
    """Cancel it."""
    await db.async_cancel(id, by="ann")


@app.get("/looks")
async def looks() -> int:
    """How often the database was asked for those who watch."""
    return db.following.looks
