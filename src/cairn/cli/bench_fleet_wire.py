"""The part of `cairn bench fleet` that begins at the bytes: what engines publish, decoded, hashed and taken in."""

import time
from typing import Any

from cairn.cli.bench_fleet import BLOCK_TOKENS, prompt_of


def payloads_of(seed: int, blocks: int, event_blocks: int, events: int = 1) -> list[bytes]:
    """A prompt as vLLM 0.33 publishes it: maps with defaults left out, 64-bit hashes, `events` a batch."""
    import msgspec
    import numpy as np

    hashes = np.random.default_rng([seed, 1]).integers(0, 1 << 64, blocks, np.uint64).tolist()
    tokens = prompt_of(seed, blocks).reshape(blocks, BLOCK_TOKENS)
    told = [
        {
            "type": "BlockStored",
            "block_hashes": hashes[first : first + event_blocks],
            "parent_block_hash": hashes[first - 1] if first else None,
            "token_ids": tokens[first : first + event_blocks].reshape(-1).tolist(),
            "block_size": BLOCK_TOKENS,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [None] * len(hashes[first : first + event_blocks]),
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
        for first in range(0, blocks, event_blocks)
    ]
    batches = [told[first : first + events] for first in range(0, len(told), events)]
    return [msgspec.msgpack.encode([1.5, batch, 0]) for batch in batches]


def heard(sources: int, payloads: list[bytes]) -> tuple[Any, dict[str, float]]:
    """An index that has heard the payloads, and what `hear` says."""
    from cairn.fleet import FleetIndex

    index = FleetIndex()
    return index, hear(index, sources, payloads)


def hear(index: Any, sources: int, payloads: list[bytes]) -> dict[str, float]:
    """Seconds that it takes to hear the payloads from so many sources, one after the other.

    `decode`: from bytes to events. `apply`: hashing, and the index itself.
    """
    from cairn.fleet import Source
    from cairn.fleet.events import Decoder
    from cairn.fleet.metrics import FleetMetrics

    metrics = FleetMetrics()
    decoding, applying, clock = 0.0, 0.0, time.perf_counter
    for source in (Source(f"w{i}", 0) for i in range(sources)):
        decoder = Decoder(metrics, many=True)
        for payload in payloads:
            start = clock()
            batch = decoder.decode(payload)
            middle = clock()
            assert batch is not None
            index.apply(source, batch.events)
            decoding += middle - start
            applying += clock() - middle
    return {"decode": decoding, "apply": applying}


def wire(sources: int, blocks: int, event_blocks: int, events: int) -> dict[str, float]:
    """All sources tell the same blocks, in events of `event_blocks`, `events` a batch."""
    from cairn.cli.bench_fleet import QUERY_BLOCKS, joined, percentiles, warm
    from cairn.cli.bench_index import _resident_bytes as resident_bytes

    warm()
    payloads = payloads_of(1, blocks, event_blocks, events)
    heard(2, payloads_of(2, 64, 16))
    before = resident_bytes()
    index, seconds = heard(sources, payloads)
    grown, stats = resident_bytes() - before, index.stats()
    tokens = joined(prompt_of(1, blocks), prompt_of(2, max(0, QUERY_BLOCKS - blocks)))
    hashed = index.hashed(tokens)
    told = sources * blocks
    if index.match(hashed).reach[:, -1].tolist() != [blocks * BLOCK_TOKENS] * sources:
        raise SystemExit("the index does not find what it was told")
    return {
        "ingest_blocks_per_s": told / sum(seconds.values()),
        "events_per_s": told / event_blocks / sum(seconds.values()),
        **{f"{part}_ns_per_block": 1e9 * spent / told for part, spent in seconds.items()},
        "process_bytes_per_worker_block": grown / stats.worker_blocks,
        **percentiles("query", lambda: index.match(hashed)),
        **percentiles("query_from_tokens", lambda: index.match(tokens)),
    }
