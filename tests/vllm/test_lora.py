"""LoRA: base model and adapters never meet, and each answers as vLLM alone does."""

import json
from pathlib import Path
from typing import Any

import pytest

from cairn.connect.vllm.adapters import Adapters
from tests.vllm.engine import BLOCK, PROMPTS, hits, no_leak, serving, settle

RANK = 8
ASKED = [PROMPTS[1][:320], PROMPTS[2][:320][::-1]]


def make_adapter(model: Path, home: Path, seed: int) -> Path:
    """Random weights on the projections that K and V come from, large enough to change the answers."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        for name, width in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{stem}.lora_A.weight"] = 0.05 * torch.randn(RANK, hidden, generator=random)
            weights[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(width * head_dim, RANK, generator=random)
    home.mkdir()
    save_file(weights, str(home / "adapter_model.safetensors"))
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
    }
    (home / "adapter_config.json").write_text(json.dumps(settings))
    return home


def ask(llm: Any, adapter: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in ASKED]
    outputs = llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_adapters_do_not_meet(model: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    adapters = [
        None,
        LoRARequest("a", 1, str(make_adapter(model, tmp_path / "a", 1))),
        LoRARequest("b", 2, str(make_adapter(model, tmp_path / "b", 2))),
    ]
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    with serving(model, None, enable_prefix_caching=False, **options) as llm:
        plain = [ask(llm, adapter) for adapter in adapters]
    assert all(plain[i][k] != plain[j][k] for k in (0, 1) for i, j in ((0, 1), (0, 2), (1, 2)))
    with serving(model, {}, **options) as llm:
        for warm in (False, True):
            for adapter, expected in zip(adapters, plain, strict=True):
                before = hits(llm)
                assert ask(llm, adapter) == expected
                settle(llm)
                assert hits(llm) - before == (2 * 10 * BLOCK if warm else 0)
        no_leak(llm)


class Request:
    """What of vLLM's LoRARequest Cairn reads."""

    def __init__(self, name: str, number: int, path: Path | str) -> None:
        self.lora_name, self.lora_int_id, self.lora_path = name, number, str(path)


def test_an_adapter_is_its_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
    adapters = Adapters()
    first = adapters.identity(Request("a", 1, tmp_path / "a"))
    assert first
    assert adapters.identity(Request("a", 1, tmp_path / "a")) == first
    assert adapters.identity(Request("b", 2, tmp_path / "b")) not in (first, None)
    assert adapters.identity(None) == ""
    # Another process, the same files.
    assert Adapters().identity(Request("a", 7, tmp_path / "a")) == first


def test_an_adapter_of_unknown_weights_is_not_served(tmp_path: Path) -> None:
    """vLLM keeps what it has read, until it reads it again: nobody knows which."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    adapters, request = Adapters(), Request("a", 1, tmp_path)
    first = adapters.identity(request)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"another")
    assert adapters.identity(request) is None
    assert adapters.identity(request) is None
    assert adapters.identity(Request("a", 2, tmp_path)) not in (first, None)
    assert adapters.identity(Request("hub", 3, "nobody/never-fetched")) is None
    assert adapters.identity(Request("gone", 4, tmp_path / "gone")) is None


def test_an_adapter_whose_files_are_being_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One goes between two looks at it: its request is served without Cairn, and vLLM's step goes on."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    adapters, request, is_file = Adapters(), Request("a", 1, tmp_path), Path.is_file
    first = adapters.identity(request)

    def goes(path: Path) -> bool:
        there = is_file(path)
        path.rename(tmp_path.parent / "aside")
        return there

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", goes)
        assert adapters.identity(request) is None
    (tmp_path.parent / "aside").rename(tmp_path / "adapter_model.safetensors")
    assert adapters.identity(request) == first
