"""What fails below a running vLLM: disk, DRAM, copies. Answers stay right, the reason is counted, nothing leaks."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cairn.tier.breaker import Breaker
from cairn.tier.disk import DiskTier
from tests.tier.rig import PAGE
from tests.tier.test_disk_faults import StuckDevice, flip, replaced
from tests.vllm.engine import OTHER, PROMPTS, answers, connector, hits, no_leak, serving, settle, stats

TIMEOUT_S = 3.0
ASKED = PROMPTS[:8]


@pytest.fixture(scope="module")
def engine(tiny: Path, all_tiny: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    settings = {
        "storage.disk.path": str(tmp_path_factory.mktemp("disk") / "cache"),
        "storage.disk.size": "256MiB",
        "storage.cpu.size": "64MiB",
        "engine.timeout_s": TIMEOUT_S,
    }
    with serving(tiny, settings, skip_tokenizer_init=True) as llm:
        yield llm


@pytest.fixture
def llm(engine: Any, tiny_plain: list[list[int]]) -> Iterator[Any]:
    """An engine that has ASKED in its tiers; afterwards all is mended, and must be as it was."""
    assert answers(engine, ASKED) == tiny_plain[:8]
    settle(engine)
    yield engine
    vars(disk(engine)._breaker).update(vars(Breaker()))
    settle(engine)
    no_leak(engine)
    before = hits(engine)
    for _ in range(2):
        assert answers(engine, ASKED) == tiny_plain[:8]
        settle(engine)
    assert hits(engine) - before > 1000
    no_leak(engine)


def disk(llm: Any) -> DiskTier:
    tier = connector(llm)._scheduler.engine._store._lower[0]
    assert isinstance(tier, DiskTier)
    return tier


def missed(llm: Any, reason: str) -> float:
    return float(stats(llm)["miss_tokens"].get(reason, 0))


def only_on_disk(llm: Any) -> None:
    """Empties DRAM once everything is written."""
    assert connector(llm)._scheduler.engine._store._writers[0].drain(30)
    index = connector(llm)._scheduler.engine._store.dram.index
    index.free(index.reserve(index.capacity))
    assert stats(llm)["tiers"]["dram"]["resident_blocks"] == 0


def test_a_sound_disk_serves(llm: Any, tiny_plain: list[list[int]]) -> None:
    only_on_disk(llm)
    before = stats(llm)["hit_tokens"].get("disk", 0)
    assert answers(llm, ASKED[1:2]) == tiny_plain[1:2]
    assert stats(llm)["hit_tokens"]["disk"] - before == 640


def test_unreadable_disk(llm: Any, tiny_plain: list[list[int]]) -> None:
    only_on_disk(llm)
    before = missed(llm, "io_error")
    with replaced(disk(llm)._slots.fd, "/proc/self/mem"):
        assert answers(llm, ASKED) == tiny_plain[:8]
        settle(llm)
        connector(llm)._scheduler.engine._store._writers[0].drain(30)
    assert missed(llm, "io_error") > before


def test_full_disk(llm: Any, tiny_plain: list[list[int]]) -> None:
    with replaced(disk(llm)._slots.fd, "/dev/full"):
        prompt = PROMPTS[1][::-1]
        first = answers(llm, [prompt])
        settle(llm)
        connector(llm)._scheduler.engine._store._writers[0].drain(30)
        assert answers(llm, [prompt]) == first
    assert stats(llm)["skipped_tokens"]["disk"]["no_space"] > 0


def test_corrupt_disk(llm: Any, tiny_plain: list[list[int]]) -> None:
    only_on_disk(llm)
    before = missed(llm, "corrupt")
    tier = disk(llm)
    slot_bytes = PAGE + -(-tier.geometry.block_bytes // PAGE) * PAGE
    data = tier._directory.path / "data"
    for slot in range(data.stat().st_size // slot_bytes):
        flip(data, slot * slot_bytes + PAGE + 1000, 0x10)
    assert answers(llm, ASKED) == tiny_plain[:8]
    assert missed(llm, "corrupt") > before


def test_disk_that_does_not_answer(llm: Any, tiny_plain: list[list[int]]) -> None:
    only_on_disk(llm)
    slots = disk(llm)._slots
    read, run_blocks, before = slots.read, slots.read_run_blocks, missed(llm, "timeout")
    device = StuckDevice(disk(llm))
    started = time.monotonic()
    try:
        assert answers(llm, ASKED[:2]) == tiny_plain[:2]
        assert time.monotonic() - started < 10 * TIMEOUT_S
        assert missed(llm, "timeout") > before
    finally:
        device.released.set()
        while disk(llm).stats()["batches_under_way"]:
            time.sleep(0.01)  # late reads end by themselves, and tell nobody
        slots.read, slots.read_run_blocks = read, run_blocks  # type: ignore[method-assign]


@pytest.mark.parametrize("taken", ["reserved", "pinned"])
def test_full_dram(llm: Any, tiny_plain: list[list[int]], tiny_other: list[int], taken: str) -> None:
    engine = connector(llm)._scheduler.engine
    index, before = engine._store.dram.index, missed(llm, "no_slot")
    if taken == "reserved":
        only_on_disk(llm)
    pins = index.pin(engine.chain(ASKED[0]).keys)
    ids = index.reserve(index.capacity)
    try:
        assert answers(llm, ASKED) == tiny_plain[:8]
        assert answers(llm, [OTHER]) == [tiny_other]
        settle(llm)
    finally:
        index.unpin(pins)
        index.free(ids)
    assert missed(llm, "no_slot") > before
    assert stats(llm)["skipped_tokens"]["dram"]["no_slot"] > 0


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_one_layer_that_is_not_loaded(
    llm: Any, tiny_plain: list[list[int]], layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cairn.copy import Copier, CpuCopier

    real, failed = CpuCopier.scatter, []

    def broken(self: Any, kv: Any, slots: Any, memory: Any, rows: Any, layers: range | None = None) -> None:
        if layers and layer in layers:
            failed.append(layers)
            raise OSError("injected")
        real(self, kv, slots, memory, rows, layers)

    monkeypatch.setattr(CpuCopier, "scatter", broken)
    monkeypatch.setattr(CpuCopier, "scatter_layers", Copier.scatter_layers)  # in groups of layers, by the former
    before = stats(llm)["failures"].get("dram", {}).get("io_error", 0)
    for prompt, expected in zip(ASKED[:4], tiny_plain, strict=False):
        assert answers(llm, [prompt]) == [expected]
        settle(llm)
    assert len(failed) == 4
    assert stats(llm)["failures"]["dram"]["io_error"] - before == 4


def test_copy_threads_that_die(llm: Any, tiny_plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a copy's thread raises, even what ends threads, ends neither the engine nor the next copy."""
    from cairn.copy import CpuCopier

    def dies(*args: Any, **kwargs: Any) -> None:
        raise SystemExit

    before = stats(llm)["failures"].get("dram", {}).get("io_error", 0)
    with monkeypatch.context() as patch:
        patch.setattr(CpuCopier, "scatter", dies)
        patch.setattr(CpuCopier, "scatter_layers", dies)
        patch.setattr(CpuCopier, "gather", dies)
        assert answers(llm, ASKED) == tiny_plain[:8]
        settle(llm)
    assert stats(llm)["failures"]["dram"]["io_error"] > before
