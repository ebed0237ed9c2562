"""Chunks are blended in an engine that shares VRAM (the stand-in's): out of DRAM, where VRAM's blocks are, too."""

from pathlib import Path

from tests.vllm.engine import answers, no_leak, serving, settle, stats
from tests.vllm.test_blending import SETTINGS, Texts, counted, ratio
from tests.vllm.test_node import Node, node, settings
from tests.vllm.test_vram import VRAM, pins

__all__ = ["node"]


def test_a_prompt_with_chunks_is_loaded_from_dram(model: Path, node: Node) -> None:
    with serving(
        model, SETTINGS | settings(node) | VRAM | {"storage.vram.size": "256MiB"}, max_num_batched_tokens=2048
    ) as llm:
        texts = Texts(llm.get_tokenizer())
        answers(llm, [texts.questions[0]], tokens=1)
        settle(llm)  # the worker's segment is there from now on
        answers(llm, [texts.prelude + chunk for chunk in texts.chunks[:5]], tokens=1)
        settle(llm)
        assert stats(llm)["stored_tokens"]["vram"] > 400, "chunks are prompts here, and in VRAM"
        # The first prompt's head is in VRAM, too, when the others ask for it.
        prompts = [texts.prompt(order, 1) for order in ([0, 1, 2], [0, 3, 4], [4, 2, 1])]
        before = stats(llm)["hit_tokens"].get("vram", 0)
        with ratio(llm, 1.0):
            found = [answers(llm, [prompt])[0] for prompt in prompts]
        settle(llm)
        assert counted(llm)[1] >= 0.8 * counted(llm)[0] > 400
        assert stats(llm)["hit_tokens"].get("vram", 0) == before
        assert stats(llm)["hit_tokens"]["dram"] > 400
        assert "io_error" not in stats(llm)["miss_tokens"], "a blend has failed"
        assert found == answers(llm, prompts, cache_salt="another tenant")
        settle(llm)
        no_leak(llm)
        assert pins(llm) == 0
