"""A running request waits for blocks that Cairn is about to give back, and is not preempted for want of them."""

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine import BLOCK, answers, connector, serving


def test_no_preemption_while_blocks_are_being_stored(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """29 blocks in all: one request is over and has 17 that are being stored, another has 12 and wants a 13th."""
    from vllm import SamplingParams

    from cairn.connect.vllm.scheduler import SchedulerSide
    from cairn.copy import CpuCopier

    over = [1000 + 37 * i for i in range(17 * BLOCK)]
    running = [2000 + 41 * i for i in range(12 * BLOCK - 2)]
    stored, real = threading.Event(), CpuCopier.gather

    def gated(*args: Any, **options: Any) -> None:
        stored.wait(20)
        real(*args, **options)

    options = {"num_gpu_blocks_override": 30, "max_model_len": 896, "enable_prefix_caching": False}
    with serving(tiny, {}, skip_tokenizer_init=True, **options) as llm:
        (alone,) = answers(llm, [running])
        while llm.llm_engine.engine_core.engine_core.scheduler.has_requests():
            llm.llm_engine.step()  # until its blocks are free
        preempted, orders = set(), SchedulerSide.orders

        def watched(side: Any, output: Any) -> Any:
            preempted.update(output.preempted_req_ids or ())
            return orders(side, output)

        monkeypatch.setattr(SchedulerSide, "orders", watched)
        monkeypatch.setattr(CpuCopier, "gather", gated)
        engine = llm.llm_engine
        for name, prompt, count in (("over", over, 1), ("running", running, 8)):
            sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        done = [output for _ in range(12) for output in engine.step() if output.finished]
        assert [output.request_id for output in done] == ["over"]
        assert connector(llm).has_pending_block_frees()
        stored.set()
        while engine.has_unfinished_requests():
            done += [output for output in engine.step() if output.finished]
        assert list(done[-1].outputs[0].token_ids) == alone
        assert not preempted
