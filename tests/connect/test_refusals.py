"""What the connector will not do: serve models it cannot, and KV of other tokens than it was computed from."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RoFormerConfig,
    RoFormerForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from cairn.connect.hf_model import namespace_of, weights_revision
from cairn.connect.transformers import CairnConnector
from cairn.errors import CairnError, ClosedError, GeometryError, InputError
from tests.connect.rig import check, figures, generate, open_engine, prompt, tiny_model

MODEL = tiny_model()
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


@pytest.fixture
def connector() -> Iterator[CairnConnector]:
    with open_engine(MODEL) as engine, CairnConnector(MODEL, engine) as connector:
        yield connector


# --- models ----------------------------------------------------------------------------------------------------------


def test_models_whose_kv_is_not_the_prefix_alone_are_refused() -> None:
    models = [
        (MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=32)), "sliding_window=32"),
        (tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
        (
            T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=96)),
            "encoder",
        ),
        (MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=96)), "recurrent"),
        (DeepseekV2ForCausalLM(DeepseekV2Config(**SMALL, kv_lora_rank=8, n_routed_experts=4)), "MLA"),
        (BertLMHeadModel(BertConfig(**SMALL)), "both ways"),
        (RoFormerForCausalLM(RoFormerConfig(**SMALL)), "both ways, as is_decoder=False in its config says"),
        (OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=1, n_head=2)), "no KV cache"),
    ]
    for model, reason in models:
        with pytest.raises(GeometryError, match=reason) as caught:
            namespace_of(model)
        assert "\n" not in str(caught.value)


def test_a_model_whose_layers_differ_is_refused() -> None:
    """Its config raises where it is asked for what differs."""

    class Differing(LlamaConfig):  # type: ignore[misc]
        is_heterogeneous = True

        @property
        def kv_lora_rank(self) -> int:
            raise RuntimeError("'kv_lora_rank' is a per-layer attribute")

    model = tiny_model()
    model.config = Differing(**model.config.to_dict())
    with pytest.raises(GeometryError, match="its layers differ"):
        namespace_of(model)


def test_a_model_with_other_heads_than_its_config_says_is_served_plainly() -> None:
    """CPMAnt has a name of its own for the width of a head."""
    model = tiny_model(head_dim=16)
    model.config.head_dim = 8
    ids = prompt(13, 40)
    with open_engine(model) as engine, CairnConnector(model, engine) as connector:
        for _ in range(2):
            assert check(model, connector, ids).reused_tokens == 0
        assert engine.lookup(ids[0]) == 0


def test_a_model_that_does_not_fit_the_engine_is_refused(connector: CairnConnector) -> None:
    with pytest.raises(GeometryError, match="must be equal"):
        CairnConnector(tiny_model(num_key_value_heads=4), connector.engine)
    with pytest.raises(GeometryError, match="must be equal"):
        CairnConnector(tiny_model().to(torch.bfloat16), connector.engine)


def test_a_revision_tells_any_change_of_the_weights() -> None:
    revision = weights_revision(MODEL)
    assert weights_revision(tiny_model()) == revision
    changed = tiny_model()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 7] += 1e-3
    assert weights_revision(changed) != revision
    assert weights_revision(tiny_model(rms_norm_eps=1e-3)) != revision
    assert weights_revision(tiny_model().to(torch.bfloat16)) != revision


def test_a_quantized_model_does_not_pass_for_the_plain_one() -> None:
    quantized = tiny_model()
    quantized.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="awq"))
    assert namespace_of(quantized, revision="r") != namespace_of(MODEL, revision="r")
    assert namespace_of(tiny_model(), revision="r") == namespace_of(MODEL, revision="r")


# --- requests --------------------------------------------------------------------------------------------------------


def test_one_sequence_of_token_ids_is_what_a_cache_is_for(connector: CairnConnector) -> None:
    for wrong in (prompt(0, 20).repeat(2, 1), prompt(0, 0), torch.ones(1, 4), -prompt(0, 5) - 1, [[1, 2], [3]]):
        with pytest.raises(InputError):
            connector.cache(wrong)
    for right in (prompt(0, 20), prompt(0, 20)[0], prompt(0, 20)[0].tolist()):
        assert connector.cache(right).get_seq_length() == 0


def test_a_prefix_is_not_lent_to_another_prompt(connector: CairnConnector) -> None:
    ids = prompt(1, 40)
    check(MODEL, connector, ids)
    other = ids.clone()
    other[0, 35] += 1
    with pytest.raises(InputError, match="another prompt"):
        generate(MODEL, other, connector.cache(ids))
    with pytest.raises(InputError, match="another prompt"):
        generate(
            MODEL,
            ids.repeat(2, 1).index_put((torch.tensor(1), torch.tensor(38)), torch.tensor(1)),
            connector.cache(ids),
        )
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    with pytest.raises(InputError, match="padding"):
        MODEL.generate(ids, attention_mask=padding, past_key_values=connector.cache(ids), max_new_tokens=2)
    with pytest.raises(InputError, match="positions"):
        MODEL(ids[:, 32:], position_ids=torch.arange(8)[None], past_key_values=connector.cache(ids))
    with pytest.raises(InputError, match="embeddings"):
        MODEL(inputs_embeds=torch.zeros(1, 8, 32), past_key_values=connector.cache(ids))


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2, "output_logits": False}], ids=["greedy", "beams"])
def test_a_prefix_is_not_lent_to_another_prompt_that_ends_alike(
    connector: CairnConnector, mode: dict[str, object]
) -> None:
    """Of which the model itself is given the same tokens; chat templates end alike always."""
    ids = prompt(1, 40)
    check(MODEL, connector, ids)
    other = ids.clone()
    other[0, 3] += 1
    cache = connector.cache(ids)
    for wrong in (other, torch.cat([ids, other]), other):
        with pytest.raises(InputError, match="another prompt"):
            generate(MODEL, wrong, cache, **mode)
    for wrong in (other, torch.cat([ids, other])):
        with pytest.raises(InputError, match="another prompt"):
            generate(MODEL, wrong, connector.cache(ids), **mode)


def test_a_next_turn_with_another_history_is_refused(connector: CairnConnector) -> None:
    ids = prompt(1, 40)
    check(MODEL, connector, ids)
    cache = connector.cache(ids)
    answer, _ = generate(MODEL, ids, cache)
    turn = torch.cat([answer, prompt(2, 10)], dim=1)
    turn[0, 41] = (turn[0, 41] + 1) % 96
    with pytest.raises(InputError, match="another prompt"):
        generate(MODEL, turn, cache)


def test_connectors_of_one_model_leave_it_as_it_was() -> None:
    model, ids = tiny_model(), prompt(3, 40)
    with open_engine(model) as engine:
        first, second = CairnConnector(model, engine), CairnConnector(model, engine)
        for one in (first, second):
            check(model, one, ids)
        first.close()
        check(model, second, ids)
        second.close()
        generate(model, ids)
        third = CairnConnector(model, engine)
        check(model, third, ids)
        third.close()
    assert not model._forward_pre_hooks
    assert "prepare_inputs_for_generation" not in vars(model)


def test_a_prefix_is_not_lent_on_asking_again(connector: CairnConnector) -> None:
    ids, other = prompt(1, 40), prompt(2, 60)
    check(MODEL, connector, ids)
    cache = connector.cache(ids)
    for _ in range(3):
        with pytest.raises(InputError):
            generate(MODEL, other, cache)
    cache.reset()
    assert torch.equal(generate(MODEL, other, cache)[0], generate(MODEL, other)[0])


def test_a_prefix_that_does_not_come_is_not_gone_on_behind(
    connector: CairnConnector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by asking again nor by taking back the pass that failed; and nothing is stored of it."""
    ids = prompt(1, 40)
    check(MODEL, connector, ids)
    monkeypatch.setattr(connector.engine.autopilot, "layerwise", lambda *_: True)
    cache = connector.cache(ids)
    assert cache._load is not None
    monkeypatch.setattr(type(cache._load), "wait", lambda *_: False)
    with pytest.raises(CairnError, match="did not come"):
        MODEL(ids[:, cache.get_seq_length() :], past_key_values=cache)
    cache.crop(32 - cache.get_seq_length())
    with pytest.raises(InputError):
        MODEL(ids[:, 32:], past_key_values=cache)
    assert cache.finish() == 0


def test_nothing_is_stored_of_passes_that_are_not_plain(connector: CairnConnector) -> None:
    ids, other = prompt(2, 40), prompt(3, 40)
    with connector.cache(ids) as cache:
        assert torch.equal(generate(MODEL, other, cache)[0], generate(MODEL, other)[0])
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    with connector.cache(ids) as cache:
        MODEL.generate(ids, attention_mask=padding, past_key_values=cache, max_new_tokens=2)
    with connector.cache(ids) as cache:
        MODEL(ids, position_ids=torch.arange(5, 45)[None], past_key_values=cache)
    assert connector.engine.lookup(ids[0]) == connector.engine.lookup(other[0]) == 0


def test_kv_of_token_types_is_neither_stored_nor_gone_on_behind() -> None:
    """GPT-2 adds an embedding for each: its KV is of more than the tokens."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=128, n_embd=32, n_layer=2, n_head=4)).eval()
    ids = prompt(12, 40)
    with open_engine(model) as engine, CairnConnector(model, engine) as connector:
        with connector.cache(ids) as cache:
            model(ids, token_type_ids=torch.full_like(ids, 7), past_key_values=cache)
        assert engine.lookup(ids[0]) == 0
        with connector.cache(ids) as cache:
            model(ids, past_key_values=cache)
        with pytest.raises(InputError, match="other inputs"):
            model(ids[:, 32:], token_type_ids=torch.full((1, 8), 7), past_key_values=connector.cache(ids))


def test_a_shifted_answer_is_not_stored(connector: CairnConnector) -> None:
    """Behind the prompt as well, only plain positions count."""
    ids, more = prompt(4, 32), prompt(5, 32)
    with connector.cache(ids) as cache:
        MODEL(ids, past_key_values=cache)
        MODEL(more, position_ids=torch.arange(100, 132)[None], past_key_values=cache)
    assert connector.engine.lookup(torch.cat([ids, more], dim=1)[0]) == 32


def test_kv_of_a_model_in_training_is_refused(connector: CairnConnector) -> None:
    MODEL.train()
    try:
        with pytest.raises(InputError, match="eval"):
            MODEL(prompt(6, 20), past_key_values=connector.cache(prompt(6, 20)))
    finally:
        MODEL.eval()


def test_kv_of_another_dtype_is_not_stored(connector: CairnConnector) -> None:
    ids = prompt(11, 40)
    with connector.cache(ids) as cache, torch.autocast("cpu", dtype=torch.bfloat16):
        MODEL(ids, past_key_values=cache)
    assert connector.engine.lookup(ids[0]) == 0
    check(MODEL, connector, ids)


def test_kv_of_another_model_is_not_stored(connector: CairnConnector) -> None:
    ids, other = prompt(7, 40), tiny_model(seed=1)
    with connector.cache(ids) as cache:
        other(ids, past_key_values=cache)
    assert connector.engine.lookup(ids[0]) == 0
    check(MODEL, connector, ids)
    with pytest.raises(InputError, match="did not see"):
        other(ids[:, 32:], past_key_values=connector.cache(ids))


# --- failures --------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_gone_costs_nothing_but_the_reuse(connector: CairnConnector) -> None:
    ids = prompt(8, 60)
    check(MODEL, connector, ids)
    cache = connector.cache(ids)
    connector.engine.close()
    assert torch.equal(generate(MODEL, ids, cache)[0], generate(MODEL, ids)[0])
    assert cache.finish() == 0
    assert figures(connector.engine)["failures"]["engine"]["closed"] > 0
    with pytest.raises(ClosedError):
        connector.cache(ids)


def test_a_pass_that_fails_stores_nothing(connector: CairnConnector) -> None:
    ids = prompt(9, 40)

    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    hook = MODEL.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError), connector.cache(ids) as cache:
        generate(MODEL, ids, cache)
    hook.remove()
    assert connector.engine.lookup(ids[0]) == 0
    assert figures(connector.engine)["tiers"]["dram"]["reserved_blocks"] == 0
    check(MODEL, connector, ids)


def test_a_closed_connector_leaves_no_hook_behind() -> None:
    model = tiny_model()
    with CairnConnector.open(model, dram_bytes=1 << 20, revision="r1") as connector:
        assert connector.engine.namespace.revision == "r1"
        check(model, connector, prompt(10, 40))
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_hooks
