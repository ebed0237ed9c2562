"""KV events of the tiers, over the wire: a listener's set is what DRAM and disk hold."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY

from cairn.index.slots import RESIDENT
from tests.vllm.engine import BLOCK, answers, connector, leftovers, prompts, serving, stats
from tests.vllm.mirror import Mirror

PROMPTS = prompts(30)
#: A block of this model is 1.4 MiB in fp32: DRAM has 32 slots, the disk 36.
SMALL = {"storage.cpu.size": "46MiB", "storage.disk.size": "52MiB"}


class Told:
    """An engine and a listener to its events."""

    def __init__(self, model: Path, home: Path) -> None:
        self.model, self.home = model, home
        self.open = ExitStack()
        self.before = leftovers()
        self.start()

    def start(self) -> None:
        self.mirror = self.open.enter_context(Mirror(self.home))
        settings = SMALL | {"storage.disk.path": str(self.home / "cache")}
        options = {"kv_events_config": self.mirror.options, "disable_log_stats": False}
        self.llm = self.open.enter_context(serving(self.model, settings, **options))
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.engine = connector(self.llm)._scheduler.engine

    def stop(self) -> None:
        del self.llm, self.core, self.engine
        self.open.close()

    def ask(self, prompts: list[list[int]], tokens: int = 2, **options: Any) -> None:
        answers(self.llm, prompts, tokens, **options)
        self.settle()

    def settle(self) -> None:
        """Until all is stored, written and told: events ride on steps, so one more is made."""
        while self.core.scheduler.has_requests():
            self.llm.llm_engine.step()
        assert self.engine.flush(30)
        answers(self.llm, [[1, 2, 3]], tokens=1)
        while self.core.scheduler.has_requests():
            self.llm.llm_engine.step()
        publisher = self.core.scheduler.kv_event_publisher
        publisher._event_queue.join()
        self.mirror.catch_up(len(publisher._buffer))

    def held(self, tier: str) -> set[bytes]:
        """What a tier really holds, read from its index."""
        store = self.engine._store
        slots = (store.dram.index if tier == "dram" else store._lower[0]._index)._slots
        live = slots[slots["state"] == RESIDENT]
        return {key.tobytes() for key in np.stack([live["key0"], live["key1"]], axis=1)}

    def agrees(self) -> None:
        assert {*self.mirror.blocks["CPU"]} == self.held("dram")
        assert {*self.mirror.blocks["STORAGE"]} == self.held("disk")


@pytest.fixture(scope="module")
def told(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    told = Told(model, tmp_path_factory.mktemp("events"))
    yield told
    told.stop()


def test_a_listener_knows_what_the_tiers_hold(told: Told) -> None:
    for start in range(0, len(PROMPTS), 6):
        told.ask(PROMPTS[start : start + 6])
        told.agrees()
    figures = stats(told.llm)["tiers"]
    assert figures["dram"]["evicted_blocks_total"] > 0
    assert figures["disk"]["evicted_blocks_total"] > 0
    assert told.mirror.told["CPU"] > len(told.held("dram"))


def test_events_describe_their_blocks(told: Told) -> None:
    """Whoever has the tokens finds them: hashes are the engine's keys, and the tokens are the prompt's."""
    prompt = PROMPTS[1][: 5 * BLOCK - 4]
    told.ask([prompt], tokens=8)
    keys = told.engine.chain(prompt)
    for medium in ("CPU", "STORAGE"):
        blocks = told.mirror.blocks[medium]
        for i in range(len(keys)):
            tokens = tuple(prompt[i * BLOCK : (i + 1) * BLOCK])
            assert blocks[keys.key(i)] == (keys.key(i - 1) if i else None, tokens, None, None)
        # The block that decoding has filled hangs from the prompt's last.
        behind = [tokens for parent, tokens, *_ in blocks.values() if parent == keys.key(len(keys) - 1)]
        assert any(tokens[: BLOCK - 4] == tuple(prompt[len(keys) * BLOCK :]) for tokens in behind)


def test_a_salt_shows_and_cannot_be_read(told: Told) -> None:
    prompt = PROMPTS[1][:128]
    told.ask([prompt])
    told.ask([prompt], cache_salt="secret of tenant 7")
    told.agrees()
    tokens = tuple(prompt[32:64])
    found = [block for block in told.mirror.blocks["CPU"].values() if block[1] == tokens]
    marks = {block[3] for block in found}
    assert None in marks
    (salted,) = (mark for mark in marks if mark is not None)
    assert salted[0].startswith("salt:")
    assert "secret" not in str(salted)
    assert len({block[0] for block in found}) == 2, "salted and plain must hang from different blocks"


def figure(name: str, **labels: str) -> float:
    """A metric of the engine that runs in this process."""
    found = [sample for family in REGISTRY.collect() for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in found if labels.items() <= sample.labels.items())


def test_what_a_restart_finds_is_told_when_it_is_named(told: Told) -> None:
    prompt = PROMPTS[1]
    told.ask([prompt])
    scheduler = connector(told.llm)
    assert len(leftovers(told.home / "cache")) > len(told.before) + 5
    told.stop()
    assert leftovers(told.home / "cache") == told.before, "a connector that was shut down keeps something"
    scheduler.shutdown()
    told.start()
    told.settle()
    found = told.held("disk")
    assert len(found) > 10
    assert not told.mirror.blocks["STORAGE"]
    told.ask([prompt])
    chain = told.engine.chain(prompt)
    named = {chain.key(i) for i in range(len(chain))}
    assert named & found
    hits = len(named & found) * BLOCK
    assert figure("cairn_hit_tokens_total", tier="disk") == hits
    assert figure("vllm:prompt_tokens_cached_by_source_total", source="disk") == hits
    assert figure("vllm:external_prefix_cache_hits_total") == hits
    assert {*told.mirror.blocks["STORAGE"]} == told.held("disk") - (found - named)
    assert {*told.mirror.blocks["CPU"]} == told.held("dram")


def test_a_reset_clears(told: Told) -> None:
    told.ask(PROMPTS[:2])
    before = told.mirror.clears
    assert told.llm.reset_prefix_cache(reset_connector=True)
    told.settle()
    assert told.mirror.clears > before
    assert not told.mirror.blocks["CPU"]
    assert not told.mirror.blocks["STORAGE"]
    old = told.held("dram")
    told.ask(PROMPTS[:6])
    assert len(told.mirror.blocks["CPU"]) > 10
    assert {*told.mirror.blocks["CPU"]} == told.held("dram") - old
