"""Blending with Transformers: chunks in a new order, what is stored of it, and what is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cairn.blend.checked import Checked
from cairn.config import load_config
from cairn.config.schema import Blending
from cairn.connect.transformers import CairnConnector, namespace_of
from cairn.engine import CacheEngine
from cairn.errors import GeometryError, InputError
from tests.blend.rig import model_of, tokens_of
from tests.connect.rig import BLOCK, check, generate, open_engine
from tests.connect.test_compressed import divergence

SEPARATOR = [94, 95, 94]
SETTINGS = {"blending.enabled": True, "blending.special_str": "sep", "blending.check_layers": [1]}


class Tokenizer:
    """Knows one word."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert (text, add_special_tokens) == ("sep", False)
        return SEPARATOR


def prompt(*chunks: Any, system: int = 37) -> Any:
    """System, chunks, question: [1, n]."""
    parts = [tokens_of(100, system), *chunks, tokens_of(101, 9)]
    joined = [part for piece in parts for part in (np.array(SEPARATOR), piece)][1:]
    return torch.from_numpy(np.concatenate(joined).astype(np.int64))[None]


A, B, C = (tokens_of(seed, length) for seed, length in ((1, 70), (2, 49), (3, 64)))
WHOLE = 64 + 48 + 64


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_ratio_one_answers_as_the_model(family: str) -> None:
    """Everything is loaded, and everything computed: tokens are equal, logits to 1e-4."""
    model = model_of(family)
    settings = {**SETTINGS, "blending.recompute_ratios": [1.0]}
    with open_engine(model, **settings) as engine, CairnConnector(model, engine, Tokenizer()) as cairn:
        cold = check(model, cairn, prompt(A, B, C))
        assert cold.blended.reused == 0
        assert engine.metrics.blend_lookups.value(unit="chunks") == 3
        warm = check(model, cairn, prompt(C, A, B))
        assert warm.blended.reused == WHOLE


@pytest.mark.parametrize(
    "parts",
    [
        ["", "A", "B", "question"],  # a separator first
        ["system", "A", "B", ""],  # and last
        ["", "A", "", "", "B", "", ""],  # adjacent
        ["", ""],
        ["one", "A", "one", "B", "one", "question"],
    ],
)
def test_wherever_separators_stand(parts: list[str]) -> None:
    """Ratio 1: whatever is loaded, the answer is the model's."""
    model = model_of()
    texts = {"": A[:0], "one": A[:1], "A": A, "B": B, "system": tokens_of(100, 37), "question": tokens_of(101, 9)}
    joined = [part for name in parts for part in (np.array(SEPARATOR), texts[name])][1:]
    settings = {**SETTINGS, "blending.recompute_ratios": [1.0]}
    with open_engine(model, **settings) as engine, CairnConnector(model, engine, Tokenizer()) as cairn:
        for chunk in (A[:1], A, B):
            cairn.learn(chunk)
        cache = check(model, cairn, torch.from_numpy(np.concatenate(joined).astype(np.int64))[None])
        assert cache.blended.reused == (64 + 48 if "A" in parts else 0)
        assert not cache.blended.missing


def test_without_a_separator() -> None:
    """Chunks are cut by their content: a text that was learned is found where it stands behind another."""
    model = model_of()
    settings = {**SETTINGS, "blending.special_str": None, "blending.recompute_ratios": [1.0]}
    texts = [tokens_of(seed, 1200) for seed in (1, 2)]
    with open_engine(model, dram_blocks=1024, **settings) as engine, CairnConnector(model, engine) as cairn:
        assert sum(map(cairn.learn, texts)) > 2000
        whole = np.concatenate([tokens_of(3, 333), texts[1], tokens_of(4, 77), texts[0], tokens_of(5, 9)])
        cache = check(model, cairn, torch.from_numpy(whole.astype(np.int64))[None])
        assert cache.blended.reused > 800


def test_a_learned_text_is_cut_where_prompts_are() -> None:
    model = model_of()
    with open_engine(model, **SETTINGS) as engine, CairnConnector(model, engine, Tokenizer()) as cairn:
        cairn.learn(np.concatenate([A, SEPARATOR, B]))
        assert cairn.cache(prompt(B, A)).blended.reused == 64 + 48


@pytest.mark.parametrize("other", ["weights", "salt", "theta", "scaling"])
def test_nothing_of_others_is_blended(tmp_path: Path, other: str) -> None:
    """The same texts in a store that all share, by another model, for another tenant, or with other positions: even
    where the operator has given both models one name and revision.
    """
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    changes = {"theta": {"rope_theta": 2e4}, "scaling": {"factor": 4.0}}.get(other, {})
    models = [model_of(rope_parameters=rope), model_of(seed=other == "weights", rope_parameters={**rope, **changes})]
    named = {"name": "one", "revision": "1"} if changes else {}

    def blended(model: Any, salt: bytes) -> Any:
        config = load_config(
            environ={},
            overrides={
                **SETTINGS,
                "engine.planner": False,
                "engine.timeout_s": 30,
                "storage.cpu.size": 4 << 20,
                "storage.remote.url": f"file://{tmp_path}/store",
                "storage.remote.lookup_timeout_s": 60,
            },
        )
        with CacheEngine(namespace_of(model, salt=salt, **named), config) as engine:
            with CairnConnector(model, engine, Tokenizer()) as cairn:
                found = cairn.cache(prompt(C, A, B)).blended
                for chunk in (A, B, C):
                    cairn.learn(chunk)
            assert engine.flush(60)
        return found.reused

    assert blended(models[0], b"") == 0
    assert blended(models[1], b"tenant" if other == "salt" else b"") == 0
    assert blended(models[0], b"") == WHOLE


def test_reused_chunks_do_not_reach_prefixes() -> None:
    """What was blended is never stored: whoever has a prefix has it from a prefill."""
    model = model_of()
    with open_engine(model, **SETTINGS) as engine:
        with CairnConnector(model, engine, Tokenizer()) as cairn:
            for chunk in (A, B, C):
                assert cairn.learn(chunk) == len(chunk) // BLOCK * BLOCK
                assert cairn.learn(chunk) == 0
            ids = prompt(B, C, A)
            with cairn.cache(ids) as cache:
                assert cache.blended.reused == WHOLE
                assert cache.blended.exact == 40
                _, blended = generate(model, ids, cache, new_tokens=40)
        assert not torch.allclose(blended, generate(model, ids, new_tokens=40)[1], atol=1e-3)
        assert engine.lookup(ids[0]) == 40 // BLOCK * BLOCK
    settings = {**SETTINGS, "blending.enabled": False}
    with open_engine(model, **settings) as plain, CairnConnector(model, plain) as cairn:
        for _ in range(2):
            check(model, cairn, ids)


def test_turns_behind_a_blended_prompt() -> None:
    """The cache goes on as any other: cropped, extended, finished twice."""
    model = model_of()
    with open_engine(model, **SETTINGS) as engine, CairnConnector(model, engine, Tokenizer()) as cairn:
        cairn.learn(A)
        ids = prompt(B, A)
        cache = cairn.cache(ids)
        tokens, _ = generate(model, ids, cache)
        cache.finish()
        more = torch.cat([tokens, tokens_of_torch(7, 20)], dim=1)
        generate(model, more, cache)
        assert cache.finish() == 0
        assert engine.lookup(more[0]) <= cache.blended.exact
        # B was learnt when the request was over.
        again = cairn.cache(prompt(A, B))
        assert again.blended.reused == 64 + 48


def tokens_of_torch(seed: int, length: int) -> Any:
    return torch.from_numpy(tokens_of(seed, length).astype(np.int64))[None]


@pytest.mark.parametrize(
    ("tier", "settings"),
    [
        ("disk", {}),
        ("disk", {"storage.cpu.codec": "int8"}),
        ("remote", {"compression.algorithm": "none"}),
        ("remote", {"compression.algorithm": "lossless"}),
        ("remote", {"compression.algorithm": "cachegen"}),
    ],
)
def test_chunks_come_back_after_a_restart(tmp_path: Path, tier: str, settings: dict[str, Any]) -> None:
    """What is blended then is what was blended before, or near it where the store's codec loses something."""
    model, ids = model_of(head_dim=16), prompt(C, A, B)
    settings = {**SETTINGS, "engine.timeout_s": 30, "autopilot.codec": "always", **settings}
    if tier == "remote":
        settings |= {"storage.remote.url": f"file://{tmp_path}/store", "storage.remote.lookup_timeout_s": 60}
    disk = tmp_path / "kv" if tier == "disk" else None
    with open_engine(model, disk=disk, **settings) as engine, CairnConnector(model, engine, Tokenizer()) as cairn:
        for chunk in (A, B, C):
            cairn.learn(chunk)
        expected, logits = generate(model, ids, cairn.cache(ids))
        assert engine.flush(60)
    with open_engine(model, disk=disk, **settings) as engine, CairnConnector(model, engine, Tokenizer()) as cairn:
        cache = cairn.cache(ids)
        assert cache.blended.reused == WHOLE
        found, again = generate(model, ids, cache)
        assert engine.metrics.hit_tokens.value(tier=tier) >= WHOLE
    if settings.get("compression.algorithm") == "cachegen" or "storage.cpu.codec" in settings:
        assert 0 < divergence(logits[:1], again[:1]) < 0.05
    else:
        assert torch.equal(found, expected)
        assert torch.equal(again, logits)


def test_a_token_counts_once() -> None:
    """Of a blended prompt: a hit where it was loaded, as a chunk's or the prefix's, and else a miss."""
    model = model_of()
    with open_engine(model, **SETTINGS) as engine, CairnConnector(model, engine, Tokenizer()) as cairn:
        hits, misses = engine.metrics.hit_tokens, engine.metrics.miss_tokens
        for chunk in (A, B):
            cairn.learn(chunk)
        for order, loaded in (((A, B), 64 + 48), ((B, C, A), 32 + 64 + 48), ((C, B, A), 32 + WHOLE)):
            ids = prompt(*order)
            before = hits.value(), misses.value()
            with cairn.cache(ids) as cache:
                assert cache.blended.reused + cache.reused_tokens == loaded
                generate(model, ids, cache, new_tokens=1)
            assert hits.value() - before[0] == loaded
            assert misses.value() - before[1] == ids.shape[1] - loaded


def test_what_does_not_pay_is_left() -> None:
    """A chunk of one block in a long prompt: the prompt is computed, and nothing is blended."""
    model = model_of()
    settings = {**SETTINGS, "engine.planner": True}
    with open_engine(model, **settings) as engine, CairnConnector(model, engine, Tokenizer()) as cairn:
        cairn.learn(A[:16])
        cache = check(model, cairn, prompt(tokens_of(9, 300), A[:16]))
        assert cache.blended.reused == 0


def test_a_chunk_that_goes_away_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that does not come ends the blending, and not the request."""
    model = model_of()
    with open_engine(model, **SETTINGS) as engine, CairnConnector(model, engine, Tokenizer()) as cairn:
        cairn.learn(A)
        monkeypatch.setattr("cairn.engine.hold.Hold.scatter", lambda *_, **__: False)
        cache = check(model, cairn, prompt(B, A))
        assert cache.blended is None
        assert engine.metrics.failures.value(reason="internal") == 1


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 128}, "sliding_window=128"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("gpt2", {}, "it has no RoPE"),
        ("stablelm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial rotary"),
        ("olmo2", {}, "'olmo2' is none of llama, mistral, qwen2, qwen3"),
        ("deepseek_v3", {}, "MLA"),
        ("bloom", {}, "ALiBi"),
        ("qwen2_vl_text", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 2, 4]}}, "mrope"),
        ("smollm3", {}, "NoPE"),
    ],
)
def test_refusals_say_why(family: str, changes: dict[str, Any], reason: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from cairn.blend import refuse_blending

    with pytest.raises(GeometryError, match=reason) as refusal:
        refuse_blending(CONFIG_MAPPING[family](**changes))
    assert "\n" not in str(refusal.value)
    assert "set blending.enabled to false" in str(refusal.value)


def test_a_model_whose_check_failed_is_refused(tmp_path: Path) -> None:
    model = model_of()
    model.config.name_or_path = str(tmp_path)
    Checked.of(Blending(special_str="sep"), most_kl=0.1, kl={(1,): 0.3}).save(tmp_path)
    with open_engine(model, **SETTINGS) as engine, pytest.raises(GeometryError, match=r"costs up to 0\.3 nats"):
        CairnConnector(model, engine, Tokenizer())


def test_settings_that_do_not_fit() -> None:
    model = model_of()
    with open_engine(model, **SETTINGS) as engine, pytest.raises(InputError, match="without a tokenizer"):
        CairnConnector(model, engine)
    settings = {**SETTINGS, "blending.check_layers": [3]}
    with open_engine(model, **settings) as engine, pytest.raises(InputError, match="the model has layers 0"):
        CairnConnector(model, engine, Tokenizer())
    with open_engine(model) as engine, CairnConnector(model, engine) as cairn:  # noqa: SIM117
        with pytest.raises(InputError, match="enabled is false"):
            cairn.learn(A)
