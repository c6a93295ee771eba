"""A network that loses the answer of a COMMIT, or all that comes after some moment, and says so to neither side."""

import socket
import threading
from contextlib import suppress

ARM = b"swallow my commit"


class Proxy:
    """Stands between an application and PostgreSQL. A connection that sent ``ARM`` loses the answer to its COMMIT.

    Args:
        port: The server's.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.swallowed = threading.Semaphore(0)
        self._sockets: list[socket.socket] = []
        self._swallows = threading.Event()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def close(self) -> None:
        """Cut everything off."""
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def swallow(self) -> None:
        """From now on let nothing through, in neither direction, not even the end of a connection.

        So it is for the server when a client's power fails: no FIN, no RST, and all sockets are as they were.
        """
        self._swallows.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                committing = threading.Event()
                for pump in (self._to_server, self._to_client):
                    threading.Thread(target=pump, args=(client, server, committing), name="proxy", daemon=True).start()

    def _to_server(self, client: socket.socket, server: socket.socket, committing: threading.Event) -> None:
        armed = False
        with suppress(OSError):
            while (data := client.recv(65536)) or self._swallows.is_set():
                if self._swallows.is_set():
                    return
                armed = armed or ARM in data
                if armed and b"COMMIT" in data:
                    committing.set()
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _to_client(self, client: socket.socket, server: socket.socket, committing: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if self._swallows.is_set():
                    return
                if committing.is_set():
                    # The server has answered, so it is done; here the cable is cut. Told first, because either end
                    # may be gone already, and shutting it down then fails.
                    self.swallowed.release()
                    client.shutdown(socket.SHUT_RDWR)
                    server.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
