"""Token ids from JSON text to uint32 without a Python int for each."""

import re

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel, load_byte, load_word, trailing_zeros, unlike_digits
from cairn.serve.base import RequestError, Tokens

_FIELD = re.compile(rb'"token_ids"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_COMMA, _CLOSE, _ZERO, _NINE = 0x2C, 0x5D, 0x30, 0x39
_BEYOND = np.uint64(1 << 32)
_ONE, _ZEROS = np.uint64(1), np.uint64(0x3030303030303030)
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
def _behind_blanks(text: npt.NDArray[np.uint8], at: int) -> int:
    while at < len(text) and _blank(text[at]):
        at += 1
    return at


@kernel
def _value(word: np.uint64, digits: int) -> np.uint64:
    """Of the last `digits` (1 to 8) of eight characters; all are added up in three steps, pairs first."""
    before = np.uint64(64 - 8 * digits)
    pairs = (word ^ _ZEROS) >> before << before
    pairs = pairs * np.uint64(10) + (pairs >> np.uint64(8))
    low, high = (pairs & _EVERY_FOURTH) * _MILLION_100, ((pairs >> np.uint64(16)) & _EVERY_FOURTH) * _TEN_THOUSAND_1
    return (low + high) >> np.uint64(32)


@kernel
def _many(text: npt.NDArray[np.uint8], at: int, tokens: Tokens, count: int) -> tuple[int, int]:
    """Numbers of up to 8 digits with a comma behind each, from text[at] on, 12 or above; goes on with tokens[count].
    Returns how many there are by then, and where what is no such number begins, or the blanks before it.

    64 bytes at a time are asked where numbers end, so that no number waits for the one before it.
    """
    base, block = int(np.int64(text.ctypes.data)), at
    while block + 64 <= len(text):
        ends = unlike_digits(base + block)
        while ends:
            end = block + trailing_zeros(ends)
            ends &= ends - _ONE
            digits = end - at
            if not digits and _blank(load_byte(base + at)):
                at += 1
                continue
            zero = digits > 1 and load_byte(base + at) == _ZERO
            if not 1 <= digits <= 8 or load_byte(base + end) != _COMMA or zero:
                return count, at
            tokens[count] = np.uint32(_value(load_word(base + end - 8), digits))
            count += 1
            at = end + 1
        block += 64
    return count, at


@kernel
def _number(text: npt.NDArray[np.uint8], at: int) -> tuple[int, np.uint64]:
    """How many digits stand here, and their value; -1 for what is beyond 32 bits, or has a zero before it."""
    first, value = at, np.uint64(0)
    while at < len(text) and at - first < 11 and _ZERO <= text[at] <= _NINE:
        value = value * np.uint64(10) + np.uint64(text[at] - _ZERO)
        at += 1
    if value >= _BEYOND or (at - first > 1 and text[first] == _ZERO):
        return -1, value
    return at - first, value


@kernel
def _parse(text: npt.NDArray[np.uint8], at: int, tokens: Tokens) -> tuple[int, int]:
    """Parses the array that begins at text[at]; returns how many there are, and where it ends; -1 if it is none."""
    end, count, at = len(text), 0, _behind_blanks(text, at + 1)
    if at < end and text[at] == _CLOSE:
        return 0, at + 1
    while at < end:
        count, at = _many(text, at, tokens, count)
        at = _behind_blanks(text, at)
        digits, value = _number(text, at)
        if digits < 1:
            return 0, -1
        tokens[count] = np.uint32(value)
        count += 1
        at = _behind_blanks(text, at + digits)
        if at == end or (text[at] != _COMMA and text[at] != _CLOSE):
            return 0, -1
        at += 1
        if text[at - 1] == _CLOSE:
            return count, at
    return 0, -1
