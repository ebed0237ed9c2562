"""Engines to test with, and the prompts that they are asked."""

import gc
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Small enough that prompts span several blocks and several chunks of prefill.
BLOCK, CHUNK = 32, 256


@contextmanager
def serving(model: Path, settings: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """A vLLM engine; settings: Cairn's (None: without Cairn)."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if settings is not None:
        options["kv_transfer_config"] = {
            "kv_connector": "CairnConnector",
            "kv_connector_module_path": "cairn.connect.vllm",
            "kv_role": options.pop("kv_role", "kv_both"),
            "kv_connector_extra_config": {"engine.planner": False, "storage.cpu.size": "256MiB"} | settings,
        }
    # vLLM collects garbage several times a start. The million objects of modules that are there now it need not visit.
    gc.collect()
    gc.freeze()
    defaults = {"block_size": BLOCK, "max_model_len": 2048, "max_num_batched_tokens": CHUNK, "dtype": "float32"}
    llm = LLM(model=str(model), enforce_eager=True, max_num_seqs=8, **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()  # thaws, and collects


def answers(llm: Any, prompts: Sequence[list[int]], tokens: int = 8, **options: Any) -> list[list[int]]:
    """Greedy tokens for each prompt; all are asked at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} | options for prompt in prompts]
    return [list(output.outputs[0].token_ids) for output in llm.generate(asked, sampling, use_tqdm=False)]


def settle(llm: Any) -> None:
    """Lets vLLM's engine run until it holds no block for Cairn, and drops its own prefix cache."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests():
        core.step_fn()
    assert llm.reset_prefix_cache()


@contextmanager
def emptied(llm: Any) -> Iterator[Any]:
    """An engine that others have used: it begins with empty caches; afterwards nothing may be left behind."""
    connector(llm).reset_cache()
    settle(llm)
    yield llm
    settle(llm)
    no_leak(llm)


def no_leak(llm: Any) -> None:
    """Nothing is held any more; a tier that is being measured in the background is waited for."""
    side, deadline = connector(llm)._scheduler, time.monotonic() + 30
    while (dram := stats(llm)["tiers"]["dram"])["reserved_blocks"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not side._tracked
    under_way = side._under_way
    assert [under_way.copies, under_way._reports, under_way._failed] == [{}, {}, {}]
    assert dram["pinned_blocks"] == 0
    assert dram["reserved_blocks"] == 0


def connector(llm: Any) -> Any:
    """The scheduler's connector."""
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def stats(llm: Any) -> dict[str, Any]:
    figures: dict[str, Any] = connector(llm)._scheduler.engine.get_stats()
    return figures


def hits(llm: Any) -> int:
    """Tokens, of all tiers."""
    return int(sum(stats(llm)["hit_tokens"].values()))


def leftovers(*paths: Path) -> list[str]:
    """What this process still has of Cairn's: threads, mapped arenas, files in `paths`."""
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("cairn")]
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/cairn-" in line]
    files = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return threads + maps + [file for file in files if file.startswith(("/dev/shm/cairn-", *map(str, paths)))]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts that share prefixes in every way: equal, longer, shorter, diverging inside a block and at its end."""
    chance = random.Random(seed)
    base = [chance.randrange(1000, 40000) for _ in range(640)]
    made = []
    for i in range(count):
        cut = chance.choice([64, 97, 256, 320, 511, 512, 513, 640])
        tail = [chance.randrange(1000, 40000) for _ in range(chance.choice([0, 1, 31, 32, 150]))]
        made.append(base[:cut] + (tail if i % 3 else []))
    return made


PROMPTS = prompts(30)
#: The same and more behind: what is computed here hangs from blocks that were stored before.
LONGER = [prompt + list(range(2000 + i, 2100 + i)) for i, prompt in enumerate(PROMPTS[:10])]
#: Shares nothing with them.
OTHER = PROMPTS[2][::-1]
