"""Pieces of a text, tokenized one by one, against the whole."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

import tokenizers

from cairn.serve.cuts import Cuts

WORDS = [
    "hello",
    "hel",
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_",
    "<tool>",
    "lo<s>",
    " ",
    "  ",
    "\n",
    "\n\n",
    "é",
    "H",
    ">",
    "<",
]
CORPUS = ["hello world", "hello  hello\n\nHello <tool> é"] * 4


def added(content: str, **more: Any) -> Any:
    return tokenizers.AddedToken(content, **({"special": True, "normalized": False} | more))


def byte_level(*tokens: Any) -> Any:
    made = tokenizers.ByteLevelBPETokenizer(add_prefix_space=True, lowercase=True)
    made.train_from_iterator(CORPUS, vocab_size=300, show_progress=False)
    made.add_tokens(list(tokens))
    return made._tokenizer


def sentence_pieces(*tokens: Any) -> Any:
    """As Llama's: a mark before the first word alone."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    made.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=80, show_progress=False))
    made.add_tokens(list(tokens))
    return made


CHAT = [added("<|im_start|>"), added("<|im_end|>")]
#: One takes blanks along, one begins within another, one is looked for in normalized text, one is a blank.
ODD = [added("<s>", lstrip=True), added("lo<s>"), added("<tool>", normalized=True)]
MADE = [
    make(*tokens)
    for make in (byte_level, sentence_pieces)
    for tokens in (
        CHAT,
        CHAT + ODD,
        [*CHAT, added("hel", single_word=True)],
        [*ODD, added("\n"), added("<|im_end|>", rstrip=True)],
        [],
    )
]


@pytest.mark.parametrize("tokenizer", MADE)
def test_the_pieces_tokens_are_the_whole_s(tokenizer: Any) -> None:
    cuts = Cuts(tokenizer)

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a loaded machine
    @given(st.lists(st.sampled_from(WORDS), max_size=12))
    def holds(words: list[str]) -> None:
        text = "".join(words)
        pieces = cuts.pieces(text)
        assert "".join(pieces) == text
        ids = [number for piece in pieces for number in tokenizer.encode(piece, add_special_tokens=False).ids]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids

    holds()


def test_turns_of_a_chat_are_pieces() -> None:
    turns = ["<|im_start|>system\nhello", "<|im_end|>\n", "<|im_start|>user\nhello <tool>", "<|im_end|>\n"]
    assert Cuts(byte_level(*CHAT)).pieces("".join(turns)) == turns
    assert Cuts(byte_level(*CHAT)).pieces("") == [""]
    tokenizer = byte_level(*CHAT)
    tokenizer.encode_special_tokens = True  # then these are words as any
    assert Cuts(tokenizer).pieces("".join(turns)) == ["".join(turns)]
