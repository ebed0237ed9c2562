"""A TCP proxy whose speed a test sets, and which cuts connections when told to."""

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self


class Proxy:
    """Forwards connections on `port` to `target` (a port), `bytes_per_s` in each direction of each connection.

    cut_after: once so many bytes have gone to a client, its connection is cut.
    """

    def __init__(self, target: int) -> None:
        self.bytes_per_s: float | None = None
        self.cut_after: int | None = None
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        for one in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target), 10)
                self._sockets += [client, server]
                threading.Thread(target=self._forward, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, True), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, to_client: bool) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                rate = self.bytes_per_s
                if rate is not None:
                    # In small steps, so that a new rate counts soon.
                    due = time.monotonic() + len(data) / rate
                    while self.bytes_per_s == rate and (left := due - time.monotonic()) > 0:
                        if self._closed.wait(min(left, 0.05)):
                            return
                if to_client and self.cut_after is not None and sent + len(data) > self.cut_after:
                    sink.sendall(data[: max(0, self.cut_after - sent)])
                    break
                sink.sendall(data)
                sent += len(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
