"""Chunks of SmolLM2's prompts are reused wherever they stand, in an unpatched vLLM."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cairn.blend import Recipe
from tests.vllm.engine import answers, connector, no_leak, serving, settle, stats

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
CHUNKS, WORDS = 8, 110
SETTINGS = {"blending.enabled": True, "storage.cpu.size": "512MiB"}


class Texts:
    """Prompts of one set of chunks: system, chunks, question, each between separators."""

    def __init__(self, tokenizer: Any) -> None:
        words = TEXT.split()
        texts = [" ".join(words[i * WORDS : (i + 1) * WORDS]) for i in range(CHUNKS + 4)]
        self._encode = lambda text: list(tokenizer.encode(text, add_special_tokens=False))
        self.chunks = [self._encode(text) for text in texts[:CHUNKS]]
        self.system = self._encode("Answer from the licence below.")
        self.separator = self._encode(" # # ")
        self.questions = [self._encode(f"\nQuestion {i}: {text[:60]}?\nAnswer:") for i, text in enumerate(texts)]

    def prompt(self, order: list[int], question: int = 0) -> list[int]:
        parts = [self.system, *(self.chunks[i] for i in order), self.questions[question]]
        joined = list(parts[0])
        for part in parts[1:]:
            joined += self.separator + part
        return joined


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Any]:
    with serving(model, SETTINGS, max_num_batched_tokens=2048) as llm:
        yield llm


@pytest.fixture(scope="module")
def texts(engine: Any) -> Texts:
    found = Texts(engine.get_tokenizer())
    answers(engine, found.chunks, tokens=1)
    settle(engine)
    return found


@pytest.fixture(autouse=True)
def _whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blends where everything is computed, too, which does not pay."""
    monkeypatch.setattr("cairn.blend.worth.MOST_COMPUTED", 2.0)


@contextmanager
def ratio(llm: Any, share: float, head_tokens: int = 4) -> Iterator[None]:
    """Blends with another recipe."""
    sides = connector(llm)._scheduler._blending, connector(llm)._worker._blender
    before = [side._recipe for side in sides]
    for side in sides:
        side._recipe = Recipe((1,), (share,), head_tokens)
    yield
    for side, recipe in zip(sides, before, strict=True):
        side._recipe = recipe


def counted(llm: Any) -> tuple[float, float]:
    """Tokens of chunks that were looked up and that were found."""
    figures = stats(llm)
    return figures["blend_lookups"].get("tokens", 0), figures["blend_hits"].get("tokens", 0)


def first_logprobs(llm: Any, prompts: list[list[int]], **options: Any) -> np.ndarray:
    """Of the first token that follows each prompt: [prompts, vocabulary]."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} | options for p in prompts], sampling, use_tqdm=False)
    settle(llm)
    return np.array([[entry.logprob for _, entry in sorted(o.outputs[0].logprobs[0].items())] for o in outputs])


def test_all_computed_is_exact(engine: Any, texts: Texts) -> None:
    import time
    orders = [random.Random(i).sample(range(CHUNKS), 5) for i in range(10)]
    prompts = [texts.prompt(order, i) for i, order in enumerate(orders)]
    t = time.time()
    with ratio(engine, 1.0):
        found = answers(engine, prompts)
        settle(engine)
    print(time.time() - t, stats(engine))
    assert counted(engine)[1] >= 0.85 * counted(engine)[0] > 5000
    no_leak(engine)
    t = time.time()
    plain = answers(engine, prompts, cache_salt="other")
    print(time.time() - t)
    settle(engine)
    assert found == plain
    exact = first_logprobs(engine, prompts, cache_salt="other2")
    def kl(p, q):
        return (np.exp(p) * (p - q)).sum(1).mean()
    for share, heads in ((1.0, 0), (0.0, 0), (0.15, 4), (0.3, 4)):
        with ratio(engine, share, heads):
            t = time.time()
            got = first_logprobs(engine, prompts)
            print(share, heads, kl(exact, got), time.time() - t)
