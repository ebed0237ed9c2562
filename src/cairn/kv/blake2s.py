"""BLAKE2s (RFC 7693) as numba kernels: the hash behind every block key.

Keys must resist deliberate collisions (a tenant chooses its prompts, also to collide with another's), which rules the
fast non-cryptographic hashes out, and 8,192 blocks must hash in about a millisecond, which rules a Python call a block
out. The kernels equal `hashlib.blake2s` bit for bit (that is their test) and hash a whole prompt in one call. The
compression is written as LLVM IR over a type: one 32-bit word for a chain, a vector of words for rows hashed side by
side, which numba's own loops are not turned into.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from cairn.jit import intrinsic, kernel

Words = npt.NDArray[np.uint32]
Matrix = npt.NDArray[np.uint32]

LANES = 16
BLOCK_WORDS = 16

_IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
_SIGMA = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)
_COLUMNS_AND_DIAGONALS = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip
_WORD = ir.IntType(32)
_ADDRESS = ir.IntType(64)


def initial_state(digest_bytes: int, person: bytes) -> Words:
    """The chaining value before the first compression: unkeyed; `person` (8 bytes) separates one use from another."""
    state = np.array(_IV, np.uint32)
    state[0] ^= np.uint32(0x01010000 | digest_bytes)
    state[6:8] ^= np.frombuffer(person, np.uint32)
    return state


def _mix(builder: ir.IRBuilder, v: list[Any], at: tuple[int, int, int, int], x: Any, y: Any) -> None:
    """The function G on four entries of v, each a word or a vector of words."""
    kind = x.type
    lanes = kind.count if isinstance(kind, ir.VectorType) else 0

    def rotate(value: Any, by: int) -> Any:
        left, right = (ir.Constant(kind, [n] * lanes if lanes else n) for n in (32 - by, by))
        return builder.or_(builder.lshr(value, right), builder.shl(value, left))

    a, b, c, d = at
    for word, turn_d, turn_b in ((x, 16, 12), (y, 8, 7)):
        v[a] = builder.add(builder.add(v[a], word), v[b])
        v[d] = rotate(builder.xor(v[d], v[a]), turn_d)
        v[c] = builder.add(v[c], v[d])
        v[b] = rotate(builder.xor(v[b], v[c]), turn_b)


def _pointers(builder: ir.IRBuilder, base: Any, kind: Any, count: int) -> list[Any]:
    """Pointers to `count` consecutive values of `kind` from an address on."""
    size = 4 * (kind.count if isinstance(kind, ir.VectorType) else 1)
    addresses = [builder.add(base, ir.Constant(_ADDRESS, size * i)) for i in range(count)]
    return [builder.inttoptr(address, kind.as_pointer()) for address in addresses]


def _vector(builder: ir.IRBuilder, words: list[Any]) -> Any:
    vector = ir.Constant(ir.VectorType(_WORD, len(words)), ir.Undefined)
    for i, word in enumerate(words):
        vector = builder.insert_element(vector, word, ir.Constant(_WORD, i))
    return vector


def _compress_one(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> Any:
    """Codegen for one message: the 4 x 4 state as four rows, so that its four columns are mixed at once."""
    state, block, length, last = args
    row = ir.VectorType(_WORD, 4)
    h_pointers = _pointers(builder, state, row, 2)
    h = [builder.load(pointer, align=4) for pointer in h_pointers]
    m = [builder.load(pointer, align=4) for pointer in _pointers(builder, block, _WORD, BLOCK_WORDS)]

    def turn(vector: Any, by: int) -> Any:
        order = ir.Constant(row, [(i + by) % 4 for i in range(4)])
        return builder.shuffle_vector(vector, vector, order)

    zero = ir.Constant(_WORD, 0)
    counters = _vector(builder, [builder.trunc(length, _WORD), zero, builder.trunc(builder.neg(last), _WORD), zero])
    v = [*h, ir.Constant(row, _IV[:4]), builder.xor(ir.Constant(row, _IV[4:]), counters)]
    for sigma in _SIGMA:
        for half, sign in ((sigma[:8], 1), (sigma[8:], -1)):
            x, y = (_vector(builder, [m[i] for i in half[part::2]]) for part in (0, 1))
            _mix(builder, v, (0, 1, 2, 3), x, y)
            # Turns the diagonals into columns, and after the second half back.
            v[1:] = [turn(v[i], sign * i) for i in (1, 2, 3)]
    for i in range(2):
        builder.store(builder.xor(h[i], builder.xor(v[i], v[i + 2])), h_pointers[i], align=4)
    return context.get_dummy_value()


def _compress_many(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> Any:
    """Codegen for LANES messages side by side: a vector holds one word of each."""
    state, block, length, last = args
    kind = ir.VectorType(_WORD, LANES)
    h_pointers = _pointers(builder, state, kind, 8)
    h = [builder.load(pointer, align=4) for pointer in h_pointers]
    m = [builder.load(pointer, align=4) for pointer in _pointers(builder, block, kind, BLOCK_WORDS)]
    v = h + [ir.Constant(kind, [value] * LANES) for value in _IV]
    for i, value in ((12, length), (14, builder.neg(last))):
        v[i] = builder.xor(v[i], _vector(builder, [builder.trunc(value, _WORD)] * LANES))
    for sigma in _SIGMA:
        for i, at in enumerate(_COLUMNS_AND_DIAGONALS):
            _mix(builder, v, at, m[sigma[2 * i]], m[sigma[2 * i + 1]])
    for i in range(8):
        builder.store(builder.xor(h[i], builder.xor(v[i], v[i + 8])), h_pointers[i], align=4)
    return context.get_dummy_value()


_FOUR_INTS = types.void(types.int64, types.int64, types.int64, types.int64)


@intrinsic
def _compress(typingctx: Any, state: Any, block: Any, length: Any, last: Any) -> Any:
    return _FOUR_INTS, _compress_one


@intrinsic
def _compress_lanes(typingctx: Any, state: Any, block: Any, length: Any, last: Any) -> Any:
    return _FOUR_INTS, _compress_many


@kernel
def hash_rows(initial: Words, rows: Matrix, digests: Matrix) -> None:
    """`digests[i]` [8 words] = BLAKE2s of `rows[i]` (4 bytes a word, little-endian), each row hashed on its own."""
    words = rows.shape[1]
    state = np.empty((8, LANES), np.uint32)
    block = np.empty((BLOCK_WORDS, LANES), np.uint32)
    for base in range(0, rows.shape[0], LANES):
        lanes = min(LANES, rows.shape[0] - base)
        for word in range(8):
            state[word, :] = initial[word]
        for done in range(0, words, BLOCK_WORDS):
            count = min(BLOCK_WORDS, words - done)
            block[:] = 0
            for lane in range(lanes):
                for word in range(count):
                    block[word, lane] = rows[base + lane, done + word]
            last = np.int64(done + count == words)
            _compress_lanes(state.ctypes.data, block.ctypes.data, 4 * (done + count), last)
        for lane in range(lanes):
            for word in range(8):
                digests[base + lane, word] = state[word, lane]


@kernel
def hash_chain(initial: Words, seed: Words, links: Matrix, keys: Matrix) -> None:
    """`keys[i]` [4 words] = BLAKE2s-128 of (`keys[i-1]`, `links[i]`); `seed` [4 words] stands before the first.

    `links` [n, w], w <= 12 words, so that a link costs one compression.
    """
    width = links.shape[1]
    block = np.zeros(BLOCK_WORDS, np.uint32)
    state = np.empty(8, np.uint32)
    for word in range(4):
        block[word] = seed[word]
    for i in range(links.shape[0]):
        for word in range(width):
            block[4 + word] = links[i, word]
        for word in range(8):
            state[word] = initial[word]
        _compress(state.ctypes.data, block.ctypes.data, 4 * (4 + width), 1)
        for word in range(4):
            block[word] = state[word]
            keys[i, word] = state[word]
