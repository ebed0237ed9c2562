"""A publisher in a process of its own, which does what vLLM's ZmqEventPublisher does, and loses what it is told to.

Run with a JSON of options; then reads a JSON command a line and answers each with a line.
"""

import base64
import json
import sys
import time
from collections import deque
from typing import Any

import zmq

END = (-1).to_bytes(8, "big", signed=True)


class Process:
    def __init__(self, endpoint: str, replay: str, bind: bool, buffer: int, hwm: int = 100_000) -> None:
        self.context = zmq.Context()
        self.endpoint, self.bind, self.hwm = endpoint, bind, hwm
        self.open()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(replay)
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer)
        self.sequence = 0
        self.mute = False
        self.hole = -1

    def open(self) -> None:
        self.pub = self.context.socket(zmq.PUB)
        self.pub.setsockopt(zmq.LINGER, 0)
        self.pub.set_hwm(self.hwm)
        (self.pub.bind if self.bind else self.pub.connect)(self.endpoint)

    def publish(self, payload: str, lost: bool, count: int = 1) -> int:
        for _ in range(count):
            data = base64.b64decode(payload)
            if not lost:
                self.pub.send_multipart([b"kv", self.sequence.to_bytes(8, "big"), data])
            self.buffer.append((self.sequence, data))
            self.sequence += 1
        return self.sequence

    def huge(self, size: int) -> int:
        """A payload of so many bytes that is no batch, made here as no pipe wants it."""
        return self.publish(base64.b64encode(b"\xc1" * size).decode(), lost=False)

    def raw(self, frames: list[str]) -> None:
        self.pub.send_multipart([base64.b64decode(frame) for frame in frames])

    def forget(self) -> None:
        self.buffer.clear()

    def silence(self, mute: bool) -> None:
        """The replay answers without its end."""
        self.mute = mute

    def leave_out(self, sequence: int) -> None:
        """The next replay has a hole, as one that was too much for its connection."""
        self.hole = sequence

    def rebind(self) -> None:
        """The connection breaks; the process stays."""
        self.pub.unbind(self.endpoint)
        self.pub.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                return self.open()
            except zmq.ZMQError:  # the socket closes in the background
                self.pub.close()
                if time.monotonic() > deadline:
                    raise

    def serve(self) -> None:
        client, _, start = self.router.recv_multipart()
        for sequence, payload in self.buffer:
            if sequence >= int.from_bytes(start, "big") and sequence != self.hole:
                self.router.send_multipart([client, b"", b"kv", sequence.to_bytes(8, "big"), payload])
        self.hole = -1
        if not self.mute:
            self.router.send_multipart([client, b"", b"", END, b""])

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        poller.register(self.router, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self.router in ready:
                self.serve()
            if sys.stdin.fileno() in ready:
                line = sys.stdin.buffer.raw.readline()
                if not line:
                    return
                command: dict[str, Any] = json.loads(line)
                self.answer(getattr(self, command.pop("do"))(**command))

    def answer(self, value: Any) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    process = Process(**json.loads(sys.argv[1]))
    process.answer("ready")
    process.run()
    process.context.destroy(linger=0)
