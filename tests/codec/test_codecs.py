"""Every codec on every kind of geometry: what comes back, in how many bytes, and that only streams are taken."""

import numpy as np
import pytest

from cairn.codec.base import Codec
from cairn.codec.cachegen import CacheGen
from cairn.codec.fixed import Fp8, Int4, Int8
from cairn.codec.levels import LEVELS
from cairn.codec.lossless import Exact, Lossless, Packed
from cairn.errors import GeometryError, InputError
from cairn.kv import KVGeometry
from tests.codec import samples

pytestmark = pytest.mark.slow

DTYPES = ["bfloat16", "float16", "float32"]
SHAPES = {
    "mha": KVGeometry(layers=2, kv_heads=4, head_dim=16, block_tokens=16),
    "gqa": KVGeometry(layers=3, kv_heads=2, head_dim=20, block_tokens=16),
    "mla": KVGeometry.mla(layers=2, latent_dim=64, rope_dim=16, dtype="bfloat16", block_tokens=64),
    "one": KVGeometry(layers=1, kv_heads=1, head_dim=1, block_tokens=1),
}
#: Largest error, as a share of the range of all values but the sinks.
LOSSY = {Int8: 0.51 / 255 + 2**-8, Int4: 0.51 / 15 + 2**-8, Fp8: 2**-4 + 2**-8}


def geometry(shape: str, dtype: str) -> KVGeometry:
    return KVGeometry(**{**{f: getattr(SHAPES[shape], f) for f in SHAPES[shape].__struct_fields__}, "dtype": dtype})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", [1, 9])
def test_cachegen_keeps_errors_within_half_a_step(shape: str, dtype: str, blocks: int) -> None:
    g = geometry(shape, dtype)
    x = samples.from_rows(samples.to_rows(samples.values(g, blocks), dtype), g)
    sinks = min(8, blocks * g.block_tokens)
    for level in LEVELS.values():
        for calibration in (None, samples.calibration(g)):
            codec = CacheGen(g, level, calibration)
            stored = codec.encode(samples.to_rows(x, dtype), sinks=sinks)
            assert len(stored) <= codec.stored_bytes_limit(blocks)
            y = samples.from_rows(samples.back(codec, stored, blocks), g)
            # As a sequence: [layer, plane, token, head, dim].
            a, b = (v.transpose(1, 2, 0, 3, 4, 5).reshape(g.layers, g.planes, -1, *v.shape[4:]) for v in (x, y))
            assert (a[:, :, :sinks] == b[:, :, :sinks]).all()
            deviation = a[:, :, sinks:].std(axis=(2, 4), keepdims=True) if sinks < a.shape[2] else 1.0
            widest = codec_steps(codec, level)[:, :, None, None, None]
            # A step is rounded to an eighth of an octave; rounding of the dtype comes on top.
            allowed = 0.5 * widest * deviation * 2 ** (1 / 16) * 1.01 + np.abs(a) * 2.0**-8
            assert (np.abs(a - b) <= allowed).all()


def codec_steps(codec: CacheGen, level):  # type: ignore[no-untyped-def]
    return level.relative_steps(codec.geometry, codec._calibration)


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fixed_rates_are_fixed_and_near(kind: type[Int8], shape: str, dtype: str) -> None:
    g = geometry(shape, dtype)
    codec = kind(g)
    rows = samples.to_rows(samples.values(g, 5), dtype)
    sinks = min(8, 5 * g.block_tokens)
    stored = codec.encode(rows, sinks=sinks)
    assert len(stored) == codec.stored_bytes(5, sinks) <= codec.stored_bytes_limit(5)
    assert len(codec.encode(np.zeros_like(rows))) == codec.stored_bytes(5)
    out = samples.back(codec, stored, 5)
    x, y = samples.from_rows(rows, g), samples.from_rows(out, g)
    first = x[0, :, :, :sinks], y[0, :, :, :sinks]
    assert (first[0] == first[1]).all()
    rest = np.concatenate([x[0, :, :, sinks:].reshape(-1), x[1:].reshape(-1)])
    assert np.abs(x - y).max() <= LOSSY[kind] * (rest.max() - rest.min() + np.abs(rest).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", [1, 9])
@pytest.mark.parametrize("kind", [Lossless, Packed])
def test_without_loss_every_bit_comes_back(kind: type[Exact], shape: str, dtype: str, blocks: int) -> None:
    g = geometry(shape, dtype)
    codec = kind(g)
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (blocks, g.block_bytes), np.uint8)
    ordinary = samples.to_rows(samples.values(g, blocks), dtype)
    for rows in (ordinary, noise, np.zeros_like(noise), np.where(noise < 9, noise, ordinary)):
        stored = codec.encode(rows)
        assert len(stored) <= codec.stored_bytes_limit(blocks)
        assert (samples.back(codec, stored, blocks) == rows).all()


@pytest.mark.parametrize("kind", [Lossless, Packed])
def test_a_fifth_of_bfloat16_is_saved_without_loss(kind: type[Exact]) -> None:
    g = geometry("mha", "bfloat16")
    rows = samples.to_rows(samples.values(g, 32), "bfloat16")
    assert len(rows.reshape(-1)) / len(kind(g).encode(rows)) >= 1.25


@pytest.mark.parametrize("codec", [CacheGen, Int8, Int4, Fp8, Lossless, Packed])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 3e38, 1e-40])
def test_strange_values_do_no_harm_to_others(codec: type[Codec], special: float) -> None:
    g = geometry("gqa", "float32")
    x = samples.values(g, 3)
    x[1, 1, 0, 3, 1, 5] = special
    made = codec(g)
    y = samples.from_rows(samples.back(made, made.encode(samples.to_rows(x, g.dtype)), 3), g)
    if issubclass(codec, Exact) or (codec is CacheGen and not abs(special) < 1):
        assert np.array_equal(y[1, 1, 0, 3, 1, 5], np.float32(special), equal_nan=True)
    assert np.isfinite(y[:, 2]).all()
    assert np.abs(y[:, 2] - x[:, 2]).max() < 0.2 * np.abs(x[:, 2]).max()


@pytest.mark.parametrize("codec", [CacheGen, *LOSSY])
def test_values_at_the_end_of_float16_stay_numbers(codec: type[Codec]) -> None:
    """As an engine has them that clips: rounded up they would be infinite, and so the answer."""
    g = geometry("gqa", "float16")
    x = np.clip(samples.values(g, 9) * 3e5, -65504, 65504)
    for scale in (1.0, 0.5, 0.3):
        rows = samples.to_rows(x * scale, "float16")
        assert np.isfinite(samples.from_rows(rows, g)).all()
        assert np.isfinite(samples.from_rows(samples.back(codec(g), codec(g).encode(rows), 9), g)).all()


@pytest.mark.parametrize("codec", [CacheGen, Int8, Int4, Fp8, Lossless, Packed])
def test_layer_by_layer_is_the_same(codec: type[Codec]) -> None:
    g = geometry("gqa", "bfloat16")
    made = codec(g)
    stored = made.encode(samples.to_rows(samples.values(g, 3), g.dtype))
    whole, parts = np.zeros((3, g.block_bytes), np.uint8), np.zeros((3, g.block_bytes), np.uint8)
    assert made.decode(stored, whole)
    for layer in (2, 0, 1):
        before = parts.copy()
        assert made.decode(stored, parts, layers=range(layer, layer + 1))  # type: ignore[call-arg]
        others = np.ones(g.layers, bool)
        others[layer] = False
        shape = (3, g.layers, g.layer_bytes)
        assert (parts.reshape(shape)[:, others] == before.reshape(shape)[:, others]).all()
    assert (whole == parts).all()


@pytest.mark.parametrize("codec", [CacheGen, Int8, Lossless])
def test_one_block_and_rows_with_gaps_are_taken(codec: type[Codec]) -> None:
    g = geometry("mha", "float16")
    made = codec(g)
    memory = np.zeros((4, g.block_bytes + 128), np.uint8)
    memory[:, : g.block_bytes] = samples.to_rows(samples.values(g, 4), g.dtype)
    assert (made.encode(memory) == made.encode(memory[:, : g.block_bytes].copy())).all()
    block = memory[1, : g.block_bytes]
    out = np.empty(g.block_bytes, np.uint8)
    assert made.decode(made.encode(block), out)
    with pytest.raises(InputError, match="must be"):
        made.encode(block[:-2])
    with pytest.raises(InputError, match="contiguous"):
        made.encode(np.zeros((2, 2 * g.block_bytes), np.uint8)[:, ::2])


def test_levels_grow_smaller_and_calibration_helps_none_but_the_writer() -> None:
    g = geometry("mha", "bfloat16")
    rows = samples.to_rows(samples.values(g, 16), g.dtype)
    sizes = [len(CacheGen(g, level, samples.calibration(g)).encode(rows)) for level in LEVELS.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    stored = CacheGen(g, calibration=samples.calibration(g)).encode(rows)
    plain = samples.back(CacheGen(g), stored, 16)
    assert (plain == samples.back(CacheGen(g, calibration=samples.calibration(g)), stored, 16)).all()


@pytest.mark.parametrize("codec", [CacheGen, Int8, Int4, Fp8, Lossless, Packed])
def test_quantized_geometries_are_refused(codec: type[Codec]) -> None:
    with pytest.raises(GeometryError, match="can be compressed"):
        codec(KVGeometry(layers=1, kv_heads=1, head_dim=8, dtype="float8_e4m3"))
