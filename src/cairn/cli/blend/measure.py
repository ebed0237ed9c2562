"""Holds blended prompts to fully computed ones: the same model, the same answer, token by token."""

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from cairn.cli.blend.prompts import Rag
from cairn.cli.quality.measure import divergence
from cairn.connect.hf_blend import Blender
from cairn.connect.transformers import CairnConnector
from cairn.errors import CairnError

#: Tokens of an answer.
ANSWER: Final = 12
_RESAMPLES: Final = 2000

#: By name; None: prefixes only.
Variants = Mapping[str, Blender | None]


class Score(NamedTuple):
    """One prompt under one variant. kl: nats a token of the answer; exact: whether the greedy answer is the same; f1:
    of its words; ttft: time to the first token as a share of full prefill's; hit: share of the prompt that was loaded.
    """

    kl: float
    exact: float
    f1: float
    ttft: float
    hit: float


class _Answer(NamedTuple):
    tokens: list[int]
    probabilities: torch.Tensor
    ttft_s: float


@torch.inference_mode()  # type: ignore[untyped-decorator]
def compare(
    model: Any, tokenizer: Any, connector: CairnConnector, rag: Rag, variants: Variants, turn: int
) -> dict[str, Score]:
    """One prompt under every variant, whose chunks are all stored before. turn: who is first; prefixes only, which
    stores the prompt, is last.
    """
    blenders = {name: blender for name, blender in variants.items() if blender is not None}
    names = list(blenders)
    for blender in blenders.values():
        for chunk in rag.chunks:
            blender.learn(chunk)
    ids = torch.from_numpy(rag.ids(blenders[names[0]].separator).astype(np.int64))[None]
    first = turn % len(names)
    order = [*names[first:], *names[:first], *(name for name in variants if name not in blenders)]
    right, scores = _full(model, tokenizer, ids), {}
    for name in order:
        connector.blender = variants[name]
        scores[name] = _score(model, tokenizer, connector, ids, right)
    return {name: scores[name] for name in variants}


def _full(model: Any, tokenizer: Any, ids: torch.Tensor) -> _Answer:
    """What plain Transformers answers."""
    cache = DynamicCache(config=model.config)
    started = time.perf_counter()
    first = model(ids, past_key_values=cache, logits_to_keep=1).logits[0]
    seconds = time.perf_counter() - started
    tokens = _greedy(model, cache, first, ANSWER, tokenizer.eos_token_id)
    cache.crop(ids.shape[1] - cache.get_seq_length())
    return _Answer(tokens, _given(model, cache, first, tokens), seconds)


def _score(model: Any, tokenizer: Any, connector: CairnConnector, ids: torch.Tensor, right: _Answer) -> Score:
    started = time.perf_counter()
    cache = connector.cache(ids)
    begun = int(cache.get_seq_length())
    first = model(ids[:, begun:], past_key_values=cache, logits_to_keep=1).logits[0]
    seconds = time.perf_counter() - started
    found = _given(model, cache, first, right.tokens)
    tokens = found.argmax(-1).tolist()
    if tokens != right.tokens:
        same = next(i for i, pair in enumerate(zip(tokens, right.tokens, strict=True)) if pair[0] != pair[1])
        cache.crop(ids.shape[1] + same)
        more = _greedy(model, cache, found[same : same + 1], ANSWER - same, tokenizer.eos_token_id)
        tokens = right.tokens[:same] + more
    by_chunks = cache.blended.reused if cache.blended else 0
    if connector.blender and not by_chunks:
        raise CairnError("nothing of a prompt was blended, though its chunks are stored: the log says why")
    return Score(
        kl=divergence(right.probabilities, found),
        exact=float(tokens == right.tokens),
        f1=f1(tokenizer.decode(tokens), tokenizer.decode(right.tokens)),
        ttft=seconds / right.ttft_s,
        hit=(cache.reused_tokens + by_chunks) / ids.shape[1],
    )


def _given(model: Any, cache: Any, first: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Log probabilities of each token of an answer, given those before it; float64, so that equal ones differ by 0."""
    given = torch.tensor([tokens[:-1]])
    rest = model(given, past_key_values=cache).logits[0] if given.numel() else first[:0]
    return torch.log_softmax(torch.cat([first, rest]).double(), -1)


def _greedy(model: Any, cache: Any, logits: torch.Tensor, most: int, end: int | None) -> list[int]:
    """At most so many tokens, the first by `logits` [1, vocabulary]."""
    tokens = [int(logits.argmax())]
    while len(tokens) < most and tokens[-1] != end:
        tokens.append(int(model(torch.tensor([[tokens[-1]]]), past_key_values=cache).logits[0].argmax()))
    return tokens


def f1(found: str, right: str) -> float:
    """Of the words of two answers, as reading comprehension counts it (Rajpurkar et al., arXiv 1606.05250)."""
    a, b = found.split(), right.split()
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def quality(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over prompts, KL's with an interval of 95 % by bootstrap over prompts, and the worst prompt's."""
    kl = np.array([score.kl for score in scores])
    drawn = np.random.default_rng(0).integers(0, len(kl), (_RESAMPLES, len(kl)))
    low, high = np.quantile(kl[drawn].mean(axis=1), [0.025, 0.975])
    return {
        "prompts": len(scores),
        "kl": float(kl.mean()),
        "kl_95": [float(low), float(high)],
        "kl_most": float(kl.max()),
        "exact_match": round(statistics.fmean(score.exact for score in scores), 4),
        "f1": round(statistics.fmean(score.f1 for score in scores), 4),
        "hit_share": round(statistics.fmean(score.hit for score in scores), 4),
    }


def times(scores: Sequence[Score]) -> dict[str, Any]:
    """Medians over prompts."""
    return {
        "prompts": len(scores),
        "ttft_share": round(statistics.median(score.ttft for score in scores), 4),
        "hit_share": round(statistics.median(score.hit for score in scores), 4),
    }
