"""A mixed workload of real texts: requests of four classes in an order that the seed draws."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from cairn.blend import join
from cairn.cli.quality.texts import texts
from cairn.kv import as_tokens
from cairn.kv.keys import Tokens

CLASSES: Final = ("chat", "turns", "rag", "cold")

_SYSTEM: Final = 24
_QUESTION: Final = (16, 64)
_ANSWER: Final = (32, 80)
_OPENING: Final = (96, 192)
_COLD: Final = (192, 512)
_CHUNK: Final = (96, 224)
_CHUNKS: Final = (4, 8)
#: Chunks that can be retrieved, conversations under way, and turns of one.
_POOL: Final = 16
_TALKS: Final = 4
_TURNS: Final = 6


class Request(NamedTuple):
    """kind: its class; ids: the prompt's token ids."""

    kind: str
    ids: list[int]


class Workload:
    """Draws requests: short chats that share a system prompt; turns of conversations; RAG prompts of chunks in any
    order out of a pool; prompts that have nothing in common with any other.

    separator: the tokens between a RAG prompt's parts. The same for the same tokenizer and seed.
    """

    def __init__(self, tokenizer: Any, separator: Tokens, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._separator = separator
        found = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in sorted(texts().items())]
        self._text = as_tokens(np.concatenate([np.array(ids, np.int64) for ids in found]))
        self._system = self._take(_SYSTEM, _SYSTEM)
        self._pool = [self._take(*_CHUNK) for _ in range(_POOL)]
        self._talks: list[list[Tokens]] = [[] for _ in range(_TALKS)]

    def requests(self, count: int) -> Iterator[Request]:
        """`count` requests, as many of each class, classes shuffled four by four."""
        for first in range(0, count, len(CLASSES)):
            kinds = self._rng.sample(CLASSES, len(CLASSES))
            for kind in kinds[: count - first]:
                yield Request(kind, self._draw(kind).astype(np.int64).tolist())

    def _draw(self, kind: str) -> Tokens:
        if kind == "chat":
            return np.concatenate([self._system, self._take(*_QUESTION)])
        if kind == "turns":
            return self._turn()
        if kind == "rag":
            chunks = self._rng.sample(self._pool, self._rng.randint(*_CHUNKS))
            return join([self._system, *chunks, self._take(*_QUESTION)], self._separator)
        return self._take(*_COLD)

    def _turn(self) -> Tokens:
        talk = self._rng.choice(self._talks)
        if len(talk) > _TURNS:
            talk.clear()
        if talk:
            talk.append(np.concatenate([self._take(*_ANSWER), self._take(*_QUESTION)]))
        else:
            talk.append(np.concatenate([self._system, self._take(*_OPENING)]))
        return np.concatenate(talk)

    def _take(self, least: int, most: int) -> Tokens:
        """Some text, from anywhere."""
        length = self._rng.randint(least, most)
        at = self._rng.randrange(len(self._text) - length)
        return self._text[at : at + length]


def lengths(requests: Sequence[Request]) -> dict[str, float]:
    """Tokens of a prompt of each class, on average."""
    found = {kind: [len(one.ids) for one in requests if one.kind == kind] for kind in CLASSES}
    return {kind: round(float(np.mean(some)), 1) for kind, some in found.items() if some}
