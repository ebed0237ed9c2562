"""The service's parts, made from the configuration; what HTTP and gRPC share."""

import time
from typing import Any, Final

import msgspec
import numpy as np
import zmq

from cairn.config.schema import Index
from cairn.fleet import FleetIndex, Removed, Source, Speculation, Stored, Tier, score
from cairn.fleet.instances import Instance, Limits, parse_instance
from cairn.fleet.messages import Framed, Inbox, Messages
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.track import Track
from cairn.serve.base import Bounds
from cairn.serve.indexer.following import Following
from cairn.serve.indexer.lookup import Lookup
from cairn.serve.indexer.memory import Memory
from cairn.serve.indexer.metrics import IndexMetrics
from cairn.serve.token_text import cut_tokens
from cairn.serve.tokenizers import Tokenizers

#: For publishers to be connected to, until the service counts as ready without them, seconds.
_CONNECT_S: Final = 10.0


class Parts:
    """Index, tokenizers and events' way of one service. `start` first, `close` when done."""

    def __init__(self, config: Index) -> None:
        """Raises InputError for values that only together make no sense."""
        self.bounds = Bounds(
            body=config.max_body, prompt=config.max_prompt, messages=config.max_messages, request=config.request_s
        )
        self.index = FleetIndex(config.blocks, worker_blocks=config.worker_blocks, sources=config.sources)
        self.speculation = Speculation(config.speculation_s)
        fleet = FleetMetrics()
        limits, memory = Limits(lost_s=config.lost_s), Memory(config, self.index, fleet)
        kept, threads = memory if memory.remembers else None, config.event_threads
        self.following = Following(self.index, self.speculation, fleet, limits, kept, threads=threads)
        self.metrics = IndexMetrics(self.index, self.following, fleet)
        weights = {Tier[name.upper()]: value for name, value in config.weights.model_dump().items()}
        self.lookup = Lookup(self.index, self.speculation, self.following, weights)
        self.tokenizers = Tokenizers(
            config.models,
            self.bounds,
            threads=config.tokenizer_threads,
            own_templates=config.request_chat_template,
        )
        self.speculation_s = config.speculation_s
        self._ready_at = 0.0
        self._was_ready = False

    def start(self, config: Index) -> None:
        """Compiles what lookups and events need, then follows the configured instances. Raises InputError."""
        instances = [parse_instance(text) for text in config.instances]
        rehearse()
        self._ready_at = time.monotonic() + _CONNECT_S
        self.following.start(instances)

    def is_ready(self) -> bool:
        """Whether answers are worth asking for: every publisher has been connected to, or has had its time. Stays."""
        if not self._was_ready:
            connected = all(state.connected for state in self.following.states())
            self._was_ready = connected or time.monotonic() > self._ready_at
        return self._was_ready

    def close(self) -> None:
        self.following.close()
        self.tokenizers.close()


def rehearse() -> None:
    """Runs every kernel once, so that no request or batch waits for a compiler."""
    index, source, speculation = FleetIndex(64), Source("rehearsal", 0), Speculation(1.0)
    tokens = np.arange(64, dtype=np.uint32)
    kinds: list[Any] = [tokens, tokens.data, tokens.tolist()]
    for given in kinds:
        index.apply(source, [Stored((1, 2, 3, 4), None, given, 16, Tier.VRAM, b"", ())])
    index.apply(source, [Stored((1, 2), None, (), 0, Tier.CPU, b"", ()), Removed((2,), Tier.VRAM, None)])
    speculation.routed(source, index.hashed(tokens))
    score(index, tokens, [source], speculation=speculation)
    index.drop(source)
    cut_tokens(b'{"token_ids": [1, 2]}')
    _rehearse_events()


def _rehearse_events() -> None:
    """From a socket to an index whose tables grow by it."""
    track = Track(Instance("rehearsal", ""), FleetIndex(), FleetMetrics())
    for sequence, blocks in enumerate((1, 1 << 13)):
        event = ("BlockStored", list(range(blocks)), None, list(range(16 * blocks)), 16)
        track.accept(Messages.of(Framed(b"", sequence, msgspec.msgpack.encode([0.0, [event], 0]))))
    with zmq.Context() as context, context.socket(zmq.SUB) as nobody:
        Inbox().drain(nobody).going_on(0, 0)
