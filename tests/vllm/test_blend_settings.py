"""Where blending is off, and why; and how the model is found."""

import gc
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig

from cairn.blend.checked import Checked
from cairn.config import Config
from cairn.config.schema import Blending
from cairn.connect.vllm import plugin
from cairn.connect.vllm.blend_model import model_of
from cairn.connect.vllm.blending import make_private, settings_of
from cairn.errors import GeometryError
from cairn.kv import KVGeometry

G = KVGeometry(layers=4, kv_heads=2, head_dim=16, block_tokens=16)


def asked(blending: dict[str, Any] | None = None, ranks: int = 1, home: Path | str = "", **vllm: Any) -> Any:
    """What `settings_of` says. home: of the model. vllm: of its config, or of its model's."""
    text = LlamaConfig(num_hidden_layers=4)
    for name in ("llama_4_scaling", "rope_parameters"):
        setattr(text, name, vllm.pop(name, getattr(text, name, None)))
    model = SimpleNamespace(hf_text_config=text, skip_tokenizer_init=True, model=str(home))
    vllm_config = SimpleNamespace(**{"model_config": model, "lora_config": None} | vllm)
    served = SimpleNamespace(namespace=SimpleNamespace(geometry=vllm.pop("geometry", G)), ranks=ranks)
    settings = {"enabled": True, "special_str": None, "check_layers": (1,)} | (blending or {})
    return settings_of(vllm_config, served, Config(blending=Blending(**settings)))  # type: ignore[arg-type]


def test_as_configured() -> None:
    settings = asked({"recompute_ratios": (0.3,), "check_layers": (2,), "head_tokens": 7})
    assert settings.recipe == ((2,), (0.3,), 7)
    assert len(settings.separator) == 0
    assert asked({"enabled": False}) is None


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic"])
def test_every_rope_with_a_table_of_its_own(kind: str) -> None:
    assert asked(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})


@pytest.mark.parametrize(
    ("reason", "how"),
    [
        ("longrope", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}),
        ("blending.check_layers=[4]: the model has layers 0..3", {"blending": {"check_layers": (4,)}}),
        ("parallelism", {"ranks": 2}),
        ("LoRA", {"lora_config": object()}),
        ("draft model", {"speculative_config": object()}),
        ("scales", {"geometry": KVGeometry(layers=4, kv_heads=2, head_dim=16, block_tokens=16, dtype="float8_e4m3")}),
        ("llama_4_scaling", {"llama_4_scaling": {"beta": 0.1}}),
        ("without a tokenizer", {"blending": {"special_str": " # # "}}),
    ],
)
def test_refusals_say_why_and_prefixes_go_on(reason: str, how: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert asked(**how) is None
    (record,) = [record.getMessage() for record in caplog.records if record.name.startswith("cairn")]
    assert "prefixes are reused all the same" in record
    assert reason in record


def test_a_model_whose_check_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Checked.of(Blending(special_str=None), most_kl=0.1, kl={(1,): 0.3}).save(tmp_path)
    assert asked(home=tmp_path) is None
    assert "costs up to 0.3 nats a token" in caplog.text


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.attn = nn.Identity()


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])


def test_the_model_is_found_by_its_attentions() -> None:
    plugin.register()
    plugin.register()
    bodies = [Body() for _ in range(3)]
    attentions = [layer.self_attn.attn for layer in bodies[1].layers]
    assert plugin.body_with(attentions) is bodies[1]
    assert plugin.body_with(attentions[::-1]) is None
    assert plugin.body_with(attentions[:1]) is None
    with pytest.raises(GeometryError, match=r"Body.embed_tokens, Layer.input_layernorm"):
        model_of(attentions)
    del bodies
    gc.collect()
    with pytest.raises(GeometryError, match="has not run Cairn's plugin"):
        model_of(attentions)


def test_private_hashes() -> None:
    request = SimpleNamespace(block_hashes=[bytes([i]) * 32 for i in range(5)])
    before = list(request.block_hashes)
    make_private(request, 2)
    assert request.block_hashes[:2] == before[:2]
    assert len({*before, *request.block_hashes}) == 8
    assert {len(found) for found in request.block_hashes} == {32}
