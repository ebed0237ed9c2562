"""Token ids from msgpack to uint32 without a Python int for each."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from cairn.fleet.msgpack import PADDING, Bytes, padded, read_array, unpack
from cairn.index.slots import NONE
from cairn.jit import kernel

#: Below this many bytes a list of ints is faster than the kernel's call.
_FEW = 256

_decode_few = msgspec.msgpack.Decoder(list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]]).decode


def parse_tokens(raw: msgspec.Raw) -> Sequence[int] | None:
    """The token ids of a msgpack array of integers 0..2**32-1, or None if it is none: a list, or a view of uint32
    memory of its own. Takes at most 4 bytes of memory for each byte of `raw` once that is beyond a few hundred.
    """
    if len(memoryview(raw)) < _FEW:
        try:
            return _decode_few(raw)
        except msgspec.DecodeError:
            return None
    packed = np.frombuffer(padded([bytes(raw)]), np.uint8)
    count = _count(packed)
    tokens = np.empty(max(0, count), np.uint32)
    return tokens.data if count != NONE and _whole(packed, tokens) else None


@kernel
def _count(packed: Bytes) -> int:
    """How many items the array has, or NONE."""
    start = int(np.int64(packed.ctypes.data))
    count, at = read_array(start, start + len(packed) - PADDING)
    return count if at != NONE else NONE


@kernel
def _whole(packed: Bytes, tokens: npt.NDArray[np.uint32]) -> bool:
    """Unpacks the array, which must end with the last of the bytes; False if it does not."""
    start = int(np.int64(packed.ctypes.data))
    end = start + len(packed) - PADDING
    _, at = read_array(start, end)
    return unpack(at, end, int(np.int64(tokens.ctypes.data)), len(tokens)) == end
