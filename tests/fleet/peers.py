"""A publisher's process from the test's side, and what a subscriber should make of it."""

import asyncio
import base64
import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from cairn.fleet.base import Source
from cairn.fleet.events import Decoder
from cairn.fleet.instances import Instance, Limits
from cairn.fleet.metrics import FleetMetrics
from tests.fleet.holder import Hash, Holder
from tests.fleet.wire_events import encode, stored
from tests.ports import free_ports

DEADLINE_S = 20.0
LIMITS = Limits(replay_s=8.0, quiet_s=1.0, check_s=0.3, lost_s=5.0)


def free_endpoint() -> str:
    return f"tcp://127.0.0.1:{free_ports(1)[0]}"


async def until(condition: Callable[[], bool], what: str = "") -> None:
    """Waits for a condition, by the clock at most DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.005)


class Publisher:
    """One process after another at the same endpoints. `state()`: what its present one holds."""

    def __init__(self, name: str = "a", *, bind: bool = True, buffer: int = 10_000, rank: int = 0, **options: Any):
        self.endpoint, self.replay = free_endpoint(), free_endpoint()
        self.options = {"endpoint": self.endpoint, "replay": self.replay, "bind": bind, "buffer": buffer} | options
        self.instance = Instance(name, self.endpoint, self.replay, bind=not bind)
        self.source = Source(name, rank)
        self.buffer = buffer
        self.made = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("publisher_process.py")), json.dumps(self.options)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.batches: list[bytes] = []
        self.kept: list[bytes] = []
        assert self._answer() == "ready"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def publish(self, *events: Any, lost: bool = False) -> None:
        """A batch; without events it stores a new block."""
        self.send(encode(list(events) or [self.block()], rank=self.source.rank, time=time.time()), lost=lost)

    def send(self, payload: bytes, lost: bool = False, count: int = 1) -> None:
        self.do("publish", payload=base64.b64encode(payload).decode(), lost=lost, count=count)
        self.batches += [payload] * count
        self.kept = (self.kept + [payload] * count)[-self.buffer :]

    def block(self) -> dict[str, Any]:
        self.made += 1
        return stored([self.made], [self.made, 1, 2, 3], 4)

    def forget(self) -> None:
        self.do("forget")
        self.kept = []

    def do(self, command: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": command} | arguments).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def state(self) -> set[Hash]:
        return self.made_of(self.batches)

    def made_of(self, batches: Sequence[bytes]) -> set[Hash]:
        """What the batches leave behind, of a process whose first one is among them or not."""
        holder, decoder = Holder(), Decoder(FleetMetrics())
        for payload in batches:
            batch = decoder.decode(payload)
            holder.apply(self.source, batch.events if batch else [])
        return holder.hashes(self.source)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], DEADLINE_S)[0], "the publisher does not answer"
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
