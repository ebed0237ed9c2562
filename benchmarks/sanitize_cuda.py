"""The codecs' kernels on a GPU with real and with mutated bytes, small enough for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python3 benchmarks/sanitize_cuda.py

Without torch's caching allocator every tensor is an allocation of its own, so that a read one byte behind it is seen.
Mutated: what is coded (words, states, stored rows); a stream's places and classes are checked on the host before a
kernel gets them; of whole objects, encoded on the device, any byte. A minute with the sanitizer.
"""

import logging
from itertools import product

import numpy as np
import torch
from quantized_cuda import CODECS, LAYOUTS, drawn, paged

from cairn.codec import parts, rans, tables, triton_kernels
from cairn.codec.calibration import Calibration
from cairn.codec.choice import cachegen_on
from cairn.codec.levels import LEVELS
from cairn.codec.planes import STEPS
from cairn.codec.quantized import Quantizer
from cairn.codec.rotary import Rotary, sines
from cairn.copy.cuda_quantized import QuantizedCudaCopier
from cairn.kv import KVGeometry

TOKENS, BLOCK_TOKENS, DIM, HEADS, PLANES, ROUNDS = 64, 16, 64, 5, 4, 8


def cachegen(rng: np.random.Generator) -> None:
    """Encodes planes, decodes them, and decodes them again with words and states that nobody has coded."""
    channels = HEADS * DIM
    groups = parts.groups_a_stream(TOKENS, channels)
    streams = -(-channels // rans.LANES // groups)
    room = TOKENS * rans.LANES * groups
    classes = torch.from_numpy(rng.integers(0, tables.WIDTHS, (PLANES, channels)).astype(np.uint8)).cuda()
    residuals = torch.from_numpy(rng.integers(-8, 8, (PLANES, TOKENS, channels)).astype(np.int16)).cuda()
    encoder, decoder = (torch.from_numpy(table).cuda() for table in tables.shared_tables())
    words = torch.zeros((PLANES, streams, room), dtype=torch.uint16, device="cuda")
    counts = torch.zeros((PLANES, streams), dtype=torch.int32, device="cuda")
    states = torch.zeros((PLANES, streams, rans.LANES), dtype=torch.uint32, device="cuda")
    triton_kernels.encode(residuals, classes, encoder, words, counts, states, groups=groups)
    anchors = torch.from_numpy(rng.integers(-200, 200, (PLANES, channels)).astype(np.int16)).cuda()
    steps = torch.from_numpy(STEPS[rng.integers(0, 256, (PLANES, HEADS))]).cuda()
    angles = sines(np.array(Rotary.from_theta(5e5, DIM).turns, np.uint32), TOKENS)
    turns = torch.from_numpy(triton_kernels.turns_of(angles)).cuda()
    rows = torch.zeros((TOKENS // BLOCK_TOKENS, PLANES * BLOCK_TOKENS * channels), dtype=torch.bfloat16, device="cuda")
    offsets = torch.arange(PLANES, device="cuda", dtype=torch.int64) * BLOCK_TOKENS * channels
    ends = torch.arange(1, PLANES * streams + 1, device="cuda").reshape(PLANES, streams) * room
    spans, wrong = torch.stack([ends - counts, ends], dim=2), torch.zeros(1, dtype=torch.int32, device="cuda")
    for _ in range(ROUNDS):
        triton_kernels.decode(
            words, spans, states, classes, anchors, steps, decoder, turns, rows, offsets, wrong,
            tokens=TOKENS, block_tokens=BLOCK_TOKENS, heads=HEADS, dim=DIM, first=0, groups=groups, planes=2,
        )  # fmt: skip
        # A stream takes at most a word a value, so whoever begins at its room's begin stays in it.
        spans = torch.stack([ends - room, ends], dim=2)
        words = torch.from_numpy(rng.integers(0, 1 << 16, words.shape, np.uint16)).cuda()
        states = torch.from_numpy(rng.integers(0, 1 << 32, states.shape, np.uint32)).cuda()
    torch.cuda.synchronize()


class Refused(logging.Handler):
    """Ends it all where the device has not done what it was asked for: else the CPU would be looked at."""

    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit(record.getMessage())


def objects(rng: np.random.Generator, dtype: str, planes: int, turns: int) -> None:
    """Blocks, values that are not finite among them, to an object and back, all on the device; and back from objects of
    which a byte is another one.
    """
    g = KVGeometry(layers=2, kv_heads=5 if planes == 2 else 1, head_dim=72, dtype=dtype, planes=planes)
    known = Calibration(model="x", sensitivity=((0.02,) * planes,) * 2, rotary=Rotary.from_theta(1e4, 2 * turns))
    x = rng.normal(1, 1, (8, *g.block_shape)) * np.exp(rng.normal(0, 1, g.block_shape[3:]))
    x.reshape(-1)[rng.integers(0, x.size, 6)] = [np.nan, np.inf, 9e4, -1e30, 0, 1]
    rows = torch.from_numpy(x).to(getattr(torch, dtype)).reshape(8, -1).view(torch.uint8).numpy()
    for level in LEVELS.values():
        codec = cachegen_on("cuda", g, level, known if turns else None)
        stored = codec.encode(rows, sinks=8)
        assert codec.decode(stored, np.empty_like(rows))
        for _ in range(ROUNDS):
            mutated = stored.copy()
            mutated[rng.integers(0, len(mutated))] ^= 1 << rng.integers(0, 8)
            codec.decode(mutated, np.empty_like(rows))


def quantized(rng: np.random.Generator, layout: str, codec: str, dtype: str) -> None:
    """Pages to rows and back, with holes, and back once more from bytes that are no rows."""
    planes = 1 if layout == "mla" else 2
    g = KVGeometry(layers=2, kv_heads=1 if planes == 1 else 5, head_dim=64, dtype=dtype, block_tokens=32, planes=planes)
    quantizer, blocks = Quantizer(g, codec), 5
    kv = paged(drawn(layout, g, 8, 1), layout, g)
    slots = rng.permutation(8 * 32)[: blocks * 32]
    rows = rng.permutation(blocks).astype(np.int32)
    memory = np.zeros((blocks, quantizer.stored.block_bytes), np.uint8)
    copier = QuantizedCudaCopier(quantizer)
    copier.gather(kv, slots, memory, rows)
    slots = np.where(rng.random(len(slots)) < 0.2, -1, slots)
    for layer in range(g.layers):
        copier.scatter(kv, slots, memory, rows, range(layer, layer + 1))
    memory[:] = rng.integers(0, 256, memory.shape, np.uint8)
    copier.scatter(kv, slots, memory, rows)
    copier.close()


def main() -> None:
    rng = np.random.default_rng(0)
    logging.getLogger("cairn.codec").addHandler(Refused())
    cachegen(rng)
    kinds = list(product(("bfloat16", "float16", "float32"), (1, 2), (0, 24)))
    for kind in kinds:
        objects(rng, *kind)
    cases = list(product(LAYOUTS, CODECS, ("bfloat16", "float32")))
    for case in cases:
        quantized(rng, *case)
    print(f"cachegen, {len(kinds)} kinds of objects, {len(cases)} of quantized rows: every kernel ended")


if __name__ == "__main__":
    main()
