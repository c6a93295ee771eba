"""A load generator that costs next to nothing: one request, as bytes, over and over on connections kept alive."""

import asyncio
from urllib.parse import urlsplit


def send(url: str, *, times: int, width: int) -> None:
    """Send *times* POSTs to *url*, *width* at once.

    Raises:
        RuntimeError: If an answer is not 202, or a connection is closed.
    """
    asyncio.run(_send(url, times, width))


async def _send(url: str, times: int, width: int) -> None:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    request = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 0\r\n\r\n".encode()
    numbers = iter(range(times))
    loop = asyncio.get_running_loop()

    async def one_connection() -> None:
        transport, connection = await loop.create_connection(_Connection, host, port)
        try:
            for _ in numbers:
                await connection.ask(request)
        finally:
            transport.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(one_connection())


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._received = b""
        self._answer: asyncio.Future[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self, request: bytes) -> None:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or len(body) < int(_value(head, b"content-length:")):
            return
        self._received = b""
        if head.startswith(b"HTTP/1.1 202 "):
            self._answer.set_result(None)
        else:
            self._answer.set_exception(RuntimeError(f"The server answered {head!r} {body!r}."))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(RuntimeError("The server closed the connection before it answered."))


def _value(head: bytes, name: bytes) -> bytes:
    return head.lower().partition(name)[2].partition(b"\r\n")[0]
