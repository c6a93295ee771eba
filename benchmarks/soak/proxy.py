"""A bad network between the application and PostgreSQL: it cuts, half-closes, swallows, delays and truncates."""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Final, Literal

from benchmarks.soak.wire import Frames, FromClient, FromServer

Way = Literal["cut", "half-close", "swallow", "delay", "truncate"]
Moment = Literal["now", "commit", "committed"]
WAYS: Final[tuple[Way, ...]] = ("cut", "half-close", "swallow", "delay", "truncate")
MOMENTS: Final[tuple[Moment, ...]] = ("now", "commit", "committed")
LAGS: Final = 0.35
"""How many of all COMMITs, and of their answers, are late. Within that time others claim what is not locked."""

LISTED_WITHIN: Final = 3.0
"""Seconds, on a loaded machine: a worker has listed a connection of this age as its own, so that whoever rescues it can
end it. What locks of younger ones do is documented (explanation/guarantees.md), and takes longer than a soak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """What happens to one connection.

    Attributes:
        way: What is done to it.
        moment: At once, or when the next COMMIT passes on its way to the server, or the next acknowledgement of one.
        is_upward: Whether the direction to the server is hit, where *moment* leaves that open.
        seconds: How long a delay takes, and how long nothing passes of what is swallowed, before the line is cut.
    """

    way: Way
    moment: Moment
    is_upward: bool
    seconds: float


@dataclass(eq=False)
class _Side:
    """One direction of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    frames: Frames
    moment: Moment
    pending: list[Strike] = field(default_factory=list)
    is_mute: bool = False


class _Link:
    """One connection through the proxy."""

    def __init__(self, proxy: "Proxy", client: _Side, server: _Side) -> None:
        self._proxy = proxy
        self.up, self.down = client, server
        self.is_vanished = False
        self.born = time.monotonic()
        self._ends: list[asyncio.TimerHandle] = []

    async def pump(self, side: _Side) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while data := await side.reader.read(65536):
                for piece, is_commit in side.frames.cut(data):
                    strikes, side.pending = side.pending, []
                    if is_commit and (met := self._proxy.met(side.moment)) is not None:
                        strikes.append(met)
                    if is_commit and (lag := self._proxy.lag()):
                        await asyncio.sleep(lag)
                    for strike in strikes:
                        await self.hit(side, strike, piece)
                    if not side.is_mute:
                        side.writer.write(piece)
                        await side.writer.drain()
            if not side.is_mute:
                side.writer.write_eof()
            return
        self.cut()

    async def hit(self, side: _Side, strike: Strike, piece: bytes) -> None:
        """Do to this direction, of which *piece* is about to pass, what *strike* says."""
        if self.is_vanished or side.is_mute:
            return
        loop = asyncio.get_running_loop()
        if strike.way == "delay":
            await asyncio.sleep(strike.seconds)
        elif strike.way == "cut":
            self.cut()
        elif strike.way == "truncate":
            side.writer.write(piece[: len(piece) // 2])
            side.is_mute = True
            self._ends.append(loop.call_later(0.05, self.cut))
        else:
            side.is_mute = True
            if strike.way == "half-close":
                side.writer.write_eof()
            self._ends.append(loop.call_later(strike.seconds, self.cut))

    def cut(self) -> None:
        """End both directions at once."""
        if not self.is_vanished:
            for side in (self.up, self.down):
                side.is_mute = True
                side.writer.transport.abort()

    def vanish(self) -> None:
        """From now on nothing passes, and neither side is told: as where the power of a machine goes."""
        for each in self._ends:
            each.cancel()
        self.is_vanished = self.up.is_mute = self.down.is_mute = True


class Proxy:
    """Listens on a port of its own, for one process of the application.

    Args:
        target: The port of the server behind it.
    """

    _loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, target: int) -> None:
        self._target = target
        self._links: set[_Link] = set()
        self._armed: list[Strike] = []
        self._rng = Random(target)
        self.done: Counter[str] = Counter()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def strike(self, strike: Strike, rng: Random) -> None:
        """Hit one connection now, or the next COMMIT that passes."""
        if strike.moment != "now":
            self._armed.append(strike)
            return

        async def hit() -> None:
            links = sorted((each for each in self._links if not each.is_vanished), key=id)
            if links:
                link = rng.choice(links)
                self.done[f"network: {strike.way}"] += 1
                side = link.up if strike.is_upward else link.down
                if strike.way in ("delay", "truncate"):
                    side.pending.append(strike)
                else:
                    await link.hit(side, strike, b"")

        self._call(hit())

    def met(self, moment: Moment) -> Strike | None:
        """Take the strike that waits for *moment*."""
        for each in self._armed:
            if each.moment == moment:
                self._armed.remove(each)
                at = "its COMMIT" if moment == "commit" else "its COMMIT's answer"
                self.done[f"network: {each.way} at {at}"] += 1
                return each
        return None

    def lag(self) -> float:
        """How long a COMMIT takes, or its answer, on an ordinary bad day: seconds, mostly none."""
        return self._rng.uniform(0.0, 0.1) if self._rng.random() < LAGS else 0.0

    def vanish(self) -> None:
        """Have the client of every connection vanish; the server is told nothing until ``close``, but of young ones."""

        async def all_of_them() -> None:
            for link in list(self._links):
                if time.monotonic() - link.born > LISTED_WITHIN:
                    link.vanish()
                else:
                    link.cut()

        self.done["network: client vanishes"] += 1
        self._call(all_of_them())

    def calm(self) -> None:
        """Hit nothing more."""
        self._armed.clear()

    def close(self) -> None:
        """Cut all connections, and listen no more."""

        async def all_of_them() -> None:
            self._server.close()
            for link in list(self._links):
                link.is_vanished = False
                link.cut()

        self._call(all_of_them())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        frames = FromClient()
        up = _Side(reader, back_writer, frames, "commit")
        down = _Side(back_reader, writer, FromServer(frames), "committed")
        link = _Link(self, up, down)
        self._links.add(link)
        try:
            await asyncio.gather(link.pump(up), link.pump(down))
            while link.is_vanished:  # noqa: ASYNC110  # for as long as the soak lasts
                await asyncio.sleep(0.5)
        finally:
            self._links.discard(link)
            for each in (writer, back_writer):
                each.transport.abort()

    def _call(self, work: object) -> object:
        if Proxy._loop is None:
            Proxy._loop = asyncio.new_event_loop()
            threading.Thread(target=Proxy._loop.run_forever, name="proxy", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(work, Proxy._loop).result(30.0)  # type: ignore[arg-type]
