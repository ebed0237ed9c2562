"""One prompt in two processes that share a remote store: one computes and stores it, the other loads it.

    python -m tests.tier.remote.serve python -m tests.tier.remote.tokens TOKENS

prints, for each store, the seconds to the first token: computed anew, from the store, and from DRAM; as JSON.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cairn.config import load_config
from cairn.config.urls import mask_url
from cairn.connect.transformers import CairnConnector, namespace_of
from cairn.engine import CacheEngine
from tests.smollm2 import smollm2

NEW = 4
RUNS = 3
CHECKOUT = Path(__file__).parents[3]


class Answer(NamedTuple):
    """tokens: the new ones. ttft_s: seconds to the first of them, lookup and load included. tiers: reused, by tier."""

    tokens: list[int]
    ttft_s: float
    tiers: dict[str, int]


def load_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32, local_files_only=True).eval()


def text(tokens: int) -> list[int]:
    """The beginning of a real text."""
    from transformers import AutoTokenizer

    from cairn.cli.demo.text import load_text

    content = load_text(None).content[2000 : 2000 + 8 * tokens]
    ids: list[int] = AutoTokenizer.from_pretrained(smollm2(), local_files_only=True)(content)["input_ids"][:tokens]
    assert len(ids) == tokens
    return ids


def open_engine(model: Any, url: str, tokens: int) -> CacheEngine:
    """An engine with an empty DRAM tier above the store, which loads every hit."""
    settings = {
        "storage.cpu.size": (tokens + 256) * namespace_of(model).geometry.token_bytes,
        "storage.remote.url": url,
        "storage.remote.timeout_s": 30,
        "storage.remote.lookup_timeout_s": 5,
        "engine.planner": False,
        "engine.timeout_s": 60,
        "engine.lease_s": 60,
    }
    return CacheEngine(namespace_of(model), load_config(environ={}, overrides=settings))


def answer(model: Any, ids: list[int], make_cache: Callable[[torch.Tensor], Any] = lambda _: None) -> Answer:
    """Greedy tokens behind a prompt, with the cache that `make_cache` gives for it."""
    prompt = torch.tensor([ids])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    started = time.perf_counter()
    cache = make_cache(prompt)
    first = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=1, **options
    )
    ttft_s = time.perf_counter() - started
    tiers = dict(cache.reused_by_tier) if cache is not None else {}
    # From the same KV: a prompt that is computed anew would say nothing of what was loaded.
    tokens = first.sequences
    rest = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=first.past_key_values,
        max_new_tokens=NEW - 1,
        **options,
    )
    if cache is not None:
        cache.finish()
    return Answer(rest.sequences[0, len(ids) :].tolist(), ttft_s, tiers)


def served(model: Any, ids: list[int], url: str) -> tuple[Answer, Answer]:
    """The prompt from the store, and again, then from DRAM."""
    with open_engine(model, url, len(ids)) as engine, CairnConnector(model, engine) as connector:
        return answer(model, ids, connector.cache), answer(model, ids, connector.cache)


def store_elsewhere(ids: list[int], urls: list[str]) -> None:
    """Lets another process compute the prompt and store it in every store."""
    command = [sys.executable, "-m", "tests.tier.remote.tokens", "store", *urls]
    done = subprocess.run(command, input=json.dumps(ids), text=True, capture_output=True, cwd=CHECKOUT, timeout=300)
    assert done.returncode == 0, done.stderr


def store(urls: list[str]) -> None:
    ids, model = json.load(sys.stdin), load_model()
    for url in urls:
        with open_engine(model, url, len(ids)) as engine, CairnConnector(model, engine) as connector:
            assert answer(model, ids, connector.cache).tiers == {}, "the store should have had nothing"
            assert engine.flush(60)


def measure(tokens: int, urls: list[str]) -> None:
    ids, model = text(tokens), load_model()
    answer(model, ids[:64])  # the first pass is slower
    plain = [answer(model, ids) for _ in range(RUNS)]
    store_elsewhere(ids, urls)
    figures: dict[str, Any] = {
        "tokens": tokens,
        "kv_bytes": namespace_of(model).geometry.token_bytes * tokens,
        "ttft_recompute_s": round(statistics.median(each.ttft_s for each in plain), 3),
    }
    for url in urls:
        runs = [served(model, ids, url) for _ in range(RUNS)]
        for remote, dram in runs:
            assert remote.tokens == dram.tokens == plain[0].tokens, "the answers differ"
            assert remote.tiers["remote"] >= tokens - 16, remote.tiers
            assert dram.tiers == {"dram": remote.tiers["remote"]}, dram.tiers
        figures[mask_url(url)] = {
            "ttft_remote_s": round(statistics.median(remote.ttft_s for remote, _ in runs), 3),
            "ttft_dram_s": round(statistics.median(dram.ttft_s for _, dram in runs), 3),
        }
    print(json.dumps(figures, indent=2))  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)  # two wait for each other at every layer when the machine is busy
    if sys.argv[1] == "store":
        store(sys.argv[2:])
    else:
        measure(int(sys.argv[1]), sys.argv[2:])
