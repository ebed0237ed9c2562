"""The device's encoder on CPU tensors, its kernels interpreted: what it writes is byte for byte what the CPU does."""

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cairn.codec.cachegen import CacheGen, Plain
from cairn.codec.ladder import ladder_for
from cairn.codec.levels import LEVELS
from cairn.codec.planes import LARGEST, LEAST_STEP, STEP_EDGES, STEP_ZERO, STEPS_AN_OCTAVE
from cairn.codec.rotary import Rotary
from cairn.codec.sections import HEADER_WORDS
from cairn.config.schema import Compression
from cairn.kv import KVGeometry
from tests.codec import samples

SPECIALS = ["plain", "infinite", "none-finite", "zero", "constant", "spiky", "large", "far", "small"]


def spoil(x: samples.Floats, how: str, rng: np.random.Generator) -> None:
    """Puts into values what is rare."""
    if how == "infinite":
        np.put(x, rng.integers(0, x.size, 3), [np.inf, -np.inf, np.nan])
    elif how == "none-finite":
        x[:, 0] = np.nan
    elif how == "zero":
        x[:] = -0.0
    elif how == "constant":
        x[:, :, :, :, 0] = 3.25
    elif how == "spiky":
        np.put(x, rng.integers(0, x.size, 5), [3e3, -9e3, 6e4, -5e-8, 2e4])
    elif how in ("large", "small"):
        x *= 3e37 if how == "large" else 1e-40
    elif how == "far":
        x += 3e4


@st.composite
def cases(draw: st.DrawFn) -> tuple[KVGeometry, Any, int]:
    """A geometry, values, and how many tokens are sinks."""
    planes = draw(st.sampled_from([1, 2]))
    g = KVGeometry(
        layers=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 3)) if planes == 2 else 1,
        head_dim=draw(st.sampled_from([2, 7, 16, 20])),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        block_tokens=draw(st.sampled_from([1, 3, 4])),
        planes=planes,
    )
    blocks, seed = draw(st.integers(1, 4)), draw(st.integers(0, 1 << 30))
    x = samples.values(g, blocks, seed)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        spoil(x, draw(st.sampled_from(SPECIALS)), np.random.default_rng(seed))
        return g, samples.to_rows(x, g.dtype), draw(st.integers(0, 6))


@pytest.fixture
def strict(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to the CPU."""

    def fail(what: str, error: RuntimeError) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("cairn.codec.cachegen_cuda"), "_log_failure", fail)


@pytest.mark.usefixtures("strict")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(cases(), st.sampled_from(sorted(LEVELS)), st.booleans(), st.sampled_from([0, 64]), st.booleans())
def test_bytes_are_those_of_a_cpu(
    case: tuple[KVGeometry, Any, int], level: str, calibrated: bool, padding: int, roomy: bool
) -> None:
    """roomy: with room for streams that are longer than the blocks, which these few tokens' often are."""
    g, rows, sinks = case
    known = samples.calibration(g) if calibrated else None
    cpu, device = CacheGen(g, LEVELS[level], known), on_cpu_tensors(g, LEVELS[level], known)
    if roomy:
        for codec in (cpu, device):
            codec.stored_bytes_limit = lambda blocks=1: 20_000 + 2 * blocks * g.block_bytes  # type: ignore[method-assign]
    memory = np.pad(rows, ((0, 0), (0, padding)), constant_values=0xFF)
    expected, found = (codec.encode(memory, sinks=sinks) for codec in (cpu, device))
    assert expected[8] or not roomy  # groups a stream, 0 where blocks are as they were
    assert found.shape == expected.shape
    assert (found == expected).all()


def on_cpu_tensors(*settings: Any) -> CacheGen:
    made: CacheGen = importlib.import_module("cairn.codec.cachegen_cuda").CudaCacheGen(*settings, device="cpu")
    return made


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("groups", [1, 5])
def test_many_streams_a_plane(groups: int) -> None:
    """More channels than a program of the kernels has, and no power of two."""
    g = KVGeometry(layers=1, kv_heads=1, head_dim=576, block_tokens=4, planes=1)
    rows = samples.to_rows(samples.values(g, 2), g.dtype).view(np.uint16)
    turns = np.array(Rotary.from_theta(1e4, 64).turns, np.uint32)
    begin = 4 * (HEADER_WORDS + g.layers + len(turns))
    plain = Plain(rows, np.full((1, 1), 0.2, np.float32), 1, groups, turns, 512, begin, 1 << 16)
    device = on_cpu_tensors(g)
    expected, found = CacheGen._encode_planes(device, plain), device._encode_planes(plain)
    assert expected is not None
    assert found is not None
    assert found[begin:].tobytes() == expected[begin:].tobytes()


def test_a_device_that_fails_leaves_it_to_the_cpu(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch = importlib.import_module("torch")
    g = KVGeometry(layers=1, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
    device, rows = on_cpu_tensors(g), samples.to_rows(samples.values(g, 2), g.dtype)
    monkeypatch.setattr(kernels, "encode", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    assert (device.encode(rows) == CacheGen(g).encode(rows)).all()
    assert [record.message for record in caplog.records if "encoded on the CPU: no memory" in record.message]


def test_whoever_stores_encodes_on_the_device(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every level that the remote tier's ladder, an engine's or a node's, may choose."""
    cuda = importlib.import_module("cairn.codec.cachegen_cuda")
    lanes = cuda.lanes_on("cpu")
    monkeypatch.setattr(cuda, "lanes_on", lambda _: lanes)
    g = KVGeometry(layers=1, kv_heads=1, head_dim=16, block_tokens=4)
    ladder = ladder_for(g, Compression(algorithm="cachegen", quality="balanced", device="cuda:1"))
    assert ladder is not None
    coded = [rung.codec for rung in ladder.rungs if rung.codec.id == CacheGen.id]
    assert len(coded) == 3
    assert all(isinstance(codec, cuda.CudaCacheGen) for codec in coded)


@given(st.floats(LEAST_STEP, float(LARGEST)))
def test_a_step_gets_the_nearest_code(step: float) -> None:
    nearest = min(max(round(np.log2(step) * STEPS_AN_OCTAVE) + STEP_ZERO, 0), 255)
    assert np.searchsorted(STEP_EDGES, step) == nearest
