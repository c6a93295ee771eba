"""Upload files of orders and watch them being processed: `make demo`."""

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from models import DATA, Base, Order, OrderFile, db
from sqlalchemy import func, select
from tasks import process_file

from aftercommit import TaskRecord
from aftercommit.fastapi import AfterCommitDep, SessionDep, install

HERE = Path(__file__).parent
pages = Jinja2Templates(HERE / "templates")
app = FastAPI(title="Orders")
app.mount("/static", StaticFiles(directory=HERE / "static"))
install(app, db, create_tables=Base.metadata, grace=2.0)  # a file goes on where it was, so a stop need not wait for it


@app.post("/files")
def upload(files: list[UploadFile], session: SessionDep, after_commit: AfterCommitDep) -> Response:
    """Store the files; each is processed once this request has committed."""
    for each in files:
        file = OrderFile(name=each.filename, size=each.size)
        session.add(file)
        file.task_id = after_commit(process_file, file).id
        with (DATA / f"{file.task_id}.csv").open("wb") as target:
            shutil.copyfileobj(each.file, target)
    return RedirectResponse("/", status_code=303)


@app.get("/")
def list_files(request: Request, session: SessionDep) -> Response:
    """Show the latest files, and how far each is."""
    files = select(OrderFile, TaskRecord).outerjoin(TaskRecord, TaskRecord.id == OrderFile.task_id)
    rows = session.execute(files.order_by(OrderFile.id.desc()).limit(50)).all()
    return pages.TemplateResponse(request, "files.html", {"rows": rows})


@app.get("/files/{file_id}")
def show_file(file_id: int, request: Request, session: SessionDep) -> Response:
    """Show what was in a file."""
    file = session.get(OrderFile, file_id)
    if file is None:
        raise HTTPException(404)
    totals = {}
    for title, column in {"Products": Order.product, "Customers": Order.customer}.items():
        units, cents = func.sum(Order.quantity), func.sum(Order.cents).label("cents")
        query = select(column, func.count(), units, cents).where(Order.file_id == file_id).group_by(column)
        totals[title] = session.execute(query.order_by(cents.desc(), column).limit(10)).all()
    context = {"file": file, "record": session.get(TaskRecord, file.task_id), "totals": totals}
    return pages.TemplateResponse(request, "file.html", context)


if __name__ == "__main__":
    try:
        server = socket.create_server(("127.0.0.1", int(os.environ.get("PORT", "8000"))))
    except OSError as error:
        print(f"{error.strerror}, so the demo takes another port. PORT=… chooses one.")
        server = socket.create_server(("127.0.0.1", 0))
    print(f"Orders on {db}: open http://127.0.0.1:{server.getsockname()[1]}", flush=True)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[server])
