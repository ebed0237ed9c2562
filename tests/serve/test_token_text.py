"""Token ids out of JSON text, against the json module."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.errors import InputError
from cairn.serve.token_text import cut_tokens

IDS = st.lists(st.integers(0, (1 << 32) - 1) | st.integers(0, 200_000) | st.integers(0, 9), max_size=40)
BLANKS = st.text(" \t\r\n", max_size=3)


@given(IDS, BLANKS, BLANKS, st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_what_json_reads(ids: list[int], before: str, after: str, alone: bool) -> None:
    text = "[" + before + f"{after},{before}".join(map(str, ids)) + after + "]"
    body = f'{{"a": "b", "token_ids"{before}:{after}{text}' + ("}" if alone else ', "c": [1, 2]}')
    rest, tokens = cut_tokens(body.encode())
    assert tokens is not None
    assert tokens.tolist() == json.loads(text) == ids
    assert json.loads(rest) == {"a": "b", "token_ids": None} | ({} if alone else {"c": [1, 2]})


JUNK = st.text("0123456789, -+.eE[]null\t", max_size=24)


@given(st.sampled_from(("", "12345, 67,8, ", "1,2," * 20)), JUNK, st.sampled_from(("", " " * 64)))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_what_is_no_list_of_tokens(before: str, junk: str, after: str) -> None:
    """Whatever is taken, json takes too, and as the same; where many bytes are read at once too."""
    text = before + junk
    body = f'{{"token_ids":[{text}]{after}}}'.encode()
    try:
        _, tokens = cut_tokens(body)
    except InputError:
        tokens = None
    try:
        expected = json.loads(body)["token_ids"]
    except ValueError:
        expected = None
    fits = expected is not None and all(type(one) is int and 0 <= one < 1 << 32 for one in expected)
    if tokens is None:
        assert not fits or "-0" in text.replace(" ", "")
    elif fits:
        assert tokens.tolist() == expected
    else:
        assert "]" in text  # the list has ended before; the decoder of the rest refuses what follows
        with pytest.raises(ValueError):
            json.loads(cut_tokens(body)[0])


@pytest.mark.parametrize("text", ["[", "[1", "[1,", "[4294967296]", "[99999999999999999999]", "[00]", "[1 2]", "[,1]"])
def test_refused(text: str) -> None:
    with pytest.raises(InputError, match="token_ids: must be a list of integers in"):
        cut_tokens(b'{"token_ids":' + text.encode())


def test_strings_that_speak_of_tokens_are_left_alone() -> None:
    body = json.dumps({"prompt": '"token_ids": [1, 2]', "model": "token_ids"}).encode()
    assert cut_tokens(body) == (body, None)


def test_many() -> None:
    ids = np.random.default_rng(1).integers(0, 1 << 32, 50_000, np.uint64) >> np.random.default_rng(2).integers(
        0, 32, 50_000
    ).astype(np.uint64)
    _, tokens = cut_tokens(json.dumps({"token_ids": ids.tolist()}).encode())
    assert tokens is not None
    assert np.array_equal(tokens, ids)
