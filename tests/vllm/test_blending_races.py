"""What goes on around a blend: failures, preemptions, aborts, resets, requests that are not blended."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vllm.engine import OTHER, answers, connector, no_leak, serving, settle, stats
from tests.vllm.test_races import abort_within_the_next_step, add, drain, step

SEPARATOR = [7, 7]
CHUNKS = [[random.Random(i).randrange(1000, 40000) for _ in range(40 + 9 * i)] for i in range(6)]
SETTINGS = {"blending.enabled": True, "blending.recompute_ratios": [1.0], "blending.check_layers": [1]}


def prompt(order: list[int], question: int) -> list[int]:
    joined = [3, 4, 5]
    for chunk in (*(CHUNKS[i] for i in order), list(range(2000 + 10 * question, 2009 + 10 * question))):
        joined += SEPARATOR + chunk
    return joined


def orders(i: int) -> list[int]:
    return random.Random(i).sample(range(6), 3)


ASKED = [prompt(orders(i), i) for i in range(12)]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Any]:
    """Blends and computes everything, so that answers are those without blending. Few blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cairn.connect.vllm.blending.separator_of", lambda *_: np.array(SEPARATOR, np.uint32))
        with serving(tiny, SETTINGS, skip_tokenizer_init=True, num_gpu_blocks_override=40, max_model_len=1024) as llm:
            yield llm


@pytest.fixture(scope="module")
def plain(engine: Any) -> list[list[int]]:
    found = answers(engine, ASKED, tokens=40, cache_salt="never blended")
    assert stats(engine)["blend_hits"].get("tokens", 0) == 0
    return found


@pytest.fixture
def llm(engine: Any, plain: list[list[int]]) -> Iterator[Any]:
    """Has every chunk; afterwards nothing may be left behind."""
    connector(engine).reset_cache()
    settle(engine)
    answers(engine, [SEPARATOR + chunk for chunk in CHUNKS], tokens=1)
    settle(engine)
    yield engine
    settle(engine)
    no_leak(engine)


def whole(chunk: int) -> int:
    """Tokens of a chunk that are kept."""
    return (len(SEPARATOR) + len(CHUNKS[chunk])) // 32 * 32 - len(SEPARATOR)


def hits(llm: Any) -> float:
    return float(stats(llm)["blend_hits"].get("tokens", 0))


def failures(llm: Any) -> float:
    return float(stats(llm)["failures"].get("dram", {}).get("io_error", 0))


def test_a_crowd_with_preemptions(llm: Any, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    preempted = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    real = scheduler._preempt_request

    def counting(request: Any, *rest: Any, **options: Any) -> None:
        preempted.append(request)
        real(request, *rest, **options)

    monkeypatch.setattr(scheduler, "_preempt_request", counting)
    before = hits(llm)
    assert answers(llm, [OTHER, *ASKED], tokens=40)[1:] == plain
    assert hits(llm) - before > 12 * 64
    assert preempted


def test_failed_blends_are_computed(llm: Any, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    from cairn.connect.vllm.blender import _Read

    real, calls = _Read.fill, []

    def failing(self: Any, layer: int, planes: Any) -> None:
        calls.append(layer)
        if layer == 3:
            planes[0].fill_(1e3)
            raise RuntimeError("injected")
        real(self, layer, planes)

    monkeypatch.setattr(_Read, "fill", failing)
    before = failures(llm)
    assert answers(llm, ASKED[:6], tokens=40) == plain[:6]
    assert calls.count(3) == 6
    assert failures(llm) == before + 6
    monkeypatch.undo()
    assert answers(llm, ASKED, tokens=40) == plain


def test_aborted(llm: Any, plain: list[list[int]]) -> None:
    other = add(llm, OTHER, 40)
    while not other.num_output_tokens:
        step(llm)
    before = hits(llm)
    blended = add(llm, ASKED[0])
    abort_within_the_next_step(llm, blended)
    assert hits(llm) > before
    drain(llm)
    assert answers(llm, ASKED[:2], tokens=40) == plain[:2]


def test_a_prefix_that_the_same_step_computes(llm: Any) -> None:
    """vLLM's own cache offers what another request is about to compute behind what it loads in the step."""
    prefix = [random.Random(9).randrange(1000, 40000) for _ in range(160)]
    asked = [*prefix, *prompt([4, 5], 0)]
    expected = answers(llm, [asked], tokens=40, cache_salt="never blended")
    answers(llm, [prefix[:64]], tokens=1)
    settle(llm)
    before, loaded = hits(llm), stats(llm)["hit_tokens"].get("dram", 0)
    first, blended = add(llm, [*prefix, 5]), add(llm, asked, 40)
    step(llm)
    assert first.num_output_tokens
    drain(llm)
    assert stats(llm)["hit_tokens"]["dram"] > loaded
    assert hits(llm) - before == whole(4) + whole(5)
    assert blended.output_token_ids[:] == expected[0]


def test_reset_forgets_chunks(llm: Any, plain: list[list[int]]) -> None:
    connector(llm).reset_cache()
    settle(llm)
    before = hits(llm)
    assert answers(llm, ASKED[:3], tokens=40) == plain[:3]
    assert hits(llm) == before


def test_what_stands_before_a_chunk_may_be_held(llm: Any, plain: list[list[int]]) -> None:
    """Blends behind a prefix of the tiers, and one of vLLM's own cache."""
    longer = [*ASKED[3][:-9], *SEPARATOR, *CHUNKS[5], *range(3000, 3012)]
    expected = answers(llm, [longer], tokens=40, cache_salt="never blended")
    side = connector(llm)._scheduler
    side._blending.ready = False
    answers(llm, [ASKED[3]], tokens=1)  # exact, and stored
    side._blending.ready = True
    assert answers(llm, [longer], tokens=40) == expected
    settle(llm)
    before = stats(llm)["hit_tokens"]["dram"]
    assert answers(llm, [longer], tokens=40) == expected
    assert stats(llm)["hit_tokens"]["dram"] - before > 64


def test_missing_chunks_are_learned_alone(engine: Any, plain: list[list[int]]) -> None:
    """Nobody has sent the chunks behind the prelude: when a request is over and nothing else to be done, they are
    stored. What was computed without it is no chunk.
    """
    connector(engine).reset_cache()
    settle(engine)
    answers(engine, CHUNKS, tokens=1)
    settle(engine)
    before = hits(engine)
    assert answers(engine, ASKED[:1], tokens=40) == plain[:1]
    assert hits(engine) == before
    settle(engine)
    with_chunks = [prompt(orders(0)[::-1], 3)]
    expected = answers(engine, with_chunks, tokens=40, cache_salt="never blended")
    assert answers(engine, with_chunks, tokens=40) == expected
    assert hits(engine) - before >= sum(whole(i) for i in orders(0))
    settle(engine)


def test_what_a_crowd_lacked_is_learned_behind_it(engine: Any, plain: list[list[int]]) -> None:
    """Of all its requests, not of the last one alone."""
    connector(engine).reset_cache()
    settle(engine)
    assert answers(engine, ASKED, tokens=40) == plain
    settle(engine)
    before = hits(engine)
    answers(engine, [[9, *prompt(list(range(6)), 20)]], tokens=1)
    assert hits(engine) - before == sum(map(whole, range(6)))
    settle(engine)
    no_leak(engine)
