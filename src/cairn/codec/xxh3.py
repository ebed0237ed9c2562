"""XXH3-128 (Yann Collet; xxHash's specification, seed 0) as numba kernels, for bytes that are summed piece by piece.

A checksum costs little where the cache still has the bytes, and a pass over memory where it has not. So whoever moves
bytes sums each piece as it goes by, in the same kernel and without the GIL, which a call of a library cannot. The
package xxhash is made for any x86-64, these for the CPU that runs them: with AVX-512 they sum 59 GB/s out of the cache
and that 10. Equal to it bit for bit, which is the tests' oracle; for more than `SHORT` bytes, as less is another
algorithm and no block's size.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from cairn.jit import intrinsic, kernel, load_word, prefetch_far

Words = npt.NDArray[np.uint64]

#: So many bytes or fewer are not summed here.
SHORT: Final = 240
#: Bytes are absorbed in units of this size.
UNIT: Final = 1024
CHECKSUM_BYTES: Final = 16
ALIGNMENT: Final = 64

_STRIPE = 64
#: Memory that is in no cache is fetched so far ahead: the CPU by itself stops at every page of 4 KiB.
_AHEAD = 4096
_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
        "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a"
        "51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8f"
        "f8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_INITIAL = np.array([_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0]], np.uint64)
_PRIME64_1, _PRIME64_2 = (np.uint64(prime) for prime in _PRIME64[:2])
_AVALANCHE = np.uint64(0x165667919E3779F9)

_WORD = ir.IntType(64)
_LANES = ir.VectorType(_WORD, 8)
_NEIGHBOURS = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])


def _lanes(*words: int) -> Any:
    return ir.Constant(_LANES, list(words) if len(words) == 8 else list(words) * 8)


def _secret(offset: int) -> Any:
    """8 words of the secret from a byte on."""
    return _lanes(*_SECRET[offset : offset + _STRIPE].view(np.uint64).tolist())


def _pointer(builder: ir.IRBuilder, address: Any, offset: int = 0) -> Any:
    return builder.inttoptr(builder.add(address, ir.Constant(_WORD, offset)), _LANES.as_pointer())


def _load(builder: ir.IRBuilder, address: Any, offset: int = 0) -> Any:
    return builder.load(_pointer(builder, address, offset), align=1)


def _store(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store(value, _pointer(builder, address), align=8)


def _accumulate(builder: ir.IRBuilder, lanes: Any, data: Any, secret: Any) -> Any:
    keyed = builder.xor(data, secret)
    low, high = builder.and_(keyed, _lanes(0xFFFFFFFF)), builder.lshr(keyed, _lanes(32))
    crossed = builder.shuffle_vector(data, ir.Constant(_LANES, ir.Undefined), _NEIGHBOURS)
    return builder.add(builder.add(lanes, crossed), builder.mul(low, high))


def _take_unit(builder: ir.IRBuilder, state: Any, source: Any, target: Any = None) -> None:
    """Code that takes `UNIT` bytes into the state, and past the caches to a target; the lanes stay in registers."""
    lanes, hint = _load(builder, state), builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
    for stripe in range(UNIT // _STRIPE):
        data = _load(builder, source, stripe * _STRIPE)
        if target is not None:
            stored = builder.store(data, _pointer(builder, target, stripe * _STRIPE), align=ALIGNMENT)
            stored.set_metadata("nontemporal", hint)
        lanes = _accumulate(builder, lanes, data, _secret(8 * stripe))
    mixed = builder.xor(builder.xor(lanes, builder.lshr(lanes, _lanes(47))), _secret(len(_SECRET) - _STRIPE))
    _store(builder, state, builder.mul(mixed, _lanes(_PRIME32[0])))


@intrinsic
def _absorb_unit(typingctx: Any, state: Any, source: Any) -> Any:
    """Takes the `UNIT` bytes at an address into the state, 8 words, at another."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _take_unit(builder, *args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _carry_unit(typingctx: Any, state: Any, source: Any, target: Any) -> Any:
    """As `_absorb_unit`, and copies the bytes to a third address, past the caches."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _take_unit(builder, *args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _absorb_stripe(typingctx: Any, state: Any, source: Any, secret: Any) -> Any:
    """Takes 64 bytes at an address into the state, with the secret at a third."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        lanes, data, secret = (_load(builder, address) for address in args)
        _store(builder, args[0], _accumulate(builder, lanes, data, secret))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _fold(typingctx: Any, a: Any, b: Any) -> Any:
    """The two halves of the 128 bits of a times b, one upon the other."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(word, wide) for word in args))
        high = builder.lshr(product, ir.Constant(wide, 64))
        return builder.xor(builder.trunc(product, _WORD), builder.trunc(high, _WORD))

    return types.uint64(types.uint64, types.uint64), codegen


@kernel
def begin(state: Words) -> None:
    """Makes the state, uint64 [8], that of no bytes."""
    for i in range(len(_INITIAL)):
        state[i] = _INITIAL[i]


@kernel
def units(size: int) -> int:
    """How many of `size` bytes are absorbed in units, before the rest, which is never nothing, is left to `finish`."""
    return (size - 1) // UNIT * UNIT


@kernel
def absorb(state: Words, source: int, count: int) -> None:
    """Takes the next `count` bytes, whole units, into the state."""
    for at in range(0, count, UNIT):
        for line in range(0, UNIT, _STRIPE):
            prefetch_far(source + at + _AHEAD + line)
        _absorb_unit(state.ctypes.data, source + at)


@kernel
def carry(state: Words, source: int, target: int, count: int) -> None:
    """As `absorb`, and copies the bytes to an address that is a multiple of `ALIGNMENT`, past the caches: before other
    threads look at them there must be a `fence`."""
    for at in range(0, count, UNIT):
        _carry_unit(state.ctypes.data, source + at, target + at)


@kernel
def finish(state: Words, address: int, size: int, digest: npt.NDArray[np.uint8]) -> None:
    """Puts the checksum of the `size` bytes (more than `SHORT`) at an address, whose units have been absorbed, into
    `digest` [16]: high word first, both big-endian."""
    secret, lanes = _SECRET.ctypes.data, state.ctypes.data
    done = units(size)
    for stripe in range((size - 1 - done) // _STRIPE):
        _absorb_stripe(lanes, address + done + stripe * _STRIPE, secret + 8 * stripe)
    _absorb_stripe(lanes, address + size - _STRIPE, secret + len(_SECRET) - _STRIPE - 7)
    words = np.uint64(size)
    low = _merge(state, secret + 11, words * _PRIME64_1)
    high = _merge(state, secret + len(_SECRET) - _STRIPE - 11, ~(words * _PRIME64_2))
    for i in range(8):
        shift = np.uint64(56 - 8 * i)
        digest[i], digest[8 + i] = (high >> shift) & np.uint64(255), (low >> shift) & np.uint64(255)


@kernel
def xxh3_128(address: int, size: int, digest: npt.NDArray[np.uint8]) -> None:
    """Puts the checksum of the `size` bytes (more than `SHORT`) at an address into `digest` [16]."""
    state = np.empty(8, np.uint64)
    begin(state)
    absorb(state, address, units(size))
    finish(state, address, size, digest)


@kernel
def _merge(state: Words, secret: int, start: np.uint64) -> np.uint64:
    total = start
    for i in range(4):
        a, b = state[2 * i], state[2 * i + 1]
        total += _fold(a ^ load_word(secret + 16 * i), b ^ load_word(secret + 16 * i + 8))
    total = (total ^ (total >> np.uint64(37))) * _AVALANCHE
    return total ^ (total >> np.uint64(32))
