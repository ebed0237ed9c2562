"""Where a prompt's chunks begin and end: at separators, or where its own content says so."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.blend.base import Piece
from cairn.errors import InputError
from cairn.kv import as_tokens
from cairn.kv.keys import Tokens

logger = logging.getLogger(__name__)

#: Content-defined pieces: a cut is decided by this many tokens, comes after so many on average, and never sooner or
#: later than that.
_WINDOW: Final = 16
_MEAN, _LEAST, _MOST = 256, 64, 1024
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)


def split(tokens: Tokens, separator: Tokens) -> list[Piece]:
    """The pieces of a prompt: what stands between separators (none of them empty), or content-defined ones where the
    separator is empty. The last one is the question, and empty where a separator ends the prompt.
    """
    if not len(separator):
        edges = [0, *_cuts(tokens), len(tokens)]
        return [Piece(a, b) for a, b in pairwise(edges)]
    starts = find(tokens, separator)
    ends = [0, *(start + len(separator) for start in starts)]
    pieces = [Piece(end, start) for end, start in zip(ends, [*starts, len(tokens)], strict=True)]
    return [piece for piece in pieces[:-1] if piece.stop > piece.start] + pieces[-1:]


def separator_of(special_str: str | None, tokenizer: Any) -> Tokens:
    """The tokens of `blending.special_str`; none for None: then chunks are cut by their content.

    tokenizer: the model's, or none. Raises InputError for a text that it makes no tokens of.
    """
    if special_str is None:
        return as_tokens(())
    if tokenizer is None:
        raise InputError(
            f"blending.special_str={special_str!r} without a tokenizer: pass the model's (vLLM: no "
            "--skip-tokenizer-init), or set special_str to null"
        )
    separator = as_tokens(tokenizer.encode(special_str, add_special_tokens=False))
    if not len(separator):
        raise InputError(f"blending.special_str={special_str!r} has no token in this model; choose another")
    return separator


def prelude_of(separator: Tokens, tokenizer: Any) -> Tokens:
    """What every chunk is computed behind (see `ChunkStore`): the token that begins a text, if the tokenizer has one,
    and a separator. tokenizer: the model's, or none.
    """
    begin = getattr(tokenizer, "bos_token_id", None)
    return as_tokens([*([] if begin is None else [begin]), *separator])


def find(tokens: Tokens, separator: Tokens) -> list[int]:
    """Where a separator begins; occurrences do not overlap, the earlier one counts."""
    if len(tokens) < len(separator):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(separator))
    found: list[int] = []
    for at in np.flatnonzero((windows == separator).all(axis=1)).tolist():
        if not found or at >= found[-1] + len(separator):
            found.append(at)
    return found


def join(pieces: Sequence[Tokens], separator: Tokens) -> Tokens:
    """A prompt out of its pieces, each tokenized by itself, so that a chunk has the same tokens wherever it stands.

    Warns, with the count, of separators that pieces bring themselves, inside or at an edge: there a chunk is cut
    otherwise. Raises InputError without a separator.
    """
    if not len(separator):
        raise InputError("separator of no tokens: pieces are joined by one; set blending.special_str")
    parts = [part for piece in pieces for part in (as_tokens(piece), separator)][:-1]
    joined = np.concatenate(parts)
    ends = np.cumsum([len(part) for part in parts]).tolist()
    natural = len(set(find(joined, separator)).difference(ends[:-1:2]))
    if natural:
        logger.warning(
            "blending.special_str occurs %d times in the text of %d pieces, which are cut there: choose a rarer one",
            natural,
            len(pieces),
        )
    return joined


def _cuts(tokens: Tokens) -> list[int]:
    """Ends of content-defined pieces but the last: a chunk that moved is cut as before, but for its edges."""
    if len(tokens) < _WINDOW:
        return []
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _MIX
    mixed ^= mixed >> np.uint64(29)
    windows = np.lib.stride_tricks.sliding_window_view(mixed, _WINDOW)
    weights = np.cumprod(np.full(_WINDOW, _MIX, np.uint64))
    digests: npt.NDArray[np.uint64] = (windows * weights).sum(axis=1, dtype=np.uint64) * _MIX
    wanted = (np.flatnonzero(digests >> np.uint64(32) < (1 << 32) // (_MEAN - _LEAST)) + _WINDOW).tolist()
    cuts: list[int] = []
    last = 0
    for end in [*wanted, len(tokens)]:
        while end - last > _MOST:
            last += _MOST
            cuts.append(last)
        if end - last >= _LEAST and end < len(tokens):
            cuts.append(end)
            last = end
    return cuts
