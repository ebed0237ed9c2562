"""Token ids from JSON text to uint32 without a Python int for each."""

import re

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel, load_word, trailing_zeros
from cairn.serve.base import RequestError, Tokens

_FIELD = re.compile(rb'"token_ids"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_COMMA, _CLOSE, _ZERO, _NINE = 0x2C, 0x5D, 0x30, 0x39
_BEYOND = np.uint64(1 << 32)
_HIGHEST = np.uint64(0x8080808080808080)
_ZEROS, _ABOVE = np.uint64(0x3030303030303030), np.uint64(0x4646464646464646)
_EVERY_FOURTH = np.uint64(0x000000FF000000FF)
_MILLION_100, _TEN_THOUSAND_1 = np.uint64((1_000_000 << 32) + 100), np.uint64((10_000 << 32) + 1)
_SPACE, _TAB, _LINE, _RETURN = 0x20, 0x09, 0x0A, 0x0D


def cut_tokens(body: bytes) -> tuple[bytes, Tokens | None]:
    """A JSON object with `null` for the array called `token_ids`, and that array [n]; the body as it is without one.

    What stands here cannot stand within a string, where the quotes would be escaped. Raises RequestError for an array
    of anything but integers in [0, 2**32).
    """
    field = _FIELD.search(body)
    if field is None:
        return body, None
    text = np.frombuffer(body, np.uint8)
    tokens = np.empty((len(body) - field.end()) // 2 + 1, np.uint32)
    count, end = _parse(text, field.end(), tokens)
    if end < 0:
        raise RequestError("token_ids: must be a list of integers in [0, 2**32)")
    return body[: field.end()] + b"null" + body[end:], tokens[:count]


@kernel
def _blank(byte: int) -> bool:
    return byte <= _SPACE and byte in (_SPACE, _LINE, _RETURN, _TAB)


@kernel
def _short_number(word: np.uint64) -> tuple[int, np.uint64]:
    """How many digits eight bytes begin with, and their value; none where all eight are digits.

    A bit is set in the first byte that is no digit (above 9, or below 0, which borrows); what comes behind is shifted
    out. Then all digits are added up in three steps, pairs first, instead of one after the other.
    """
    other = ((word + _ABOVE) | (word - _ZEROS)) & _HIGHEST
    digits = trailing_zeros(other) >> 3
    if not 1 <= digits < 8:
        return 0, np.uint64(0)
    pairs = (word - _ZEROS) << np.uint64(64 - 8 * digits)
    pairs = pairs * np.uint64(10) + (pairs >> np.uint64(8))
    low, high = (pairs & _EVERY_FOURTH) * _MILLION_100, ((pairs >> np.uint64(16)) & _EVERY_FOURTH) * _TEN_THOUSAND_1
    return digits, (low + high) >> np.uint64(32)


@kernel
def _number(text: npt.NDArray[np.uint8], at: int) -> tuple[int, np.uint64]:
    """How many digits stand here, and their value; -1 for what is beyond 32 bits, or has a zero before it."""
    first, value = at, np.uint64(0)
    while at < len(text) and at - first < 11 and _ZERO <= text[at] <= _NINE:
        value = value * np.uint64(10) + np.uint64(text[at] - _ZERO)
        at += 1
    return (-1 if value >= _BEYOND else at - first), value


@kernel
def _parse(text: npt.NDArray[np.uint8], at: int, tokens: Tokens) -> tuple[int, int]:
    """Parses the array that begins at text[at]; returns how many there are, and where it ends; -1 if it is none."""
    end, count = len(text), 0
    at += 1
    while at < end and _blank(text[at]):
        at += 1
    if at < end and text[at] == _CLOSE:
        return 0, at + 1
    while at < end:
        digits, value = 0, np.uint64(0)
        if at + 8 <= end:
            digits, value = _short_number(load_word(text.ctypes.data + at))
        if digits < 1:
            digits, value = _number(text, at)
        if digits < 1 or (digits > 1 and text[at] == _ZERO):
            return 0, -1
        at += digits
        tokens[count] = np.uint32(value)
        count += 1
        while at < end and _blank(text[at]):
            at += 1
        if at == end or (text[at] != _COMMA and text[at] != _CLOSE):
            return 0, -1
        at += 1
        if text[at - 1] == _CLOSE:
            return count, at
        while at < end and _blank(text[at]):
            at += 1
    return 0, -1
