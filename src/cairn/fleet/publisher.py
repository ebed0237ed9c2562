"""A publisher as vLLM's ZmqEventPublisher: PUB, and a ROUTER that replays what it still has.

For what is not vLLM: recordings that are played to a listener again, and engines that embed Cairn.
"""

import threading
from collections import deque
from types import TracebackType
from typing import Final, Self

import zmq

from cairn.errors import InputError

_END: Final = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """Publishes payloads under rising sequences. Thread-safe; replays are answered by a thread of its own."""

    def __init__(
        self, endpoint: str, replay: str | None = None, *, bind: bool = True, topic: str = "", buffer: int = 10_000
    ) -> None:
        """endpoint: to publish at, bound unless `bind` is False. replay: where to answer replays. buffer: batches kept
        for them. Raises InputError where an endpoint cannot be used.
        """
        self._context = zmq.Context()
        self._topic = topic.encode()
        self._lock = threading.Lock()
        self._next = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._pub = self._open(zmq.PUB, endpoint, bind=bind)
            if replay is not None:
                router = self._open(zmq.ROUTER, replay, bind=True)
                self._thread = threading.Thread(target=self._serve, args=(router,), name="cairn-replay", daemon=True)
                self._thread.start()
        except InputError:
            self._context.destroy(linger=0)
            raise

    def publish(self, payload: bytes) -> int:
        """Sends a batch (msgpack, as `cairn.fleet.wire` has it); never waits. Returns its sequence."""
        with self._lock:
            sequence, self._next = self._next, self._next + 1
            self._pub.send_multipart([self._topic, sequence.to_bytes(8, "big"), payload])
            self._buffer.append((sequence, payload))
        return sequence

    def close(self, linger_ms: int = 1_000) -> None:
        """Lets what was published go out, at most `linger_ms` milliseconds long. Repeatable."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        self._pub.close(linger=linger_ms)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open(self, kind: int, endpoint: str, *, bind: bool) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set_hwm(100_000)
        try:
            if bind:
                socket.bind(endpoint)
            else:
                socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise InputError(
                f"{endpoint}: cannot be used: {error.strerror}; name a free one, as tcp://*:5557"
            ) from None
        return socket

    def _serve(self, router: zmq.Socket[bytes]) -> None:
        while not self._stop.is_set():
            if not router.poll(100):
                continue
            frames = router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            start = int.from_bytes(frames[2], "big")
            with self._lock:
                kept = [(sequence, payload) for sequence, payload in self._buffer if sequence >= start]
            for sequence, payload in kept:
                router.send_multipart([frames[0], b"", self._topic, sequence.to_bytes(8, "big"), payload])
            router.send_multipart([frames[0], b"", b"", _END, b""])
        router.close(linger=0)
