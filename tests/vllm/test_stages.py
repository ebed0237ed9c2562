"""Two pipeline stages, each in a process of its own: the answers are those of one process, and so are the blocks."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cairn.connect.vllm.model import stage_layers
from cairn.errors import GeometryError
from cairn.plan.autopilot import Autopilot
from tests.vllm.engine import BLOCK, LONGER, OTHER, PROMPTS, answers, connector, hits, no_leak, serving, settle, stats
from tests.vllm.test_ranks import break_loads, mend_loads, on_disk, ranks, shared

#: Each shares nothing with the others, nor with PROMPTS.
HANDED_TO_STAGES, HANDED_BY_STAGES = PROMPTS[1][::-2], PROMPTS[1][1::2]


def break_stores(worker: Any, rank: int) -> None:
    """From now on this rank's stores fail, long after the others' are done."""
    from cairn.copy import CpuCopier

    def broken(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.5)
        raise OSError("injected")

    if worker.rank == rank:
        CpuCopier.gather = broken  # type: ignore[method-assign]


def ask(llm: Any, prompt: list[int], tokens: int, params: dict[str, Any]) -> Any:
    """The answer's tokens, and what vLLM says of the transfer."""
    from vllm import SamplingParams

    extra = {"kv_transfer_params": params}
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    settle(llm)
    return list(output.outputs[0].token_ids), output.kv_transfer_params


def prefill(llm: Any, prompt: list[int]) -> dict[str, Any]:
    """Computes a prompt that another engine will decode; returns what that is to be told."""
    _, told = ask(llm, prompt, 1, {"do_remote_decode": True, "do_remote_prefill": False})
    assert told["cairn"]["blocks"] == len(prompt) // BLOCK
    return dict(told)


def decode(llm: Any, prompt: list[int], told: dict[str, Any]) -> list[int]:
    """The answer to a prompt whose whole blocks all come from elsewhere."""
    before = hits(llm)
    tokens, _ = ask(llm, prompt, 4, told)
    assert hits(llm) - before == len(prompt) // BLOCK * BLOCK
    return list(tokens)


def check_answers(llm: Any, plain: list[list[int]], longer: list[list[int]]) -> None:
    """Cold, warm, loaded layer by layer, and with each stage's loads failing in turn."""
    for layered in (None, False, True):
        before = hits(llm)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Autopilot, "layerwise", lambda *_, layered=layered, **__: bool(layered))
            assert answers(llm, PROMPTS[:8]) == plain[:8]
            settle(llm)
        assert layered is None or hits(llm) - before > 500
    for stage, batch in enumerate((slice(0, 2), slice(2, 5))):
        failures = stats(llm)["failures"].get("dram", {}).get("io_error", 0)
        llm.collective_rpc(break_loads, args=(stage,))
        assert answers(llm, LONGER[batch]) == longer[batch]
        settle(llm)
        llm.collective_rpc(mend_loads)
        assert stats(llm)["failures"]["dram"]["io_error"] > failures


@contextmanager
def each_told_once(llm: Any) -> Iterator[None]:
    """What comes to DRAM meanwhile is told once, by the scheduler, and not once a rank."""
    events, told = connector(llm)._scheduler.events, Counter[Any]()
    take = events.take

    def counting() -> list[Any]:
        taken: list[Any] = take()
        told.update(key for event in taken if event.medium == "CPU" for key in event.block_hashes)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "take", counting)
        yield
        answers(llm, [[1, 2, 3]], tokens=1)  # events ride on steps
        settle(llm)
    assert set(told.values()) == {1}
    assert len(told) == stats(llm)["tiers"]["dram"]["resident_blocks"]


def check_half_a_store(llm: Any, other: list[int]) -> None:
    """What one stage could not store is no hit."""
    before = hits(llm)
    llm.collective_rpc(break_stores, args=(1,))
    for _ in range(2):
        assert answers(llm, [OTHER]) == [other]
        settle(llm)
    assert hits(llm) == before


@pytest.mark.timeout(900)  # four engines
def test_stages_answer_as_one(
    tiny: Path,
    tiny_plain: list[list[int]],
    tiny_longer: list[list[int]],
    tiny_other: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two stages over a disk that one process has filled; then one process over the same disk, and over the same remote
    store. Either hands prompts over to the other.
    """
    disk, remote = on_disk(tmp_path), shared(tmp_path) | {"enable_disagg_pd": True}
    with serving(tiny, disk | remote, skip_tokenizer_init=True) as llm:
        assert answers(llm, PROMPTS[1:2]) == tiny_plain[1:2]
        told = prefill(llm, HANDED_TO_STAGES)
        assert connector(llm)._scheduler.engine.flush(60)
        handed = answers(llm, [HANDED_TO_STAGES, HANDED_BY_STAGES], 4)
    wishes = remote | {"enable_service_routing": True, "blending.enabled": True, "blending.check_layers": [1]}
    with caplog.at_level(logging.WARNING, "cairn"), ranks(tiny, tmp_path, wishes, pipeline_parallel_size=2) as llm:
        with each_told_once(llm):
            assert answers(llm, PROMPTS[1:2]) == tiny_plain[1:2]
            settle(llm)
            assert stats(llm)["hit_tokens"] == {"disk": len(PROMPTS[1]) // BLOCK * BLOCK}
            assert decode(llm, HANDED_TO_STAGES, told) == handed[0]
            check_answers(llm, tiny_plain, tiny_longer)
            told = prefill(llm, HANDED_BY_STAGES)
        check_half_a_store(llm, tiny_other)
        assert connector(llm)._scheduler.engine.flush(60)
        no_leak(llm)
        assert sum("no blending" in message and "pipeline" in message for message in caplog.messages) == 1
    with serving(tiny, disk, skip_tokenizer_init=True) as llm:
        assert answers(llm, LONGER[3:4]) == tiny_longer[3:4]
        assert stats(llm)["hit_tokens"] == {"disk": len(LONGER[3]) // BLOCK * BLOCK}
    with serving(tiny, remote, skip_tokenizer_init=True) as llm:
        assert decode(llm, HANDED_BY_STAGES, told) == handed[1]
        assert stats(llm)["hit_tokens"].keys() == {"remote"}


def test_stages_are_cut_as_vllm_cuts_them() -> None:
    """Who has other layers than expected, as where a draft model adds its own to the last stage, is refused."""
    model = SimpleNamespace(model="m", get_total_num_hidden_layers=lambda: 7)
    for rank, own in enumerate((2, 2, 3, 3, 2, 2)):
        parallel = SimpleNamespace(pipeline_parallel_size=3, tensor_parallel_size=2, rank=rank)
        assert stage_layers(model, parallel, own) == [2, 3, 2]
    with pytest.raises(GeometryError, match="stage 2 has 3 layers with KV, 2 expected"):
        stage_layers(model, parallel, 3)
