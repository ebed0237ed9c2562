"""Chunks of a prompt: exactly between separators, or where the content says so."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.blend import Piece, join, separator_of, split
from cairn.errors import InputError

SEPARATOR = np.array([7, 7, 8], np.uint32)
NONE = np.zeros(0, np.uint32)


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ([1, 2, 7, 7, 8, 3, 7, 7, 8, 4], [(0, 2), (5, 6), (9, 10)]),
        ([7, 7, 8, 1, 2, 7, 7, 8, 3], [(3, 5), (8, 9)]),  # first
        ([1, 7, 7, 8], [(0, 1), (4, 4)]),  # last: an empty question
        ([1, 7, 7, 8, 7, 7, 8, 2], [(0, 1), (7, 8)]),  # adjacent
        ([1, 7, 7, 7, 8, 2], [(0, 2), (5, 6)]),  # its own beginning before it
        ([7, 7], [(0, 2)]),
        ([7, 7, 8], [(3, 3)]),
        ([1, 7, 8, 2], [(0, 4)]),
        ([], [(0, 0)]),
    ],
)
def test_separators(prompt: list[int], pieces: list[tuple[int, int]]) -> None:
    assert split(tokens(*prompt), SEPARATOR) == [Piece(*piece) for piece in pieces]


def test_separators_do_not_overlap() -> None:
    assert split(tokens(9, 9, 9, 9, 1), tokens(9, 9)) == [Piece(4, 5)]
    assert split(tokens(1, 9, 9, 9), tokens(9, 9)) == [Piece(0, 1), Piece(3, 4)]


chunks = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5)


@given(chunks)
@settings(deadline=None)
def test_what_is_joined_is_split(parts: list[list[int]]) -> None:
    separator = tokens(10, 11)
    prompt = join([tokens(*part) for part in parts], separator)
    assert [prompt[p.start : p.stop].tolist() for p in split(prompt, separator)] == parts


@pytest.mark.parametrize(
    ("pieces", "separator", "times"),
    [
        ([[1, 7, 7, 8, 2, 7, 7, 8], [3]], [7, 7, 8], 2),
        ([[1, 9], [2]], [9, 9], 1),  # a piece's last token and the separator's first
        ([[1, 7], [7, 8, 2]], [7, 7, 8], 0),
    ],
)
def test_natural_separators_are_warned_of(
    pieces: list[list[int]], separator: list[int], times: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        join([tokens(*piece) for piece in pieces], tokens(*separator))
    assert (f"occurs {times} times in the text of 2 pieces" in caplog.text) == (times > 0)
    assert len(caplog.records) == (times > 0)


class Tokenizer:
    """Strips spaces, and knows one token a letter."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text.strip()]


def test_separators_are_the_tokenizers() -> None:
    assert separator_of(" # ", Tokenizer()).tolist() == [35]
    assert len(separator_of(None, None)) == 0
    with pytest.raises(InputError, match="' # ' without a tokenizer"):
        separator_of(" # ", None)
    with pytest.raises(InputError, match="'  ' has no token in this model; choose another"):
        separator_of("  ", Tokenizer())
    with pytest.raises(InputError, match="pieces are joined by one"):
        join([tokens(1)], NONE)


@given(st.integers(0, 1 << 30), st.integers(0, 3000), st.sampled_from([[], [1], [1, 1], [1, 2]]))
@settings(deadline=None)
def test_a_piece_is_one_piece(seed: int, length: int, separator: list[int]) -> None:
    """So what is learned of a prompt is found in others."""
    prompt = np.random.default_rng(seed).integers(0, 8, length).astype(np.uint32)
    for start, stop in split(prompt, tokens(*separator)):
        assert split(prompt[start:stop], tokens(*separator)) == [Piece(0, stop - start)]


@given(st.integers(0, 1 << 30), st.integers(0, 3000))
@settings(deadline=None)
def test_content_defined_pieces_cover_the_prompt(seed: int, length: int) -> None:
    prompt = np.random.default_rng(seed).integers(0, 1000, length).astype(np.uint32)
    pieces = split(prompt, NONE)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == length
    assert all(64 <= piece.stop - piece.start <= 1024 for piece in pieces[:-1])


def test_content_that_moved_is_cut_alike() -> None:
    rng = np.random.default_rng(5)
    text = rng.integers(0, 1000, 6000).astype(np.uint32)
    before = {bytes(text[p.start : p.stop]) for p in split(text, NONE)[:-1]}
    moved = np.concatenate([rng.integers(0, 1000, 333).astype(np.uint32), text])
    after = {bytes(moved[p.start : p.stop]) for p in split(moved, NONE)[:-1]}
    assert len(before & after) >= len(before) - 3
    assert len(before) > 10
