"""Compiles the Triton kernels for a GPU that need not be there, and writes their intermediate code, as lines of JSON.

A process of its own: once interpreted, kernels cannot be compiled.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cairn.codec import triton_kernels
from cairn.codec.rotary import SINE_BITS
from cairn.codec.tables import SYMBOLS

WARPS = 4
#: What is not a 32-bit number: pointers, and what is known when a kernel is compiled.
POINTERS = {
    "words": "*u16",
    "spans": "*i64",
    "states": "*u32",
    "classes": "*u8",
    "anchors": "*i16",
    "steps": "*fp32",
    "decoder": "*u32",
    "encoder": "*u32",
    "turns": "*i32",
    "rows": "*u16",
    "offsets": "*i64",
    "residuals": "*i16",
    "counts": "*i32",
    "wrong": "*i32",
}


def code_of(kernel: triton.JITFunction) -> str:
    """The kernel's TTGIR on a Hopper GPU."""
    grid, options = triton_kernels._grid(1, WARPS)
    del grid, options["num_warps"]
    known = options | {
        "BLOCK_TOKENS": 16,
        "SINE_BITS": SINE_BITS,
        "BFLOAT16": True,
        "SYMBOLS": SYMBOLS,
        "UNROLL": 4,
    }
    constants = {name: known[name] for name in kernel.arg_names if name in known}
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    return str(compiled.asm["ttgir"])


if __name__ == "__main__":
    for name in ("_decode", "_encode"):
        sys.stdout.write(json.dumps([name, code_of(getattr(triton_kernels, name))]) + "\n")
