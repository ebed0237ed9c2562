"""A listener to vLLM's KV events, as a router is one: it keeps a set from what comes over the wire."""

from pathlib import Path
from typing import Any, Self

import msgspec
import zmq

_DEADLINE_MS = 20_000


class Mirror:
    """Blocks by medium, kept from events alone: hash -> (parent, tokens, adapter, extra keys).

    Subscribes to a publisher at `endpoint` and asks its replay for what it missed before it was connected.
    """

    def __init__(self, home: Path) -> None:
        self.options: dict[str, Any] = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"ipc://{home}/events",
            "replay_endpoint": f"ipc://{home}/replay",
        }
        self.blocks: dict[str, dict[Any, tuple[Any, ...]]] = {"GPU": {}, "CPU": {}, "STORAGE": {}}
        self.clears = 0
        self.told: dict[str, int] = {}
        self._next = 0

    def __enter__(self) -> Self:
        self._live = zmq.Context.instance().socket(zmq.SUB)
        self._live.setsockopt(zmq.SUBSCRIBE, b"")
        self._live.connect(self.options["endpoint"])
        self._replay = zmq.Context.instance().socket(zmq.DEALER)
        self._replay.connect(self.options["replay_endpoint"])
        return self

    def __exit__(self, *_: object) -> None:
        self._live.close(linger=0)
        self._replay.close(linger=0)

    def catch_up(self, published: int) -> None:
        """Takes in every batch up to number `published` - 1: what comes live, and the rest by replay."""
        while self._next < published:
            if self._live.poll(200):
                _, number, payload = self._live.recv_multipart()
                if int.from_bytes(number, "big") != self._next:
                    self._catch_up_by_replay()
                else:
                    self._batch(int.from_bytes(number, "big"), payload)
            else:
                self._catch_up_by_replay()

    def _catch_up_by_replay(self) -> None:
        self._replay.send_multipart([b"", self._next.to_bytes(8, "big")])
        while True:
            assert self._replay.poll(_DEADLINE_MS), "no replay"
            *_, number, payload = self._replay.recv_multipart()
            if not payload:
                return
            self._batch(int.from_bytes(number, "big"), payload)

    def _batch(self, number: int, payload: bytes) -> None:
        if number < self._next:
            return  # it came by replay
        assert number == self._next, "a batch is missing"
        self._next += 1
        for event in msgspec.msgpack.decode(payload)[1]:
            getattr(self, "_" + event["type"])(event)

    def _BlockStored(self, event: dict[str, Any]) -> None:  # noqa: N802
        medium, hashes, size = event["medium"], event["block_hashes"], event["block_size"]
        if medium == "GPU":
            self.blocks[medium].update(dict.fromkeys(hashes, ()))
            return
        assert len(event["token_ids"]) == size * len(hashes)
        extra = event.get("extra_keys") or [None] * len(hashes)
        parent = event["parent_block_hash"]
        for i, key in enumerate(hashes):
            assert key not in self.blocks[medium], "told twice"
            assert parent is None or parent in self.blocks[medium], "a child before its parent"
            tokens = tuple(event["token_ids"][i * size : (i + 1) * size])
            marks = tuple(map(str, extra[i])) if extra[i] else None
            self.blocks[medium][key] = (parent, tokens, event["lora_name"], marks)
            self.told[medium] = self.told.get(medium, 0) + 1
            parent = key

    def _BlockRemoved(self, event: dict[str, Any]) -> None:  # noqa: N802
        for key in event["block_hashes"]:
            if event["medium"] == "GPU":
                self.blocks["GPU"].pop(key, None)
            else:
                del self.blocks[event["medium"]][key]

    def _AllBlocksCleared(self, event: dict[str, Any]) -> None:  # noqa: N802
        self.clears += 1
        for blocks in self.blocks.values():
            blocks.clear()
