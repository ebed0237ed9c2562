"""The tree of the beginnings that recent prompts share."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import xxhash

from cairn.serve.dashboard.base import PrefixShown
from cairn.serve.dashboard.traffic import Recent

#: Bytes that make a node, about a block of tokens: prompts which share less beyond their node count as different.
_LEAST: Final = 64
_DEPTH: Final = 4
_ROOTS, _CHILDREN = 6, 4
#: Prompts of a node that are asked for who holds it.
_ASKED: Final = 32
#: Characters shown of a node.
_SHOWN: Final = 120
_ROLE: Final = re.compile(r'\{?"role":\s*"(\w+)",\s*"content":\s*"?')
_SPACE: Final = re.compile(rb'[ "]|\\n')
_BESIDE: Final = re.compile(r'\\[nrt"]|^[\[{,\]}]+|"[\]},]*|[\[{]$')


def tree(recent: Iterable[Recent], *, with_text: bool) -> list[PrefixShown]:
    """In preorder; of the nodes under one parent those come first that would cost the most prefill. Each stands for two
    prompts at least. With 256 prompts of 16 KiB it takes about two milliseconds.
    """
    ordered = sorted(recent, key=lambda one: one.beginning)
    shared = [_shared(one.beginning, other.beginning) for one, other in pairwise(ordered)]
    nodes = _below(ordered, shared, range(len(ordered)))
    return [_shown(ordered[run.start : run.stop], at, end, depth, with_text) for run, at, end, depth in nodes]


def _below(
    ordered: Sequence[Recent], shared: Sequence[int], within: range, at: int = 0, depth: int = 0
) -> Iterator[tuple[range, int, int, int]]:
    """(prompts, first byte, last byte, depth) of the nodes below the one that ends at byte `at`. shared: bytes that
    each prompt shares with the next.
    """
    if depth == _DEPTH:
        return
    runs = sorted(_runs(shared, within, at + _LEAST), key=lambda run: -sum(ordered[i].tokens for i in run))
    for run in runs[: _CHILDREN if depth else _ROOTS]:
        end = min(shared[run.start : run.stop - 1])
        yield run, at, end, depth
        yield from _below(ordered, shared, run, end, depth + 1)


def _runs(shared: Sequence[int], within: range, least: int) -> Iterator[range]:
    """Of two neighbours or more that share so many bytes at least."""
    start = within.start
    for i in within:
        if i == within.stop - 1 or shared[i] < least:
            if i > start:
                yield range(start, i + 1)
            start = i + 1


def _shared(one: bytes, other: bytes) -> int:
    """Leading bytes that are the same."""
    most = min(len(one), len(other))
    differ = np.frombuffer(one, np.uint8, most) != np.frombuffer(other, np.uint8, most)
    return int(differ.argmax()) if differ.any() else most


def _shown(group: Sequence[Recent], at: int, end: int, depth: int, with_text: bool) -> PrefixShown:
    held: dict[str, float] = {}
    for one in group[:_ASKED]:
        tokens = max(1, _tokens(one, end))
        for name, tiers in one.held.items():
            share = min(1.0, sum(tiers.values()) / tokens)
            held[name] = max(held.get(name, 0.0), round(share, 3))
        held[one.instance] = 1.0
    beginning = group[0].beginning
    return PrefixShown(
        depth=depth,
        digest=xxhash.xxh3_64_hexdigest(beginning[:end])[:8],
        tokens=_tokens(group[0], end),
        requests=len(group),
        text=_readable(beginning[_word_at(beginning, at) : end]) if with_text else "",
        held=held,
    )


def _tokens(one: Recent, end: int) -> int:
    return one.tokens * end // max(1, one.size)


def _word_at(text: bytes, at: int) -> int:
    """Where the word begins that goes on at `at`, or what is before it if that is long."""
    marks = [*_SPACE.finditer(text, max(0, at - _LEAST), at)]
    return marks[-1].end() if marks else at


def _readable(part: bytes) -> str:
    """JSON as people read it: roles in front of what they say, no brackets and escapes."""
    text = part[: 4 * _SHOWN].decode("utf-8", "ignore")
    text = _BESIDE.sub(" ", _ROLE.sub(r" \1: ", text))
    return " ".join(text.split())[:_SHOWN]
