"""Replaces a real model's KV by what a codec gives back, and compares the logits of the tokens after it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from cairn.cli.quality.published import Floats
from cairn.cli.quality.texts import CONTEXT, Window
from cairn.codec.base import Codec
from cairn.codec.quantized import Quantizer
from cairn.kv import KVGeometry

#: Tokens of one stored object.
CHUNK: Final = 256
#: Bits that an element takes uncompressed.
RAW_BITS: Final = 16
_RESAMPLES: Final = 2000

#: KV [layers, 2, tokens, heads, dim] of a chunk, and whether it begins the sequence -> what comes back, its bytes.
Subject = Callable[[Floats, bool], tuple[Floats, int]]


class Score(NamedTuple):
    """One window under one subject: KL (nats a token), change of the log-likelihood, share of equal first choices."""

    kl: float
    nll: float
    top1: float
    bits: float


def codec_subject(encode: Callable[[npt.NDArray[np.uint8], bool], Any], codec: Codec) -> Subject:
    """A codec of a bfloat16 geometry as a subject: the bytes are those that would be stored, all of them."""

    def run(kv: Floats, first: bool) -> tuple[Floats, int]:
        rows = to_rows(kv, codec.geometry)
        out = np.empty_like(rows)
        stored = encode(rows, first)
        if not codec.decode(stored, out):
            raise AssertionError(f"{codec.id} refuses what it has encoded")
        return from_rows(out, codec.geometry), len(stored)

    return run


def quantizer_subject(quantizer: Quantizer) -> Subject:
    """Rows of `storage.cpu.codec`, of a bfloat16 geometry. They keep no token exact."""

    def run(kv: Floats, first: bool) -> tuple[Floats, int]:  # noqa: ARG001 - a row does not know where it stands
        rows = to_rows(kv, quantizer.geometry)
        out, stored = np.empty_like(rows), np.empty(quantizer.stored.block_bytes, np.uint8)
        layers = range(quantizer.geometry.layers)
        for block, back in zip(rows, out, strict=True):
            quantizer.encode(block, stored, layers)
            quantizer.decode(stored, back, layers)
        return from_rows(out, quantizer.geometry), len(rows) * len(stored)

    return run


def to_rows(kv: Floats, geometry: KVGeometry) -> npt.NDArray[np.uint8]:
    """KV [layers, planes, tokens, heads, dim] as canonical bfloat16 blocks, uint8 [blocks, block_bytes]."""
    tokens = geometry.block_tokens
    shape = (geometry.layers, geometry.planes, -1, tokens, geometry.kv_heads, geometry.head_dim)
    blocks = np.ascontiguousarray(kv.reshape(shape).transpose(2, 0, 1, 3, 4, 5), np.float32)
    bits = blocks.view(np.uint32)
    halves = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return halves.reshape(len(halves), -1).view(np.uint8)


def from_rows(rows: npt.NDArray[np.uint8], geometry: KVGeometry) -> Floats:
    """The inverse of `to_rows`."""
    values = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    blocks = values.reshape(-1, *geometry.block_shape).transpose(1, 2, 0, 3, 4, 5)
    return np.ascontiguousarray(blocks).reshape(*blocks.shape[:2], -1, *blocks.shape[4:])


@torch.inference_mode()  # type: ignore[untyped-decorator]
def scores(model: Any, window: Window, subjects: Mapping[str, Subject]) -> dict[str, Score]:
    """Every subject on one window."""
    kv = context_kv(model, window)
    plain = log_probabilities(model, window, kv)
    following = torch.tensor(window.ids[CONTEXT + 1 :])[:, None]
    found = {}
    for name, subject in subjects.items():
        changed_kv, size = coded(kv, subject)
        changed = log_probabilities(model, window, changed_kv)
        found[name] = Score(
            kl=divergence(plain, changed),
            nll=float((plain[:-1].gather(1, following) - changed[:-1].gather(1, following)).mean()),
            top1=float((plain.argmax(-1) == changed.argmax(-1)).float().mean()),
            bits=8 * size / kv.size,
        )
    return found


def context_kv(model: Any, window: Window) -> Floats:
    """The KV of a window's context, float32 [layers, 2, tokens, heads, dim]."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([window.ids[:CONTEXT]]), past_key_values=cache, logits_to_keep=1)
    return np.stack(
        [np.stack([t[0].transpose(0, 1).numpy() for t in (layer.keys, layer.values)]) for layer in cache.layers]
    )


def coded(kv: Floats, subject: Subject) -> tuple[Floats, int]:
    """What a subject makes of a context, chunk by chunk, and the bytes it took."""
    parts = [subject(kv[:, :, at : at + CHUNK], at == 0) for at in range(0, CONTEXT, CHUNK)]
    return np.concatenate([part[0] for part in parts], axis=2), sum(part[1] for part in parts)


def log_probabilities(model: Any, window: Window, kv: Iterable[Floats]) -> torch.Tensor:
    """Of the scored tokens after a context with this KV, layer by layer; float32 [scored tokens, vocabulary]."""
    cache = DynamicCache(config=model.config)
    for layer, planes in enumerate(kv):
        keys, values = (torch.from_numpy(plane.copy()).transpose(0, 1)[None] for plane in planes)
        cache.update(keys, values, layer)
    return torch.log_softmax(model(torch.tensor([window.ids[CONTEXT:]]), past_key_values=cache).logits[0], -1)


def divergence(plain: torch.Tensor, changed: torch.Tensor) -> float:
    """KL of log probabilities [tokens, vocabulary] in nats, the mean over tokens."""
    return float((plain.exp() * (plain - changed)).sum(-1).mean())


def summary(scored: Sequence[Score]) -> dict[str, Any]:
    """The means over windows; intervals of 95 % by bootstrap over windows, since tokens of a window go together."""
    table = np.array(scored)
    rng = np.random.default_rng(0)
    means = table[rng.integers(0, len(table), (_RESAMPLES, len(table)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    kl, nll, top1, bits = table.mean(axis=0).tolist()
    return {
        "bits": round(bits, 4),
        "ratio": round(RAW_BITS / bits, 3),
        "kl": kl,
        "kl_95": [float(low[0]), float(high[0])],
        "perplexity_change_percent": 100 * math.expm1(nll),
        "perplexity_change_percent_95": [100 * math.expm1(low[1]), 100 * math.expm1(high[1])],
        "top1": top1,
    }
