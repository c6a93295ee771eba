"""Enough of PostgreSQL's wire protocol (version 3) to see a COMMIT go by, and its acknowledgement come back."""

from collections.abc import Iterator

_CANCEL, _SSL, _GSS = 80877102, 80877103, 80877104


class Frames:
    """Cuts a stream of bytes into whole messages; what is incomplete waits for the rest."""

    def __init__(self) -> None:
        self._rest = b""

    def cut(self, data: bytes) -> Iterator[tuple[bytes, bool]]:
        """Give what is whole, in as few pieces as can be, each with whether it is about a COMMIT."""
        self._rest += data
        start = at = 0
        while size := self._size(at):
            if at + size > len(self._rest):
                break
            if self._is_commit(self._rest[at : at + size]):
                if at > start:
                    yield self._rest[start:at], False
                yield self._rest[at : at + size], True
                start = at + size
            at += size
        if at > start:
            yield self._rest[start:at], False
        self._rest = self._rest[at:]

    def _size(self, at: int) -> int:
        """How long the message is that begins there; 0 if that cannot be told yet."""
        if len(self._rest) < at + 5:
            return 0
        return 1 + int.from_bytes(self._rest[at + 1 : at + 5])

    def _is_commit(self, message: bytes) -> bool:
        raise NotImplementedError


class FromClient(Frames):
    """What a client sends.

    Attributes:
        refusable: How many of its requests for encryption have yet to be answered, with one bare byte each.
    """

    def __init__(self) -> None:
        super().__init__()
        self._has_begun = False
        self._committing: set[bytes] = set()
        self.refusable = 0

    def _size(self, at: int) -> int:
        if self._has_begun:
            return super()._size(at)
        # No type comes before the length of the first messages.
        if len(self._rest) < at + 8 or len(self._rest) < at + int.from_bytes(self._rest[at : at + 4]):
            return 0
        code = int.from_bytes(self._rest[at + 4 : at + 8])
        if code in (_SSL, _GSS):
            self.refusable += 1
        else:
            self._has_begun = code != _CANCEL
        return int.from_bytes(self._rest[at : at + 4])

    def _is_commit(self, message: bytes) -> bool:
        kind, body = message[:1], message[5:]
        if kind == b"Q":
            return _says_commit(body)
        if kind == b"P":
            name, _, rest = body.partition(b"\0")
            known = self._committing
            (known.add if _says_commit(rest) else known.discard)(name)
        elif kind == b"B":
            return body.split(b"\0", 2)[1] in self._committing
        return False


class FromServer(Frames):
    """What the server sends back to *client*."""

    def __init__(self, client: FromClient) -> None:
        super().__init__()
        self._client = client

    def _size(self, at: int) -> int:
        if self._client.refusable and len(self._rest) > at:
            self._client.refusable -= 1
            return 1
        return super()._size(at)

    def _is_commit(self, message: bytes) -> bool:
        return message[:1] == b"C" and message[5:] == b"COMMIT\0"


def _says_commit(statement: bytes) -> bool:
    return statement.lstrip()[:6].upper() == b"COMMIT"
