"""One plain event, read from its bytes in a kernel.

*Plain* is what nearly every event of a fleet is: a `BlockStored` of whole blocks with tokens, without anything that
separates them (LoRA, salt, pictures), a `BlockRemoved`, or an `AllBlocksCleared`; of the group that the index follows;
in either encoding; with no field twice. What is read here must be what `cairn.fleet.events` makes of it; where in doubt
an event is not plain.
"""

import numpy as np
import numpy.typing as npt

from cairn.fleet.base import Tier
from cairn.fleet.msgpack import NIL, read_array, read_map, read_text, read_unsigned, skip_scalar, unpack
from cairn.index.slots import NONE
from cairn.jit import kernel, load_big, load_byte, load_word, store_word

_ONE = np.uint64(1)

STORED, REMOVED, CLEARED, OTHER = range(4)
"""Kinds of events; OTHER: not plain."""

#: No plain event takes fewer bytes: its headers, its name, one hash.
LEAST_BYTES = 16

ANY_TIER = -1

_TIERS = {
    b"GPU": Tier.VRAM,
    b"CPU": Tier.CPU,
    b"CPU_PINNED": Tier.CPU,
    b"STORAGE": Tier.DISK,
    b"DISK": Tier.DISK,
    b"FS": Tier.DISK,
    b"OBJ": Tier.REMOTE,
    b"EXTERNAL": Tier.REMOTE,
}
_FULL = (b"full_attention", b"mla_attention", b"sink_full_attention")

#: In vLLM's order, which is the positional encoding's.
_FIELDS = (
    b"block_hashes",
    b"parent_block_hash",
    b"token_ids",
    b"block_size",
    b"lora_id",
    b"medium",
    b"lora_name",
    b"extra_keys",
    b"group_idx",
    b"kv_cache_spec_kind",
    b"kv_cache_spec_sliding_window",
    b"locality",
    b"ownership",
    b"session_id",
    b"lookahead_token_ids",
)
_HASHES, _PARENT, _TOKENS, _SIZE, _LORA_ID, _MEDIUM, _LORA_NAME, _EXTRA, _GROUP, _KIND, _, _LOCALITY = range(12)
_LOOKAHEAD = len(_FIELDS) - 1
_UNKNOWN = len(_FIELDS)

#: What a `BlockRemoved` has, in its order.
_OF_REMOVED = np.array([_HASHES, _MEDIUM, _GROUP, _LOCALITY])

#: The longest string that is known, in words of 8 bytes.
_WORDS = 4

Strings = npt.NDArray[np.uint64]


def _strings(*texts: bytes) -> Strings:
    """A row each: its length, its bytes as `_WORDS` words."""
    made = np.zeros((len(texts), 1 + _WORDS), np.uint64)
    for row, text in zip(made, texts, strict=True):
        row[0] = len(text)
        row[1:] = np.frombuffer(text.ljust(8 * _WORDS, b"\0"), "<u8")
    return made


_TAGS = _strings(b"BlockStored", b"BlockRemoved", b"AllBlocksCleared")
_TYPE, _LOCAL = _strings(b"type"), _strings(b"LOCAL")
_FIELD_NAMES, _FULL_NAMES = _strings(*_FIELDS), _strings(*_FULL)
_MEDIUMS, _TIER_OF = _strings(*_TIERS), np.array([int(tier) for tier in _TIERS.values()])

#: What an event's fields said: blocks, tokens, tokens of a block, tier or ANY_TIER, entries of extra keys or NONE,
#: its parent (uint64 as int64) and whether it has none.
BLOCKS, TOKENS, BLOCK_TOKENS, TIER, EXTRAS, PARENT, BEGINS, NOTES = range(8)


@kernel
def _note(notes: int, which: int, value: int) -> None:
    store_word(notes + 8 * which, np.uint64(value))


@kernel
def noted(notes: int, which: int) -> int:
    """What an event's fields said: one of the notes that `read_event` left."""
    return int(np.int64(load_word(notes + 8 * which)))


@kernel
def _word(at: int, left: int) -> np.uint64:
    """The next 8 of `left` bytes; zeros stand for those that are not there."""
    if left >= 8:
        return np.uint64(load_word(at))
    return np.uint64(load_word(at) & ((_ONE << np.uint64(8 * max(0, left))) - _ONE))


@kernel
def _which(start: int, stop: int, strings: Strings, guess: int) -> int:
    """The row of `strings` that stands at start:stop, or NONE; looks at `guess` first."""
    length = stop - start
    if length > 8 * _WORDS:
        return NONE
    first = _word(start, length)
    for turn in range(NONE, len(strings)):
        row = guess if turn == NONE else turn
        if row < len(strings) and strings[row, 0] == np.uint64(length) and strings[row, 1] == first:
            if length <= 8:
                return row
            same = strings[row, 2] == _word(start + 8, length - 8)
            for i in range(2, _WORDS):
                same = same and strings[row, 1 + i] == _word(start + 8 * i, length - 8 * i)
            if same:
                return row
    return NONE


@kernel
def _one_of(at: int, end: int, strings: Strings) -> tuple[int, int]:
    """Which of the strings stands here."""
    start, stop = read_text(at, end)
    if stop == NONE:
        return NONE, NONE
    row = _which(start, stop, strings, 0)
    return (row, stop) if row != NONE else (NONE, NONE)


@kernel
def _hash(at: int, end: int) -> tuple[np.uint64, int]:
    """A hash of either form, as `cairn.fleet.names.hash_of` takes it."""
    if at + 1 < end and load_byte(at) == 0xC4:
        length = load_byte(at + 1)
        stop = at + 2 + length
        if not 1 <= length <= 64 or stop > end:
            return np.uint64(0), NONE
        if length >= 8:
            return load_big(stop - 8), stop
        return load_big(at + 2) >> np.uint64(64 - 8 * length), stop
    return read_unsigned(at, end)


@kernel
def _field(at: int, end: int, field: int, group: int, hashes: int, tokens: int, notes: int) -> int:
    """Reads one field's value; where it ends, or NONE if the event is not plain by it."""
    nil = at < end and load_byte(at) == NIL
    if field == _HASHES:
        count, at = read_array(at, end)
        for i in range(count):
            value, at = _hash(at, end)
            if at == NONE:
                return NONE
            store_word(hashes + 8 * i, value)
        _note(notes, BLOCKS, count)
        return at
    if field == _TOKENS:
        count, at = read_array(at, end)
        _note(notes, TOKENS, count)
        return unpack(at, end, tokens, count) if at != NONE else NONE
    if field == _SIZE:
        size, at = read_unsigned(at, end)
        _note(notes, BLOCK_TOKENS, int(np.int64(size)))
        return at
    if field >= 10 and field != _LOCALITY and field != _LOOKAHEAD:
        return skip_scalar(at, end)
    if nil:
        return at + 1
    if field == _PARENT:
        _note(notes, BEGINS, 0)
        parent, at = _hash(at, end)
        _note(notes, PARENT, int(np.int64(parent)))
        return at
    if field == _MEDIUM:
        row, at = _one_of(at, end, _MEDIUMS)
        if at != NONE:
            _note(notes, TIER, _TIER_OF[row])
        return at
    if field == _EXTRA:
        count, at = read_array(at, end)
        for i in range(count):
            if at + i >= end or load_byte(at + i) != NIL:
                return NONE
        _note(notes, EXTRAS, count)
        return at + count if at != NONE else NONE
    if field == _GROUP:
        told_group, at = read_unsigned(at, end)
        return at if group != NONE and told_group == np.uint64(group) else NONE
    if field == _KIND:
        return _one_of(at, end, _FULL_NAMES)[1]
    if field == _LOCALITY:
        return _one_of(at, end, _LOCAL)[1]
    return NONE  # LoRA, lookahead


@kernel
def _is_ascii(start: int, stop: int) -> bool:
    high = 0
    for at in range(start, stop):
        high |= load_byte(at)
    return high < 0x80


@kernel
def read_event(at: int, end: int, group: int, hashes: int, tokens: int, notes: int) -> tuple[int, int]:
    """Reads one event: its hashes to uint64 memory, its tokens to uint32 memory, the rest to NOTES words, all named by
    their addresses. No more hashes or tokens are written than the event has bytes. Its kind and where it ends, or OTHER
    and NONE if it is not plain.
    """
    named = load_byte(at) & 0xF0 == 0x80 or load_byte(at) == 0xDE
    fields, at = read_map(at, end) if named else read_array(at, end)
    if at == NONE or not fields:
        return OTHER, NONE
    if named:
        at = _one_of(at, end, _TYPE)[1]
        if at == NONE:
            return OTHER, NONE
    kind, at = _one_of(at, end, _TAGS)
    if at == NONE or (kind == CLEARED and fields != 1):
        return OTHER, NONE
    for word in range(NOTES):
        _note(notes, word, 0)
    _note(notes, TIER, ANY_TIER)
    _note(notes, EXTRAS, NONE)
    _note(notes, BEGINS, 1)
    last, seen = NONE, 0
    for i in range(fields - 1):
        field = _UNKNOWN
        if not named:
            if kind == STORED:
                field = min(i, _UNKNOWN)
            elif i < len(_OF_REMOVED):
                field = _OF_REMOVED[i]
        else:
            start, stop = read_text(at, end)
            if stop == NONE:
                return OTHER, NONE
            row = _which(start, stop, _FIELD_NAMES, last + 1)
            if row == NONE and not _is_ascii(start, stop):
                return OTHER, NONE
            known = row != NONE and (kind == STORED or row in (_HASHES, _MEDIUM, _GROUP))
            if known or (row == _LOCALITY and kind == REMOVED):
                if seen >> row & 1:
                    return OTHER, NONE
                seen |= 1 << row
                field = last = row
            at = stop
        at = _field(at, end, field, group, hashes, tokens, notes)
        if at == NONE:
            return OTHER, NONE
    if kind == CLEARED:
        return kind, at
    return (kind, at) if _is_sound(kind, notes) else (OTHER, NONE)


@kernel
def _is_sound(kind: int, notes: int) -> bool:
    """Whether the fields fit together."""
    blocks, size = noted(notes, BLOCKS), noted(notes, BLOCK_TOKENS)
    if not blocks or kind == REMOVED:
        return blocks > 0
    if not 1 <= size < 1 << 24 or noted(notes, TOKENS) != blocks * size:
        return False
    extras = noted(notes, EXTRAS)
    return extras in (NONE, blocks)
