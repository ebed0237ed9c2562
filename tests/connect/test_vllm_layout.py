"""When a vLLM engine's rows can be told in the canonical order, and why not where they cannot."""

from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from cairn.connect.vllm import layout
from cairn.connect.vllm.model import _named_revision
from cairn.errors import GeometryError
from cairn.kv import KVGeometry, Layout, Part

WHOLE = KVGeometry(layers=5, kv_heads=4, head_dim=8, dtype="float32", block_tokens=4)


def found(monkeypatch: pytest.MonkeyPatch, *, tensor: int, stages: list[int], **told: Any) -> Layout:
    """The layout of so many ranks in each of the stages; told: what differs from a plain model on the CPU."""
    monkeypatch.setattr(layout, "_is_cpu_page", lambda *_: told.get("proved", True))
    whole = told.get("whole", WHOLE)
    shard = replace(whole, kv_heads=whole.kv_heads // tensor)
    shards = tuple(replace(shard, layers=layers) for layers in stages for _ in range(tensor))
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=None, get_total_num_kv_heads=lambda: told.get("heads", 4)),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    return layout.layout_of(config, shards, len(stages), whole, told.get("page", "cpu:LBHNC"))


def test_stages_and_their_ranks_stand_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, tensor=1, stages=[5]) == Layout("vllm_cpu")
    assert found(monkeypatch, tensor=2, stages=[3, 2]) == Layout(
        "vllm_cpu", (Part(0, 3, 0, 2), Part(0, 3, 2, 2), Part(3, 2, 0, 2), Part(3, 2, 2, 2))
    )


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"heads": 2}, "4 heads in 4 ranks repeat the model's 2 KV heads"),
        ({"whole": replace(WHOLE, planes=1)}, "whole MLA latent"),
        ({"whole": replace(WHOLE, dtype="float8_e4m3")}, "scales"),
        ({"page": "cuda:BLNHC"}, "not known"),
        ({"proved": False}, "not known"),
    ],
)
def test_what_cannot_be_proved_is_kept_apart(monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], why: str) -> None:
    with pytest.raises(GeometryError, match=why) as caught:
        found(monkeypatch, tensor=4, stages=[5], **told)
    assert "\n" not in str(caught.value)


def test_what_vllm_makes_of_named_weights_keeps_them_apart() -> None:
    """A revision that an operator has given stands for the plain weights only."""

    def revision(given: str | None = "r", **told: Any) -> str | None:
        plain: dict[str, Any] = {"quantization": None, "hf_overrides": {}}
        model = SimpleNamespace(**plain | told, hf_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 1}))
        return _named_revision(SimpleNamespace(model_config=model, speculative_config=told.get("draft")), given)

    draft = SimpleNamespace(method="eagle", model="small")
    found = [
        revision(),
        revision(quantization="awq"),
        revision(hf_overrides={"rope_theta": 1}),
        revision(hf_overrides=lambda config: config),
        revision(draft=draft),
    ]
    assert found[0] == "r"
    assert found[2] == found[3]
    assert len(set(found)) == 4
    assert revision(None, quantization="awq") is None
