"""A client that does as it is told: one frame at a time, and no heartbeat of its own."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from cairn.kv import KeyChain, Keys
from cairn.node import wire
from cairn.node.gate import Entrance
from cairn.node.segments import path_of
from cairn.node.wire import raw_of, rows_of
from cairn.tier.arena import Arena
from tests.engine.pages import GEOMETRY

NAMESPACE = bytes(16)


def keys_of(seed: int, blocks: int) -> Keys:
    tokens = np.random.default_rng(seed).integers(0, 1000, blocks * GEOMETRY.block_tokens)
    return KeyChain(NAMESPACE, GEOMETRY.block_tokens, tokens).keys


class Peer:
    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket: Any = self.context.socket(zmq.DEALER)
        self.socket.connect(address)
        self.numbers = itertools.count(1)
        self.session = 0

    def close(self) -> None:
        self.context.destroy(linger=0)

    def raw(self, *frames: bytes) -> wire.Reply:
        self.socket.send_multipart(frames)
        return self.reply()

    def reply(self, timeout_s: float = 10) -> wire.Reply:
        assert self.socket.poll(timeout_s * 1000), "no answer"
        return wire.decode_reply(self.socket.recv())

    def ask(self, kind: Any, *fields: Any) -> Any:
        return self.raw(wire.encode(kind(next(self.numbers), self.session, *fields)))

    def tell(self, message: wire.Request) -> None:
        self.socket.send(wire.encode(message))

    def hello(self) -> "Peer":
        while isinstance(found := self.ask(wire.Hello, GEOMETRY), wire.Wait):
            pass
        assert isinstance(found, wire.Welcome), found
        self.session = found.session
        self.welcome = found
        self.gate = path_of(found.gate)
        return self

    def entrance(self) -> Entrance:
        return Entrance(self.gate)

    def memory(self) -> npt.NDArray[np.uint8]:
        return Arena.attach(self.welcome.arena, self.welcome.slots, self.welcome.stride).memory

    def reserve(self, number: int, keys: Keys) -> npt.NDArray[np.int32]:
        found = self.ask(wire.Reserve, number, raw_of(keys), NAMESPACE)
        assert isinstance(found, wire.Reserved), found
        return rows_of(found.rows)

    def commit(self, number: int, count: int) -> Any:
        return self.ask(wire.Commit, number, count)

    def store(self, keys: Keys, number: int = 1 << 30) -> npt.NDArray[np.int32]:
        rows = self.reserve(number, keys)
        found = self.commit(number, len(rows))
        assert isinstance(found, wire.Committed)
        self.tell(wire.End(self.session, [number]))
        return rows

    def take(self, number: int, keys: Keys) -> Any:
        return self.ask(wire.Take, number, raw_of(keys), 1.0)

    def match(self, keys: Keys) -> int:
        found = self.ask(wire.Match, raw_of(keys))
        assert isinstance(found, wire.Matched), found
        return found.dram

    def figures(self) -> dict[str, dict[str, float]]:
        found = self.ask(wire.Stats)
        assert isinstance(found, wire.Figures)
        return found.tiers

    def busy(self) -> tuple[float, float]:
        """Pinned and reserved rows."""
        dram = self.figures()["dram"]
        return dram["pinned_blocks"], dram["reserved_blocks"]


def within(seconds: float, peer: Peer, holds: Callable[[], bool]) -> bool:
    """Whether it holds in time; the peer stays alive by asking."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        peer.figures()
    return holds()
