"""What vLLM does between two of our steps: aborts, preemptions, resets, while loads and stores are under way."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.vllm.engine import BLOCK, OTHER, PROMPTS, answers, connector, emptied, hits, serving, settle, stats

LONG = PROMPTS[1]


@pytest.fixture(scope="module")
def engine(tiny: Path, all_tiny: list[list[int]]) -> Iterator[Any]:
    """Few blocks, so that freed ones are soon another's."""
    with serving(tiny, {}, skip_tokenizer_init=True, num_gpu_blocks_override=40, max_model_len=1024) as llm:
        yield llm


@pytest.fixture
def llm(engine: Any) -> Iterator[Any]:
    with emptied(engine) as llm:
        yield llm


def core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def side(llm: Any) -> Any:
    return connector(llm)._scheduler


def add(llm: Any, prompt: list[int], tokens: int = 8) -> Any:
    """Adds a request; returns vLLM's own record of it."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    known = set(core(llm).scheduler.requests)
    llm.llm_engine.add_request(f"r{time.monotonic_ns()}", {"prompt_token_ids": prompt}, sampling)
    (name,) = set(core(llm).scheduler.requests) - known
    return core(llm).scheduler.requests[name]


def step(llm: Any) -> None:
    llm.llm_engine.step()


def drain(llm: Any) -> None:
    while llm.llm_engine.has_unfinished_requests():
        step(llm)


def abort_within_the_next_step(llm: Any, request: Any) -> None:
    """vLLM takes in aborts between a forward pass and its outcome."""
    core(llm).aborts_queue.put_nowait(llm.llm_engine.output_processor.abort_requests([request.request_id], True))
    step(llm)


def breaking_loads(patch: pytest.MonkeyPatch) -> None:
    from cairn.copy import CpuCopier

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("injected")

    patch.setattr(CpuCopier, "scatter", broken)
    patch.setattr(CpuCopier, "scatter_layers", broken)


@contextmanager
def held_up(patch: pytest.MonkeyPatch, copy: str, fails: bool = False) -> Iterator[Event]:
    """The first copy of this direction begins only when the event is set, and may fail then."""
    from cairn.copy import CpuCopier

    go, real, first = Event(), getattr(CpuCopier, copy), [True]

    def waits(copier: Any, *args: Any) -> None:
        if first.pop() if first else False:
            assert go.wait(60)
            if fails:
                raise OSError("injected")
        real(copier, *args)

    with patch.context() as while_held:
        while_held.setattr(CpuCopier, copy, waits)
        try:
            yield go
        finally:
            go.set()


def under_way(llm: Any, kind: str) -> bool:
    """kind: Load or Store."""
    return any(type(copy).__name__ == kind for copy in side(llm)._under_way.copies.values())


def begin_load(llm: Any, patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(a request that runs, one that waits outside of the steps for its load); of OTHER and of LONG."""
    patch.setattr("cairn.plan.autopilot.Autopilot.layerwise", lambda *_, **__: False)
    other = add(llm, OTHER, 40)
    while not other.num_output_tokens:
        step(llm)
    loading = add(llm, LONG)
    step(llm)
    assert under_way(llm, "Load")
    assert loading.num_output_tokens == 0
    return other, loading


def test_abort_in_the_step_that_loads_and_stores(
    llm: Any, tiny_plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's stores are still to come when the request is gone: its blocks must not be another's by then."""
    head = LONG[: 4 * BLOCK]
    answers(llm, [head])
    settle(llm)
    with held_up(monkeypatch, "gather"):
        abort_within_the_next_step(llm, add(llm, LONG))
        assert under_way(llm, "Store")
        # These have every block that is free, one after the other.
        for start in range(3):
            answers(llm, [OTHER[start:]])
    settle(llm)
    before = hits(llm)
    assert answers(llm, [LONG]) == [tiny_plain[1]]
    assert hits(llm) - before >= 4 * BLOCK


def test_abort_in_the_step_whose_load_fails(
    llm: Any, tiny_plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own prefix cache must not offer what was not loaded."""
    answers(llm, [LONG])
    settle(llm)
    with monkeypatch.context() as patch:
        breaking_loads(patch)
        abort_within_the_next_step(llm, add(llm, LONG))
    drain(llm)
    assert answers(llm, [LONG]) == [tiny_plain[1]]
    settle(llm)
    assert answers(llm, [LONG]) == [tiny_plain[1]]


@pytest.mark.parametrize("then", ["abort", "preempt"])
def test_a_request_whose_load_failed_is_taken_off(
    llm: Any, tiny_plain: list[list[int]], then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before vLLM could compute again what was not loaded."""
    answers(llm, [LONG])
    settle(llm)
    with monkeypatch.context() as patch:
        breaking_loads(patch)
        request = add(llm, LONG)
        step(llm)
    assert request.num_computed_tokens == 0
    if then == "abort":
        llm.llm_engine.abort_request([request.request_id], internal=True)
    else:
        scheduler = core(llm).scheduler
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic())
        drain(llm)
        assert request.output_token_ids[:] == tiny_plain[1]
    assert answers(llm, [LONG]) == [tiny_plain[1]]
    settle(llm)
    assert answers(llm, [LONG]) == [tiny_plain[1]]


@pytest.mark.parametrize("cached", [False, True])
def test_preemption_before_a_load_is_reported(
    llm: Any, tiny_plain: list[list[int]], cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU reports a step's load as late as it is over: vLLM may ask about its request again before. cached: whether
    vLLM's own prefix cache has then what was loaded.
    """
    from cairn.connect.vllm.movers import _CpuLayers

    class Reported(Future[float]):
        def done(self) -> bool:
            return reported.is_set() and super().done()

    def late(layers: Any) -> Any:
        over, late = end(layers), Reported()
        late.set_result(over.result())
        return late

    reported, end = Event(), _CpuLayers.end
    monkeypatch.setattr(_CpuLayers, "end", late)
    answers(llm, [LONG])
    settle(llm)
    scheduler, request = core(llm).scheduler, add(llm, LONG)
    step(llm)
    assert under_way(llm, "Load")
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
    scheduler.prev_step_scheduled_req_ids.clear()
    if not cached:
        assert scheduler.kv_cache_manager.reset_prefix_cache()
        for cache in core(llm).model_executor.driver_worker.worker.model_runner.kv_caches:
            cache.fill_(1e3)
    step(llm)
    step(llm)
    reported.set()
    drain(llm)
    assert request.output_token_ids[:] == tiny_plain[1]
    settle(llm)
    assert answers(llm, [LONG]) == [tiny_plain[1]]


def test_abort_between_match_and_blocks(llm: Any, tiny_plain: list[list[int]]) -> None:
    answers(llm, [LONG])
    settle(llm)
    big = add(llm, OTHER, 400)
    while core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks() > 12:
        step(llm)
    waiting = add(llm, LONG)
    step(llm)
    assert stats(llm)["tiers"]["dram"]["pinned_blocks"] > 0
    assert not under_way(llm, "Load")
    llm.llm_engine.abort_request([waiting.request_id], internal=True)
    assert stats(llm)["tiers"]["dram"]["pinned_blocks"] == 0
    llm.llm_engine.abort_request([big.request_id], internal=True)
    drain(llm)


def test_reset_with_a_request_that_has_matched(llm: Any, tiny_plain: list[list[int]]) -> None:
    """It must not load what was forgotten after it had asked."""
    answers(llm, [LONG])
    settle(llm)
    big = add(llm, OTHER, 400)
    while core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks() > 12:
        step(llm)
    before = hits(llm)
    waiting = add(llm, LONG)
    step(llm)
    assert stats(llm)["tiers"]["dram"]["pinned_blocks"] > 0
    assert connector(llm).reset_cache()
    assert stats(llm)["tiers"]["dram"]["pinned_blocks"] == 0
    llm.llm_engine.abort_request([big.request_id], internal=True)
    drain(llm)
    assert waiting.output_token_ids[:] == tiny_plain[1]
    assert hits(llm) == before
    settle(llm)
    assert answers(llm, [LONG]) == [tiny_plain[1]]
    assert hits(llm) > before


def test_reset_with_a_request_that_is_over_and_kept(llm: Any) -> None:
    """The last to go is kept for the chunks that requests lacked, though it had no blocks; vLLM is told to free it."""
    waiting = add(llm, LONG)
    assert side(llm).matched(waiting, 0) == (0, False)
    side(llm)._lacking[b"a chunk"] = None
    llm.llm_engine.abort_request([waiting.request_id], internal=True)
    assert side(llm)._tracked[waiting.request_id].held
    assert connector(llm).reset_cache()
    for _ in range(3):
        core(llm).step_fn()
    assert waiting.request_id not in core(llm).scheduler.requests


def test_reset_with_requests_that_run(llm: Any, tiny_plain: list[list[int]]) -> None:
    """vLLM starts them anew, and they must not find what they had stored before."""
    request = add(llm, LONG)
    while request.num_output_tokens < 2:
        step(llm)
    assert stats(llm)["tiers"]["dram"]["resident_blocks"] > 10
    assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    before = hits(llm)
    drain(llm)
    assert request.output_token_ids[:] == tiny_plain[1]
    assert hits(llm) == before
    settle(llm)
    assert answers(llm, [LONG]) == [tiny_plain[1]]
    assert hits(llm) == before


def test_reset_while_a_load_is_under_way(
    llm: Any, tiny_plain: list[list[int]], tiny_other: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(llm, [LONG])
    settle(llm)
    with held_up(monkeypatch, "scatter"):
        other, loading = begin_load(llm, monkeypatch)
        assert connector(llm).reset_cache()
    drain(llm)
    assert loading.output_token_ids[:] == tiny_plain[1]
    assert other.output_token_ids[:8] == tiny_other


@pytest.mark.parametrize("fails", [False, True])
def test_abort_while_a_load_is_under_way(
    llm: Any, tiny_plain: list[list[int]], tiny_other: list[int], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks stay its own until the load is over."""
    answers(llm, [LONG])
    settle(llm)
    with held_up(monkeypatch, "scatter", fails):
        other, loading = begin_load(llm, monkeypatch)
        llm.llm_engine.abort_request([loading.request_id], internal=True)
        step(llm)
        step(llm)
    drain(llm)
    assert other.output_token_ids[:8] == tiny_other
    settle(llm)
    assert answers(llm, [LONG]) == [tiny_plain[1]]


def test_stores_begin_with_the_next_step_where_vllm_does_not_ask(
    llm: Any, tiny_plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves `wait_for_save` out in steps that compute nothing (0.26), and on ranks before the one that drafts."""
    from cairn.connect.vllm.connector import CairnConnector

    monkeypatch.setattr(CairnConnector, "wait_for_save", lambda _: None)
    assert answers(llm, PROMPTS[:16]) == tiny_plain
    settle(llm)
    before = hits(llm)
    assert answers(llm, PROMPTS[:16]) == tiny_plain
    assert hits(llm) - before > 1000


def test_an_id_that_comes_again(llm: Any) -> None:
    """While the request that had it first is not quite over, the second is served without Cairn."""
    answers(llm, [LONG])
    settle(llm)
    first, second = add(llm, LONG), add(llm, OTHER)
    try:
        assert side(llm).matched(first, 0)[0] > 0
        name, second.request_id = second.request_id, first.request_id
        assert side(llm).matched(second, 0) == (0, False)
        assert not side(llm).finished(second)
        assert side(llm)._tracked[first.request_id].request is first
    finally:
        second.request_id = name
        side(llm).finished(first)
        llm.llm_engine.abort_request([first.request_id, second.request_id], internal=True)
        drain(llm)
