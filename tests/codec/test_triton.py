"""The Triton kernels in Triton's interpreter: what they encode and decode is bit for bit what numba does."""

import importlib
import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from cairn.codec import rans, tables
from cairn.codec.cachegen import CacheGen
from cairn.codec.choice import cachegen_on
from cairn.codec.levels import LEVELS
from cairn.codec.planes import STEPS, restore_plane
from cairn.codec.rotary import Rotary, sines
from cairn.errors import ConfigError
from cairn.kv import KVGeometry
from tests.codec import samples

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}


def planes_of(seed: int, planes: int, tokens: int, channels: int) -> tuple[Any, Any, Any]:
    """(residuals, classes, anchors) of so many planes."""
    rng = np.random.default_rng(seed)
    classes = rng.choice(tables.classes(), (planes, channels))
    reach = tables.HALF << (classes >> 4).astype(np.int64)[:, None]
    residuals = np.clip(np.rint(rng.normal(0, 0.4, (planes, tokens, channels)) * reach), -reach, reach - 1)
    return residuals.astype(np.int16), classes, rng.integers(-900, 900, (planes, channels)).astype(np.int16)


def by_numba(residuals: Any, classes: Any, groups: int) -> tuple[list[Any], Any]:
    """Every stream's words, and the states [planes, streams, 32]."""
    planes, tokens, channels = residuals.shape
    total = -(-channels // 32)
    streams = -(-total // groups)
    states = np.empty((planes, streams, 32), np.uint32)
    words = np.empty(tokens * groups * 32, np.uint16)
    found = []
    for p in range(planes):
        for s in range(streams):
            some = min(groups, total - s * groups)
            count = rans.encode_stream(
                residuals[p], s * groups, some, classes[p], tables.shared_tables().encoder, words, states[p, s]
            )
            found.append(words[:count].copy())
    return found, states


@pytest.mark.parametrize(("channels", "groups", "tokens"), [(64, 1, 6), (80, 2, 5), (20, 1, 3)])
def test_streams_are_the_same(kernels: Any, channels: int, groups: int, tokens: int) -> None:
    residuals, classes, _ = planes_of(channels, 2, tokens, channels)
    expected, expected_states = by_numba(residuals, classes, groups)
    streams = expected_states.shape[1]
    words = torch.zeros((2, streams, tokens * 32 * groups), dtype=torch.uint16)
    counts = torch.zeros((2, streams), dtype=torch.int32)
    states = torch.zeros((2, streams, 32), dtype=torch.uint32)
    encoder = torch.from_numpy(tables.shared_tables().encoder)
    kernels.encode(
        torch.from_numpy(residuals), torch.from_numpy(classes), encoder, words, counts, states, groups=groups
    )
    assert (states.numpy() == expected_states).all()
    rooms, lengths = words.numpy().reshape(2 * streams, -1), counts.numpy().reshape(-1)
    for room, length, stream in zip(rooms, lengths, expected, strict=True):
        assert length == len(stream)
        assert (room[len(room) - length :] == stream).all()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("heads", "dim", "pairs", "first", "groups"), [(2, 32, 8, 16, 2), (2, 20, 10, 0, 1), (3, 11, 0, 0, 2)]
)
def test_values_are_the_same(
    kernels: Any, dtype: str, heads: int, dim: int, pairs: int, first: int, groups: int
) -> None:
    planes, block_tokens, blocks = 4, 3, 2
    tokens, channels = block_tokens * blocks, heads * dim
    residuals, classes, anchors = planes_of(dim, planes, tokens, channels)
    codes = np.random.default_rng(0).integers(100, 180, (planes, heads)).astype(np.uint8)
    turns = np.array(Rotary.from_theta(100.0, 2 * pairs).turns if pairs else (), np.uint32)
    table = sines(turns, tokens)
    stride = planes * block_tokens * channels + 8
    element = np.uint32 if dtype == "float32" else np.uint16
    expected = np.zeros((blocks, stride), element)
    for p in range(planes):
        turning = table if p % 2 == 0 else table[:, :, :0]
        restore_plane(
            residuals[p],
            codes[p],
            anchors[p],
            turning,
            first,
            expected,
            p * block_tokens * channels,
            block_tokens,
            KINDS[dtype],
        )
    streams, states = by_numba(residuals, classes, groups)
    ends = np.cumsum([len(stream) for stream in streams])
    spans = np.stack([ends - [len(stream) for stream in streams], ends], axis=1).reshape(planes, -1, 2)
    wrong = torch.zeros(1, dtype=torch.int32)
    rows = torch.zeros((blocks, stride), dtype=getattr(torch, dtype))
    kernels.decode(
        torch.from_numpy(np.concatenate([*streams, np.zeros(64, np.uint16)])),
        torch.from_numpy(spans),
        torch.from_numpy(states),
        torch.from_numpy(classes),
        torch.from_numpy(anchors),
        torch.from_numpy(STEPS[codes]),
        torch.from_numpy(tables.shared_tables().decoder),
        torch.from_numpy(kernels.turns_of(table)),
        rows,
        torch.arange(planes) * block_tokens * channels,
        wrong,
        tokens=tokens,
        block_tokens=block_tokens,
        heads=heads,
        dim=dim,
        first=first,
        groups=groups,
        planes=2,
    )
    found = rows.view(torch.int32 if dtype == "float32" else torch.int16).numpy().view(element)
    assert (found == expected).all()
    assert not int(wrong)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("planes", [1, 2])
def test_whole_streams_are_decoded_as_on_a_cpu(kernels: Any, dtype: str, planes: int) -> None:
    """With exact vectors, values that are not finite, rows longer than a block; and what is no stream is refused."""
    on_gpu = importlib.import_module("cairn.codec.cachegen_cuda").CudaCacheGen
    heads = 2 if planes == 2 else 1
    g = KVGeometry(layers=3 - planes, kv_heads=heads, head_dim=16, dtype=dtype, block_tokens=4, planes=planes)
    known = samples.calibration(g)
    cpu, gpu = CacheGen(g, LEVELS["small"], known), on_gpu(g, LEVELS["small"], known, device="cpu")
    x = samples.values(g, 4)
    x[1, -1, 0, 2, 0, 5] = np.inf
    stored = cpu.encode(samples.to_rows(x, dtype), sinks=3)
    assert len(stored) < 4 * g.block_bytes
    room = g.block_bytes + 4 * g.element_bytes
    begin = int(stored[20:24].view(np.uint32)[0])  # of the first layer: its exact ones, spans, states
    for place in (None, begin + 10, begin + 4) if dtype == "bfloat16" else (None,):
        given = stored.copy()
        if place:
            given[place] ^= 1
        expected, found = (np.full((4, room), 7, np.uint8) for _ in range(2))
        good = cpu.decode(given, expected)
        assert good is (place is None)
        assert gpu.decode(given, found) is good
        assert not good or (found == expected).all()


def test_a_device_that_fails_leaves_it_to_the_cpu(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = importlib.import_module("cairn.codec.cachegen_cuda")
    g = KVGeometry(layers=1, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
    gpu = cuda.CudaCacheGen(g, device="cpu")
    blocks = np.random.default_rng(0).normal(0, 1, (2, g.block_bytes // 4)).astype(np.float32).view(np.uint8)
    stored, out, expected = gpu.encode(blocks), np.empty_like(blocks), np.empty_like(blocks)
    assert CacheGen(g).decode(stored, expected)
    monkeypatch.setattr(cuda.triton_kernels, "decode", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError))
    assert gpu.decode(stored, out)
    assert (out == expected).all()


def test_a_device_that_is_not_there_is_named(kernels: Any) -> None:
    with pytest.raises(ConfigError, match=r"compression.device='cuda:99'"):
        cachegen_on("cuda:99", KVGeometry(layers=1, kv_heads=1, head_dim=8, dtype="float32"))


def test_kernels_compile_to_what_they_count_on() -> None:
    """A ballot: that neighbouring elements are one warp's threads, which nothing in Triton promises. Sums as on a CPU:
    that no product is added without being rounded."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.compiled"], env=environ, stdout=subprocess.PIPE, check=True, timeout=300
    )
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert len(found) == 6
    for name in ("_decode", "_encode"):
        code, _ = found.pop(name)
        assert "vote.sync.ballot" in code, name
        layouts = re.findall(r"^#\S+ = #ttg\.blocked<.*>$", code, re.MULTILINE)
        assert len(layouts) == 1, name
        assert "sizePerThread = [1], threadsPerWarp = [32]" in layouts[0], name
        assert "convert_layout" not in code, name
    for name, (_, assembly) in found.items():
        assert not re.search(r"\bfma\.|\bmad\.f|\.ftz|\.approx", assembly), name
    assert "mul.f32" in found["moments"][1] or "mul.rn.f32" in found["moments"][1]
