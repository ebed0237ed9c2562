"""The parts of `cachegen`: shared tables, rANS lanes, sines."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.codec import rans, rotary, tables
from cairn.codec.calibration import Calibration
from cairn.codec.levels import LEVELS
from cairn.codec.rotary import Rotary
from cairn.errors import GeometryError, InputError
from cairn.kv import KVGeometry
from tests.codec import samples


def test_every_slot_names_its_symbol() -> None:
    shared = tables.shared_tables()
    encoder = shared.encoder.reshape(tables.WIDTHS, tables.SYMBOLS)
    decoder = shared.decoder.reshape(tables.WIDTHS, tables.SLOTS)
    for row, slots in zip(encoder, decoder, strict=True):
        freq, start = row & 0xFFFF, row >> 16
        assert freq.sum() == tables.SLOTS
        assert freq.min() >= 1
        for symbol in range(tables.SYMBOLS):
            part = slots[start[symbol] : start[symbol] + freq[symbol]]
            assert (part >> 22 == symbol).all()
            assert (part >> 11 & 2047 == freq[symbol]).all()
            assert (part & 2047 == np.arange(freq[symbol])).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([1, 3, 32, 33, 70]), st.sampled_from([1, 2, 17]))
def test_lanes_give_back_any_residual_in_range(seed: int, channels: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    classes = rng.choice(tables.classes(), channels)
    reach = tables.HALF << (classes >> 4).astype(np.int64)
    residuals = rng.integers(-reach, reach, (tokens, channels)).astype(np.int16)
    shared, total = tables.shared_tables(), -(-channels // rans.LANES)
    words, states = np.empty(tokens * total * rans.LANES, np.uint16), np.empty(rans.LANES, np.uint32)
    count = rans.encode_stream(residuals, 0, total, classes, shared.encoder, words, states)
    out = np.zeros_like(residuals)
    assert rans.decode_stream(words, 0, count, states.copy(), 0, total, classes, shared.decoder, out)
    assert (out == residuals).all()
    # One word too few or too many is no such stream.
    assert not rans.decode_stream(words, 0, count - 1, states.copy(), 0, total, classes, shared.decoder, out)
    assert not rans.decode_stream(words, 0, count + 1, states.copy(), 0, total, classes, shared.decoder, out)


def test_rates_are_those_of_the_distribution() -> None:
    rng = np.random.default_rng(1)
    shared = tables.shared_tables()
    for sigma in (0.5, 1.0, 2.0, 12.0):
        residuals = np.rint(rng.logistic(0, sigma * math.sqrt(3) / math.pi, (4096, 32)))
        klass = tables.classes()[np.searchsorted(tables.class_edges(), residuals.std())]
        reach = tables.HALF << int(klass >> 4)
        residuals = np.clip(residuals, -reach, reach - 1).astype(np.int16)
        _, counts = np.unique(residuals, return_counts=True)
        share = counts / residuals.size
        entropy = -(share * np.log2(share)).sum()
        words, states = np.empty(residuals.size, np.uint16), np.empty(32, np.uint32)
        count = rans.encode_stream(residuals, 0, 1, np.full(32, klass, np.uint8), shared.encoder, words, states)
        assert entropy <= (16 * count + 32 * 32) / residuals.size <= entropy + 0.15


def test_sines_are_sines() -> None:
    turns = np.array(Rotary.from_theta(10000.0, 64).turns, np.uint32)
    cosine, sine = rotary.sines(turns, 500) / 2**rotary.SINE_BITS
    angles = np.arange(500)[:, None] * 10000.0 ** (-np.arange(32) / 32)
    assert np.abs(cosine - np.cos(angles)).max() < 2e-3
    assert np.abs(sine - np.sin(angles)).max() < 2e-3
    with pytest.raises(GeometryError, match="does not fit"):
        Rotary.from_theta(10000.0, 64, first=1).check(64)


def test_keys_that_turn_cost_less_when_it_is_known() -> None:
    from cairn.codec.cachegen import CacheGen

    g = KVGeometry(layers=1, kv_heads=1, head_dim=64, block_tokens=16)
    rng = np.random.default_rng(0)
    known = Calibration(model="x", sensitivity=((0.02, 0.02),), rotary=Rotary.from_theta(1000.0, 64))
    angles = np.arange(256)[:, None] * 1000.0 ** (-np.arange(32) / 32)
    turned = np.exp(1j * angles) * (rng.normal(0, 8, 32) + 1j * rng.normal(0, 8, 32))
    keys = np.concatenate([turned.real, turned.imag], axis=1) + rng.normal(0, 1, (256, 64))
    x = np.stack([keys, rng.normal(0, 1, (256, 64))]).reshape(1, 2, 16, 16, 1, 64).transpose(2, 0, 1, 3, 4, 5)
    rows = samples.to_rows(np.ascontiguousarray(x, np.float32), g.dtype)
    steps = np.full((1, 2), 0.25, np.float32)
    errors = []
    for calibration in (known, None):
        codec = CacheGen(g, LEVELS["high"], calibration)
        y = samples.from_rows(samples.back(codec, codec.encode_at(steps, rows), 16), g)
        errors.append(float(np.square(y - x)[:, :, 0].mean()))
    assert errors[0] < 0.25**2 / 12 * 1.4  # the noise of the step, and bfloat16's
    assert errors[1] > 5 * errors[0]


def test_calibrations_are_checked(tmp_path) -> None:  # type: ignore[no-untyped-def]
    g = KVGeometry(layers=2, kv_heads=1, head_dim=8)
    good = samples.calibration(g)
    good.save(tmp_path / "good.json")
    assert Calibration.load(tmp_path / "good.json") == good
    with pytest.raises(InputError, match="2 layers"):
        good.check(KVGeometry(layers=3, kv_heads=1, head_dim=8))
    (tmp_path / "bad.json").write_text('{"model": "x", "sensitivity": [[0]]}')
    with pytest.raises(InputError, match="above 0"):
        Calibration.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match="no calibration"):
        Calibration.load(tmp_path / "bad.json")
    with pytest.raises(InputError, match="No such file"):
        Calibration.load(tmp_path / "none.json")


def test_a_level_spends_its_budget_evenly() -> None:
    g = KVGeometry(layers=2, kv_heads=1, head_dim=8)
    known = Calibration(model="x", sensitivity=((0.01, 0.04), (0.09, 1e-9)))
    steps = LEVELS["high"].relative_steps(g, known)
    cost = np.array(known.sensitivity) * steps.astype(np.float64) ** 2
    assert cost.reshape(-1)[:3] == pytest.approx(0.65 * LEVELS["high"].kl / 4)
    assert steps[1, 1] == 1.5
