"""Engines that share VRAM (the stand-in's): what one has computed another loads out of its segment, and one that dies
costs hits only.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cairn.copy import CpuCopier
from tests.vllm.engine import BLOCK, LONGER, OTHER, PROMPTS, answers, connector, no_leak, serving, settle, stats
from tests.vllm.neighbour import Neighbour
from tests.vllm.test_node import OPTIONS, Node, node, settings

__all__ = ["node"]

VRAM = {"storage.vram.size": "32MiB", "storage.vram.device": "stand-in"}


def hits(llm: Any, tier: str = "vram") -> int:
    return int(stats(llm)["hit_tokens"].get(tier, 0))


def whole(prompt: list[int]) -> int:
    return len(prompt) // BLOCK * BLOCK


def pins(llm: Any) -> float:
    connector(llm)._scheduler.engine._store._figures_at = 0.0  # asked for anew
    figures = stats(llm)["tiers"]["vram"]
    return float(figures["pinned_blocks"] + figures["reserved_blocks"])


def test_what_one_computed_another_loads_from_its_vram(
    tiny: Path,
    tiny_plain: list[list[int]],
    tiny_longer: list[list[int]],
    tiny_other: list[int],
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        Neighbour(tiny, settings(node) | VRAM, OPTIONS) as other,
        serving(tiny, settings(node) | VRAM, **OPTIONS) as llm,
    ):
        assert other.wait() == "ready"
        other.ask(PROMPTS[1:2])
        assert other.wait()[0] == tiny_plain[1:2]
        assert answers(llm, PROMPTS[1:2]) == tiny_plain[1:2]
        assert hits(llm) == whole(PROMPTS[1])
        settle(llm)
        assert stats(llm)["stored_tokens"] == {"vram": whole(PROMPTS[1])}, (
            "DRAM has it, the own VRAM has it from now on"
        )
        other.ask(PROMPTS[:16])
        assert other.wait()[0] == tiny_plain[:16]
        assert answers(llm, PROMPTS[:16]) == tiny_plain[:16]
        settle(llm)
        assert hits(llm) > 1000
        assert "dram" not in stats(llm)["hit_tokens"]
        # Longer here: of the head it is the longest that VRAM has, the rest is computed, and found there by the other.
        assert answers(llm, LONGER[:4]) == tiny_longer[:4]
        settle(llm)
        other.ask(LONGER[:4])
        assert other.wait()[0] == tiny_longer[:4]
        assert pins(llm) == 0
        # The owner dies while its rows are copied, and what was copied is not what it had.
        other.ask([OTHER, *LONGER[4:8]])
        assert other.wait()[0] == [tiny_other, *tiny_longer[4:8]]
        scatter = CpuCopier.scatter

        def dies(self: Any, kv: Any, slots: Any, *arguments: Any) -> None:
            os.kill(other.process.pid, signal.SIGKILL)
            other.process.wait()
            for tensor in kv.owner:
                tensor[slots[0] // BLOCK].fill_(7)

        monkeypatch.setattr(CpuCopier, "scatter", dies)
        before = hits(llm)
        assert answers(llm, [OTHER]) == [tiny_other]
        settle(llm)
        monkeypatch.setattr(CpuCopier, "scatter", scatter)
        assert stats(llm)["failures"]["vram"] == {"owner_gone": 1}
        assert stats(llm)["miss_tokens"]["owner_gone"] == whole(OTHER)
        assert hits(llm) == before
        # What it alone had in VRAM comes from DRAM now.
        assert answers(llm, LONGER[4:8]) == tiny_longer[4:8]
        settle(llm)
        assert stats(llm)["hit_tokens"]["dram"] > 0
        # And its own VRAM serves what it has computed itself.
        before = hits(llm)
        assert answers(llm, [OTHER]) == [tiny_other]
        settle(llm)
        assert hits(llm) - before == whole(OTHER)
        assert pins(llm) == 0
        no_leak(llm)
