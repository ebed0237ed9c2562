"""The examples run, and say what they are said to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cairn.fleet.publisher import Publisher
from tests.docs.pages import ROOT
from tests.fleet.peers import free_endpoint
from tests.fleet.wire_events import encode, stored
from tests.serve.running import Service, until


def test_the_embedding_example_runs_and_is_warm_the_second_time(tmp_path: Path) -> None:
    def run() -> str:
        command = [sys.executable, str(ROOT / "examples" / "embed_engine.py")]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120).stdout

    assert "loaded 0 of 1000 tokens" in run()
    second = run()
    assert "loaded 992 of 1000 tokens" in second
    assert "hits by tier: {'disk': 992}" in second


def run_example(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_offline_example_of_a_fleet() -> None:
    assert run_example("fleet_offline.py").splitlines() == [
        "a: score 320 of 320, holds {'VRAM': 320}",
        "b: score 205 of 320, holds {'CPU': 256}",
        "just sent to b: 128 tokens count as held there",
        "a has cleared its cache: now b is best, with 205",
    ]


def test_the_example_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in, where there are no GPUs."""
    monkeypatch.setenv("CAIRN_LOG_LEVEL", "info")
    command = [sys.executable, str(ROOT / "examples" / "cross_gpu_store_retrieve.py")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    listening, stored, found = ran.stdout.splitlines()
    assert listening == "listening"
    assert "stored 1888 of 1900 tokens" in stored
    assert found.endswith("found it in VRAM, retrieved 1888 tokens, hits by tier {'vram': 1888}, right: True")
    assert "INFO cairn.node.pools: pool of KVGeometry(layers=8" in ran.stderr


def test_the_benchmark_of_the_vram_pool(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "vram_pool.py"), "--stand-in", "--blocks", "2"]
    subprocess.run([*command, "--out", tmp_path / "out.json"], capture_output=True, check=True, timeout=240)
    found = json.loads((tmp_path / "out.json").read_text())
    measured = [(run["layout"], run["cold"]) for run in found["runs"]]
    assert measured == [(layout, cold) for layout in ("cross_layer", "nhd") for cold in (False, True)]
    assert all(run["right"] and run["hit_tokens"] == {"vram": 32 * 11} for run in found["runs"])
    assert found["dram"]["right"]
    assert found["dram"]["hit_tokens"] == {"dram": 32 * 4}


def test_the_scorer_for_a_scheduler() -> None:
    """The second request follows the first, whose blocks nobody has told of yet, though more waits there."""
    ends = [(free_endpoint(), free_endpoint()) for _ in "ab"]
    told = [f"{name}={end},replay={replay}" for name, (end, replay) in zip("ab", ends, strict=True)]
    options = ["--instance", told[0], "--instance", told[1], "--no-rpc", "--set", "index.speculation_s=60"]
    with Publisher(*ends[0]) as a, Publisher(*ends[1]), Service(*options) as service:
        a.publish(encode([stored([1], [7_000_000] * 16, 16)]))  # so that the fleet's block size is known
        service.wait_for_blocks("a", 1)
        until(lambda: service.client.get("/health").json()["connected"] == 2, "both")
        first, second = run_example("fleet_scorer.py", f"http://{service.http}", "--tokens", "512").splitlines()
        assert first == "request 1 goes to a"
        assert second == "request 2 goes to a"
        assert service.binary(range(512))["scores"]["a"]["score"] == 512
    failing = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); {NOBODY}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert failing.stdout == "b\n"
    assert "not scored" in failing.stderr


#: Where no service answers, the least loaded instance is taken.
NOBODY = "from fleet_scorer import Scorer; print(Scorer('http://127.0.0.1:9').pick([1], {'a': 2, 'b': 1}))"
