"""A real vLLM whose blocks are quantized in DRAM: hits answer nearly what was computed."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vllm import test_blending_races as chunked
from tests.vllm.engine import BLOCK, PROMPTS, connector, no_leak, serving, settle, stats
from tests.vllm.test_ranks import on_disk, ranks


def first_token(llm: Any, prompt: list[int], **options: Any) -> dict[int, float]:
    """The log-probabilities of the 20 likeliest first tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=20, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt} | options], sampling, use_tqdm=False)
    settle(llm)
    return {token: one.logprob for token, one in output.outputs[0].logprobs[0].items()}


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    """The mean difference of common tokens; 100 if few are common."""
    common = one.keys() & other.keys()
    return float(np.mean([abs(one[token] - other[token]) for token in common])) if len(common) > 10 else 100.0


def test_quantized_hits_answer_nearly_the_same(tiny: Path, tmp_path: Path) -> None:
    """Those that one process has stored, and the same from its disk in a pipeline of two stages."""
    prompts, quantized = PROMPTS[:5], {"storage.cpu.codec": "int8"}
    with serving(tiny, on_disk(tmp_path) | quantized, skip_tokenizer_init=True) as llm:
        computed = [first_token(llm, prompt) for prompt in prompts]
        hits = stats(llm)["hit_tokens"].get("dram", 0)  # of what prompts share
        loaded = [first_token(llm, prompt) for prompt in prompts]
        whole = sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts)
        assert stats(llm)["hit_tokens"]["dram"] - hits >= whole
        engine = connector(llm)._scheduler.engine
        assert engine.row_geometry.token_bytes * 32 == engine.geometry.token_bytes * 9
        assert engine.flush(60)
        no_leak(llm)
    with ranks(tiny, tmp_path, quantized, pipeline_parallel_size=2) as llm:
        staged = [first_token(llm, prompt) for prompt in prompts]
        found = stats(llm)["hit_tokens"]
        assert found["disk"] > 0
        assert found["disk"] + found.get("dram", 0) >= whole
        no_leak(llm)
    assert max(distance(one, other) for one, other in zip(loaded, staged, strict=True)) < 1e-3
    off = [distance(one, other) for one, other in zip(computed, loaded, strict=True)]
    apart = [distance(one, other) for one, other in pairwise(computed)]
    assert 0 < max(off) < min(apart) / 10, (off, apart)


def test_quantized_chunks_are_blended(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned into quantized rows and loaded from them; all of it is computed anew, so that answers are exact."""
    separator = np.array(chunked.SEPARATOR, np.uint32)
    monkeypatch.setattr("cairn.connect.vllm.blending.separator_of", lambda *_: separator)
    order = chunked.orders(0)
    with serving(tiny, chunked.SETTINGS | {"storage.cpu.codec": "int8"}, skip_tokenizer_init=True) as llm:
        first_token(llm, PROMPTS[0])  # with its first step the worker says that it can blend
        first_token(llm, chunked.prompt(order, 0))  # lacks its chunks, which are learned
        asked = chunked.prompt(order[::-1], 1)
        expected = first_token(llm, asked, cache_salt="never blended")
        before = chunked.hits(llm)
        assert distance(first_token(llm, asked), expected) < 1e-3
        assert chunked.hits(llm) - before == sum(map(chunked.whole, order))
        assert not chunked.failures(llm)
        no_leak(llm)
