"""A request's trace goes on in Cairn's connector."""

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from cairn.observe import trace
from tests.observe.collector import Collector

from .engine import serving, settle

PARENT = "00000000000000aa"


def ask(llm: Any, name: str, prompt: list[int], trace_id: str) -> None:
    parameters = SamplingParams(max_tokens=2, temperature=0, detokenize=False)
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-01"}
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, parameters, trace_headers=headers)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    settle(llm)


def test_a_load_is_part_of_its_requests_trace(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setattr(trace, "_otel", None)
    prompt, cold, hit = list(range(100, 200)), "c0" * 16, "11" * 16
    with (
        Collector() as collector,
        serving(tiny, {"observe.otlp_endpoint": collector.endpoint}, skip_tokenizer_init=True) as llm,
    ):
        ask(llm, "cold", prompt, cold)
        ask(llm, "hit", prompt, hit)
        first, second = collector.wait_for(cold, "cairn.load"), collector.wait_for(hit, "cairn.load")
    assert first["cairn.load"].attributes["held_tokens"] == 0
    assert second["cairn.load"].parent == PARENT
    assert second["cairn.load"].attributes["hit_tokens.dram"] == 96
    assert second["cairn.load"].service == "cairn-engine"
