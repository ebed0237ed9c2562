"""What an instance is for: `kv_role`, and speculative decoding, whose guesses are nobody's KV."""

from pathlib import Path
from typing import Any

from tests.vllm.engine import BLOCK, PROMPTS, answers, no_leak, serving, settle, stats

ASKED = PROMPTS[:4]


def tokens(llm: Any, counter: str) -> int:
    return int(sum(stats(llm)[counter].values()))


def test_roles(tiny: Path, tiny_plain: list[list[int]], tmp_path: Path) -> None:
    """A producer stores and never loads; a consumer loads and never stores."""
    settings = {"storage.disk.path": str(tmp_path / "cache"), "storage.disk.size": "256MiB"}
    with serving(tiny, settings, skip_tokenizer_init=True, kv_role="kv_producer") as llm:
        for _ in range(2):
            assert answers(llm, ASKED) == tiny_plain[:4]
            settle(llm)
        assert tokens(llm, "stored_tokens") > 500
        assert tokens(llm, "hit_tokens") == 0
        no_leak(llm)
    with serving(tiny, settings, skip_tokenizer_init=True, kv_role="kv_consumer") as llm:
        for _ in range(2):
            assert answers(llm, ASKED) == tiny_plain[:4]
            settle(llm)
        assert tokens(llm, "hit_tokens") > 500
        before = tokens(llm, "hit_tokens")
        fresh = [PROMPTS[1][::-1]]
        for _ in range(2):
            answers(llm, fresh)
            settle(llm)
        assert tokens(llm, "hit_tokens") == before
        assert tokens(llm, "stored_tokens") == 0
        no_leak(llm)


def test_rejected_guesses_are_not_stored(tiny: Path, tiny_plain: list[list[int]]) -> None:
    """Prompts that repeat themselves invite guesses; a random model seldom follows them."""
    prompts = [(prompt[:40] * 5)[: 150 + 7 * i] for i, prompt in enumerate(PROMPTS[:6])]
    guess = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    options: dict[str, Any] = {"skip_tokenizer_init": True}
    with serving(tiny, None, enable_prefix_caching=False, **options) as llm:
        plain = answers(llm, prompts, tokens=80)
        longer = [prompt + answer + [5, 6, 7] for prompt, answer in zip(prompts, plain, strict=True)]
        plain_longer = answers(llm, longer)
    with serving(tiny, {}, speculative_config=guess, disable_log_stats=False, **options) as llm:
        assert answers(llm, prompts, tokens=80) == plain
        settle(llm)
        counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        assert counted["vllm:spec_decode_num_draft_tokens"] > counted["vllm:spec_decode_num_accepted_tokens"]
        before = tokens(llm, "hit_tokens")
        for prompt, expected in zip(longer, plain_longer, strict=True):
            assert answers(llm, [prompt]) == [expected]
            settle(llm)
        assert tokens(llm, "hit_tokens") - before >= sum((len(prompt) // BLOCK - 1) * BLOCK for prompt in longer)
        no_leak(llm)
