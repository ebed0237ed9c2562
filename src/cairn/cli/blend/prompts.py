"""RAG prompts out of real texts: a system prompt, retrieved chunks, and a question that one of them answers."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from cairn.blend import join
from cairn.cli.quality.texts import texts
from cairn.errors import InputError
from cairn.kv import as_tokens
from cairn.kv.keys import Tokens

_SYSTEM: Final = "You answer from the documents that you are given, and from nothing else."
#: Tokens of a quotation, and letters that hold a token for certain.
_QUOTED: Final = 16
_LETTERS: Final = 8
_QUESTIONS: Final = (
    "One of the documents contains this: {quote}\nQuote what follows it, word for word.",
    "Which of the documents contains this: {quote}\nSay in one sentence what it is about.",
)


class Rag(NamedTuple):
    """The parts of one prompt, each tokenized by itself; chunks in the order in which the prompt has them."""

    system: Tokens
    chunks: list[Tokens]
    question: Tokens

    def ids(self, separator: Tokens) -> Tokens:
        """The prompt."""
        return join([self.system, *self.chunks, self.question], separator)


class Shape(NamedTuple):
    """How many chunks a prompt has, and how many tokens a chunk: least and most. documents: so many different chunks
    there are, so that each comes in several prompts, as retrieved ones do.
    """

    chunks: tuple[int, int]
    tokens: tuple[int, int]
    documents: int

    @classmethod
    def about(cls, tokens: int, documents: int = 100) -> "Shape":
        """4 to 8 chunks, which have so many tokens together, more or less."""
        return cls((4, 8), (tokens // 10, tokens * 9 // 40), documents)


def rag_prompts(tokenizer: Any, count: int, shape: Shape, seed: int = 0) -> Iterator[Rag]:
    """`count` prompts, the same for the same arguments. Raises InputError where the system has no long texts."""
    rng = random.Random(seed)
    head, tail = _frame(tokenizer)
    sources = [text for _, text in sorted(texts().items()) if len(text) > 4 * _LETTERS * shape.tokens[1]]
    if not sources:
        raise InputError(f"chunks of {shape.tokens[1]} tokens: no text of this system is long enough")
    documents = [_chunk(rng, tokenizer, sources, shape) for _ in range(shape.documents)]
    for i in range(count):
        chunks = rng.sample(documents, rng.randint(*shape.chunks))
        asked = rng.choice(chunks)
        at = rng.randrange(len(asked) // 4, len(asked) // 2)
        quote = tokenizer.decode(asked[at : at + _QUOTED])
        question = _QUESTIONS[i % len(_QUESTIONS)].format(quote=quote)
        yield Rag(_ids(tokenizer, head), chunks, _ids(tokenizer, question + tail))


def _chunk(rng: random.Random, tokenizer: Any, sources: Sequence[str], shape: Shape) -> Tokens:
    text, length = rng.choice(sources), rng.randint(*shape.tokens)
    at = rng.randrange(len(text) - _LETTERS * length)
    return _ids(tokenizer, text[at : at + _LETTERS * length])[:length]


def _frame(tokenizer: Any) -> tuple[str, str]:
    """What stands before the documents and behind the question, by the model's own chat template if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{_SYSTEM}\n", "\nAnswer:"
    mark = "THE-DOCUMENTS"
    messages: Sequence[dict[str, str]] = (
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": mark},
    )
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, _, tail = text.partition(mark)
    return head, tail


def _ids(tokenizer: Any, text: str) -> Tokens:
    return as_tokens(np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64))
