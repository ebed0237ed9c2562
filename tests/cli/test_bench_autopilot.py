"""`cairn bench autopilot` at tiny size, and what it makes of times that are known."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tests.cli.test_blend import model  # noqa: F401 (a fixture)

from cairn.cli.autopilot.verdict import verdict
from cairn.cli.autopilot.workload import CLASSES, Workload
from cairn.cli.bench_machine import Visit
from cairn.config.autopilot import PRESETS

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_every_contender_answers_every_class(run: Run, model: Path, tmp_path: Path) -> None:  # noqa: F811
    ended = run("bench", "autopilot", "--model", model, "--requests", "8", "--out", tmp_path / "found.json", "--json")
    result = json.loads(ended.stdout)
    assert result["requests"] == 8
    assert ended.stderr.splitlines()[-1] == "request 8 of 8"
    assert result["ttft_wall"].keys() == result["ttft_cpu"].keys() == {"no cache", *PRESETS}
    assert result["autopilot_share_of_no_cache_cpu"].keys() == set(CLASSES)
    assert result["decisions"]["store"]["behind"]["token_first"] == 9
    assert sum(result["decisions"]["blend"].get(choice, {}).get("pinned", 0) for choice in ("yes", "no")) == 0
    stopped = json.loads((tmp_path / "found.json").read_text())
    assert stopped["bars"] == result["bars"]


def test_known_times_give_known_bars() -> None:
    rng = np.random.default_rng(0)
    kinds = [CLASSES[i % 4] for i in range(80)]
    base = rng.uniform(0.1, 1.0, 80)

    def visits(*shares: float) -> list[Visit]:
        taken = [float(base[i] * shares[i % 4]) for i in range(80)]
        return [Visit(one, one, (one, one), 1, [], {}) for one in taken]

    found = verdict(
        kinds, {"no cache": visits(1, 1, 1, 1), "rag": visits(1, 1, 0.5, 1.1), "auto": visits(1, 1, 0.4, 1)}
    )
    assert found["autopilot_share_of_no_cache_cpu"]["rag"]["median_of_pairs"] == 0.4
    assert found["bars"]["wall"] == {
        "better_than_every_preset": True,
        "better_than_every_preset_sure": True,
        "worst_class": "chat",
        "worst_class_share": 1.0,
        "worst_class_met": True,
        "worst_class_met_sure": True,
    }
    worse = verdict(
        kinds, {"no cache": visits(1, 1, 1, 1), "rag": visits(1, 1, 0.3, 1), "auto": visits(1, 1, 0.4, 1.02)}
    )
    assert worse["bars"]["cpu"]["worst_class"] == "cold"
    assert not worse["bars"]["cpu"]["worst_class_met"]
    assert not worse["bars"]["cpu"]["better_than_every_preset"]


def test_the_workload_is_the_same_for_the_same_seed(model: Path) -> None:  # noqa: F811
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    separator = np.array([1, 2], np.uint32)
    one, two = (list(Workload(tokenizer, separator, 3).requests(24)) for _ in range(2))
    assert one == two
    assert sorted(request.kind for request in one) == sorted(CLASSES * 6)
