"""Greedy tokens in fp32 are those of vLLM without Cairn, whatever is loaded, stored, preempted, aborted or lost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine import BLOCK, LONGER, PROMPTS, answers, connector, emptied, hits, no_leak, serving, settle, stats

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def all_plain(model: Path) -> list[list[int]]:
    """What vLLM alone answers, to PROMPTS and then to LONGER."""
    with serving(model, None) as llm:
        return answers(llm, PROMPTS + LONGER)


@pytest.fixture(scope="module")
def plain(all_plain: list[list[int]]) -> list[list[int]]:
    return all_plain[: len(PROMPTS)]


@pytest.fixture(scope="module")
def plain_longer(all_plain: list[list[int]]) -> list[list[int]]:
    return all_plain[len(PROMPTS) :]


def test_restart_finds_the_disk(model: Path, plain: list[list[int]], tmp_path: Path) -> None:
    settings = {"storage.disk.path": str(tmp_path / "cache"), "storage.disk.size": "1GiB"}
    with serving(model, settings) as llm:
        assert answers(llm, PROMPTS[:8]) == plain[:8]
        settle(llm)
        assert connector(llm)._scheduler.engine.flush(60)
        first = stats(llm)
    with serving(model, settings) as llm:
        assert answers(llm, PROMPTS[:8]) == plain[:8]
        settle(llm)
        # What a waiting request has read from disk may count as a hit in DRAM: how many of each is a matter of luck.
        again = stats(llm)
        assert again["hit_tokens"]["disk"] >= BLOCK, again
        assert again["stored_tokens"]["dram"] < first["stored_tokens"]["dram"] / 2, (first, again)
        no_leak(llm)


def test_preemption_in_a_tiny_cache(model: Path, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, {}, num_gpu_blocks_override=30, max_model_len=896) as llm:
        preempted: set[str] = set()
        side = connector(llm)._scheduler
        orders = side.orders

        def watched(output: Any) -> Any:
            preempted.update(output.preempted_req_ids or ())
            return orders(output)

        monkeypatch.setattr(side, "orders", watched)
        for _ in range(2):
            got = answers(llm, PROMPTS, tokens=BLOCK + 2)  # each wants one more block at least
            assert [answer[:8] for answer in got] == plain
            settle(llm)
        assert len(preempted) > 2
        no_leak(llm)


@pytest.fixture(scope="module")
def engine(model: Path, all_plain: list[list[int]]) -> Iterator[Any]:
    """For the tests from here on: a process has room for one engine."""
    with serving(model, {}) as llm:
        yield llm


@pytest.fixture
def llm(engine: Any) -> Iterator[Any]:
    with emptied(engine) as llm:
        yield llm


@pytest.mark.parametrize("batch", [1, 8])
def test_loaded_answers_are_plain_answers(llm: Any, plain: list[list[int]], batch: int) -> None:
    before = stats(llm)
    for _ in range(2):
        got = []
        for start in range(0, len(PROMPTS), batch):
            got += answers(llm, PROMPTS[start : start + batch])
            settle(llm)
        assert got == plain
    assert stats(llm)["hit_tokens"]["dram"] - before["hit_tokens"].get("dram", 0) > 100 * BLOCK
    assert stats(llm)["failures"] == before["failures"]


@pytest.mark.parametrize("zeroed", [False, True])
def test_what_a_step_follows_begins_before_it_is_prepared(
    llm: Any, plain: list[list[int]], zeroed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But behind what vLLM writes to new blocks itself, as models of other kinds have it do."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from cairn.connect.vllm.movers import CpuMover
    from cairn.connect.vllm.scheduler import SchedulerSide

    assert answers(llm, PROMPTS[:1]) == plain[:1]
    settle(llm)
    seen: list[str] = []
    load, orders, prepare = CpuMover.load_layers, SchedulerSide.orders, GPUModelRunner._update_states

    def loads(self: Any, *args: Any) -> Any:
        seen.append("load")
        return load(self, *args)

    def ordered(self: Any, output: Any) -> Any:
        output.new_block_ids_to_zero = [0] if zeroed else None
        given = orders(self, output)
        output.new_block_ids_to_zero = None
        return given

    def prepares(self: Any, output: Any) -> Any:
        seen.append("prepare")
        return prepare(self, output)

    monkeypatch.setattr(CpuMover, "load_layers", loads)
    monkeypatch.setattr(SchedulerSide, "orders", ordered)
    monkeypatch.setattr(GPUModelRunner, "_update_states", prepares)
    assert answers(llm, PROMPTS[:1]) == plain[:1]
    assert seen[:2] == (["prepare", "load"] if zeroed else ["load", "prepare"])
    assert seen.count("load") == 1


def test_abort_in_flight(llm: Any, plain: list[list[int]]) -> None:
    from vllm import SamplingParams

    answers(llm, PROMPTS[:8])
    settle(llm)
    engine = llm.llm_engine
    for steps in range(6):
        for i, prompt in enumerate(PROMPTS[:8]):
            engine.add_request(f"{steps}-{i}", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=64))
        for _ in range(steps):
            engine.step()
        engine.abort_request([f"{steps}-{i}" for i in range(8)])
        while engine.has_unfinished_requests():
            engine.step()
    settle(llm)
    assert answers(llm, PROMPTS) == plain


@pytest.mark.parametrize("fails", ["every", "third"])
def test_failed_copies_are_recomputed(
    llm: Any, plain: list[list[int]], plain_longer: list[list[int]], fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cairn.copy import Copier, CpuCopier

    assert answers(llm, PROMPTS) == plain
    settle(llm)
    real, calls = CpuCopier.scatter, [0]

    def broken(self: Any, kv: Any, slots: Any, memory: Any, rows: Any, layers: range | None = None) -> None:
        calls[0] += 1
        if fails == "every" or calls[0] % 3 == 0:
            raise OSError("injected")
        real(self, kv, slots, memory, rows, layers)

    before = failures(llm)
    monkeypatch.setattr(CpuCopier, "scatter", broken)
    monkeypatch.setattr(CpuCopier, "scatter_layers", Copier.scatter_layers)  # in groups of layers, by the former
    for prompt, expected in zip(LONGER, plain_longer, strict=True):
        assert answers(llm, [prompt]) == [expected]
        settle(llm)
    monkeypatch.undo()
    assert failures(llm) > before
    # What was stored behind failed loads is right too.
    assert answers(llm, LONGER) == plain_longer


def failures(llm: Any) -> float:
    return float(stats(llm)["failures"].get("dram", {}).get("io_error", 0))


def test_failed_stores_are_misses(llm: Any, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    from cairn.copy import CpuCopier

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("injected")

    before = stats(llm)
    with monkeypatch.context() as patch:
        patch.setattr(CpuCopier, "gather", broken)
        assert answers(llm, PROMPTS[:8]) == plain[:8]
        settle(llm)
    assert stats(llm)["failures"] != before["failures"]
    assert stats(llm)["stored_tokens"] == before["stored_tokens"]
    assert answers(llm, PROMPTS[:8]) == plain[:8]


def test_salts_do_not_meet(llm: Any) -> None:
    prompt = PROMPTS[1][:256] + [7] * 200
    for salt, hit in (("a", False), ("b", False), ("a", True), (None, False), (None, True)):
        before = hits(llm)
        answers(llm, [prompt], **({"cache_salt": salt} if salt else {}))
        settle(llm)
        assert (hits(llm) > before) == hit, salt


def test_reset_forgets(llm: Any) -> None:
    before = hits(llm)
    answers(llm, [PROMPTS[1]])
    settle(llm)
    assert connector(llm).reset_cache()
    answers(llm, [PROMPTS[1]])
    settle(llm)
    assert hits(llm) == before


def test_the_last_token_of_a_full_hit_is_computed(llm: Any) -> None:
    """Prompts of whole blocks, all of which are held."""
    prompt, before = PROMPTS[0][: 2 * BLOCK], hits(llm)
    first = answers(llm, [prompt])
    settle(llm)
    assert answers(llm, [prompt]) == first
    assert hits(llm) - before == 2 * BLOCK
