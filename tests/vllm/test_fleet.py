"""The subscriber on a real vLLM: what it holds is what vLLM's block pool holds."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.holder import Holder
from tests.vllm.engine import BLOCK, answers, prompts, serving

pytest.importorskip("zmq")

from cairn.fleet.base import Source
from cairn.fleet.instances import Instance, Limits
from cairn.fleet.subscriber import Subscriber
from tests.fleet.peers import until

SOURCE = Source("engine", 0)


def pool(core: Any) -> set[int]:
    """The blocks that vLLM would find again, by the names that its events have for them."""
    from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

    found = core.scheduler.kv_cache_manager.block_pool.blocks
    return {maybe_convert_block_hash(get_block_hash(block.block_hash)) for block in found if block.block_hash}


def published(core: Any) -> int:
    """Batches on the wire, once the publisher's thread has nothing left to do."""
    publisher = core.scheduler.kv_event_publisher
    publisher._event_queue.join()
    return len(publisher._buffer)


def test_the_sink_holds_what_the_block_pool_holds(tiny: Path, tmp_path: Path) -> None:
    endpoints = {"endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": f"ipc://{tmp_path}/replay"}
    events = {"enable_kv_cache_events": True, "publisher": "zmq"} | endpoints
    asked = prompts(15) + prompts(15, seed=1)
    # A cached prompt that ends with its last block, or has it filled in decode, is computed a second time: a twin, and
    # vLLM tells the going of one while the other stays. These have none.
    single = [[*prompt[: len(prompt) // BLOCK * BLOCK], 7] for prompt in asked]

    async def follow(llm: Any) -> None:
        core, holder = llm.llm_engine.engine_core.engine_core, Holder()
        for prompt in single[:10]:  # before anyone listens
            answers(llm, [prompt], tokens=1)
        instance = Instance(SOURCE.instance, endpoints["endpoint"], endpoints["replay_endpoint"])
        async with Subscriber(holder, [instance], limits=Limits(check_s=0.5)) as subscriber:

            async def all_told() -> None:
                answers(llm, [[1, 2, 3]], tokens=1)  # events ride on steps
                batches = published(core)
                await until(lambda: subscriber.states()[0].next == batches, "the last batch")

            async def agrees() -> None:
                await all_told()
                assert holder.hashes(SOURCE) == pool(core)

            await agrees()
            for prompt in single[10:]:
                answers(llm, [prompt], tokens=1)
                await agrees()
            assert len(pool(core)) < len(holder.ever), "nothing was evicted: no test of removals"
            answers(llm, [single[1][:129]], tokens=1, cache_salt="tenant")
            await agrees()
            namespaces = {namespace for _, _, namespace, _ in holder.blocks[SOURCE].values()}
            assert len(namespaces) == 2
            every = {tuple(tokens) for _, tokens, *_ in holder.blocks[SOURCE].values()}
            assert tuple(single[1][:BLOCK]) in every
            assert llm.reset_prefix_cache()
            await agrees()
            # With twins: what is told is there.
            answers(llm, asked)
            await all_told()
            assert set() < holder.hashes(SOURCE) <= pool(core)
            assert holder.drops == []
            assert subscriber.metrics.fleet_skipped_events.value() == 0

    options = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 40, "max_model_len": 1024}
    with serving(tiny, None, kv_events_config=events, **options) as llm:
        asyncio.run(follow(llm))
