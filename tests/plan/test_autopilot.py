"""The autopilot: pins are honoured, nothing is done that is expected to be slower, and every reason can be had."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.config import Config, load_config
from cairn.config.autopilot import PRESETS
from cairn.config.autopilot import Autopilot as Pins
from cairn.errors import ConfigError
from cairn.plan import Autopilot, Blend, CostModel, Decision, Kind, Segment, Why, Work

SIZE = 1000
seconds = st.floats(1e-7, 1e-2)
pins = st.builds(
    Pins, **{name: st.sampled_from(["auto", "always", "never"]) for name in Pins.model_fields if name != "preset"}
)


def measured(token_s: float = 1e-3, byte_s: float = 1e-9, factor: float = 1.0, tier: str = "dram") -> CostModel:
    """Prefills up to 4,096 tokens, loads, and blendings that take `factor` times what their work does."""
    cost = CostModel()
    for tokens, context in [(16, 0), (512, 0), (4096, 0), (512, 4096), (64, 8192)]:
        cost.recompute.observe(Work.of([(tokens, context)]), 1e-3 + token_s * tokens + 1e-8 * tokens * context)
    for name in {"dram", tier}:
        for size in (10**5, 10**6):
            cost.observe_load(name, size, byte_s * size)
    for _ in range(4):
        cost.blend.observe(1.0, factor)
    return cost


def pilot(cost: CostModel, pins: Pins = Pins(), **more: Any) -> tuple[Autopilot, list[Decision]]:  # noqa: B008
    told: list[Decision] = []
    return Autopilot(pins, cost, SIZE, told.append, **more), told


def rag(chunks: int = 4, held: int = 4, chunk: int = 200, prefix: int = 32) -> Blend:
    """A prompt of chunks, the first `held` of which are."""
    pieces = [(prefix + i * chunk, prefix + (i + 1) * chunk) for i in range(held)]
    stop = pieces[-1][1] if pieces else prefix
    return Blend(prefix + chunks * chunk + 20, prefix, stop, pieces, (6,), (0.15,), 4, 30)


@given(
    token_s=seconds,
    byte_s=st.floats(1e-12, 1e-4),
    factor=st.floats(0.1, 20),
    held=st.integers(0, 6),
    chunk=st.integers(1, 300),
    pins=pins,
)
def test_pins_are_honoured_and_what_is_open_is_never_expected_to_be_slower(
    token_s: float, byte_s: float, factor: float, held: int, chunk: int, pins: Pins
) -> None:
    cost = measured(token_s, byte_s, factor, "disk")
    auto, told = pilot(cost, pins)
    facts = rag(6, held, chunk)
    loaded = auto.load([Segment("dram", 64), Segment("disk", held * chunk)], 2000).tokens
    blended = auto.blend(facts).yes
    written = auto.write("disk", 32, 500)
    layered = auto.layerwise(500, alone=False)
    storing = auto.store_while_computing(500)
    everything = 64 + held * chunk
    assert [one.kind for one in told] == [Kind.LOAD, Kind.BLEND, Kind.WRITE, Kind.LAYERWISE, Kind.STORE]
    for one in told[:3]:
        acts = one.choice not in ("none", "no")
        if one.why in (Why.FASTER, Why.SLOWER) and one.kind is not Kind.WRITE:
            assert acts == (one.why is Why.FASTER)
            assert not acts or one.expected_s < one.instead_s
    assert pins.load != "never" or loaded == 0
    assert pins.load != "always" or loaded == everything
    assert pins.blend != "never" or not blended
    assert pins.blend != "always" or blended == (held > 0)
    assert pins.disk == "auto" or written == (pins.disk == "always")
    assert pins.layerwise == "auto" or layered == (pins.layerwise == "always")
    assert storing == (pins.layerwise == "always" and pins.store != "never")
    assert auto.stores == (pins.store != "never")


def test_every_reason_can_be_had() -> None:
    found = set()
    for cost in (CostModel(), measured(), measured(byte_s=1.0), measured(tier="disk", byte_s=1.0, factor=50.0)):
        for pin in (Pins(), Pins(preset="chat")):
            auto, told = pilot(cost, pin)
            for segments in ([], [Segment("dram", 160)]):
                auto.load(segments, 500)
            for held in (0, 1, 4):
                auto.blend(rag(held=held))
            for alone, tokens in ((True, 1), (False, 1), (False, 10**6)):
                auto.layerwise(tokens, alone=alone)
            auto.layerwise(1, able=False)
            for awaited in (True, False):
                auto.store_while_computing(100, awaited=awaited)
            for tier in ("disk", "remote"):
                auto.write(tier, 0, 500)
            found |= {one.why for one in told}
    assert found == set(Why) - {Why.AS_FAST}  # the ladder of codecs says that one


def test_blending_is_learnt_and_what_was_learnt_is_forgotten_when_it_is_not_used() -> None:
    cost = measured()
    auto, told = pilot(cost)
    plan = auto.blend(rag())
    assert plan.yes
    assert told[-1].expected_s < told[-1].instead_s
    for _ in range(16):
        auto.blended(plan, 10 * plan.bare_s)
    assert cost.blend.factor == pytest.approx(10)
    declined = 0
    while not auto.blend(rag()).yes:
        declined += 1
    assert 10 <= declined <= 16
    auto.blended(plan._replace(bare_s=math.nan), 1.0)  # what was not expected teaches nothing
    assert cost.blend.factor == 1


def test_until_prefills_are_measured_the_computed_share_decides() -> None:
    auto, told = pilot(CostModel())
    assert auto.blend(rag(held=4)).yes
    assert not auto.blend(rag(held=1, chunks=8)._replace(stop=1600)).yes
    assert {one.why for one in told} == {Why.UNMEASURED}


def test_without_a_planner_what_costs_would_decide_is_done() -> None:
    auto, told = pilot(measured(byte_s=1.0, factor=50.0), measures=False)
    assert auto.load([Segment("dram", 160)], 500).tokens == 160
    assert auto.blend(rag()).yes
    assert auto.write("disk", 0, 500)
    assert {one.why for one in told} == {Why.PINNED}


def test_presets_pin_all_and_pins_win_over_presets() -> None:
    for name, pinned in PRESETS.items():
        config = load_config(environ={}, overrides={"autopilot.preset": name})
        assert {key: getattr(config.autopilot, key) for key in pinned} == pinned
        assert Config.model_validate_json(config.model_dump_json()) == config
    config = load_config(environ={"CAIRN_AUTOPILOT__PRESET": "chat"}, overrides={"autopilot.disk": "auto"})
    assert (config.autopilot.disk, config.autopilot.blend) == ("auto", "never")
    with pytest.raises(ConfigError, match=r"autopilot\.preset='shat'"):
        load_config(environ={}, overrides={"autopilot.preset": "shat"})
