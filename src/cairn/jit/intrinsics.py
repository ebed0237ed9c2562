"""What kernels can do that Python has no words for: memory at addresses, the system's calls, single instructions."""

from collections.abc import Callable
from typing import Any, cast

import numba.extending
from llvmlite import ir
from numba import types
from numba.core import cgutils


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose body is LLVM IR, callable from kernels only (numba.extending.intrinsic)."""
    return cast(Callable[..., Any], numba.extending.intrinsic(function))


def _pointer(builder: ir.IRBuilder, address: Any, bits: int) -> Any:
    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


def _loading(bits: int, *, swapped: bool = False) -> Any:
    """Codegen for a value of so many bits, which need not be aligned."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        value = builder.load(_pointer(builder, arguments[0], bits), align=1)
        return builder.bswap(value) if swapped else value

    return generate


def _load_byte(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    return builder.zext(_loading(8)(context, builder, signature, arguments), ir.IntType(64))


def _storing(bits: int) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], _pointer(builder, arguments[0], bits), align=1)
        return context.get_dummy_value()

    return generate


def _call(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
    word = ir.IntType(64)
    kind = ir.FunctionType(ir.IntType(32), [word] * (len(arguments) - 1))
    return builder.sext(builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:]), word)


def _count_zeros(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
    return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))


def _unlike_digits(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
    """Codegen: below "0", which wraps around, or above "9"."""
    bytes_ = ir.VectorType(ir.IntType(8), 64)
    text = builder.load(builder.inttoptr(arguments[0], bytes_.as_pointer()), align=1)
    above = builder.icmp_unsigned(
        ">", builder.sub(text, ir.Constant(bytes_, [0x30] * 64)), ir.Constant(bytes_, [9] * 64)
    )
    return builder.bitcast(above, ir.IntType(64))


def _fetching(locality: int) -> Any:
    """Codegen: to be read, into every level of the cache (locality 3), or all but the first (2)."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        hints = (ir.Constant(word, value) for value in (0, locality, 1))
        builder.call(function, [_pointer(builder, arguments[0], 8), *hints])
        return context.get_dummy_value()

    return generate


@intrinsic
def load_byte(typingctx: Any, address: Any) -> Any:
    """The byte at an address, as an int64. Nothing checks addresses; whoever makes one has to."""
    return types.int64(types.int64), _load_byte


@intrinsic
def load_word(typingctx: Any, address: Any) -> Any:
    """8 bytes at any address as a uint64, the first byte lowest."""
    return types.uint64(types.int64), _loading(64)


@intrinsic
def load_big(typingctx: Any, address: Any) -> Any:
    """8 bytes at any address as a uint64, the first byte highest."""
    return types.uint64(types.int64), _loading(64, swapped=True)


@intrinsic
def store_half(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes a uint32."""
    return types.void(types.int64, types.uint32), _storing(32)


@intrinsic
def store_word(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes a uint64."""
    return types.void(types.int64, types.uint64), _storing(64)


def _load_acquire(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
    return builder.load_atomic(_pointer(builder, arguments[0], 64), "acquire", 8)


def _store_release(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
    builder.store_atomic(arguments[1], _pointer(builder, arguments[0], 64), "release", 8)
    return context.get_dummy_value()


def _fence(context: Any, builder: ir.IRBuilder, _signature: Any, _arguments: Any) -> Any:
    builder.fence("seq_cst")
    return context.get_dummy_value()


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """The int64 at an 8-aligned address; what is read after it is not older than what `store_release` made visible."""
    return types.int64(types.int64), _load_acquire


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes an int64 to an 8-aligned address; whoever reads it by `load_acquire` sees all that was written before."""
    return types.void(types.int64, types.int64), _store_release


@intrinsic
def fence(typingctx: Any) -> Any:
    """All reads and writes before it are done, streamed ones too, before any after it."""
    return types.void(), _fence


@intrinsic
def call_c(typingctx: Any, function: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Calls the C function at an address, which takes four words (integers, pointers) and returns an int."""
    return types.int64(*[types.int64] * 5), _call


@intrinsic
def trailing_zeros(typingctx: Any, word: Any) -> Any:
    """How many bits of a uint64 are 0 below the lowest that is 1, as an int64; 64 for 0."""
    return types.int64(types.uint64), _count_zeros


@intrinsic
def unlike_digits(typingctx: Any, address: Any) -> Any:
    """Which of the 64 bytes at an address are no ASCII digits, as a uint64: the first byte's bit is the lowest."""
    return types.uint64(types.int64), _unlike_digits


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Has the cache line at an address fetched, and does not wait for it; any address will do."""
    return types.void(types.int64), _fetching(3)


@intrinsic
def prefetch_far(typingctx: Any, address: Any) -> Any:
    """As `prefetch`, and leaves the first level of the cache alone."""
    return types.void(types.int64), _fetching(2)


def _calling(name: str, count: int, *narrow: int, small: bool = False) -> Any:
    """Codegen for a function of the C library of `count` arguments, those `narrow` ints and the others longs: a long
    (small: an int), or where that is negative the errno, negated. It is called without the GIL."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        word, long = ir.IntType(32), ir.IntType(64)
        kinds = [word if i in narrow else long for i in range(count)]
        kind = ir.FunctionType(word if small else long, kinds)
        call = cgutils.get_or_insert_function(builder.module, kind, name)
        values = [builder.trunc(one, word) if i in narrow else one for i, one in enumerate(arguments)]
        done = builder.call(call, values)
        done = builder.sext(done, long) if small else done
        where = ir.FunctionType(word.as_pointer(), [])
        error = builder.call(cgutils.get_or_insert_function(builder.module, where, "__errno_location"), [])
        failed = builder.icmp_signed("<", done, ir.Constant(long, 0))
        return builder.select(failed, builder.neg(builder.sext(builder.load(error), long)), done)

    return types.int64(*[types.int64] * count), generate


@intrinsic
def open_file(typingctx: Any, path: Any, flags: Any) -> Any:
    """The system's open, of a file that is there: its number, or a negative errno. path: an address; ends with 0."""
    return _calling("open", 2, 1, small=True)


@intrinsic
def close_file(typingctx: Any, fd: Any) -> Any:
    """The system's close."""
    return _calling("close", 1, 0, small=True)


@intrinsic
def statx(typingctx: Any, fd: Any, path: Any, flags: Any, mask: Any, address: Any) -> Any:
    """The system's: what there is to know of a file, put to an address, 256 bytes; 0, or a negative errno."""
    return _calling("statx", 5, 0, 2, 3, small=True)


@intrinsic
def clock_gettime(typingctx: Any, clock: Any, address: Any) -> Any:
    """The system's: seconds and nanoseconds, int64 both, put to an address; 0, or a negative errno."""
    return _calling("clock_gettime", 2, 0, small=True)


@intrinsic
def pread(typingctx: Any, fd: Any, address: Any, count: Any, offset: Any) -> Any:
    """The system's: reads up to `count` bytes of a file to an address; how many, or a negative errno."""
    return _calling("pread", 4, 0)


@intrinsic
def preadv2(typingctx: Any, fd: Any, vector: Any, count: Any, offset: Any, flags: Any) -> Any:
    """The system's: as `pread`, to what an int64 [count, 2] says, each an address and a size."""
    return _calling("preadv2", 5, 0, 2, 4)


@intrinsic
def map_file(typingctx: Any, address: Any, size: Any, access: Any, flags: Any, fd: Any, offset: Any) -> Any:
    """The system's mmap: the address, or a negative errno."""
    return _calling("mmap", 6, 2, 3, 4)


@intrinsic
def unmap(typingctx: Any, address: Any, size: Any) -> Any:
    """The system's munmap."""
    return _calling("munmap", 2)


@intrinsic
def advise(typingctx: Any, address: Any, size: Any, advice: Any) -> Any:
    """The system's madvise."""
    return _calling("madvise", 3, 2)
