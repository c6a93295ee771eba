"""Upload files of orders and watch them being processed: `make demo`."""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response, UploadFile
from fastapi.responses import RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from models import STOCK, BadLine, Base, Customer, OrderFile, Product, db
from sqlalchemy import func, literal, select, union_all
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask
from starlette.middleware.trustedhost import TrustedHostMiddleware
from tasks import process_file

from aftercommit import TaskRecord
from aftercommit.fastapi import AfterCommitDep, SessionDep, install

HERE = Path(__file__).parent
pages = Jinja2Templates(HERE / "templates")
pages.env.globals |= {"STOCK": STOCK, "is_restarted": False}


def refuse_other_sites(request: Request) -> None:
    """Let no other site's page write here: a browser would send it, also to 127.0.0.1, and says where it comes from."""
    host, site = request.headers.get("host", ""), request.headers.get("sec-fetch-site", "none")
    is_ours = request.headers.get("origin", f"//{host}").endswith(f"//{host}") and site in {"same-origin", "none"}
    if request.method == "POST" and not is_ours:
        raise HTTPException(403)


app = FastAPI(title="Orders", dependencies=[Depends(refuse_other_sites)])
app.mount("/static", StaticFiles(directory=HERE / "static"))
install(app, db, create_tables=Base.metadata, grace=2.0)  # a file goes on where it was, so a stop need not wait for it


@app.post("/files")
def upload(files: list[UploadFile], session: SessionDep, after_commit: AfterCommitDep) -> Response:
    """Store the files; each is processed once this request has committed."""
    for each in files:
        file = OrderFile(name=(each.filename or "").replace("\0", "\ufffd"), size=each.size)
        session.add(file)
        file.task_id = after_commit(process_file, file).id
        with file.path.open("wb") as target:
            shutil.copyfileobj(each.file, target)
    return RedirectResponse("/", status_code=303)


@app.get("/")
def list_files(request: Request, session: SessionDep) -> Response:
    """Show the latest files, how far each is, and whether the totals agree."""
    files = select(OrderFile, TaskRecord).outerjoin(TaskRecord, TaskRecord.id == OrderFile.task_id)
    rows = session.execute(files.order_by(OrderFile.id.desc()).limit(50)).all()
    return pages.TemplateResponse(request, "files.html", {"rows": rows, "totals": add_up(session)})


@app.get("/files/{file_id}")
def show_file(file_id: int, request: Request, session: SessionDep) -> Response:
    """Show what was in a file; a number that no database counts to is one that is not there."""
    file = session.get(OrderFile, file_id) if 0 < file_id < 2**63 else None
    if file is None:
        raise HTTPException(404)
    bad_lines = select(BadLine).where(BadLine.file_id == file_id).order_by(BadLine.line).limit(100)
    record = session.get(TaskRecord, file.task_id)
    context = {"file": file, "record": record, "bad_lines": session.scalars(bad_lines).all()}
    return pages.TemplateResponse(request, "file.html", context)


@app.get("/files/{file_id}/bad-lines.csv")
def download_bad_lines(file_id: int, session: SessionDep) -> Response:
    """Give all bad lines of a file, with what is wrong with them."""
    if not 0 < file_id < 2**63 or session.get(OrderFile, file_id) is None:
        raise HTTPException(404)

    def rows() -> Iterator[str]:
        yield "line,reason,text\n"
        query = select(BadLine).where(BadLine.file_id == file_id).order_by(BadLine.line)
        # The request's session has ended when the answer is still being sent, so this takes one of its own.
        with db.session() as own:
            for bad in own.scalars(query, execution_options={"yield_per": 1_000}):
                quoted = ['"' + text.replace('"', '""') + '"' for text in (bad.reason, bad.text)]
                yield f"{bad.line},{','.join(quoted)}\n"

    headers = {"Content-Disposition": f'attachment; filename="bad-lines-{file_id}.csv"'}
    return StreamingResponse(rows(), media_type="text/csv; charset=utf-8", headers=headers)


@app.get("/products")
def list_products(request: Request, session: SessionDep) -> Response:
    """Show the inventory."""
    products = session.scalars(select(Product).order_by(Product.cents.desc(), Product.code).limit(100)).all()
    return pages.TemplateResponse(request, "products.html", {"products": products, "totals": add_up(session)})


@app.get("/customers")
def list_customers(request: Request, session: SessionDep) -> Response:
    """Show who has ordered most."""
    customers = session.scalars(select(Customer).order_by(Customer.cents.desc(), Customer.code).limit(100)).all()
    return pages.TemplateResponse(request, "customers.html", {"customers": customers, "totals": add_up(session)})


def kill() -> Response:
    """End this process as a power cut would, once the answer is on its way: a browser that got none would ask again."""
    return Response(status_code=204, background=BackgroundTask(os.kill, os.getpid(), signal.SIGKILL))


def add_up(session: Session) -> dict[str, tuple[int, int, int]]:
    """Return orders, units and cents as the files hold them, and as each handler has counted them so far."""
    counted = {
        "files": (OrderFile.orders, OrderFile.units, OrderFile.cents),
        "products": (Product.orders, STOCK - Product.inventory, Product.cents),
        "customers": (Customer.orders, Customer.units, Customer.cents),
    }
    sums = (select(literal(name), *map(func.sum, columns)) for name, columns in counted.items())
    # In one statement, so that all three are of the same moment.
    return {name: tuple(int(each or 0) for each in found) for name, *found in session.execute(union_all(*sums))}


def serve(listener: socket.socket) -> None:
    """Serve until told to stop, and offer to be killed: here, another is started."""
    app.post("/kill")(kill)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])  # no name that leads here
    pages.env.globals["is_restarted"] = True
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    try:
        server = socket.create_server(("127.0.0.1", int(os.environ.get("PORT", "8000"))))
    except OSError as error:
        print(f"{error.strerror}, so the demo takes another port. PORT=… chooses one.")
        server = socket.create_server(("127.0.0.1", 0))
    print(f"Orders on {db}: open http://127.0.0.1:{server.getsockname()[1]}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as Ctrl+C does, this ends the child, too
    with suppress(KeyboardInterrupt):
        while True:
            # The socket stays open here, so that while there is no server, browsers wait instead of being refused.
            child = get_context("fork").Process(target=serve, args=(server,), daemon=True)
            child.start()
            child.join()
            if child.exitcode != -signal.SIGKILL:
                break
            print("The server was killed. Here is the next.", flush=True)
