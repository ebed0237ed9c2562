"""Compiles the Triton kernels for a GPU that need not be there, and writes what becomes of them, as lines of JSON.

A process of its own: once interpreted, kernels cannot be compiled.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cairn.codec import triton_kernels, triton_planes
from cairn.codec.planes import FAR, MOST_ANCHOR

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
    "values": "*u16",
    "exact": "*u8",
    "sums": "*fp64",
    "squares": "*fp64",
    "terms": "*fp64",
    "totals": "*fp64",
    "inverses": "*fp32",
    "powers": "*i64",
    "source": "*u16",
    "target": "*u16",
    "begins": "*i64",
    "places": "*i64",
    "lengths": "*i64",
}


def code_of(kernel: triton.JITFunction, **options: Any) -> tuple[str, str]:
    """The kernel's TTGIR and PTX on a Hopper GPU."""
    known = {"BLOCK_TOKENS": 16, "BFLOAT16": True, "CHANNELS": 128, "LENGTH": 192, "ROWS": 32, "UNROLL": 4}
    known |= {"FAR": int(FAR), "MOST": MOST_ANCHOR, "TOKENS": 16, "DIM": 128, "WORDS": 512}
    constants = {name: known[name] for name in kernel.arg_names if name in known}
    pointers = POINTERS | ({"counts": "*i64"} if kernel is triton_planes.copy else {})
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_kernels.WARPS.value} | options
    )
    return str(compiled.asm["ttgir"]), str(compiled.asm["ptx"])


if __name__ == "__main__":
    for name in ("_decode", "_encode"):
        sys.stdout.write(json.dumps([name, code_of(getattr(triton_kernels, name))]) + "\n")
    for name in ("moments", "total", "subtract", "copy"):
        code = code_of(getattr(triton_planes, name), enable_fp_fusion=False)
        sys.stdout.write(json.dumps([name, code]) + "\n")
