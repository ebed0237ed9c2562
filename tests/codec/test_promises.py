"""Every level on a fixed piece of a real text, with a real model: what it costs, and the bits that it takes.

A promise is about the mean over many texts (`cairn bench quality`); 96 tokens lie around it, and may cost a third more.
"""

from typing import Any

import pytest
import torch

from cairn.cli.demo.model import NAME
from cairn.cli.quality.measure import scores
from cairn.cli.quality.run import subjects
from cairn.cli.quality.texts import CONTEXT, Window, windows
from cairn.codec.calibration import shipped
from cairn.codec.levels import LEVELS
from cairn.kv import KVGeometry
from tests.smollm2 import smollm2

SCORED = 96
#: Most bits an element on this text, a twentieth above what it is.
MOST_BITS = {"near-lossless": 5.6, "high": 4.4, "balanced": 3.6, "small": 2.9}


@pytest.fixture(scope="module")
def scored() -> dict[str, Any]:
    """All levels on one window, by their subjects' names."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = smollm2()
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, local_files_only=True).eval()
    window = next(
        w for w in windows(AutoTokenizer.from_pretrained(home, local_files_only=True), 8) if "Python" in w.source
    )
    known = shipped(NAME)
    assert known is not None
    every = subjects(KVGeometry.from_hf(model.config, dtype="bfloat16"), known)
    wanted = [f"cachegen {level}" for level in LEVELS] + ["lossless"]
    part = Window(window.source, window.ids[: CONTEXT + SCORED])
    return dict(scores(model, part, {name: every[name] for name in wanted}))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_level_costs_about_what_it_promises(scored: dict[str, Any], level: str) -> None:
    found = scored[f"cachegen {level}"]
    assert 0 < found.kl <= 1.33 * LEVELS[level].kl
    assert found.bits <= MOST_BITS[level]


@pytest.mark.slow
def test_lossless_saves_a_fifth(scored: dict[str, Any]) -> None:
    assert scored["lossless"].bits <= 16 / 1.25
    assert scored["lossless"].kl < 5e-5  # bfloat16 in a float32 model
