"""Engines that are clients of one node: what one has computed another loads, and a node that dies costs hits only."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node.rig import heard_until_it_listens
from tests.vllm.engine import BLOCK, LONGER, PROMPTS, answers, connector, hits, no_leak, serving, settle, stats
from tests.vllm.mirror import Mirror
from tests.vllm.neighbour import Neighbour, published
from tests.vllm.test_ranks import warm_up

OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True}


class Node:
    """`cairn node` in a process of its own. settings: beside its size. packages: a directory of some that it needs."""

    def __init__(self, home: Path, name: str = "node", *settings: str, packages: Path | None = None) -> None:
        self.address = f"ipc://{home}/{name}.sock"
        arguments = ["node", "--foreground", "--address", self.address]
        arguments += [part for setting in ("storage.cpu.size=64MiB", *settings) for part in ("--set", setting)]
        command = [sys.executable, "-c", "from cairn.cli import main; main()", *arguments]
        paths = os.pathsep.join(filter(None, [str(packages or ""), os.environ.get("PYTHONPATH")]))
        environ = os.environ | {"PYTHONPATH": paths}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
        said = heard_until_it_listens(self.process)
        assert "listening at" in said, said

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    one = Node(tmp_path)
    yield one
    one.kill()
    from cairn.node.segments import sweep

    sweep()


def settings(node: Node) -> dict[str, Any]:
    # Two engines and a node share two cores with whatever else runs.
    return {"node.address": node.address, "node.timeout_s": 2}


def test_one_computes_the_other_loads(
    tiny: Path, tiny_plain: list[list[int]], tiny_longer: list[list[int]], node: Node, tmp_path: Path
) -> None:
    with serving(tiny, settings(node), **OPTIONS) as llm:
        assert answers(llm, PROMPTS[:16]) == tiny_plain[:16]
        settle(llm)
        computed = stats(llm)["stored_tokens"]["dram"]
        no_leak(llm)
    with serving(tiny, settings(node), **OPTIONS) as llm:
        assert answers(llm, PROMPTS[1:2]) == tiny_plain[1:2]
        settle(llm)
        assert hits(llm) == len(PROMPTS[1]) // BLOCK * BLOCK
        assert answers(llm, PROMPTS[:16]) == tiny_plain[:16]
        settle(llm)
        assert stats(llm)["stored_tokens"].get("dram", 0) < computed / 10
        # The node dies under the engine: answers stay right, and nothing waits for long.
        node.kill()
        assert answers(llm, LONGER[:4]) == tiny_longer[:4]
        settle(llm)
        assert stats(llm)["miss_tokens"]["node_away"] > 0
        # And another comes: stored there, and loaded from there.
        client = connector(llm)._scheduler.engine._store._client
        client._found.clear()
        again = Node(tmp_path)
        try:
            assert client.wait(60)
            for _ in range(3):
                before = hits(llm)
                assert answers(llm, LONGER[:4]) == tiny_longer[:4]
                settle(llm)
            assert hits(llm) > before
            no_leak(llm)
        finally:
            again.kill()


class TierMirror(Mirror):
    """`settle` has vLLM clear the GPU's blocks; the event has no medium, and the tiers stay as they are."""

    def _AllBlocksCleared(self, event: dict[str, Any]) -> None:  # noqa: N802
        self.clears += 1
        self.blocks["GPU"].clear()


def keys(llm: Any, prompts: list[list[int]]) -> set[bytes]:
    """Of all whole blocks."""
    chains = [connector(llm)._scheduler.engine.chain(prompt) for prompt in prompts]
    return {chain.key(i) for chain in chains for i in range(len(chain))}


def test_two_at_once(
    tiny: Path, tiny_plain: list[list[int]], tiny_longer: list[list[int]], node: Node, tmp_path: Path
) -> None:
    """Each serves from the arena what the other has computed, while both run, and tells what it can serve."""
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
    with TierMirror(homes[0]) as told, TierMirror(homes[1]) as told_there:
        options = OPTIONS | {"kv_events_config": told_there.options}
        with (
            Neighbour(tiny, settings(node), options) as other,
            serving(tiny, settings(node), kv_events_config=told.options, **OPTIONS) as llm,
        ):
            assert answers(llm, PROMPTS[:16]) == tiny_plain[:16]
            settle(llm)
            assert other.wait() == "ready"
            other.ask(PROMPTS[1:2])
            assert other.wait()[:3] == [tiny_plain[1:2], len(PROMPTS[1]) // BLOCK * BLOCK, 0]
            other.ask(LONGER[:4])
            assert answers(llm, LONGER[4:8]) == tiny_longer[4:8]
            settle(llm)
            found, _, theirs, _ = other.wait()
            assert found == tiny_longer[:4]
            other.ask(PROMPTS[:16] + LONGER[4:8])
            before, computed = hits(llm), stats(llm)["stored_tokens"]["dram"]
            assert answers(llm, LONGER[:4]) == tiny_longer[:4]
            settle(llm)
            assert hits(llm) - before > 500
            assert stats(llm)["stored_tokens"]["dram"] == computed
            found, hit, stored, batches = other.wait()
            assert found == tiny_plain[:16] + tiny_longer[4:8]
            assert hit > 2000
            assert stored == theirs
            # Both have asked for all of it, and both tell it, once each.
            wanted = keys(llm, PROMPTS[:16] + LONGER[:8])
            deadline = time.monotonic() + 60
            while not wanted <= {*told.blocks["CPU"]} == {*told_there.blocks["CPU"]}:
                assert time.monotonic() < deadline, "not told"
                answers(llm, [[1, 2, 3]], tokens=1)  # events ride on steps
                told.catch_up(published(llm))
                other.ask([[1, 2, 3]])
                batches = other.wait()[-1]
                told_there.catch_up(batches)
            # A node that is frozen is waited for once, and is found again.
            client = connector(llm)._scheduler.engine._store._client
            losses = client.losses
            client._found.clear()
            node.process.send_signal(signal.SIGSTOP)
            assert answers(llm, PROMPTS[:4]) == tiny_plain[:4]
            assert client.losses == losses + 1
            node.process.send_signal(signal.SIGCONT)
            assert client.wait(60)
            before = hits(llm)
            settle(llm)
            assert answers(llm, PROMPTS[1:2]) == tiny_plain[1:2]
            assert hits(llm) - before == len(PROMPTS[1]) // BLOCK * BLOCK
            settle(llm)
            no_leak(llm)


def test_ranks_share_a_node(tiny: Path, tiny_plain: list[list[int]], node: Node) -> None:
    """Every rank copies between its own pages and the node's arena, which it maps by itself."""
    options = OPTIONS | {"num_gpu_blocks_override": 400, "distributed_executor_backend": "mp"}
    with serving(tiny, settings(node), tensor_parallel_size=2, **options) as llm:
        llm.collective_rpc(warm_up)
        assert answers(llm, PROMPTS[:16]) == tiny_plain[:16]
        settle(llm)
        before = hits(llm)
        assert answers(llm, PROMPTS[:16]) == tiny_plain[:16]
        settle(llm)
        assert hits(llm) - before > 500
        no_leak(llm)
