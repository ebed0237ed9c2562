"""A draft model's KV stands in the same blocks as the model's, and is stored and loaded with it."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine import PROMPTS, answers, hits, no_leak, serving, settle

DRAFTS, ANSWER = 3, 40


def test_drafts_are_as_good_behind_a_hit(
    tiny: Path, tiny_plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model itself drafts, so that all its guesses are taken, unless it reads KV that is not its own."""
    from vllm.v1.core.sched.scheduler import Scheduler

    drafts = {"method": "draft_model", "model": str(tiny), "num_speculative_tokens": DRAFTS}
    steps, schedule = [0], Scheduler.schedule

    def counted(scheduler: Any, *args: Any, **options: Any) -> Any:
        steps[0] += 1
        return schedule(scheduler, *args, **options)

    monkeypatch.setattr(Scheduler, "schedule", counted)
    with serving(tiny, {}, skip_tokenizer_init=True, speculative_config=drafts) as llm:
        for hit in (0, 640):
            steps[0] = 0
            assert answers(llm, PROMPTS[1:2], ANSWER)[0][:8] == tiny_plain[1]
            assert steps[0] < ANSWER // 2
            settle(llm)
            assert hits(llm) == hit
        no_leak(llm)
