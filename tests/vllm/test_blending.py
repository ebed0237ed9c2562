"""Chunks of SmolLM2's prompts are reused wherever they stand, in an unpatched vLLM."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cairn.blend import Recipe, prelude_of
from tests.vllm.engine import answers, connector, no_leak, serving, settle, stats

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
CHUNKS, WORDS = 8, 110
#: No layer that `cairn blend check` tries: what it may have found of this model on this machine is nothing to a test.
SETTINGS = {"blending.enabled": True, "blending.check_layers": [2], "storage.cpu.size": "512MiB"}


class Texts:
    """Prompts of one set of chunks: system, chunks, question, each between separators."""

    def __init__(self, tokenizer: Any) -> None:
        words = TEXT.split()
        texts = [" ".join(words[i * WORDS : (i + 1) * WORDS]) for i in range(CHUNKS + 4)]
        self._encode = lambda text: list(tokenizer.encode(text, add_special_tokens=False))
        self.chunks = [self._encode(text) for text in texts[:CHUNKS]]
        self.system = self._encode("Answer from the licence below.")
        self.separator = self._encode(" # # ")
        self.prelude = prelude_of(self.separator, tokenizer).tolist()
        self.questions = [self._encode(f"\nQuestion {i}: {text[:60]}?\nAnswer:") for i, text in enumerate(texts)]

    def prompt(self, order: list[int], question: int = 0) -> list[int]:
        parts = [self.system, *(self.chunks[i] for i in order), self.questions[question]]
        joined = list(parts[0])
        for part in parts[1:]:
            joined += self.separator + part
        return joined


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Any]:
    with serving(model, SETTINGS, max_num_batched_tokens=2048, max_logprobs=-1) as llm:
        yield llm


@pytest.fixture(scope="module")
def texts(engine: Any) -> Texts:
    found = Texts(engine.get_tokenizer())
    answers(engine, [found.prelude + chunk for chunk in found.chunks], tokens=1)
    settle(engine)
    return found


@contextmanager
def ratio(llm: Any, share: float, head_tokens: int = 4) -> Iterator[None]:
    """Blends with another recipe."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    sides = connector(llm)._scheduler._blending, get_kv_transfer_group()._worker._blender
    before = [side._recipe for side in sides]
    for side in sides:
        side._recipe = Recipe((6,), (share,), head_tokens)
    yield
    for side, recipe in zip(sides, before, strict=True):
        side._recipe = recipe


@contextmanager
def exact_only(llm: Any) -> Iterator[None]:
    """Nothing is blended, and no chunk learned."""
    blending = connector(llm)._scheduler._blending
    blending.ready = False
    yield
    blending.ready = True


def counted(llm: Any) -> tuple[float, float]:
    """Tokens of chunks that were looked up and that were found."""
    figures = stats(llm)
    return figures["blend_lookups"].get("tokens", 0), figures["blend_hits"].get("tokens", 0)


def tokens_counted(llm: Any) -> float:
    """Of prompts, as hits or misses."""
    figures = stats(llm)
    return float(sum(figures["hit_tokens"].values()) + sum(figures["miss_tokens"].values()))


def first_logprobs(llm: Any, prompts: list[list[int]], **options: Any) -> np.ndarray:
    """Of the token that follows each prompt: [prompts, vocabulary]."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    asked = [{"prompt_token_ids": prompt} | options for prompt in prompts]
    outputs = [output.outputs[0].logprobs[0] for output in llm.generate(asked, sampling, use_tqdm=False)]
    return np.array([[output[token].logprob for token in sorted(output)] for output in outputs])


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """Mean KL, nats."""
    return float((np.exp(exact) * (exact - other)).sum(axis=1).mean())


def test_all_computed_is_exact(engine: Any, texts: Texts) -> None:
    orders = [random.Random(i).sample(range(CHUNKS), 5) for i in range(10)]
    prompts = [texts.prompt(order, i) for i, order in enumerate(orders)]
    before = tokens_counted(engine)
    with ratio(engine, 1.0):
        found = answers(engine, prompts)
    settle(engine)
    assert tokens_counted(engine) - before == sum(map(len, prompts))
    assert counted(engine)[1] >= 0.85 * counted(engine)[0] > 5000
    no_leak(engine)
    before = counted(engine)[1]
    assert found == answers(engine, prompts, cache_salt="another tenant")
    assert counted(engine)[1] == before
    settle(engine)


def test_a_share_is_close_and_nothing_of_it_is_shared(engine: Any, texts: Texts) -> None:
    prompts = [texts.prompt(random.Random(20 + i).sample(range(CHUNKS), 5), i) for i in range(4)]
    with exact_only(engine):
        exact = first_logprobs(engine, prompts, cache_salt="never blended")
    with ratio(engine, 0.15):
        close = first_logprobs(engine, prompts)
    settle(engine)
    with ratio(engine, 0.0, head_tokens=0):
        reused = first_logprobs(engine, prompts)
    # Four prompts tell little; `cairn bench blend` asks 200.
    assert divergence(exact, close) < 0.5 * divergence(exact, reused)
    # What vLLM's own cache and Cairn's tiers have now is exact.
    with exact_only(engine):
        np.testing.assert_allclose(first_logprobs(engine, prompts), exact, atol=1e-3)
        settle(engine)
        np.testing.assert_allclose(first_logprobs(engine, prompts), exact, atol=1e-3)
    settle(engine)
    no_leak(engine)
