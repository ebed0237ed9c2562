"""Engines that are clients of one node: what one has computed another loads, and a node that dies costs hits only."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine import BLOCK, LONGER, PROMPTS, answers, connector, no_leak, serving, settle, stats

OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True}


class Node:
    """`cairn node` in a process of its own."""

    def __init__(self, home: Path) -> None:
        self.address = f"ipc://{home}/node.sock"
        arguments = ["node", "--foreground", "--address", self.address]
        arguments += ["--set", "storage.cpu.size=64MiB"]
        command = [sys.executable, "-c", "from cairn.cli import main; main()", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        self.process.stderr.readline()

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


def hits(llm: Any) -> int:
    return int(sum(stats(llm)["hit_tokens"].values()))


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
