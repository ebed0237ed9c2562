"""Holds blended prompts to fully computed ones: the same model, the same answer, token by token."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from cairn.cli.blend.prompts import Rag
from cairn.cli.quality.measure import divergence
from cairn.connect.hf_blend import Blender
from cairn.connect.transformers import CairnConnector

#: Tokens of an answer.
ANSWER: Final = 24
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
    model: Any,
    tokenizer: Any,
    connector: CairnConnector,
    prompts: Iterable[Rag],
    variants: Variants,
    tick: Callable[[int], None] = lambda done: None,  # noqa: ARG005
) -> list[dict[str, Score]]:
    """Every prompt under every variant, whose chunks are all stored before. Who is first takes turns; prefixes only,
    which stores the prompt, is last.
    """
    blenders = {name: blender for name, blender in variants.items() if blender is not None}
    names, scored = list(blenders), []
    for i, rag in enumerate(prompts):
        for blender in blenders.values():
            for chunk in rag.chunks:
                blender.learn(chunk)
        ids = torch.from_numpy(rag.ids(blenders[names[0]].separator).astype(np.int64))[None]
        turn = i % len(names)
        order = [*names[turn:], *names[:turn], *(name for name in variants if name not in blenders)]
        right, scores = _full(model, tokenizer, ids), {}
        for name in order:
            connector.blender = variants[name]
            scores[name] = _score(model, tokenizer, connector, ids, right)
        scored.append({name: scores[name] for name in variants})
        tick(i + 1)
    return scored


def _full(model: Any, tokenizer: Any, ids: torch.Tensor) -> _Answer:
    """What plain Transformers answers."""
    cache = DynamicCache(config=model.config)
    started = time.perf_counter()
    first = model(ids, past_key_values=cache, logits_to_keep=1).logits[0]
    seconds = time.perf_counter() - started
    tokens, logits = _greedy(model, cache, first, ANSWER, tokenizer.eos_token_id)
    return _Answer(tokens, torch.log_softmax(logits, -1), seconds)


def _score(model: Any, tokenizer: Any, connector: CairnConnector, ids: torch.Tensor, right: _Answer) -> Score:
    started = time.perf_counter()
    cache = connector.cache(ids)
    begun = int(cache.get_seq_length())
    first = model(ids[:, begun:], past_key_values=cache, logits_to_keep=1).logits[0]
    seconds = time.perf_counter() - started
    given = torch.tensor([right.tokens[:-1]])
    rest = model(given, past_key_values=cache).logits[0] if given.numel() else first[:0]
    found = torch.log_softmax(torch.cat([first, rest]), -1)
    tokens = found.argmax(-1).tolist()
    if tokens != right.tokens:
        same = next(i for i, pair in enumerate(zip(tokens, right.tokens, strict=True)) if pair[0] != pair[1])
        cache.crop(ids.shape[1] + same)
        more, _ = _greedy(model, cache, found[same : same + 1], ANSWER - same, tokenizer.eos_token_id)
        tokens = right.tokens[:same] + more
    reused = cache.reused_tokens + (cache.blended.reused if cache.blended else 0)
    return Score(
        kl=divergence(right.probabilities, found),
        exact=float(tokens == right.tokens),
        f1=f1(tokenizer.decode(tokens), tokenizer.decode(right.tokens)),
        ttft=seconds / right.ttft_s,
        hit=reused / ids.shape[1],
    )


def _greedy(model: Any, cache: Any, logits: torch.Tensor, most: int, end: int | None) -> tuple[list[int], torch.Tensor]:
    """At most so many tokens, the first by `logits` [1, vocabulary]; and the logits of each."""
    tokens, rows = [int(logits.argmax())], [logits]
    while len(tokens) < most and tokens[-1] != end:
        rows.append(model(torch.tensor([[tokens[-1]]]), past_key_values=cache).logits[0])
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.cat(rows)


def f1(found: str, right: str) -> float:
    """Of the words of two answers, as reading comprehension counts it (Rajpurkar et al., arXiv 1606.05250)."""
    a, b = found.split(), right.split()
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over prompts, KL's with an interval of 95 % by bootstrap over prompts; of times the median."""
    kl = np.array([score.kl for score in scores])
    drawn = np.random.default_rng(0).integers(0, len(kl), (_RESAMPLES, len(kl)))
    low, high = np.quantile(kl[drawn].mean(axis=1), [0.025, 0.975])
    return {
        "kl": float(kl.mean()),
        "kl_95": [float(low), float(high)],
        "exact_match": statistics.fmean(score.exact for score in scores),
        "f1": round(statistics.fmean(score.f1 for score in scores), 4),
        "ttft_share": round(statistics.median(score.ttft for score in scores), 4),
        "hit_share": round(statistics.fmean(score.hit for score in scores), 4),
    }
