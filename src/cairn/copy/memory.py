"""Raw memory for numba kernels: addresses in, bytes moved. The only place where Cairn computes with pointers."""

from typing import Any

from llvmlite import ir
from numba import types

from cairn.jit import intrinsic

_WORD = ir.IntType(64)
_LANE_BYTES = 32
_UNROLL = 4


@intrinsic
def move_bytes(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    """move_bytes(target, source, count): memcpy between two addresses (int64); the ranges must not overlap."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        byte_pointer = ir.IntType(8).as_pointer()
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [byte_pointer, byte_pointer, _WORD])
        pointers = [builder.inttoptr(address, byte_pointer) for address in args[:2]]
        builder.call(memcpy, [*pointers, args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def stream_lines(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    """stream_lines(target, source, count): as move_bytes, past the caches, for `count` a multiple of 128 and a
    32-aligned target.

    Non-temporal stores skip the read of the target's cache lines (a third of a plain copy's traffic) and leave the
    cache to the model. Whoever reads the target in another thread must be ordered after a `fence`.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        lane = ir.VectorType(_WORD, _LANE_BYTES // 8).as_pointer()
        target_address, source_address, size = args
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        loop, done = builder.append_basic_block("lines"), builder.append_basic_block("lines.end")
        entry = builder.block
        builder.cbranch(builder.icmp_signed(">", size, ir.Constant(_WORD, 0)), loop, done)
        builder.position_at_end(loop)
        offset = builder.phi(_WORD)
        offset.add_incoming(ir.Constant(_WORD, 0), entry)
        lanes = []
        for i in range(_UNROLL):
            at = builder.add(offset, ir.Constant(_WORD, i * _LANE_BYTES))
            pointer = builder.inttoptr(builder.add(source_address, at), lane)
            lanes.append((at, builder.load(pointer, align=1)))
        for at, value in lanes:
            pointer = builder.inttoptr(builder.add(target_address, at), lane)
            builder.store(value, pointer, align=_LANE_BYTES).set_metadata("nontemporal", hint)
        following = builder.add(offset, ir.Constant(_WORD, _UNROLL * _LANE_BYTES))
        offset.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, size), loop, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """atomic_add(address, amount): adds to the int64 at an 8-aligned address, sequentially consistent with whatever
    other processes do to it; returns what it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _WORD.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_or(typingctx: Any, address: Any, bits: Any) -> Any:
    """atomic_or(address, bits): as atomic_add, setting bits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("or", builder.inttoptr(args[0], _WORD.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen
