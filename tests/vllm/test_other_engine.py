"""What Transformers has computed vLLM serves from a shared store, and the other way round: SmolLM2 in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cairn.config import load_config
from cairn.connect.transformers import CairnConnector, namespace_of
from cairn.engine import CacheEngine
from tests.vllm.engine import BLOCK, PROMPTS, answers, connector, serving, settle, stats

NAME, REVISION, NEW = "SmolLM2-135M-Instruct", "the one in tests", 8
#: One that vLLM is to load, and one that Transformers is.
LEFT, RIGHT = PROMPTS[1][:150], PROMPTS[2][10:150]


def settings(home: Path) -> dict[str, Any]:
    """Of both engines: the same store, blocks and name for the model."""
    return {
        "storage.cpu.size": "64MiB",
        "storage.remote.url": f"file://{home}/shared",
        "storage.remote.timeout_s": 60,
        "storage.remote.lookup_timeout_s": 5,
        "engine.planner": False,
        "engine.timeout_s": 60,
        "engine.lease_s": 120,
        "engine.model_name": NAME,
        "engine.model_revision": REVISION,
    }


@contextmanager
def transformers(model: Any, home: Path) -> Iterator[CairnConnector]:
    config = load_config(environ={}, overrides=settings(home) | {"engine.block_tokens": BLOCK})
    namespace = namespace_of(model, name=NAME, revision=REVISION, block_tokens=BLOCK)
    with CacheEngine(namespace, config) as engine, CairnConnector(model, engine) as cairn:
        yield cairn


def generated(model: Any, prompt: list[int], cache: Any = None) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    found: list[int] = model.generate(ids, past_key_values=cache, max_new_tokens=NEW, **options)[
        0, len(prompt) :
    ].tolist()
    return found


def test_transformers_and_vllm_read_each_other(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    expected = {tuple(prompt): generated(hf, prompt) for prompt in (LEFT, RIGHT)}
    with transformers(hf, tmp_path) as cairn:
        with cairn.cache(LEFT) as cache:
            assert generated(hf, LEFT, cache) == expected[tuple(LEFT)]
        assert cairn.engine.flush(60)
    with serving(model, settings(tmp_path), skip_tokenizer_init=True) as llm:
        assert answers(llm, [LEFT]) == [expected[tuple(LEFT)]]
        settle(llm)
        assert stats(llm)["hit_tokens"] == {"remote": len(LEFT) // BLOCK * BLOCK}
        assert answers(llm, [RIGHT]) == [expected[tuple(RIGHT)]]
        settle(llm)
        assert connector(llm)._scheduler.engine.flush(60)
    with transformers(hf, tmp_path) as cairn, cairn.cache(RIGHT) as cache:
        assert generated(hf, RIGHT, cache) == expected[tuple(RIGHT)]
        assert cache.reused_by_tier["remote"] == len(RIGHT) // BLOCK * BLOCK
