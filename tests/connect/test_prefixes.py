"""Reuse of prefixes in every way: same tokens and same logits as plain Transformers, and as much reused as there is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

from cairn.connect.hf_cache import ROOM_TOKENS
from cairn.connect.transformers import CairnConnector
from tests.connect.rig import BLOCK, VOCABULARY, check, figures, generate, open_engine, prompt, tiny_model

MODEL = tiny_model()


@pytest.fixture
def connector() -> Iterator[CairnConnector]:
    with open_engine(MODEL) as engine, CairnConnector(MODEL, engine) as connector:
        yield connector


def test_a_wrong_prefix_would_show() -> None:
    """The oracle itself: another first token changes the logits by more than `check` lets pass."""
    one = prompt(0, 64)
    other = one.clone()
    other[0, 0] = (other[0, 0] + 1) % VOCABULARY
    assert (generate(MODEL, one)[1] - generate(MODEL, other)[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("length", "reused"),
    [(1, 0), (15, 0), (16, 15), (17, 16), (31, 16), (32, 31), (100, 96), (104, 96), (112, 111), (113, 112), (200, 112)],
)
def test_as_many_whole_blocks_as_are_stored_are_reused_and_one_token_is_computed(
    connector: CairnConnector, length: int, reused: int
) -> None:
    check(MODEL, connector, prompt(1, 112))
    cache = check(MODEL, connector, prompt(1, length))
    assert cache.reused_tokens == reused
    assert cache.reused_by_tier == ({"dram": reused} if reused else {})
    assert cache.loaded_bytes == reused * connector.engine.geometry.token_bytes


@pytest.mark.parametrize("at", [0, 5, 15, 16, 47, 48, 63])
def test_a_prompt_that_diverges_reuses_the_blocks_before(connector: CairnConnector, at: int) -> None:
    check(MODEL, connector, prompt(2, 64))
    other = prompt(2, 64)
    other[0, at:] = prompt(3, 64)[0, at:]
    assert check(MODEL, connector, other).reused_tokens == at // BLOCK * BLOCK


def test_the_next_turn_reuses_the_answer(connector: CairnConnector) -> None:
    first = prompt(4, 40)
    answer, _ = generate(MODEL, first, new_tokens=30)
    assert check(MODEL, connector, first, new_tokens=30).stored_tokens == 64
    # 40 + 30 tokens, the KV of the last one was never computed: 69 tokens, 4 whole blocks.
    turn = torch.cat([answer, prompt(5, 20)], dim=1)
    assert check(MODEL, connector, turn, new_tokens=30).reused_tokens == 64


def test_an_unfinished_cache_has_stored_the_prompt_only(connector: CairnConnector) -> None:
    ids = prompt(6, 48)
    cache = connector.cache(ids)
    answer, _ = generate(MODEL, ids, cache, new_tokens=40)
    assert connector.engine.lookup(answer[0]) == 48
    assert cache.finish() == 32
    assert connector.engine.lookup(answer[0]) == 80
    assert cache.finish() == 0


def test_one_cache_serves_several_turns(connector: CairnConnector) -> None:
    ids, cache, plain = prompt(7, 30), connector.cache(prompt(7, 30)), DynamicCache()
    for turn in range(3):
        expected, _ = generate(MODEL, ids, plain, new_tokens=9)
        ids, _ = generate(MODEL, ids, cache, new_tokens=9)
        assert torch.equal(ids, expected)
        ids = torch.cat([ids, prompt(8 + turn, 11)], dim=1)
    cache.finish()
    assert connector.engine.lookup(ids[0]) == 64


def test_buffers_grow_when_the_answer_outgrows_them(connector: CairnConnector) -> None:
    new = ROOM_TOKENS + 40
    check(MODEL, connector, prompt(9, 20), new_tokens=new)
    assert check(MODEL, connector, prompt(9, 20), new_tokens=new).reused_tokens == 16


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3, "output_logits": False},
        {"num_beams": 2, "num_return_sequences": 2, "output_logits": False},
        {"prefill_chunk_size": 20},
        {"prompt_lookup_num_tokens": 3, "output_logits": False},
    ],
    ids=["beams", "several beams", "chunked prefill", "assisted"],
)
def test_other_ways_to_generate(connector: CairnConnector, mode: dict[str, Any]) -> None:
    ids = prompt(20, 70)
    assisted = "prompt_lookup_num_tokens" in mode
    plain = MODEL.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, **mode)
    expected = plain.sequences if hasattr(plain, "sequences") else plain
    for reused in (0, 64):
        with connector.cache(ids) as cache:
            tokens = MODEL.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=24,
                do_sample=False,
                **mode,
            )
        assert torch.equal(tokens, expected)
        assert cache.reused_tokens == (0 if assisted else reused)
    # What those ways have stored is right for the plain way too, and the answer of a single sequence is stored.
    check(MODEL, connector, expected[:1])


@pytest.mark.parametrize(
    "model",
    [
        OPTForCausalLM(
            OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
        ),
        FalconForCausalLM(FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    ],
    ids=["a head that calls the decoder past its base model", "one head for keys under another name"],
)
def test_models_of_other_makes(model: Any) -> None:
    ids = prompt(25, 60)
    model.eval().generation_config.eos_token_id = None
    with open_engine(model) as engine, CairnConnector(model, engine) as connector:
        assert [check(model, connector, ids).reused_tokens for _ in range(2)] == [0, 48]
        assert model(ids, use_cache=True).past_key_values.layers[0].keys.shape[1] == engine.geometry.kv_heads


def test_samples_of_one_prompt_differ_and_store_the_prompt(connector: CairnConnector) -> None:
    ids = prompt(21, 40)
    check(MODEL, connector, prompt(21, 32))
    torch.manual_seed(1)
    expected = MODEL.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=True, num_return_sequences=3
    )
    torch.manual_seed(1)
    with connector.cache(ids) as cache:
        tokens = MODEL.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=True,
            num_return_sequences=3,
            past_key_values=cache,
        )
    assert torch.equal(tokens, expected)
    assert cache.reused_tokens == 32
    assert connector.engine.lookup(tokens[0]) == 32


def test_crop_and_reset_take_tokens_back(connector: CairnConnector) -> None:
    ids = prompt(22, 64)
    check(MODEL, connector, ids)
    cache = connector.cache(ids)
    cache.crop(-24)
    assert cache.get_seq_length() == 39
    other = torch.cat([ids[:, :39], prompt(23, 30)], dim=1)
    assert torch.equal(generate(MODEL, other, cache)[0], generate(MODEL, other)[0])
    cache.finish()
    assert connector.engine.lookup(other[0]) == 64
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(MODEL, prompt(24, 20), cache)[0], generate(MODEL, prompt(24, 20))[0])
    check(MODEL, connector, other)


@pytest.mark.parametrize("taken", [-4, -1])
@pytest.mark.parametrize("warm", [False, True])
def test_a_pass_that_was_interrupted_is_taken_back(connector: CairnConnector, warm: bool, taken: int) -> None:
    """It has been through the first layer and not through the others, which lose nothing by it."""
    ids, more = prompt(6, 48), prompt(7, 4)
    if warm:
        check(MODEL, connector, ids)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    cache = connector.cache(ids)
    MODEL(ids[:, cache.get_seq_length() :], past_key_values=cache)
    hook = MODEL.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        MODEL(more, past_key_values=cache)
    hook.remove()
    cache.crop(taken)
    assert [layer.get_seq_length() for layer in cache.layers] == [48, 48, 48]
    expected = MODEL(torch.cat([ids, more], dim=1)).logits[:, 48:]
    torch.testing.assert_close(MODEL(more, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_restart_starts_from_disk(tmp_path: Path) -> None:
    ids = prompt(25, 100)
    for reused in ({}, {"dram": 0, "disk": 96}):
        with open_engine(MODEL, disk=tmp_path / "kv") as engine, CairnConnector(MODEL, engine) as connector:
            assert check(MODEL, connector, ids).reused_by_tier == reused
            assert engine.flush(10)


def test_damaged_frames_are_computed_again(tmp_path: Path) -> None:
    ids = prompt(26, 96)
    with open_engine(MODEL, disk=tmp_path / "kv") as engine, CairnConnector(MODEL, engine) as connector:
        check(MODEL, connector, ids)
        assert engine.flush(10)
    damage(tmp_path / "kv" / "data")
    with open_engine(MODEL, disk=tmp_path / "kv") as engine, CairnConnector(MODEL, engine) as connector:
        assert check(MODEL, connector, ids).reused_tokens < 96
        assert check(MODEL, connector, ids).reused_tokens == 95


def damage(data: Path) -> None:
    """Flips a byte in every 1,000 that are not zero padding."""
    content = bytearray(data.read_bytes())
    for at in range(0, len(content), 1000):
        content[at] ^= 0x55
    data.write_bytes(content)


def test_what_was_evicted_is_computed_again() -> None:
    with open_engine(MODEL, dram_blocks=8) as engine, CairnConnector(MODEL, engine) as connector:
        check(MODEL, connector, prompt(27, 96))
        check(MODEL, connector, prompt(28, 96))
        assert check(MODEL, connector, prompt(27, 96)).reused_tokens < 95


runs = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 90), st.integers(0, 2), st.integers(0, 40), st.integers(1, 20)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(runs=runs, dram_blocks=st.sampled_from([4, 9, 64]))
def test_no_sequence_of_prompts_changes_an_answer(runs: list[tuple[int, ...]], dram_blocks: int) -> None:
    with open_engine(MODEL, dram_blocks=dram_blocks) as engine, CairnConnector(MODEL, engine) as connector:
        for head, length, tail, more, new in runs:
            ids = torch.cat([prompt(30 + head, length), prompt(40 + tail, more)], dim=1)
            check(MODEL, connector, ids, new_tokens=new)
        tiers = figures(engine)["tiers"]
        assert tiers["dram"]["pinned_blocks"] == 0
        assert tiers["dram"]["reserved_blocks"] == 0
