"""Several ranks, each in a process of its own: the answers are those of one, and a hit is a hit on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine import BLOCK, LONGER, PROMPTS, answers, connector, hits, no_leak, serving, settle, stats

_real: dict[str, Any] = {}


def warm_up(worker: Any) -> None:
    """vLLM on the CPU leaves this out without compilation."""
    worker.model_runner.profile_run()


def break_loads(worker: Any, rank: int) -> None:
    """From now on this rank's loads fail."""
    from cairn.copy import CpuCopier

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("injected")

    for name in ("scatter", "scatter_layers"):
        _real[name] = getattr(CpuCopier, name)
        if worker.rank == rank:
            setattr(CpuCopier, name, broken)


def mend_loads(worker: Any) -> None:
    from cairn.copy import CpuCopier

    for name, real in _real.items():
        setattr(CpuCopier, name, real)


def on_disk(home: Path) -> dict[str, Any]:
    return {
        "storage.disk.path": str(home / "cache"),
        "storage.disk.size": "256MiB",
        "storage.cpu.size": "64MiB",
        # Several processes on two cores are slow to answer, whatever the disk does.
        "engine.timeout_s": 30,
    }


def shared(home: Path) -> dict[str, Any]:
    return {
        "storage.remote.url": f"file://{home}/shared",
        "storage.remote.timeout_s": 60,
        "storage.remote.lookup_timeout_s": 5,
        "engine.timeout_s": 60,
        "engine.lease_s": 120,
    }


@contextmanager
def ranks(model: Path, home: Path, more: dict[str, Any] | None = None, **parallel: int) -> Iterator[Any]:
    options = {"num_gpu_blocks_override": 400, "skip_tokenizer_init": True}
    with serving(model, on_disk(home) | (more or {}), distributed_executor_backend="mp", **options, **parallel) as llm:
        llm.collective_rpc(warm_up)
        yield llm


def check_answers(llm: Any, plain: list[list[int]], longer: list[list[int]]) -> None:
    """Cold, warm, and with one rank whose loads fail."""
    for warm in (False, True):
        before = hits(llm)
        assert answers(llm, PROMPTS[:16]) == plain[:16]
        settle(llm)
        assert (hits(llm) - before > 500) or not warm
    llm.collective_rpc(break_loads, args=(1,))
    for batch in (LONGER[:1], LONGER[1:8]):
        assert answers(llm, batch) == longer[LONGER.index(batch[0]) : LONGER.index(batch[-1]) + 1]
        settle(llm)
    assert stats(llm)["failures"]["dram"]["io_error"] > 0
    llm.collective_rpc(mend_loads)
    before = hits(llm)
    assert answers(llm, LONGER[:8]) == longer[:8]
    settle(llm)
    assert hits(llm) > before
    assert connector(llm)._scheduler.engine.flush(60)
    no_leak(llm)


@pytest.mark.timeout(900)  # five engines
def test_ranks_answer_as_one(
    tiny: Path,
    tiny_plain: list[list[int]],
    tiny_longer: list[list[int]],
    tmp_path: Path,
) -> None:
    """Two ranks, the same after a restart, and then one: over the same disk, whose blocks are not its own, and over the
    same remote store, whose objects are everybody's.
    """
    remote = shared(tmp_path)
    with ranks(tiny, tmp_path, remote, tensor_parallel_size=2) as llm:
        check_answers(llm, tiny_plain, tiny_longer)
    with ranks(tiny, tmp_path, tensor_parallel_size=2) as llm:
        # One prompt by itself: of several, the first brings up what the others then find in DRAM.
        assert answers(llm, PROMPTS[1:2]) == tiny_plain[1:2]
        settle(llm)
        assert stats(llm)["hit_tokens"] == {"disk": len(PROMPTS[1]) // BLOCK * BLOCK}
        no_leak(llm)
    with serving(tiny, on_disk(tmp_path), skip_tokenizer_init=True) as llm:
        assert answers(llm, PROMPTS[:1]) == tiny_plain[:1]
        assert hits(llm) == 0
    with serving(tiny, remote, skip_tokenizer_init=True) as llm:
        # No prompt goes on behind this one, so an object ends with it. Others may have been stored only as they grew.
        assert answers(llm, LONGER[3:4]) == tiny_longer[3:4]
        settle(llm)
        assert stats(llm)["hit_tokens"] == {"remote": len(LONGER[3]) // BLOCK * BLOCK}
