"""One process of the application, as a web process is: it runs tasks, and asks for more, until it is stopped."""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.soak.application import GRACE, Shop
from benchmarks.soak.askers import Askers
from benchmarks.soak.kinds import requests_of
from benchmarks.soak.ledger import Ledger
from benchmarks.soak.tasks import declare

ASKERS = 3


class Twice(BaseException):  # an exit
    """The second SIGTERM."""


def main(settings: Mapping[str, Any]) -> None:
    """Run until SIGTERM.

    Args:
        settings: ``url``, ``notify_url``, ``directory``, ``seed``, ``name``, and ``only``: kinds of requests, or None.
    """
    directory, name = Path(settings["directory"]), settings["name"]
    # To a file, and not to a pipe that nobody empties.
    with (directory / f"{name}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    shop = Shop(settings["url"], notify_url=settings["notify_url"])
    declare(shop)
    askers = Askers(shop, Ledger(directory / f"{name}.ledger"), directory)
    requests = [requests_of(settings["seed"], name, each, settings["only"]) for each in range(ASKERS)]
    stop = threading.Event()

    def heard(_number: int, _frame: object) -> None:
        if stop.is_set():
            raise Twice
        stop.set()

    signal.signal(signal.SIGTERM, heard)
    try:
        if shop.is_async:
            asyncio.run(_serve(shop, askers, requests, stop))
        else:
            _serve_plain(shop, askers, requests, stop)
    except (Twice, KeyboardInterrupt):
        print("stopped twice", flush=True)
    # Tasks that hang on threads must not keep the process: whoever stops it waits for its end.
    os._exit(0)


def _serve_plain(shop: Shop, askers: Askers, requests: list[Any], stop: threading.Event) -> None:
    with shop.db.running(grace=GRACE):
        threads = [threading.Thread(target=askers.serve, args=(each,), daemon=True) for each in requests]
        for thread in threads:
            thread.start()
        while not stop.wait(0.1):
            pass
        askers.over.set()
        for thread in threads:
            thread.join(5.0)
    shop.db.dispose()


async def _serve(shop: Shop, askers: Askers, requests: list[Any], stop: threading.Event) -> None:
    async with shop.db.running(grace=GRACE):
        asking = [asyncio.create_task(askers.async_serve(each)) for each in requests]
        while not stop.is_set():  # noqa: ASYNC110  # set by a signal's handler, which may not touch the loop
            await asyncio.sleep(0.1)
        askers.over.set()
        await asyncio.wait(asking, timeout=5.0)
    await shop.db.async_dispose()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
